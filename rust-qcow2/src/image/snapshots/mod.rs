//! Internal snapshots.
//!
//! A snapshot is a copy of the L1 table. All that can be reached from it is
//! counted once more for it, and what is counted more than once is not written
//! in place. The order of steps in each operation makes sure that, whenever a
//! crash comes, counts are too high rather than too low, and that no table on
//! disk has a copied flag for a cluster that has two owners there:
//!
//! - counts that grow and flags that are cleared are durable before the second
//!   owner (the snapshot table, or the L1 table that goes back to a snapshot);
//! - counts shrink after the owner is gone on disk;
//! - flags are set when that is done.
//!
//! A disk goes back to a snapshot of another size in three steps: what has to be
//! counted is counted, which is what may be refused; then the size changes, by
//! which a part of the disk may be lost; then the L1 table.
//!
//! All operations but the list need an image that no request uses; those that
//! would pull something away under a request refuse then.

mod references;
mod table;

use super::refcounts::{Change, Reason};
use super::zero::After;
use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::geometry::{MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::format::snapshots::Snapshot;
use crate::host::{File, Host};
use crate::units::{GuestOffset, HostOffset, round_up};

pub(super) use table::{Repair, SnapshotTable, read_snapshot_table};

/// What a new snapshot is to be called, and what is known of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name, without NUL.
    pub name: Vec<u8>,
    /// When it is taken, seconds since 1970.
    pub date_sec: u32,
    /// The rest of that in nanoseconds.
    pub date_nsec: u32,
    /// The time that the guest has been running, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of the state of the machine behind the disk.
    pub vm_state_size: u64,
    /// Instructions that the guest has run.
    pub icount: u64,
}

/// A snapshot that the disk is about to go back to. What it refers to is counted
/// for that: it ends in [`Image::apply_snapshot`] or [`Image::release_snapshot`].
#[derive(Debug)]
#[must_use = "what is counted for it is lost otherwise"]
pub struct HeldSnapshot {
    disk_size: u64,
    l1: Vec<u64>,
}

impl HeldSnapshot {
    /// The size that the disk has to have then, in bytes.
    pub fn disk_size(&self) -> u64 {
        self.disk_size
    }
}

impl<H: Host> Image<H> {
    /// The internal snapshots, in the order of the table.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.shared.read().snapshots.list.clone()
    }

    /// Takes a snapshot and returns its identity. What lies behind the disk
    /// goes to the snapshot alone.
    ///
    /// # Errors
    /// `ENOTSUP` with an external data file, `EFBIG` for too many snapshots, `EINVAL` where a refcount is at its
    /// limit, `EBUSY` while there are requests, and those of the file.
    pub fn create_snapshot(&self, new: &NewSnapshot) -> Result<Vec<u8>> {
        self.ensure_snapshots()?;
        let mut st = self.lock();
        self.begin_change_of_snapshots(&mut st)?;
        let mut list = self.snapshots();
        if list.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::errno(libc::EFBIG));
        }
        let id = new_id(&list);
        let l1_size = self.l1.len();
        let l1_offset = self.allocate(&mut st, l1_size * 8)?;
        let l1 = self.l1.to_vec();
        // Where that is refused the new table is leaked, and no more than it, as
        // iotest 112 has it.
        self.write_snapshot_l1(&mut st, l1_offset, &l1)?;
        self.add_references(&mut st, &l1)?;
        list.push(Snapshot {
            l1_table_offset: l1_offset.0,
            l1_size: l1_size as u32,
            id_str: id.clone(),
            name: new.name.clone(),
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            vm_clock_nsec: new.vm_clock_nsec,
            vm_state_size: new.vm_state_size,
            disk_size: self.visible_size(),
            icount: new.icount,
            ..Snapshot::default()
        });
        let written = self
            .clear_l1_flags(&mut st)
            .and_then(|()| self.write_snapshot_table(&mut st, list));
        if let Err(error) = written {
            // What cannot be taken back costs space, until it is repaired.
            let _ = self.release_references(&mut st, &l1);
            self.free(&mut st, l1_offset, l1_size * 8, Reason::Always);
            return Err(error);
        }
        // The state is not part of the disk that goes on.
        let state = round_up(new.vm_state_size, self.geometry.cluster_bits);
        let start = GuestOffset(self.vm_state_offset());
        if state.checked_add(start.0).is_some() {
            let after = After::Unallocated;
            // The snapshot stands without that.
            let _ = self.discard_clusters(&mut st, start, state, Reason::Never, after);
        }
        Ok(id)
    }

    /// Finds a snapshot, by its identity or else its name, and counts all that
    /// it refers to for the disk, which so is known to be able to go back to it.
    /// The disk stays as it is.
    ///
    /// # Errors
    /// `ENOENT` where there is no such snapshot, `EINVAL` or `EFBIG` where its
    /// entry is damaged, `EINVAL` where a refcount is at its limit, `EBUSY`
    /// while there are requests, and those of the file.
    pub fn hold_snapshot(&self, id_or_name: &[u8]) -> Result<HeldSnapshot> {
        let snapshot = self.usable_snapshot(id_or_name)?;
        let mut st = self.lock();
        self.begin_change_of_snapshots(&mut st)?;
        let l1 = self.read_snapshot_l1(&snapshot)?;
        self.add_references(&mut st, &l1)?;
        Ok(HeldSnapshot {
            disk_size: snapshot.disk_size,
            l1,
        })
    }

    /// Does not go back to a snapshot.
    ///
    /// # Errors
    /// Those of the file; what is still counted costs space until it is repaired.
    pub fn release_snapshot(&self, held: HeldSnapshot) -> Result<()> {
        self.release_references(&mut self.lock(), &held.l1)
    }

    /// Goes back to a snapshot, which is not held any more then. The disk as it is
    /// now is lost; if the L1 table could not be exchanged it is as before, and
    /// what fails after that costs space at most.
    ///
    /// # Errors
    /// `EINVAL` where the disk has not the size of the snapshot, `EBUSY` while
    /// there are requests, and those of the file.
    pub fn apply_snapshot(&self, held: HeldSnapshot) -> Result<()> {
        let mut st = self.lock();
        let old = match self.replace_l1(&mut st, &held) {
            Ok(old) => old,
            Err(error) => {
                let _ = self.release_references(&mut st, &held.l1);
                return Err(error);
            }
        };
        self.drop_references(&mut st, &old)?;
        self.update_copied(&mut st)?;
        self.pass_discards(&mut st)
    }

    /// Makes the disk that of a snapshot, and returns the L1 table that it had.
    fn replace_l1(&self, st: &mut StateGuard<'_, H>, held: &HeldSnapshot) -> Result<Vec<u64>> {
        self.begin_change_of_snapshots(st)?;
        if held.disk_size != self.visible_size() {
            return Err(Error::errno(libc::EINVAL));
        }
        self.grow_l1(st, held.l1.len() as u64, true)?;
        let mut l1 = held.l1.clone();
        l1.resize(self.l1.len() as usize, 0);
        let old = self.l1.to_vec();
        self.write_active_l1(st, &l1)?;
        self.l1.replace(l1);
        self.links().changed_altogether();
        self.forget_overlap_map();
        Ok(old)
    }

    /// Deletes the snapshot that has this identity and this name, as far as
    /// they are given.
    ///
    /// # Errors
    /// The sentences that users of QEMU know.
    pub fn delete_snapshot(&self, id: Option<&[u8]>, name: Option<&[u8]>) -> Result<()> {
        self.ensure_snapshots()?;
        let mut list = self.snapshots();
        let index = find(&list, id, name)
            .ok_or_else(|| Error::new(libc::ENOENT, "Can't find the snapshot"))?;
        let snapshot = list.remove(index);
        self.validate_snapshot(&snapshot)?;
        let mut st = self.lock();
        self.ensure_usable()?;
        self.reclaim_all(&mut st)?;
        self.write_snapshot_table(&mut st, list)
            .map_err(|error| error.context("Failed to remove snapshot from snapshot list"))?;
        // The snapshot is gone. What fails from here on leaks space.
        self.free_snapshot(&mut st, &snapshot)
            .map_err(|error| error.context("Failed to free the cluster and L1 table"))?;
        self.update_copied(&mut st)
            .and_then(|()| self.pass_discards(&mut st))
            .map_err(|error| error.context("Failed to update snapshot status in disk"))
    }

    fn free_snapshot(&self, st: &mut StateGuard<'_, H>, snapshot: &Snapshot) -> Result<()> {
        let l1 = self.read_snapshot_l1(snapshot)?;
        self.drop_references(st, &l1)?;
        let offset = HostOffset(snapshot.l1_table_offset);
        let len = u64::from(snapshot.l1_size) * 8;
        self.change_refcount(st, offset, len, Change::Sub(1), Reason::Snapshot)
    }

    /// Shows a snapshot instead of the disk, with the size of the disk. The
    /// image cannot be written from now on.
    ///
    /// # Errors
    /// The sentences that users of QEMU know.
    pub fn load_snapshot(&self, id: Option<&[u8]>, name: Option<&[u8]>) -> Result<()> {
        self.ensure_snapshots()?;
        if self.is_writable() {
            return Err(Error::errno(libc::EINVAL));
        }
        let list = self.snapshots();
        let index =
            find(&list, id, name).ok_or_else(|| Error::new(libc::ENOENT, "Can't find snapshot"))?;
        let snapshot = &list[index];
        self.validate_snapshot(snapshot)?;
        let l1 = self
            .read_snapshot_l1(snapshot)
            .map_err(|error| Error::new(error.code(), "Failed to read l1 table for snapshot"))?;
        self.shared.write().shows_snapshot = true;
        self.l1.replace(l1);
        self.l1.compact();
        self.links().changed_altogether();
        Ok(())
    }

    /// An external data file has a place for each cluster, and no second one.
    fn ensure_snapshots(&self) -> Result<()> {
        if self.has_data_file() {
            return Err(Error::errno(libc::ENOTSUP));
        }
        Ok(())
    }

    fn usable_snapshot(&self, id_or_name: &[u8]) -> Result<Snapshot> {
        self.ensure_snapshots()?;
        let list = self.snapshots();
        let index = find(&list, Some(id_or_name), None)
            .or_else(|| find(&list, None, Some(id_or_name)))
            .ok_or_else(|| Error::errno(libc::ENOENT))?;
        self.validate_snapshot(&list[index])?;
        Ok(list[index].clone())
    }

    pub(super) fn validate_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        self.geometry.validate_table(
            snapshot.l1_table_offset,
            u64::from(snapshot.l1_size),
            8,
            MAX_L1_BYTES,
            "Snapshot L1 table",
        )
    }

    /// Makes the file say what memory says, and makes sure that nobody is
    /// using what is going to change.
    pub(super) fn begin_change_of_snapshots(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        self.ensure_usable()?;
        self.await_all_allocations(st, GuestOffset(0), u64::MAX);
        if !self.inflight.is_unused() {
            return Err(Error::errno(libc::EBUSY));
        }
        self.reclaim_all(st)?;
        self.write_back_all(st)
    }

    fn write_snapshot_l1(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        l1: &[u64],
    ) -> Result<()> {
        let bytes = references::l1_bytes(l1, false);
        self.ensure_no_overlap(st, MetadataKind::empty(), offset.0, bytes.len() as u64)?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.host.file().write(offset.0, &bytes)
    }
}

/// The snapshot that has this identity and this name, as far as given.
fn find(list: &[Snapshot], id: Option<&[u8]>, name: Option<&[u8]>) -> Option<usize> {
    if id.is_none() && name.is_none() {
        return None;
    }
    list.iter().position(|snapshot| {
        id.is_none_or(|id| snapshot.id_str == id) && name.is_none_or(|name| snapshot.name == name)
    })
}

/// A number that is greater than all that begin the identities.
fn new_id(list: &[Snapshot]) -> Vec<u8> {
    let number = |snapshot: &Snapshot| {
        let digits = snapshot.id_str.iter().take_while(|c| c.is_ascii_digit());
        digits.fold(0u64, |sum, digit| {
            sum.saturating_mul(10)
                .saturating_add(u64::from(digit - b'0'))
        })
    };
    let highest = list.iter().map(number).max().unwrap_or(0);
    highest.wrapping_add(1).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(id: &str, name: &str) -> Snapshot {
        Snapshot {
            id_str: id.into(),
            name: name.into(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn identities_grow() {
        assert_eq!(new_id(&[]), b"1");
        assert_eq!(new_id(&[named("7", "a"), named("3", "b")]), b"8");
        assert_eq!(new_id(&[named("x", "a"), named("12y", "b")]), b"13");
    }

    #[test]
    fn snapshots_are_found_by_what_is_given() {
        let list = [named("1", "a"), named("2", "1"), named("3", "a")];
        let found = |id: Option<&str>, name: Option<&str>| {
            find(&list, id.map(str::as_bytes), name.map(str::as_bytes))
        };
        assert_eq!(found(Some("1"), None), Some(0));
        assert_eq!(found(None, Some("1")), Some(1));
        assert_eq!(found(Some("3"), Some("a")), Some(2));
        assert_eq!(found(Some("2"), Some("a")), None);
        assert_eq!(found(None, None), None);
    }
}
