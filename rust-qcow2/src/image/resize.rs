//! Changing the size of the disk, and of the L1 table with it.

use std::sync::atomic::Ordering;

use super::pending::Marking;
use super::refcounts::Reason;
use super::subclusters::kept;
use super::zero::After;
use super::{Image, Options, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::{L2Entry, Mapping, MetadataKind};
use crate::format::geometry::MAX_L1_BYTES;
use crate::format::header::field;
use crate::format::subclusters::{ClusterEntry, Subclusters};
use crate::host::{Event, File, Host, Preallocation, ZeroFlags};
use crate::units::{GuestOffset, HostOffset, div_up, round_up};

impl<H: Host> Image<H> {
    /// Sets the size of the disk to `new` bytes. What is added reads as zeroes
    /// where `zero` is set, else as in the backing file, where that is long
    /// enough. With `preallocation` it has its place in the file already; `exact`
    /// is for an external data file, which then gets this size and no other.
    ///
    /// # Errors
    /// `EINVAL` for a size that is no multiple of 512 or a preallocation that
    /// shrinks, `ENOTSUP` where snapshots are in the way, `EFBIG` for
    /// more than an L1 table of 32 MiB maps, and those of the file; in sentences
    /// that users of QEMU know.
    pub fn resize(
        &self,
        new: u64,
        exact: bool,
        mut preallocation: Preallocation,
        zero: bool,
    ) -> Result<()> {
        if new % 512 != 0 {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        let mut st = self.lock();
        self.ensure_usable()?;
        if self.geometry.version < 3 && !self.shared.read().snapshots.list.is_empty() {
            return Err(Error::unsupported(
                "Can't resize a v2 image which has snapshots",
            ));
        }
        let old = self.size();
        if new < old {
            if preallocation != Preallocation::Off {
                return Err(Error::invalid(
                    "Preallocation can't be used for shrinking an image",
                ));
            }
            self.shrink(&mut st, old, new)?;
        } else {
            if new > old {
                self.discard_behind(&mut st, old)?;
            }
            let entries = self.geometry.l1_entries_for(new);
            self.grow_l1(&mut st, entries, true)
                .map_err(|error| error.context("Failed to grow the L1 table"))?;
            if preallocation == Preallocation::Off && self.data_file_is_raw() {
                // So that the data file alone reads as the image does.
                preallocation = Preallocation::Metadata;
            }
        }
        let mut zeroed = false;
        match preallocation {
            Preallocation::Off if self.has_data_file() => {
                self.data_file()?
                    .truncate(new, exact, Preallocation::Off, false)?;
            }
            Preallocation::Off => {}
            Preallocation::Falloc | Preallocation::Full if self.has_data_file() => {
                self.preallocate_external(&mut st, old, new, preallocation)?;
            }
            Preallocation::Metadata if self.has_data_file() => {
                self.preallocate_external(&mut st, old, new, Preallocation::Off)?;
            }
            Preallocation::Metadata => self.preallocate_metadata(&mut st, old, new)?,
            Preallocation::Falloc | Preallocation::Full => {
                zeroed = self.preallocate_data(&mut st, old, new, preallocation, zero)?;
            }
        }
        if zero && new > old && !zeroed {
            st = self.zero_new_area(st, old, new)?;
        }
        if preallocation != Preallocation::Off {
            self.write_back(&mut st)
                .map_err(|error| error.context("Failed to flush the preallocated area to disk"))?;
        }
        self.write_pointer(
            &mut st,
            MetadataKind::MAIN_HEADER,
            field::SIZE,
            &new.to_be_bytes(),
        )
        .map_err(|error| error.context("Failed to update the image size"))?;
        self.shared.write().header.size = new;
        self.size.store(new, Ordering::Release);
        self.links().changed_altogether();
        self.adapt_caches()
    }

    /// Fits the number of slices in the cache to the size of the disk. Slices
    /// keep their size, as others are looking things up in them.
    fn adapt_caches(&self) -> Result<()> {
        let slices = {
            let mut shared = self.shared.write();
            let new = Options::resolve(&shared.header, shared.flags, &shared.request)?.caches;
            let bytes = new.l2_slices * new.l2_slice_size;
            let caches = &mut shared.options.caches;
            caches.l2_slices = (bytes / caches.l2_slice_size).max(2);
            caches.refcount_blocks = new.refcount_blocks;
            caches.l2_slices
        };
        self.l2.set_capacity(slices);
        Ok(())
    }

    /// Makes the L1 table at least `entries` long, with `exact` not longer than
    /// that.
    pub(super) fn grow_l1(
        &self,
        st: &mut StateGuard<'_, H>,
        entries: u64,
        exact: bool,
    ) -> Result<()> {
        let old = self.l1.to_vec();
        if entries <= old.len() as u64 {
            return Ok(());
        }
        let mut len = entries;
        if !exact {
            let mut grown = (old.len() as u64).max(1);
            while grown < entries {
                grown = div_up(grown * 3, 2);
            }
            len = grown;
        }
        if len > MAX_L1_BYTES / 8 {
            return Err(Error::errno(libc::EFBIG));
        }
        let mut table = old.clone();
        table.resize(len as usize, 0);
        self.host.event(Event::L1GrowAllocTable);
        let offset = self.allocate(st, len * 8)?;
        if offset.0 == 0 {
            let message = "Preventing invalid allocation of L1 table at offset 0".to_owned();
            return Err(self.corrupt(st, true, None, None, message));
        }
        let result = self.write_new_l1(st, offset, &table);
        if result.is_err() {
            self.free(st, offset, len * 8, Reason::Other);
            return result;
        }
        let old_offset = {
            let mut shared = self.shared.write();
            let old_offset = shared.header.l1_table_offset;
            shared.header.l1_table_offset = offset.0;
            shared.header.l1_size = len as u32;
            old_offset
        };
        self.l1.replace(table);
        self.forget_overlap_map();
        if old_offset != 0 && !old.is_empty() {
            self.free_table(st, HostOffset(old_offset), old.len() as u64 * 8);
        }
        Ok(())
    }

    fn write_new_l1(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        table: &[u64],
    ) -> Result<()> {
        self.write_dirty_refcounts(st)?;
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.ensure_no_overlap(st, MetadataKind::empty(), offset.0, bytes.len() as u64)?;
        self.host.event(Event::L1GrowWriteTable);
        self.host.file().write(offset.0, &bytes)?;
        self.host.event(Event::L1GrowActivateTable);
        let mut pointer = [0; 12];
        pointer[..4].copy_from_slice(&(table.len() as u32).to_be_bytes());
        pointer[4..].copy_from_slice(&offset.0.to_be_bytes());
        self.write_pointer(st, MetadataKind::MAIN_HEADER, field::L1, &pointer)
    }

    fn preallocate_metadata(&self, st: &mut StateGuard<'_, H>, old: u64, new: u64) -> Result<()> {
        if new == old {
            return Ok(());
        }
        // Only space that the file gains now: a cluster that was in use before
        // would show its old content. A device has all of its space already.
        let file = self.host.file();
        st.data_floor = self.shrink_file(st)? >> self.geometry.cluster_bits;
        // Reading what was allocated last must not go beyond the end of the file,
        // which has to be there before the entries are. It grows by what is left
        // and, now and then, by what tables took of that: a few flushes in all.
        let mut left = new - old;
        let grow = |host: HostOffset, len| {
            left -= len;
            let bits = self.geometry.cluster_bits;
            let grown = file.length()? < round_up(host.0 + len, bits);
            if grown {
                let end = round_up(host.0 + len + left, bits);
                file.truncate(end, false, Preallocation::Off, false)?;
            }
            Ok(grown)
        };
        let area = (GuestOffset(old), new - old);
        let result = self.preallocate(st, area, Marking::Reserved, grow);
        st.data_floor = 0;
        result.map_err(|error| error.context("Allocating clusters failed"))
    }

    /// Maps the new area to the external data file, which grows in the way of
    /// `below`.
    fn preallocate_external(
        &self,
        st: &mut StateGuard<'_, H>,
        old: u64,
        new: u64,
        below: Preallocation,
    ) -> Result<()> {
        if new == old {
            return Ok(());
        }
        let area = (GuestOffset(old), new - old);
        self.preallocate(st, area, Marking::Reserved, |_, _| Ok(false))
            .map_err(|error| error.context("Allocating clusters failed"))?;
        let file = self.data_file()?;
        if file.length()? < new {
            file.truncate(new, false, below, false)?;
        }
        Ok(())
    }

    /// Allocates host clusters for the new area in one piece at the end of the
    /// file, with `preallocation` below. Returns whether they read as zeroes.
    fn preallocate_data(
        &self,
        st: &mut StateGuard<'_, H>,
        old: u64,
        new: u64,
        preallocation: Preallocation,
        zero: bool,
    ) -> Result<bool> {
        let bits = self.geometry.cluster_bits;
        // A cluster that the old end cuts moves to the new area.
        let guest = GuestOffset(old).align_down(bits);
        let cut = old - guest.0;
        let count = (round_up(new, bits) - guest.0) >> bits;
        if count == 0 {
            return Ok(false);
        }
        let file = self.host.file();
        // All L2 tables first, so that the data area stays in one piece.
        let mut at = guest;
        while at.0 < new {
            self.entry_for_change(st, at)
                .map_err(|error| error.context("Failed to update L2 tables"))?;
            let span = self.geometry.l2_span_bits();
            at = at.align_down(span).add(1 << span);
        }
        let start = loop {
            // What lies behind the last cluster in use may be old data.
            let start = HostOffset(self.shrink_file(st)?);
            if !self.ensure_blocks(st, self.geometry.cluster_of(start), count)? {
                break start;
            }
        };
        let got = self
            .allocate_at(st, start, count)
            .map_err(|error| error.context("Failed to allocate data clusters"))?;
        if got != count {
            self.free(st, start, got << bits, Reason::Never);
            return Err(Error::new(libc::EIO, "Failed to allocate data clusters"));
        }
        let end = start.add(count << bits).0;
        let zeroed = zero
            && self.encryption.is_none()
            && file.truncate(end, false, preallocation, true).is_ok();
        if !zeroed {
            if let Err(error) = file.truncate(end, false, preallocation, false) {
                self.free(st, start, count << bits, Reason::Other);
                return Err(Error::new(
                    error.code(),
                    format!("Failed to resize underlying file: {error}"),
                ));
            }
        }
        if cut > 0 {
            self.copy_to(st, guest, cut, start)?;
        }
        // And for the new length.
        self.l2_waits_for_data(st);
        self.l2_waits_for_refcounts(st)?;
        let mut replaced = Vec::new();
        let mut done = 0;
        while done < count {
            let at = self
                .entry_for_change(st, guest.add(done << bits))
                .map_err(|error| error.context("Failed to update L2 tables"))?;
            let here = (count - done).min((at.slice.len() - at.index) as u64);
            for i in 0..here {
                let index = at.index + i as usize;
                let old = at.slice.get(index);
                let subclusters = match (self.geometry.has_subclusters(), zeroed) {
                    (false, _) => Subclusters::NONE,
                    // Zeroes in the file hide what is in the backing file.
                    (true, true) => Subclusters::ALL_DATA,
                    (true, false) => kept(old),
                };
                let entry = ClusterEntry {
                    entry: L2Entry::normal(start.add((done + i) << bits)),
                    subclusters,
                };
                self.l2.set(&at.slice, index, entry);
                if old.entry != L2Entry::UNALLOCATED {
                    replaced.push(old.entry);
                }
            }
            done += here;
        }
        self.links().changed(guest.0, count << bits);
        for entry in replaced {
            self.free_entry(st, entry, Reason::Other);
        }
        Ok(zeroed)
    }

    /// Lets go what is mapped behind a disk of `size` bytes, so that it does not
    /// become a part of it.
    fn discard_behind(&self, st: &mut StateGuard<'_, H>, size: u64) -> Result<()> {
        let mut at = GuestOffset(round_up(size, self.geometry.cluster_bits));
        let end = self.mapped_end(size);
        while at.0 < end {
            let run = self.lookup_locked(st, at, end - at.0)?;
            if run.mapping != Mapping::Unallocated {
                self.discard_clusters(st, at, run.len, Reason::Other, After::Unallocated)?;
            }
            at = at.add(run.len);
        }
        Ok(())
    }

    fn zero_new_area<'a>(
        &'a self,
        mut st: StateGuard<'a, H>,
        old: u64,
        new: u64,
    ) -> Result<StateGuard<'a, H>> {
        let start = round_up(old, self.geometry.subcluster_bits());
        if new > start {
            self.zeroize(
                &mut st,
                GuestOffset(start),
                new - start,
                ZeroFlags::default(),
            )
            .map_err(|error| error.context("Failed to zero out new clusters"))?;
        }
        if start > old {
            self.zero_bytes(&mut st, old, start.min(new) - old)
                .map_err(|error| error.context("Failed to zero out the new area"))?;
        }
        Ok(st)
    }

    /// Writes zeroes over a part of one cluster or subcluster, with
    /// copy-on-write.
    fn zero_bytes(&self, st: &mut StateGuard<'_, H>, at: u64, len: u64) -> Result<()> {
        let bits = self.geometry.subcluster_bits();
        let cluster = GuestOffset(at).align_down(bits);
        self.await_all_allocations(st, cluster, 1 << bits);
        let run = self.lookup_locked(st, GuestOffset(at), len)?;
        match run.mapping {
            Mapping::Normal(host) if run.copied => {
                // Others may be writing to the rest of the cluster.
                self.ensure_free_for_data(st, host, len)?;
                let zeroes = self.host.aligned(len as usize)?;
                return self.write_data(GuestOffset(at), host, &zeroes);
            }
            _ => {}
        }
        let mut bytes = self.host.aligned(1 << bits)?;
        self.read_bytes_locked(st, cluster, &mut bytes)?;
        let first = (at - cluster.0) as usize;
        bytes[first..first + len as usize].fill(0);
        let area = (cluster, 1 << bits);
        self.preallocate(st, area, Marking::Written, |host, _| {
            self.write_data(cluster, host, &bytes).map(|()| true)
        })
    }
}
