//! Finding clusters: the L1 table, and runs of L2 entries.

use std::sync::Arc;

use super::refcounts::Reason;
use super::{Image, StateGuard};
use crate::cache::l2::{L2Slice, Room};
use crate::error::{Error, Result};
use crate::format::entry::{L1Entry, L2Entry, Mapping, MetadataKind};
use crate::format::geometry::Geometry;
use crate::format::subclusters::ClusterEntry;
use crate::host::{Event, File, Host};
use crate::units::{GuestOffset, Hex, HostOffset};

/// Guest clusters of one kind in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// What the clusters are. Host offsets are exact: they belong to the guest
    /// offset that was looked up, not to the begin of its cluster.
    pub(crate) mapping: Mapping,
    /// Whether the first cluster may be written in place.
    pub(super) copied: bool,
    /// Bytes from the guest offset on, at least 1 and at most as asked.
    pub(crate) len: u64,
    /// The first L2 entry, of an extended one the first half.
    pub(crate) entry: L2Entry,
    /// The place kept for the bytes, if they are not allocated but others of
    /// their cluster are.
    pub(super) reserved: Option<HostOffset>,
}

/// Where an L2 entry is: slice, and the entry in it.
pub(super) struct SliceAt {
    pub(super) slice: Arc<L2Slice>,
    pub(super) index: usize,
}

/// Why a lookup could not be answered at once.
pub(super) enum Miss {
    /// The slice is not in memory.
    Load(HostOffset),
    /// An entry has to be reported as corrupt.
    Bad,
    /// An entry is being changed.
    Changing,
}

/// What an L2 entry is looked up for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Read,
    Write,
}

/// Whether an entry breaks a rule of the format that makes it unusable.
/// The entry is that of the guest cluster at `cluster`.
pub(super) fn is_bad(geometry: &Geometry, entry: ClusterEntry, cluster: GuestOffset) -> bool {
    let misplaced = |at: HostOffset| {
        !at.is_aligned(geometry.cluster_bits) || (geometry.external_data && at.0 != cluster.0)
    };
    let mapping = geometry.mapping(entry.entry);
    if geometry.has_subclusters() && entry.contradicts_itself(mapping) {
        return true;
    }
    match mapping {
        Mapping::Normal(at) => misplaced(at),
        Mapping::ZeroAllocated(at) => geometry.version < 3 || misplaced(at),
        Mapping::ZeroPlain => geometry.version < 3,
        Mapping::Unallocated => false,
        Mapping::Compressed => geometry.external_data,
    }
}

impl<H: Host> Image<H> {
    /// What the `len` > 0 bytes at `guest` are, as far as one run goes. A run
    /// ends where the kind of cluster changes, where host clusters are not
    /// contiguous, and at the end of a slice.
    pub(crate) fn lookup(&self, guest: GuestOffset, len: u64) -> Result<Run> {
        match self.lookup_cached(guest, len, false) {
            Ok(run) => Ok(run),
            Err(_) => self.lookup_locked(&mut self.lock(), guest, len),
        }
    }

    /// How many of the `len` bytes at `guest` have no L2 table, `None` where
    /// the first one has one.
    #[inline]
    pub(crate) fn without_table(&self, guest: GuestOffset, len: u64) -> Option<u64> {
        let span = self.geometry.l2_span_bits();
        let table = self.l1.get(self.geometry.l1_index(guest)).table();
        table
            .is_none()
            .then(|| len.min((1 << span) - guest.within(span)))
    }

    /// [`Image::lookup`] without lock and I/O, `None` where it needs them.
    #[inline]
    pub(super) fn lookup_fast(&self, guest: GuestOffset, len: u64) -> Option<Run> {
        self.lookup_cached(guest, len, false).ok()
    }

    /// [`Image::lookup`] with the metadata lock held.
    pub(super) fn lookup_locked(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
    ) -> Result<Run> {
        loop {
            match self.lookup_cached(guest, len, true) {
                Ok(run) => return Ok(run),
                Err(Miss::Load(offset)) => {
                    self.load_slice(st, guest, offset)?;
                }
                Err(Miss::Bad) => return Err(self.report_bad_entry(st, guest, Purpose::Read)),
                // Nobody changes entries but the holder of the lock.
                Err(Miss::Changing) => return Err(Error::errno(libc::EIO)),
            }
        }
    }

    #[inline]
    fn lookup_cached(&self, guest: GuestOffset, len: u64, locked: bool) -> Result<Run, Miss> {
        let geometry = &self.geometry;
        let Some(table) = self.l1.get(geometry.l1_index(guest)).table() else {
            let rest = (1 << geometry.l2_span_bits()) - guest.within(geometry.l2_span_bits());
            return Ok(Run {
                mapping: Mapping::Unallocated,
                copied: false,
                len: len.min(rest),
                entry: L2Entry::UNALLOCATED,
                reserved: None,
            });
        };
        let (offset, index) = self.slice_position(table, guest);
        let slice = self.l2.get(offset).ok_or(Miss::Load(offset))?;
        if geometry.has_subclusters() {
            return self.parts_in_slice(&slice, index, guest, len, locked);
        }
        self.run_in_slice(&slice, index, guest, len)
            .ok_or(Miss::Bad)
    }

    /// Where the entry for `guest` is in the L2 table at `table`: the slice's
    /// place in the file and the entry in it.
    #[inline]
    fn slice_position(&self, table: HostOffset, guest: GuestOffset) -> (HostOffset, usize) {
        let entries = (self.l2.slice_size() as u64) >> self.geometry.l2_entry_bits;
        let index = self.geometry.l2_index(guest);
        let first = index & !(entries - 1);
        (
            table.add(first << self.geometry.l2_entry_bits),
            (index - first) as usize,
        )
    }

    #[inline]
    fn run_in_slice(
        &self,
        slice: &L2Slice,
        index: usize,
        guest: GuestOffset,
        len: u64,
    ) -> Option<Run> {
        let geometry = &self.geometry;
        let size = geometry.cluster_size();
        let within = guest.within(geometry.cluster_bits);
        let entry = slice.get_standard(index);
        let cluster = guest.align_down(geometry.cluster_bits);
        if is_bad(geometry, ClusterEntry::standard(entry), cluster) {
            return None;
        }
        let first = geometry.mapping(entry);
        let mapping = match first {
            Mapping::Normal(at) => Mapping::Normal(at.add(within)),
            Mapping::ZeroAllocated(at) => Mapping::ZeroAllocated(at.add(within)),
            other => other,
        };
        let mut covered = size - within;
        let mut next = index + 1;
        if first != Mapping::Compressed {
            while covered < len && next < slice.len() {
                let other = slice.get_standard(next);
                let expected = match first {
                    Mapping::Normal(at) => Mapping::Normal(at.add((next - index) as u64 * size)),
                    Mapping::ZeroAllocated(at) => {
                        Mapping::ZeroAllocated(at.add((next - index) as u64 * size))
                    }
                    other => other,
                };
                if geometry.mapping(other) != expected || other.copied() != entry.copied() {
                    break;
                }
                covered += size;
                next += 1;
            }
        }
        Some(Run {
            mapping,
            copied: entry.copied(),
            len: covered.min(len),
            entry,
            reserved: None,
        })
    }

    /// Reads a slice into the cache, after making room for it.
    pub(super) fn load_slice(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        offset: HostOffset,
    ) -> Result<Arc<L2Slice>> {
        self.ensure_usable()?;
        let within = self.geometry.l2_index(guest) << self.geometry.l2_entry_bits;
        let slice_size = self.l2.slice_size();
        let table = HostOffset(offset.0.wrapping_sub(within & !(slice_size as u64 - 1)));
        if !table.is_aligned(self.geometry.cluster_bits) {
            let index = Hex(self.geometry.l1_index(guest));
            let message = format!(
                "L2 table offset {:#x} unaligned (L1 index: {index})",
                table.0
            );
            return Err(self.corrupt(st, true, None, None, message));
        }
        if let Some(slice) = self.l2.get(offset) {
            return Ok(slice);
        }
        while let Room::Dirty(victim) = self.l2.make_room() {
            self.write_victim(st, &victim)?;
        }
        let count = self.slices_to_load(guest, table, offset);
        // Not new memory: what is aligned and let go again among the slices that
        // stay leaves holes that are as large as they are.
        let mut bytes = self.host.scratch(slice_size * count)?;
        self.host.event(Event::L2Load);
        self.host.file().read(offset.0, &mut bytes)?;
        let extended = self.geometry.has_subclusters();
        let (wanted, others) = bytes.split_at(slice_size);
        let wanted = self
            .l2
            .insert(L2Slice::from_bytes(offset, wanted, extended));
        self.insert_slices(offset.add(slice_size as u64), others);
        Ok(wanted)
    }

    /// Puts slices that follow each other in the file, from `offset` on, into the
    /// cache.
    pub(super) fn insert_slices(&self, offset: HostOffset, bytes: &[u8]) {
        let size = self.l2.slice_size();
        let extended = self.geometry.has_subclusters();
        for (slice, number) in bytes.chunks_exact(size).zip(0..) {
            let at = offset.add(number * size as u64);
            self.l2.insert(L2Slice::from_bytes(at, slice, extended));
        }
    }

    /// How many slices to read where that at `offset` of a table is needed: it
    /// alone, or, as in a scan of the disk, which comes from the slice before it,
    /// those that follow in the table as well, while nothing has to go for them.
    fn slices_to_load(&self, guest: GuestOffset, table: HostOffset, offset: HostOffset) -> usize {
        let slice_size = self.l2.slice_size() as u64;
        let end = table.add(self.geometry.cluster_size());
        let before = if offset == table {
            let index = self.geometry.l1_index(guest).checked_sub(1);
            index
                .and_then(|index| self.l1.get(index).table())
                .map(|table| table.0 + self.geometry.cluster_size())
        } else {
            Some(offset.0)
        };
        let known = |end: u64| self.l2.peek(HostOffset(end - slice_size)).is_some();
        if !before.is_some_and(known) {
            return 1;
        }
        // What is here may be newer than the file.
        let missing = (offset.0..end.0)
            .step_by(slice_size as usize)
            .skip(1)
            .take_while(|at| self.l2.peek(HostOffset(*at)).is_none());
        1 + missing
            .take(self.l2.spare_slices().saturating_sub(1))
            .count()
    }

    /// The entry for `guest` for reading, `None` where there is no L2 table.
    pub(super) fn entry_at(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
    ) -> Result<Option<SliceAt>> {
        let Some(table) = self.l1.get(self.geometry.l1_index(guest)).table() else {
            return Ok(None);
        };
        let (offset, index) = self.slice_position(table, guest);
        let slice = match self.l2.get(offset) {
            Some(slice) => slice,
            None => self.load_slice(st, guest, offset)?,
        };
        Ok(Some(SliceAt { slice, index }))
    }

    /// The entry for `guest` for changing it. The L2 table is made where it is
    /// missing, and copied where a snapshot shares it.
    pub(super) fn entry_for_change(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
    ) -> Result<SliceAt> {
        let index = self.geometry.l1_index(guest);
        if index >= self.l1.len() {
            self.grow_l1(st, index + 1, false)?;
        }
        let entry = self.l1.get(index);
        if let Some(table) = entry.table() {
            if !table.is_aligned(self.geometry.cluster_bits) {
                let message = format!(
                    "L2 table offset {:#x} unaligned (L1 index: {})",
                    table.0,
                    Hex(index)
                );
                return Err(self.corrupt(st, true, None, None, message));
            }
        }
        if entry.table().is_none() || !entry.copied() {
            return self.allocate_l2(st, guest);
        }
        match self.entry_at(st, guest)? {
            Some(at) => Ok(at),
            None => Err(Error::errno(libc::EIO)),
        }
    }

    /// Gives the L1 entry for `guest` an L2 table of its own: empty, or a copy
    /// of the one it shares.
    fn allocate_l2(&self, st: &mut StateGuard<'_, H>, guest: GuestOffset) -> Result<SliceAt> {
        let size = self.geometry.cluster_size();
        let index = self.geometry.l1_index(guest);
        let old = self.l1.get(index).table();
        let table = self.allocate(st, size)?;
        if table.0 == 0 {
            let message = "Preventing invalid allocation of L2 table at offset 0".to_owned();
            return Err(self.corrupt(st, true, None, None, message));
        }
        match self.link_l2(st, index, old, table) {
            Ok(bytes) => {
                if let Some(old) = old {
                    self.free_table(st, old, size);
                }
                self.cache_new_slice(st, guest, table, &bytes)
            }
            Err(error) => {
                self.free(st, table, size, Reason::Always);
                Err(error)
            }
        }
    }

    /// Puts the slice for `guest` of a table that was just written into the
    /// cache.
    fn cache_new_slice(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        table: HostOffset,
        bytes: &[u8],
    ) -> Result<SliceAt> {
        while let Room::Dirty(victim) = self.l2.make_room() {
            self.write_victim(st, &victim)?;
        }
        let (offset, index) = self.slice_position(table, guest);
        let start = (offset.0 - table.0) as usize;
        let bytes = &bytes[start..start + self.l2.slice_size()];
        let slice = L2Slice::from_bytes(offset, bytes, self.geometry.has_subclusters());
        let slice = self.l2.insert(slice);
        Ok(SliceAt { slice, index })
    }

    fn link_l2(
        &self,
        st: &mut StateGuard<'_, H>,
        index: u64,
        old: Option<HostOffset>,
        table: HostOffset,
    ) -> Result<H::Aligned> {
        let size = self.geometry.cluster_size();
        let file = self.host.file();
        // The new table's refcount is on disk before anything points to it.
        self.write_dirty_refcounts(st)?;
        let mut bytes = self.host.aligned(size as usize)?;
        if let Some(old) = old {
            // The cached slices of a shared table are never dirty.
            self.host.event(Event::L2AllocCowRead);
            file.read(old.0, &mut bytes)?;
        }
        self.ensure_no_overlap(st, MetadataKind::empty(), table.0, size)?;
        self.host.event(Event::L2AllocWrite);
        file.write(table.0, &bytes)?;
        self.l2.discard(table, size);
        let before = self.l1.get(index);
        self.l1.set(index, L1Entry::owned(table));
        if let Err(error) = self.write_l1_entry(st, index) {
            self.l1.set(index, before);
            return Err(error);
        }
        self.note_metadata(table, MetadataKind::ACTIVE_L2);
        Ok(bytes)
    }

    /// Writes the part of the L1 table around one entry, after all that was
    /// written before, and flushes.
    pub(super) fn write_l1_entry(&self, st: &mut StateGuard<'_, H>, index: u64) -> Result<()> {
        const PER_SECTOR: u64 = 64;
        self.host.event(Event::L1Update);
        let table_offset = self.shared.read().header.l1_table_offset;
        let first = index & !(PER_SECTOR - 1);
        let last = (first + PER_SECTOR).min(self.l1.len());
        let bytes: Vec<u8> = (first..last)
            .flat_map(|i| self.l1.get(i).0.to_be_bytes())
            .collect();
        self.write_pointer(
            st,
            MetadataKind::ACTIVE_L1,
            table_offset + first * 8,
            &bytes,
        )
    }

    /// Reports the entry for `guest`, which is known to be bad.
    fn report_bad_entry(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        purpose: Purpose,
    ) -> Error {
        let at = match self.entry_at(st, guest) {
            Ok(Some(at)) => at,
            Ok(None) => return Error::errno(libc::EIO),
            Err(error) => return error,
        };
        let table = self
            .l1
            .get(self.geometry.l1_index(guest))
            .table()
            .unwrap_or_default();
        let index = Hex(self.geometry.l2_index(guest));
        let entry = at.slice.get(at.index);
        let cluster = guest.align_down(self.geometry.cluster_bits);
        let mapping = self.geometry.mapping(entry.entry);
        let contradicts = self.geometry.has_subclusters() && entry.contradicts_itself(mapping);
        let unaligned = |at: HostOffset| !at.is_aligned(self.geometry.cluster_bits);
        let owned = purpose == Purpose::Write && entry.entry.copied();
        let message = match mapping {
            Mapping::Normal(at) if owned && unaligned(at) => format!(
                "Data cluster offset {:#x} unaligned (guest offset: {})",
                at.0,
                Hex(guest.0)
            ),
            Mapping::ZeroAllocated(at) if owned && unaligned(at) => format!(
                "Preallocated zero cluster offset {:#x} unaligned (guest offset: {})",
                at.0,
                Hex(guest.0)
            ),
            Mapping::Compressed if self.has_data_file() => format!(
                "Compressed cluster entry found in image with external data file (L2 offset: \
                 {:#x}, L2 index: {index})",
                table.0
            ),
            Mapping::Normal(at) if unaligned(at) && (purpose == Purpose::Read || !contradicts) => {
                format!(
                    "Cluster allocation offset {:#x} unaligned (L2 offset: {:#x}, L2 index: \
                     {index})",
                    at.0, table.0
                )
            }
            Mapping::Normal(at) | Mapping::ZeroAllocated(at)
                if self.has_data_file() && !unaligned(at) && at != HostOffset(cluster.0) =>
            {
                format!(
                    "External data file host cluster offset {:#x} does not match guest cluster \
                     offset: {:#x}, L2 index: {index})",
                    at.0, cluster.0
                )
            }
            _ if contradicts => {
                // The sentences differ in a blank.
                let found = match purpose {
                    Purpose::Read => "found ",
                    Purpose::Write => "found",
                };
                format!(
                    "Invalid cluster entry {found} (L2 offset: {:#x}, L2 index: {index})",
                    table.0
                )
            }
            Mapping::ZeroPlain | Mapping::ZeroAllocated(_) if self.geometry.version < 3 => {
                format!(
                    "Zero cluster entry found in pre-v3 image (L2 offset: {:#x}, L2 index: \
                     {index})",
                    table.0
                )
            }
            Mapping::ZeroAllocated(at) => format!(
                "Preallocated zero cluster offset {:#x} unaligned (L2 offset: {:#x}, L2 index: \
                 {index})",
                at.0, table.0
            ),
            // Mended meanwhile.
            _ => return Error::errno(libc::EIO),
        };
        self.corrupt(st, true, None, None, message)
    }

    /// Reports the entry for `guest` if it is bad.
    pub(super) fn ensure_good_entry(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        entry: ClusterEntry,
    ) -> Result<()> {
        let cluster = guest.align_down(self.geometry.cluster_bits);
        if is_bad(&self.geometry, entry, cluster) {
            Err(self.report_bad_entry(st, guest, Purpose::Write))
        } else {
            Ok(())
        }
    }
}
