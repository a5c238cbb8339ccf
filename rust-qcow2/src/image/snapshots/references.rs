//! What an L1 table refers to: counting it, and the copied flags.
//!
//! Everything here reads and writes whole tables, in the file itself: there are
//! no dirty slices when it begins, and none of a table that is written after.
//! As tables are read several times, they are kept in the cache, as far as there
//! is room.

use super::super::refcounts::{Change, Reason};
use super::super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::{L1Entry, L2Entry, MetadataKind, OFFSET_MASK};
use crate::format::snapshots::Snapshot;
use crate::host::{Event, File, Host};
use crate::image::open::read_table;
use crate::units::{Hex, HostOffset};

/// An L1 table as it is in the file, with or without copied flags.
pub(super) fn l1_bytes(l1: &[u64], flags: bool) -> Vec<u8> {
    let entry = |entry: &u64| {
        let entry = L1Entry(*entry);
        if flags {
            entry.0
        } else {
            entry.with_copied(false).0
        }
    };
    l1.iter()
        .flat_map(|word| entry(word).to_be_bytes())
        .collect()
}

impl<H: Host> Image<H> {
    /// Reads the L1 table of a snapshot, whose place was validated. Copied
    /// flags in it have no meaning and are left out.
    pub(in crate::image) fn read_snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        let file = self.host.file();
        let size = u64::from(snapshot.l1_size);
        let mut l1 = read_table(&file, snapshot.l1_table_offset, size)?;
        for entry in &mut l1 {
            *entry = L1Entry(*entry).with_copied(false).0;
        }
        Ok(l1)
    }

    /// Counts all that `l1` refers to once more, and clears the copied flags in
    /// its L2 tables. Durable when it returns. Where that fails, what was counted
    /// is taken back, as far as the file can be written.
    pub(super) fn add_references(&self, st: &mut StateGuard<'_, H>, l1: &[u64]) -> Result<()> {
        let mut counted = 0;
        let result = self
            .change_references(st, l1, Change::Add(1), u64::MAX, &mut counted)
            .and_then(|()| self.clear_flags(st, l1));
        if result.is_err() {
            let _ = self
                .change_references(st, l1, Change::Sub(1), counted, &mut 0)
                .and_then(|()| self.write_back_all(st))
                .and_then(|()| self.update_copied(st));
        }
        result
    }

    /// Takes back what [`Image::add_references`] did.
    pub(super) fn release_references(&self, st: &mut StateGuard<'_, H>, l1: &[u64]) -> Result<()> {
        self.drop_references(st, l1)?;
        self.update_copied(st)
    }

    /// Counts all that `l1` refers to once less. Durable when it returns.
    pub(super) fn drop_references(&self, st: &mut StateGuard<'_, H>, l1: &[u64]) -> Result<()> {
        self.change_references(st, l1, Change::Sub(1), u64::MAX, &mut 0)?;
        self.write_back_all(st)
    }

    /// Changes the counts of the first `most` clusters and tables that `l1`
    /// refers to; `done` says of how many it did.
    fn change_references(
        &self,
        st: &mut StateGuard<'_, H>,
        l1: &[u64],
        change: Change,
        most: u64,
        done: &mut u64,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let mut bytes = self.host.aligned(size as usize)?;
        for index in 0..l1.len() {
            let Some(table) = self.table_of(st, l1, index)? else {
                continue;
            };
            self.read_l2(table, &mut bytes)?;
            for i in 0..self.geometry.l2_entries() as usize {
                let (offset, len) = match self.reference(&bytes, i) {
                    Reference::None => continue,
                    Reference::Compressed(offset, len) => (offset, len),
                    Reference::Cluster(offset) => {
                        if !offset.is_aligned(self.geometry.cluster_bits) {
                            return Err(self.unaligned_cluster(st, offset, table, i));
                        }
                        (offset, size)
                    }
                };
                if *done == most {
                    return Ok(());
                }
                if matches!(change, Change::Add(_)) {
                    self.ensure_counted(st, offset)?;
                }
                self.change_refcount(st, offset, len, change, Reason::Snapshot)?;
                *done += 1;
            }
            if *done == most {
                return Ok(());
            }
            self.change_refcount(st, table, size, change, Reason::Snapshot)?;
            *done += 1;
        }
        Ok(())
    }

    /// Clears the copied flags of all that the tables of `l1` refer to, after
    /// the refcounts are durable.
    fn clear_flags(&self, st: &mut StateGuard<'_, H>, l1: &[u64]) -> Result<()> {
        self.write_back_all(st)?;
        let mut bytes = self.host.aligned(self.geometry.cluster_size() as usize)?;
        for index in 0..l1.len() {
            let Some(table) = self.table_of(st, l1, index)? else {
                continue;
            };
            self.read_l2(table, &mut bytes)?;
            if self.change_flags(&mut bytes, |_| Ok(false))? {
                self.write_l2(st, table, &bytes)?;
            }
        }
        self.host.file().flush()
    }

    /// Makes the copied flags of the disk agree with the refcounts, which are
    /// durable.
    pub(super) fn update_copied(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut bytes = self.host.aligned(self.geometry.cluster_size() as usize)?;
        let mut l1 = self.l1.to_vec();
        for index in 0..l1.len() {
            let Some(table) = self.table_of(st, &l1, index)? else {
                continue;
            };
            self.read_l2(table, &mut bytes)?;
            let changed = self.change_flags(&mut bytes, |offset| {
                if !offset.is_aligned(bits) {
                    return Ok(false);
                }
                let count = self.refcount(st, self.geometry.cluster_of(offset))?;
                Ok(count == 1)
            })?;
            if changed {
                self.write_l2(st, table, &bytes)?;
            }
            let owned = self.refcount(st, self.geometry.cluster_of(table))? == 1;
            l1[index] = L1Entry(l1[index]).with_copied(owned).0;
        }
        if l1 != self.l1.to_vec() {
            self.write_active_l1(st, &l1)?;
            self.l1.replace(l1);
        }
        Ok(())
    }

    /// Clears the copied flags of the L1 table, as all tables have two owners.
    pub(super) fn clear_l1_flags(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let mut l1 = self.l1.to_vec();
        for entry in &mut l1 {
            *entry = L1Entry(*entry).with_copied(false).0;
        }
        self.write_active_l1(st, &l1)?;
        self.l1.replace(l1);
        Ok(())
    }

    /// Writes the L1 table as a whole; durable when it returns.
    pub(super) fn write_active_l1(&self, st: &mut StateGuard<'_, H>, l1: &[u64]) -> Result<()> {
        if l1.is_empty() {
            return Ok(());
        }
        let offset = self.shared.read().header.l1_table_offset;
        self.host.event(Event::L1Update);
        self.write_pointer(st, MetadataKind::ACTIVE_L1, offset, &l1_bytes(l1, true))
    }

    /// A cluster that something refers to is counted: there is a block for it.
    /// In a damaged image one is made, as far as it can be, and `EAGAIN` is what
    /// users know.
    fn ensure_counted(&self, st: &mut StateGuard<'_, H>, offset: HostOffset) -> Result<()> {
        let (id, _) = self.block_of(self.geometry.cluster_of(offset));
        if self.ensure_block(st, id)? {
            return Err(Error::errno(libc::EAGAIN));
        }
        Ok(())
    }

    /// Tells of a cluster in an L2 table that cannot be there.
    pub(in crate::image) fn unaligned_cluster(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        table: HostOffset,
        index: usize,
    ) -> Error {
        let message = format!(
            "Cluster allocation offset {:#x} unaligned (L2 offset: {:#x}, L2 index: {})",
            offset.0,
            table.0,
            Hex(index as u64)
        );
        self.corrupt(st, true, None, None, message)
    }

    /// The L2 table of an L1 entry, if there is one.
    pub(in crate::image) fn table_of(
        &self,
        st: &mut StateGuard<'_, H>,
        l1: &[u64],
        index: usize,
    ) -> Result<Option<HostOffset>> {
        let Some(table) = L1Entry(l1[index]).table() else {
            return Ok(None);
        };
        if !table.is_aligned(self.geometry.cluster_bits) {
            let message = format!(
                "L2 table offset {:#x} unaligned (L1 index: {})",
                table.0,
                Hex(index as u64)
            );
            return Err(self.corrupt(st, true, None, None, message));
        }
        Ok(Some(table))
    }

    /// Reads an L2 table as it is in the file.
    pub(in crate::image) fn read_l2(&self, table: HostOffset, bytes: &mut [u8]) -> Result<()> {
        self.ensure_usable()?;
        if self.read_cached_l2(table, bytes) {
            return Ok(());
        }
        self.host.event(Event::L2Load);
        self.host.file().read(table.0, bytes)?;
        self.keep_l2(table, bytes);
        Ok(())
    }

    /// Reads an L2 table from the cache; `false` where not all of it is there.
    fn read_cached_l2(&self, table: HostOffset, bytes: &mut [u8]) -> bool {
        let size = self.l2.slice_size();
        for (part, number) in bytes.chunks_exact_mut(size).zip(0..) {
            let Some(slice) = self.l2.peek(table.add(number * size as u64)) else {
                return false;
            };
            slice.to_bytes(0, part);
        }
        true
    }

    /// Leaves an L2 table of the file in the cache, if nothing has to go for it.
    fn keep_l2(&self, table: HostOffset, bytes: &[u8]) {
        if bytes.len() / self.l2.slice_size() <= self.l2.spare_slices() {
            self.insert_slices(table, bytes);
        }
    }

    /// Writes an L2 table to the file, of the disk or of snapshots.
    pub(in crate::image) fn write_l2(
        &self,
        st: &mut StateGuard<'_, H>,
        table: HostOffset,
        bytes: &[u8],
    ) -> Result<()> {
        // It may be the table of the disk and of snapshots at the same time.
        let kinds = MetadataKind::ACTIVE_L2 | MetadataKind::INACTIVE_L2;
        self.ensure_no_overlap(st, kinds, table.0, bytes.len() as u64)?;
        self.l2.discard(table, bytes.len() as u64);
        self.host.event(Event::L2Update);
        self.host.file().write(table.0, bytes)?;
        self.keep_l2(table, bytes);
        Ok(())
    }

    /// What an entry of an L2 table refers to.
    fn reference(&self, table: &[u8], index: usize) -> Reference {
        let entry = self.raw_entry(table, index);
        if entry.is_compressed() {
            let extent = entry.compressed(self.geometry.cluster_bits);
            return Reference::Compressed(extent.offset, extent.len);
        }
        match entry.0 & OFFSET_MASK {
            0 => Reference::None,
            offset => Reference::Cluster(HostOffset(offset)),
        }
    }

    /// An entry of an L2 table.
    pub(in crate::image) fn raw_entry(&self, table: &[u8], index: usize) -> L2Entry {
        let mut word = [0; 8];
        word.copy_from_slice(&table[index << self.geometry.l2_entry_bits..][..8]);
        L2Entry(u64::from_be_bytes(word))
    }

    /// Sets the copied flag of each cluster as `owned` says, of its
    /// offset; never for compressed ones. Returns whether anything changed.
    fn change_flags(
        &self,
        table: &mut [u8],
        mut owned: impl FnMut(HostOffset) -> Result<bool>,
    ) -> Result<bool> {
        let mut changed = false;
        for index in 0..self.geometry.l2_entries() as usize {
            let entry = self.raw_entry(table, index);
            let copied = match self.reference(table, index) {
                Reference::Cluster(offset) => owned(offset)?,
                Reference::None | Reference::Compressed(..) => false,
            };
            if copied != entry.copied() {
                let entry = entry.with_copied(copied);
                let at = index << self.geometry.l2_entry_bits;
                table[at..at + 8].copy_from_slice(&entry.0.to_be_bytes());
                changed = true;
            }
        }
        Ok(changed)
    }
}

/// What an entry of an L2 table refers to.
enum Reference {
    /// Nothing.
    None,
    /// A host cluster, for data or reserved.
    Cluster(HostOffset),
    /// Compressed data: offset and length.
    Compressed(HostOffset, u64),
}
