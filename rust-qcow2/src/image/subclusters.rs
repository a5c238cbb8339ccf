//! What is special of images with subclusters: runs of them, what a write
//! copies, and how their bitmaps change.

use super::Image;
use super::map::{Miss, Run, SliceAt, is_bad};
use super::pending::{Allocation, Marking};
use crate::cache::l2::L2Slice;
use crate::error::Result;
use crate::format::subclusters::{ClusterEntry, SUBCLUSTERS, Subclusters};
use crate::host::Host;
use crate::units::{GuestOffset, div_up};

impl<H: Host> Image<H> {
    /// The run of subclusters of one kind that begins at `guest`, in a slice.
    /// Without the metadata lock entries may be changing.
    pub(super) fn parts_in_slice(
        &self,
        slice: &L2Slice,
        index: usize,
        guest: GuestOffset,
        len: u64,
        locked: bool,
    ) -> Result<Run, Miss> {
        let geometry = &self.geometry;
        let size = geometry.cluster_size();
        let get = |index| {
            let entry = if locked {
                Some(slice.get(index))
            } else {
                slice.try_get(index)
            };
            entry.ok_or(Miss::Changing)
        };
        let entry = get(index)?;
        let cluster = guest.align_down(geometry.cluster_bits);
        if is_bad(geometry, entry, cluster) {
            return Err(Miss::Bad);
        }
        let within = guest.within(geometry.cluster_bits);
        let subcluster = geometry.subcluster_index(guest);
        let (first, mut count) = entry.part(geometry.mapping(entry.entry), subcluster, within);
        let end_of = |count: u32| u64::from(count) << geometry.subcluster_bits();
        let mut covered = end_of(subcluster + count) - within;
        let mut next = index + 1;
        // Compressed clusters come one at a time.
        let compressed = entry.entry.is_compressed();
        while !compressed
            && covered < len
            && next < slice.len()
            && (subcluster + count == SUBCLUSTERS || next > index + 1 && count == SUBCLUSTERS)
        {
            let other = get(next)?;
            let distance = (next - index) as u64 * size;
            if is_bad(geometry, other, cluster.add(distance)) {
                break;
            }
            let step = distance - within;
            let (part, parts) = other.part(geometry.mapping(other.entry), 0, 0);
            if part != first.plus(step) || other.entry.copied() != entry.entry.copied() {
                break;
            }
            covered += end_of(parts);
            count = parts;
            next += 1;
            if parts < SUBCLUSTERS {
                break;
            }
        }
        Ok(Run {
            mapping: first.mapping,
            copied: entry.entry.copied(),
            len: covered.min(len),
            entry: entry.entry,
            reserved: first.reserved,
        })
    }

    /// Whether `len` bytes from `guest` on, whose entries begin at `at`, are data
    /// altogether.
    pub(super) fn is_all_data(&self, at: &SliceAt, guest: GuestOffset, len: u64) -> bool {
        !self.geometry.has_subclusters()
            || self
                .touched_entries(at, guest, len)
                .all(|(entry, from, to)| from >= to || entry.subclusters.have_data(from, to))
    }

    /// Whether any of `len` bytes from `guest` on is data. Their entries begin at
    /// `at`, and all have a host cluster of their own.
    pub(super) fn is_any_data(&self, at: &SliceAt, guest: GuestOffset, len: u64) -> bool {
        self.touched_entries(at, guest, len)
            .any(|(entry, from, to)| {
                if self.geometry.has_subclusters() {
                    entry.subclusters.have_any_data(from, to)
                } else {
                    !entry.entry.has_zero_flag()
                }
            })
    }

    /// The entries of the clusters that `len` bytes from `guest` on touch, the
    /// first of which is at `at`, and which subclusters of each.
    fn touched_entries<'a>(
        &'a self,
        at: &'a SliceAt,
        guest: GuestOffset,
        len: u64,
    ) -> impl Iterator<Item = (ClusterEntry, u32, u32)> + 'a {
        let bits = self.geometry.cluster_bits;
        let end = guest.add(len);
        let first = guest.align_down(bits);
        (0..div_up(end.0 - first.0, 1 << bits)).map(move |i| {
            let (from, to) = self.touched(first.add(i << bits), guest, end);
            (at.slice.get(at.index + i as usize), from, to)
        })
    }

    /// Which subclusters of the cluster at `cluster` a range of guest bytes
    /// touches.
    fn touched(&self, cluster: GuestOffset, start: GuestOffset, end: GuestOffset) -> (u32, u32) {
        let bits = self.geometry.subcluster_bits();
        let size = self.geometry.cluster_size();
        let from = start.0.saturating_sub(cluster.0).min(size);
        let to = end.0.saturating_sub(cluster.0).min(size);
        ((from >> bits) as u32, div_up(to, 1 << bits) as u32)
    }

    /// The guest bytes that a write of `len` bytes at `guest` has to write to
    /// clusters that are allocated for it, whose entries begin at `at`.
    ///
    /// In a cluster that has its place already the subclusters at both ends are
    /// filled up, where they have no data yet. In a new place also all data of
    /// the cluster are copied that were in the old one. What reads as zeroes or
    /// as the backing file goes on doing so.
    pub(super) fn written_range(
        &self,
        at: &SliceAt,
        guest: GuestOffset,
        len: u64,
        reserved: bool,
    ) -> (GuestOffset, GuestOffset) {
        let cluster_bits = self.geometry.cluster_bits;
        let bits = self.geometry.subcluster_bits();
        let end = guest.add(len);
        let cluster = guest.align_down(cluster_bits);
        let last_cluster = GuestOffset(end.0 - 1).align_down(cluster_bits);
        let last_index = at.index + ((last_cluster.0 - cluster.0) >> cluster_bits) as usize;
        let (first, last) = (at.slice.get(at.index), at.slice.get(last_index));
        let first_part = self.geometry.subcluster_index(guest);
        let last_part = self.geometry.subcluster_index(GuestOffset(end.0 - 1));
        if reserved {
            let start = if first.subclusters.have_data(first_part, first_part + 1) {
                guest
            } else {
                guest.align_down(bits)
            };
            let end = if last.subclusters.have_data(last_part, last_part + 1) {
                end
            } else {
                last_cluster.add(u64::from(last_part + 1) << bits)
            };
            return (start, end);
        }
        let from = match data_of(first) {
            0 => first_part,
            data => data.trailing_zeros().min(first_part),
        };
        let to = match data_of(last) {
            0 => last_part + 1,
            data => (SUBCLUSTERS - data.leading_zeros()).max(last_part + 1),
        };
        (
            cluster.add(u64::from(from) << bits),
            last_cluster.add(u64::from(to) << bits),
        )
    }

    /// The bitmap of cluster number `number` of an allocation, whose entry was
    /// `old` before.
    pub(super) fn marked(
        &self,
        allocation: &Allocation<H>,
        number: u64,
        old: ClusterEntry,
        marking: Marking,
    ) -> Subclusters {
        if !self.geometry.has_subclusters() {
            return Subclusters::NONE;
        }
        if marking == Marking::Reserved {
            return kept(old);
        }
        let cluster = allocation.start.add(number << self.geometry.cluster_bits);
        let (from, to) = self.touched(cluster, allocation.written_start, allocation.written_end);
        let before = if old.entry.is_compressed() {
            Subclusters::NONE
        } else {
            old.subclusters
        };
        before.with_data(from, to)
    }
}

/// The subclusters of an entry that have data; of a compressed cluster all.
fn data_of(entry: ClusterEntry) -> u32 {
    if entry.entry.is_compressed() {
        Subclusters::ALL_DATA.data()
    } else {
        entry.subclusters.data()
    }
}

/// The bitmap of a cluster that moves to another place.
pub(super) fn kept(old: ClusterEntry) -> Subclusters {
    if old.entry.is_compressed() {
        Subclusters::ALL_DATA
    } else {
        old.subclusters
    }
}
