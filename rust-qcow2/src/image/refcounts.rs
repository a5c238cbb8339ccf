//! Refcount blocks in memory, and changing counts.

use std::ops::Range;
use std::time::Instant;

use rustc_hash::FxHashMap;

use super::inflight::Freed;
use super::open::read_table;
use super::space::Space;
use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::refcount::RefcountOrder;
use crate::host::{Event, File, Host};
use crate::units::{ClusterIndex, Hex, HostOffset};

/// Bits of a refcount table entry that hold the offset of the block.
pub(super) const TABLE_OFFSET_MASK: u64 = !0x1ff;

/// The number of a refcount block: its index in the refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct BlockId(pub(super) u64);

/// Why a cluster is freed; it decides whether the file gets the space back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A guest discard.
    Request,
    /// A deleted snapshot.
    Snapshot,
    /// Tables that moved, clusters that nobody shows any more.
    Other,
    /// Not given back: what is likely to be used again at once, as that of
    /// copy-on-write, or was never used.
    Never,
    /// Always given back.
    Always,
}

/// How a count changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// More references.
    Add(u64),
    /// Fewer references.
    Sub(u64),
}

impl Change {
    fn inverse(self) -> Self {
        match self {
            Self::Add(n) => Self::Sub(n),
            Self::Sub(n) => Self::Add(n),
        }
    }

    fn apply(self, count: u64, max: u64) -> Option<u64> {
        let new = match self {
            Self::Add(n) => count.checked_add(n),
            Self::Sub(n) => count.checked_sub(n),
        };
        // A damaged image may hold more than the largest count.
        new.filter(|count| *count <= max)
    }
}

struct Block<H: Host> {
    bytes: H::Aligned,
    dirty: bool,
    used: u64,
}

/// Reads a refcount table.
pub(super) fn read_refcount_table<H: Host>(
    host: &H,
    offset: HostOffset,
    entries: u64,
) -> Result<Vec<u64>> {
    host.event(Event::ReftableLoad);
    read_table(&host.file(), offset.0, entries)
        .map_err(|error| error.context("Could not initialize refcount handling"))
}

/// The refcount table and the blocks of it that are in memory.
///
/// The table of an image that is not written is read when it is first needed.
pub(super) struct Refcounts<H: Host> {
    loaded: bool,
    table: Vec<u64>,
    table_offset: HostOffset,
    blocks: FxHashMap<BlockId, Block<H>>,
    /// Counts lookups of blocks, to find the one not used for longest.
    clock: u64,
    /// No cluster below this one is free, as far as is worth knowing.
    pub(super) free_hint: u64,
    /// Where compressed data end that were written last, in a cluster that has
    /// room behind them.
    pub(super) packed_end: Option<HostOffset>,
    /// What the file is to have back.
    pub(super) space: Space,
    /// What could not be given back yet: compressed data that the tables on disk
    /// may still refer to, and clusters whose turn came while the file failed.
    pub(super) unfreed: Vec<Freed>,
    /// When the file was last flushed for the sake of those.
    pub(super) flushed_for_unfreed: Option<Instant>,
}

impl<H: Host> Refcounts<H> {
    /// With the table, or `None` where that is not read yet.
    pub(super) fn new(table: Option<Vec<u64>>, table_offset: HostOffset) -> Self {
        Self {
            loaded: table.is_some(),
            table: table.unwrap_or_default(),
            table_offset,
            blocks: FxHashMap::default(),
            clock: 0,
            free_hint: 0,
            packed_end: None,
            space: Space::default(),
            unfreed: Vec::new(),
            flushed_for_unfreed: None,
        }
    }

    /// The raw refcount table.
    pub(super) fn table(&self) -> &[u64] {
        &self.table
    }

    /// Where the refcount table is.
    pub(super) fn table_offset(&self) -> HostOffset {
        self.table_offset
    }

    /// Where a block is, `None` where there is none.
    pub(super) fn block_offset(&self, id: BlockId) -> Option<HostOffset> {
        let entry = self.table.get(usize::try_from(id.0).ok()?)?;
        match entry & TABLE_OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// Blocks that have to be written, by their number.
    pub(super) fn dirty_blocks(&self) -> Vec<BlockId> {
        let mut ids: Vec<_> = self
            .blocks
            .iter()
            .filter(|(_, block)| block.dirty)
            .map(|(id, _)| *id)
            .collect();
        ids.sort_unstable();
        ids
    }

    /// The bytes of a block that has to be written.
    pub(super) fn dirty_bytes(&self, id: BlockId) -> Option<&[u8]> {
        self.blocks
            .get(&id)
            .filter(|block| block.dirty)
            .map(|block| &*block.bytes)
    }

    pub(super) fn mark_clean(&mut self, id: BlockId) {
        if let Some(block) = self.blocks.get_mut(&id) {
            block.dirty = false;
        }
    }

    /// Forgets the table and all blocks, of which none is dirty.
    fn unload(&mut self) {
        self.blocks = FxHashMap::default();
        self.table = Vec::new();
        self.loaded = false;
        self.free_hint = 0;
        self.packed_end = None;
    }

    /// Forgets all blocks in memory, dirty or not.
    pub(super) fn forget_blocks(&mut self) {
        self.blocks.clear();
    }

    /// Exchanges the table in memory.
    pub(super) fn replace_table(&mut self, table: Vec<u64>, offset: HostOffset) {
        self.loaded = true;
        self.table = table;
        self.table_offset = offset;
        self.packed_end = None;
    }

    /// Points a table entry, that exists, to a new block.
    pub(super) fn set_block(&mut self, id: BlockId, offset: HostOffset) {
        self.table[id.0 as usize] = offset.0;
    }

    /// Forgets a block, in the table and in memory.
    pub(super) fn remove_block(&mut self, id: BlockId) {
        self.table[id.0 as usize] = 0;
        self.blocks.remove(&id);
    }

    /// Puts a block into memory, clean.
    pub(super) fn insert_block(&mut self, id: BlockId, bytes: H::Aligned) {
        self.clock += 1;
        self.blocks.insert(
            id,
            Block {
                bytes,
                dirty: false,
                used: self.clock,
            },
        );
    }

    fn oldest(&self) -> Option<BlockId> {
        self.blocks
            .iter()
            .min_by_key(|(_, block)| block.used)
            .map(|(id, _)| *id)
    }

    fn touch(&mut self, id: BlockId) -> Option<&mut Block<H>> {
        self.clock += 1;
        let clock = self.clock;
        let block = self.blocks.get_mut(&id)?;
        block.used = clock;
        Some(block)
    }
}

impl<H: Host> Image<H> {
    /// Brings the refcount table into memory. To be called before anything
    /// that looks at refcounts in an image that may be open for reading only.
    pub(super) fn need_refcounts(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        if st.refcounts.loaded {
            return Ok(());
        }
        let (offset, entries) = {
            let header = &self.shared.read().header;
            let clusters = u64::from(header.refcount_table_clusters);
            let entries = clusters << (self.geometry.cluster_bits - 3);
            (HostOffset(header.refcount_table_offset), entries)
        };
        let table = read_refcount_table(&self.host, offset, entries)?;
        st.refcounts.replace_table(table, offset);
        Ok(())
    }

    /// Gets ready for being written.
    ///
    /// # Errors
    /// Those of the file.
    pub fn prepare_writing(&self) -> Result<()> {
        self.need_refcounts(&mut self.lock())
    }

    /// Drops what is needed for writing only, where the image is not written.
    /// No request is in flight.
    pub fn end_writing(&self) {
        if !self.is_writable() {
            self.release_refcounts(&mut self.lock());
            self.l1.compact();
        }
    }

    /// [`Image::end_writing`] for refcounts.
    pub(super) fn release_refcounts(&self, st: &mut StateGuard<'_, H>) {
        if !self.is_writable() && st.refcounts.dirty_blocks().is_empty() {
            st.refcounts.unload();
        }
    }

    /// The block that has the count of a cluster, and the place in it.
    pub(super) fn block_of(&self, cluster: ClusterIndex) -> (BlockId, usize) {
        let per_block = self.geometry.refcounts_per_block();
        (
            BlockId(cluster.0 / per_block),
            (cluster.0 % per_block) as usize,
        )
    }

    /// Whether refcounts have to be right on disk: not while the dirty bit says
    /// that they are rebuilt before the next use.
    pub(super) fn needs_accurate_refcounts(&self) -> bool {
        use crate::format::header::Incompatible;
        !self
            .shared
            .read()
            .header
            .incompatible
            .contains(Incompatible::DIRTY)
    }

    /// How often a cluster is referred to.
    pub(super) fn refcount(
        &self,
        st: &mut StateGuard<'_, H>,
        cluster: ClusterIndex,
    ) -> Result<u64> {
        let (id, index) = self.block_of(cluster);
        let order = self.geometry.refcount_order;
        if !self.load_block(st, id)? {
            return Ok(0);
        }
        Ok(st
            .refcounts
            .blocks
            .get(&id)
            .map_or(0, |block| order.get(&block.bytes, index)))
    }

    /// The first cluster of `range` whose count is (`zero`) or is not zero, if it
    /// is in the refcount block in which the range begins; else `None`.
    pub(super) fn scan_block(
        &self,
        st: &mut StateGuard<'_, H>,
        range: Range<ClusterIndex>,
        zero: bool,
    ) -> Result<Option<ClusterIndex>> {
        if range.is_empty() {
            return Ok(None);
        }
        let (id, index) = self.block_of(range.start);
        let per_block = self.geometry.refcounts_per_block();
        if !self.load_block(st, id)? {
            return Ok(zero.then_some(range.start));
        }
        let order: RefcountOrder = self.geometry.refcount_order;
        let Some(block) = st.refcounts.blocks.get(&id) else {
            return Ok(None);
        };
        // Nothing behind the range is looked at: blocks are long, allocations short.
        let end = (range.end.0 - id.0 * per_block).min(per_block) as usize;
        let hit = (index..end)
            .find(|i| (order.get(&block.bytes, *i) == 0) == zero)
            .map(|i| ClusterIndex(id.0 * per_block + i as u64));
        Ok(hit)
    }

    /// Brings a block into memory. `false` where the image has no such block.
    pub(super) fn load_block(&self, st: &mut StateGuard<'_, H>, id: BlockId) -> Result<bool> {
        if st.refcounts.touch(id).is_some() {
            return Ok(true);
        }
        let Some(offset) = st.refcounts.block_offset(id) else {
            return Ok(false);
        };
        self.ensure_usable()?;
        if !offset.is_aligned(self.geometry.cluster_bits) {
            let message = format!(
                "Refblock offset {:#x} unaligned (reftable index: {})",
                offset.0,
                Hex(id.0)
            );
            return Err(self.corrupt(st, true, None, None, message));
        }
        self.make_room_for_block(st)?;
        let mut bytes = self.host.aligned(self.geometry.cluster_size() as usize)?;
        self.host.file().read(offset.0, &mut bytes)?;
        st.refcounts.insert_block(id, bytes);
        Ok(true)
    }

    pub(super) fn make_room_for_block(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let capacity = self.shared.read().options.caches.refcount_blocks;
        while st.refcounts.blocks.len() >= capacity {
            let Some(victim) = st.refcounts.oldest() else {
                break;
            };
            self.write_refcount_block(st, victim)?;
            st.refcounts.blocks.remove(&victim);
        }
        Ok(())
    }

    /// Writes all refcount blocks that are dirty, after what they wait for.
    pub(super) fn write_dirty_refcounts(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        for id in st.refcounts.dirty_blocks() {
            self.write_refcount_block(st, id)?;
        }
        Ok(())
    }

    /// Changes the counts of the clusters that `len` bytes at `offset` touch:
    /// all of them, or on failure none. `EINVAL` where a count would leave its
    /// range.
    pub(super) fn change_refcount(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        len: u64,
        change: Change,
        reason: Reason,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.settle_pointer(st)?;
        self.host.event(Event::RefblockAlloc);
        self.host.event(Event::RefblockLoad);
        let first = self.geometry.cluster_of(offset).0;
        let last = self.geometry.cluster_of(offset.add(len - 1)).0;
        if matches!(change, Change::Sub(_)) {
            self.refcounts_wait_for_l2(st)?;
        }
        if matches!(change, Change::Add(_)) {
            // Before anything is written to clusters that tables on disk have
            // not let go.
            self.settle_freed(st)?;
        }
        for cluster in first..=last {
            if let Err(error) = self.change_one(st, ClusterIndex(cluster), change, reason) {
                for undo in first..cluster {
                    // Just loaded and changed the other way, so this works but
                    // for I/O errors, which leave a leak.
                    let undone =
                        self.change_one(st, ClusterIndex(undo), change.inverse(), Reason::Never);
                    if undone.is_err() {
                        break;
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn change_one(
        &self,
        st: &mut StateGuard<'_, H>,
        cluster: ClusterIndex,
        change: Change,
        reason: Reason,
    ) -> Result<()> {
        let order = self.geometry.refcount_order;
        let (id, index) = self.block_of(cluster);
        if matches!(change, Change::Add(_)) {
            while self.ensure_block(st, id)? {}
        }
        if !self.load_block(st, id)? {
            return Err(Error::errno(libc::EINVAL));
        }
        let Some(block) = st.refcounts.touch(id) else {
            return Err(Error::errno(libc::EIO));
        };
        let old = order.get(&block.bytes, index);
        let new = change
            .apply(old, order.max())
            .ok_or_else(|| Error::errno(libc::EINVAL))?;
        order.set(&mut block.bytes, index, new);
        block.dirty = true;
        if new == 0 {
            self.cluster_is_free(st, cluster, reason);
        }
        Ok(())
    }

    fn cluster_is_free(&self, st: &mut StateGuard<'_, H>, cluster: ClusterIndex, reason: Reason) {
        let size = self.geometry.cluster_size();
        let offset = self.geometry.offset_of(cluster);
        st.refcounts.free_hint = st.refcounts.free_hint.min(cluster.0);
        let packed = st.refcounts.packed_end;
        if packed.is_some_and(|end| self.geometry.cluster_of(end) == cluster) {
            st.refcounts.packed_end = None;
        }
        // A cached table at this place must not be written over its successor.
        self.l2.discard(offset, size);
        self.forget_metadata(offset);
        if self.shared.read().options.passes(reason) {
            st.refcounts.space.add(offset, size, reason);
        }
    }

    /// Puts a refcount table in force that was written to the file already,
    /// with all blocks it refers to: header first, then memory.
    pub(super) fn set_refcount_table(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        entries: Vec<u64>,
    ) -> Result<()> {
        use crate::format::header::field;
        let clusters = (entries.len() as u64 * 8).div_ceil(self.geometry.cluster_size()) as u32;
        self.host.event(Event::RefblockAllocSwitchTable);
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&offset.0.to_be_bytes());
        bytes[8..].copy_from_slice(&clusters.to_be_bytes());
        self.write_pointer(st, MetadataKind::MAIN_HEADER, field::REFCOUNT_TABLE, &bytes)?;
        {
            let mut shared = self.shared.write();
            shared.header.refcount_table_offset = offset.0;
            shared.header.refcount_table_clusters = clusters;
        }
        st.refcounts.replace_table(entries, offset);
        self.forget_overlap_map();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
