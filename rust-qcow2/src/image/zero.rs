//! Write zeroes and discard: changes of mappings without data.

use super::refcounts::Reason;
use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::{L2Entry, Mapping};
use crate::format::subclusters::{ClusterEntry, Subclusters};
use crate::host::{File, Host, ZeroFlags};
use crate::units::{GuestOffset, round_up};

/// How a discarded cluster reads afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// As zeroes, where the version can say so.
    Zeroes,
    /// As in the backing file.
    Unallocated,
}

/// How one L2 entry changes.
struct NewEntry {
    entry: ClusterEntry,
    /// The host cluster is given back.
    free: bool,
    /// The request allows that its space goes.
    unmap: bool,
}

impl<H: Host> Image<H> {
    /// Makes a range read as zeroes. Only whole clusters get the zero flag, or
    /// whole subclusters; a range within one of them is served where the rest of
    /// it reads as zeroes already.
    ///
    /// # Errors
    /// `ENOTSUP` where zeroes have to be written instead.
    pub fn write_zeroes(&self, guest: GuestOffset, len: u64, flags: ZeroFlags) -> Result<()> {
        self.ensure_usable()?;
        let bits = self.geometry.subcluster_bits();
        let size = self.size();
        let end = guest.0 + len;
        let head = guest.within(bits);
        let tail = if end == size {
            0
        } else {
            round_up(end, bits) - end
        };
        if head == 0 && tail == 0 {
            let mut st = self.lock();
            return self.zeroize(&mut st, guest, len, flags);
        }
        let start = guest.align_down(bits);
        let clear = |at: u64, len: u64| {
            self.is_zero(GuestOffset(at), len.min(size.saturating_sub(at)), true)
        };
        if !(clear(start.0, head)? && clear(end, tail)?) {
            return Err(Error::errno(libc::ENOTSUP));
        }
        let mut st = self.lock();
        self.await_all_allocations(&mut st, start, 1 << bits);
        let run = self.lookup_locked(&mut st, start, 1 << bits)?;
        match run.mapping {
            Mapping::Unallocated | Mapping::ZeroPlain | Mapping::ZeroAllocated(_) => {
                let len = (1 << bits).min(size - start.0);
                self.zeroize(&mut st, start, len, flags)
            }
            _ => Err(Error::errno(libc::ENOTSUP)),
        }
    }

    /// Sets the zero flag on whole clusters or subclusters; the last one may be
    /// cut by the end of the disk.
    pub(super) fn zeroize(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        if self.data_file_is_raw() {
            self.await_all_allocations(st, guest, len);
            // Whoever reads the data file alone has to see zeroes, too.
            self.data_file()?.write_zeroes(guest.0, len, flags)?;
        }
        // Clusters that are touched in part, at either end.
        let bits = self.geometry.cluster_bits;
        let end = guest.0 + len;
        let first = round_up(guest.0, bits).min(end);
        let last = if end >= self.size() {
            end
        } else {
            GuestOffset(end).align_down(bits).0.max(first)
        };
        if guest.0 < first {
            self.zeroize_parts(st, guest, first - guest.0)?;
        }
        if first < last {
            self.zeroize_clusters(st, GuestOffset(first), last - first, flags)?;
        }
        if last < end {
            self.zeroize_parts(st, GuestOffset(last), end - last)?;
        }
        Ok(())
    }

    /// [`Image::zeroize`] for subclusters of one cluster, which keeps its place.
    fn zeroize_parts(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
    ) -> Result<()> {
        self.await_all_allocations(st, guest, len);
        self.ensure_usable()?;
        let bits = self.geometry.subcluster_bits();
        let at = self.entry_for_change(st, guest)?;
        let old = at.slice.get(at.index);
        self.ensure_good_entry(st, guest, old)?;
        if old.entry.is_compressed() {
            return Err(Error::errno(libc::ENOTSUP));
        }
        let first = self.geometry.subcluster_index(guest);
        let count = (round_up(len, bits) >> bits) as u32;
        let new = ClusterEntry {
            entry: old.entry,
            subclusters: old.subclusters.with_zeroes(first, first + count),
        };
        if new != old {
            self.l2.set(&at.slice, at.index, new);
            self.links().changed(guest.0, len);
        }
        Ok(())
    }

    /// An entry that reads as zeroes, with the place of `entry` or without one.
    fn zero_entry(&self, entry: L2Entry) -> ClusterEntry {
        if self.geometry.has_subclusters() {
            ClusterEntry {
                entry,
                subclusters: Subclusters::ALL_ZERO,
            }
        } else {
            ClusterEntry::standard(L2Entry(entry.0 | L2Entry::ZERO_PLAIN.0))
        }
    }

    /// [`Image::zeroize`] for whole clusters.
    fn zeroize_clusters(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        if self.geometry.version < 3 {
            // No zero flag there; without a backing file unallocated will do.
            if self.host.backing().is_none() {
                return self.discard_clusters(st, guest, len, Reason::Request, After::Zeroes);
            }
            return Err(Error::errno(libc::ENOTSUP));
        }
        let keep = self.shared.read().options.discard_no_unref;
        self.change_entries(st, guest, len, Reason::Request, |old| {
            let mapping = self.geometry.mapping(old.entry);
            let allocated = !matches!(mapping, Mapping::Unallocated | Mapping::ZeroPlain);
            let unmap = mapping == Mapping::Compressed || (flags.may_unmap && allocated);
            let keep = keep && mapping != Mapping::Compressed;
            let entry = match mapping.host_cluster() {
                Some(_) if !unmap || keep => self.zero_entry(old.entry),
                _ => self.zero_entry(L2Entry::UNALLOCATED),
            };
            NewEntry {
                entry,
                free: unmap && !keep,
                unmap,
            }
        })
    }

    /// Gives a range of guest clusters back; they read as zeroes afterwards.
    ///
    /// # Errors
    /// `ENOTSUP` for parts of clusters, and where the version has no way to
    /// keep the backing file from shining through.
    pub fn discard(&self, guest: GuestOffset, len: u64) -> Result<()> {
        self.ensure_usable()?;
        let bits = self.geometry.cluster_bits;
        if self.geometry.version < 3 && self.host.backing().is_some() {
            return Err(Error::errno(libc::ENOTSUP));
        }
        let end = guest.add(len);
        if !guest.is_aligned(bits) || !(end.is_aligned(bits) || end.0 == self.size()) {
            return Err(Error::errno(libc::ENOTSUP));
        }
        let mut st = self.lock();
        if self.data_file_is_raw() {
            self.await_all_allocations(&mut st, guest, len);
            let flags = ZeroFlags {
                may_unmap: true,
                no_fallback: false,
            };
            self.data_file()?.write_zeroes(guest.0, len, flags)?;
        }
        self.discard_clusters(&mut st, guest, len, Reason::Request, After::Zeroes)
    }

    pub(super) fn discard_clusters(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
        reason: Reason,
        after: After,
    ) -> Result<()> {
        let has_backing = self.host.backing().is_some();
        let can_zero = self.geometry.version >= 3;
        let keep = self.shared.read().options.discard_no_unref
            && after == After::Zeroes
            && reason == Reason::Request;
        self.reclaim(st)?;
        let result = self.change_entries(st, guest, len, reason, |old| {
            let mapping = self.geometry.mapping(old.entry);
            let keep = keep && mapping != Mapping::Compressed;
            let allocated = !matches!(mapping, Mapping::Unallocated | Mapping::ZeroPlain);
            let entry = match after {
                After::Unallocated => ClusterEntry::UNALLOCATED,
                After::Zeroes if !(has_backing || allocated) => old,
                After::Zeroes if !can_zero => ClusterEntry::UNALLOCATED,
                After::Zeroes if keep => self.zero_entry(old.entry),
                After::Zeroes => self.zero_entry(L2Entry::UNALLOCATED),
            };
            NewEntry {
                entry,
                free: !keep,
                unmap: true,
            }
        });
        result.and(self.pass_discards(st))
    }

    /// Passes all L2 entries of a range through `change`, slice by slice: first
    /// the entry, then the refcount.
    fn change_entries(
        &self,
        st: &mut StateGuard<'_, H>,
        mut guest: GuestOffset,
        len: u64,
        reason: Reason,
        change: impl Fn(ClusterEntry) -> NewEntry,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        self.await_all_allocations(st, guest, len);
        self.ensure_usable()?;
        let mut count = round_up(len, bits) >> bits;
        while count > 0 {
            let missing = self.l1.get(self.geometry.l1_index(guest)).table().is_none();
            let nothing = ClusterEntry::UNALLOCATED;
            if missing && change(nothing).entry == nothing {
                let table = self.geometry.l2_entries() - self.geometry.l2_index(guest);
                let skip = table.min(count);
                guest = guest.add(skip << bits);
                count -= skip;
                continue;
            }
            let at = self.entry_for_change(st, guest)?;
            let here = count.min((at.slice.len() - at.index) as u64);
            let mut holes = Vec::new();
            for i in 0..here {
                let index = at.index + i as usize;
                let old = at.slice.get(index);
                let new = change(old);
                if new.entry == old {
                    continue;
                }
                self.l2.set(&at.slice, index, new.entry);
                self.links().changed(guest.0 + (i << bits), 1 << bits);
                if new.free {
                    self.free_entry(st, old.entry, reason);
                }
                if self.leaves_hole(old.entry, &new, reason) {
                    holes.extend(self.geometry.mapping(old.entry).host_cluster());
                }
            }
            self.discard_in_place(st, &holes, reason)?;
            guest = guest.add(here << bits);
            count -= here;
        }
        // What was freed may have shown that the image is damaged.
        self.ensure_usable()?;
        Ok(())
    }

    /// Whether the space of a cluster goes although its place remains that of
    /// the guest cluster.
    fn leaves_hole(&self, old: L2Entry, new: &NewEntry, reason: Reason) -> bool {
        // A raw data file got zeroes already, and has to keep them.
        if !new.unmap || self.data_file_is_raw() || new.free && !self.has_data_file() {
            return false;
        }
        let options = self.shared.read().options;
        if new.free {
            return options.passes(reason);
        }
        // The reference stays; a snapshot may have the cluster as well.
        options.discard_no_unref
            && options.discard_request
            && reason == Reason::Request
            && new.entry == self.zero_entry(new.entry.entry)
            && old.copied()
    }
}
