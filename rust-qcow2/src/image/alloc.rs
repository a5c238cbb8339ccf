//! Finding, taking and giving back clusters of the file.

use std::io::Write as _;
use std::time::{Duration, Instant};

use super::inflight::Freed;
use super::refcounts::{BlockId, Change, Reason};
use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::geometry::{MAX_HOST_OFFSET, MAX_REFTABLE_BYTES};
use crate::host::{Event, File, Host};
use crate::units::{ClusterIndex, HostOffset, div_up};

/// How many bytes of the guest's disk may wait as in
/// [`Image::free_unfreed`] before somebody flushes.
const MAX_UNFREED: u64 = 32 << 20;

/// How long they wait at most before an allocation flushes: a file that grows
/// costs more than so few flushes.
const MAX_WAIT: Duration = Duration::from_secs(1);

impl<H: Host> Image<H> {
    /// Takes `len` bytes, rounded up to clusters, in one piece.
    ///
    /// Returns offset 0 only where the refcounts are damaged; the caller, who
    /// knows what it is for, reports that.
    pub(super) fn allocate(&self, st: &mut StateGuard<'_, H>, len: u64) -> Result<HostOffset> {
        self.ensure_usable()?;
        self.reclaim(st)?;
        self.host.event(Event::ClusterAlloc);
        let count = div_up(len, self.geometry.cluster_size());
        if count == 0 {
            // The L1 table of a disk without a byte.
            return Ok(HostOffset(0));
        }
        loop {
            let first = self.search_free(st, count)?;
            if self.ensure_blocks(st, first, count)? {
                // A new block may sit where the search ended.
                st.refcounts.free_hint = st.refcounts.free_hint.min(first.0);
                continue;
            }
            let offset = self.geometry.offset_of(first);
            let bytes = count << self.geometry.cluster_bits;
            if offset.0 != 0 {
                self.change_refcount(st, offset, bytes, Change::Add(1), Reason::Never)?;
            }
            return Ok(offset);
        }
    }

    /// [`Image::allocate`] for guest data: from the floor on, while there is
    /// one.
    pub(super) fn allocate_data(&self, st: &mut StateGuard<'_, H>, len: u64) -> Result<HostOffset> {
        let floor = st.data_floor;
        let hint = st.refcounts.free_hint;
        if hint >= floor {
            return self.allocate(st, len);
        }
        st.refcounts.free_hint = floor;
        let result = self.allocate(st, len);
        st.refcounts.free_hint = hint;
        result
    }

    /// Takes up to `count` clusters from `offset` on, as far as they are free;
    /// returns how many that are.
    pub(super) fn allocate_at(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        count: u64,
    ) -> Result<u64> {
        self.ensure_usable()?;
        let first = self.geometry.cluster_of(offset);
        loop {
            let mut free = 0;
            while free < count {
                let cluster = ClusterIndex(first.0 + free);
                if self.geometry.offset_of(cluster).0 >= MAX_HOST_OFFSET
                    || self.refcount(st, cluster)? != 0
                {
                    break;
                }
                free += 1;
            }
            if free == 0 {
                return Ok(0);
            }
            if self.ensure_blocks(st, first, free)? {
                continue;
            }
            let bytes = free << self.geometry.cluster_bits;
            self.change_refcount(st, offset, bytes, Change::Add(1), Reason::Never)?;
            return Ok(free);
        }
    }

    /// Gives clusters back. While requests are in flight that may have looked
    /// them up the count stays, and goes when they have left.
    ///
    /// A failure costs the space for a while, not the data, and is not the
    /// caller's.
    pub(super) fn free(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        len: u64,
        reason: Reason,
    ) {
        // What was never used cannot have been looked up.
        if matches!(reason, Reason::Never | Reason::Always) {
            self.host.event(Event::ClusterFree);
            self.free_now(st, offset, len, reason);
        } else {
            self.free_data(st, offset, len, reason);
        }
    }

    /// [`Image::free`] for what an L2 entry referred to, whatever the reason.
    pub(super) fn free_data(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        len: u64,
        reason: Reason,
    ) {
        self.host.event(Event::ClusterFree);
        let wait = self.inflight.must_wait(Freed {
            offset,
            len,
            reason,
        });
        if !wait {
            self.free_now(st, offset, len, reason);
        }
    }

    /// Lowers refcounts. Where they are damaged the user is told, and the
    /// clusters stay allocated: that costs space, and no data.
    fn free_now(&self, st: &mut StateGuard<'_, H>, offset: HostOffset, len: u64, reason: Reason) {
        let waiting = self
            .settle_pointer(st)
            .and_then(|()| self.refcounts_wait_for_l2(st));
        if waiting.is_err() && !self.is_broken() {
            // What keeps tables from being written is told when they should be;
            // nothing has changed, so this can be tried again.
            st.refcounts.unfreed.push(Freed {
                offset,
                len,
                reason,
            });
            return;
        }
        let freed =
            waiting.and_then(|()| self.change_refcount(st, offset, len, Change::Sub(1), reason));
        let Err(error) = freed else { return };
        // Where a write fails what it took goes back, and that is all one failure.
        let taken_back = matches!(reason, Reason::Never) && !self.is_broken();
        if !taken_back || error.code() == libc::EINVAL {
            // Without the name of the program, as it is known.
            let text = Error::with_errno(error.code(), "qcow2_free_clusters failed");
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// Gives the clusters of a table back. Tables are read under the metadata
    /// lock only, so no request can be using them.
    pub(super) fn free_table(&self, st: &mut StateGuard<'_, H>, offset: HostOffset, len: u64) {
        self.host.event(Event::ClusterFree);
        self.free_now(st, offset, len, Reason::Other);
    }

    /// Frees what waited for requests that have left meanwhile.
    pub(super) fn reclaim(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let most = (MAX_UNFREED >> self.geometry.cluster_bits).max(16);
        let unfreed = st.refcounts.unfreed.len() as u64;
        let long_ago = |at: Instant| at.elapsed() >= MAX_WAIT;
        if unfreed > most || unfreed > 0 && st.refcounts.flushed_for_unfreed.is_none_or(long_ago) {
            self.free_unfreed(st)?;
        }
        if self.inflight.is_empty() {
            return self.pass_discards(st);
        }
        for freed in self.inflight.released() {
            self.free_now(st, freed.offset, freed.len, freed.reason);
        }
        self.pass_discards(st)
    }

    /// [`Image::reclaim`], and of compressed data whatever nobody refers to, and
    /// everything that the file may have back.
    pub(super) fn reclaim_all(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        self.settle_pointer(st)?;
        // What cannot be freed there waits: the next one frees it, or fails.
        self.reclaim(st)?;
        self.free_unfreed(st)?;
        self.pass_all_discards(st)
    }

    /// Frees compressed data that were discarded or written anew, and what could
    /// not be freed when the file failed. As long as a table on disk refers to
    /// compressed data they are not given to anybody: after a crash they are the
    /// only copy of what a partial write left alone, and other bytes in their
    /// place could not be decompressed.
    fn free_unfreed(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        if st.refcounts.unfreed.is_empty() {
            return Ok(());
        }
        self.write_slices(st)?;
        self.host.file().flush()?;
        st.refcounts.flushed_for_unfreed = Some(Instant::now());
        for freed in std::mem::take(&mut st.refcounts.unfreed) {
            self.free_data(st, freed.offset, freed.len, freed.reason);
        }
        Ok(())
    }

    /// Finds `count` free clusters in a row, from the hint on, and moves the
    /// hint behind them.
    pub(super) fn search_free(
        &self,
        st: &mut StateGuard<'_, H>,
        count: u64,
    ) -> Result<ClusterIndex> {
        let limit = MAX_HOST_OFFSET >> self.geometry.cluster_bits;
        let mut start = st.refcounts.free_hint;
        let mut end = start;
        while end - start < count {
            if end >= limit {
                return Err(Error::errno(libc::EFBIG));
            }
            let per_block = self.geometry.refcounts_per_block();
            let block_end = (end / per_block + 1) * per_block;
            let wanted = start + count;
            if end == start {
                match self.scan_block(st, ClusterIndex(end)..ClusterIndex(block_end), true)? {
                    Some(free) => {
                        start = free.0;
                        end = free.0 + 1;
                    }
                    None => {
                        start = block_end;
                        end = block_end;
                    }
                }
            } else {
                match self.scan_block(st, ClusterIndex(end)..ClusterIndex(wanted), false)? {
                    Some(used) => {
                        start = used.0 + 1;
                        end = start;
                    }
                    None => end = wanted.min(block_end),
                }
            }
        }
        if end > limit {
            return Err(Error::errno(libc::EFBIG));
        }
        st.refcounts.free_hint = end;
        Ok(ClusterIndex(start))
    }

    /// Makes sure that all blocks for a range exist. Returns whether one was
    /// made, so that clusters may have been taken meanwhile.
    pub(super) fn ensure_blocks(
        &self,
        st: &mut StateGuard<'_, H>,
        first: ClusterIndex,
        count: u64,
    ) -> Result<bool> {
        let per_block = self.geometry.refcounts_per_block();
        let mut made = false;
        for id in first.0 / per_block..=(first.0 + count - 1) / per_block {
            made |= self.ensure_block(st, BlockId(id))?;
        }
        Ok(made)
    }

    /// Makes sure that a refcount block exists, or makes one that has to exist
    /// before it. Returns whether anything was made; the caller calls again
    /// until not.
    pub(super) fn ensure_block(&self, st: &mut StateGuard<'_, H>, id: BlockId) -> Result<bool> {
        if st.refcounts.block_offset(id).is_some() {
            return Ok(false);
        }
        self.host.event(Event::RefblockAlloc);
        let cluster = self.search_free(st, 1)?;
        let (home, index) = self.block_of(cluster);
        // A block whose own count has no block yet can only be that block.
        let counted = st.refcounts.block_offset(home).is_some();
        let beyond = |id: BlockId| id.0 >= st.refcounts.table().len() as u64;
        if counted && beyond(id) {
            self.grow_refcount_table(st, id, cluster)?;
            return Ok(true);
        }
        if !counted && beyond(home) {
            self.grow_refcount_table(st, home, cluster)?;
            return Ok(true);
        }
        let target = if counted { id } else { home };
        let offset = self.geometry.offset_of(cluster);
        if offset.0 == 0 {
            let message = "Preventing invalid allocation of refcount block at offset 0".to_owned();
            return Err(self.corrupt(st, true, None, None, message));
        }
        let size = self.geometry.cluster_size();
        self.ensure_no_overlap(st, MetadataKind::empty(), offset.0, size)?;
        let mut bytes = self.host.aligned(size as usize)?;
        if target == home {
            self.geometry.refcount_order.set(&mut bytes, index, 1);
        } else {
            self.change_refcount(st, offset, size, Change::Add(1), Reason::Never)?;
            self.write_refcount_block(st, home)?;
        }
        let result = self.link_block(st, target, offset, bytes);
        if result.is_err() && target != home {
            let _ = self.change_refcount(st, offset, size, Change::Sub(1), Reason::Never);
        }
        result?;
        Ok(true)
    }

    fn link_block(
        &self,
        st: &mut StateGuard<'_, H>,
        id: BlockId,
        offset: HostOffset,
        bytes: H::Aligned,
    ) -> Result<()> {
        self.make_room_for_block(st)?;
        self.l2.discard(offset, self.geometry.cluster_size());
        self.host.event(Event::RefblockAllocWrite);
        self.host.file().write(offset.0, &bytes)?;
        self.host.event(Event::RefblockAllocHookup);
        let at = st.refcounts.table_offset().0 + id.0 * 8;
        self.write_pointer(
            st,
            MetadataKind::REFCOUNT_TABLE,
            at,
            &offset.0.to_be_bytes(),
        )?;
        st.refcounts.set_block(id, offset);
        st.refcounts.insert_block(id, bytes);
        self.note_metadata(offset, MetadataKind::REFCOUNT_BLOCK);
        Ok(())
    }

    /// Replaces the refcount table by one that is long enough for `id`, and
    /// then some. The new table and the blocks that count it lie together
    /// behind all that is counted by `id`, where nothing is in use yet, so that
    /// nothing else changes. Block `id` itself is made as well, at `block`.
    fn grow_refcount_table(
        &self,
        st: &mut StateGuard<'_, H>,
        id: BlockId,
        block: ClusterIndex,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let per_block = self.geometry.refcounts_per_block();
        let order = self.geometry.refcount_order;
        let first_block = (id.0 + 1).max(div_up(block.0, per_block));
        let area = ClusterIndex(first_block * per_block);
        let total = self.blocks_for(area.0);
        let table_clusters = div_up((total + div_up(total, 2)) * 8, size);
        let blocks = total - first_block;
        let clusters = blocks + table_clusters;
        let end = area.0.saturating_add(clusters);
        if table_clusters * size > MAX_REFTABLE_BYTES
            || end > MAX_HOST_OFFSET >> self.geometry.cluster_bits
        {
            return Err(Error::errno(libc::EFBIG));
        }

        let file = self.host.file();
        let mut table = st.refcounts.table().to_vec();
        let old_len = table.len() as u64 * 8;
        table.resize((table_clusters * size / 8) as usize, 0);

        // Block `id`: counts itself, or is counted by a block that exists.
        let block_offset = self.geometry.offset_of(block);
        let (home, index) = self.block_of(block);
        let mut bytes = self.host.aligned(size as usize)?;
        self.ensure_no_overlap(st, MetadataKind::empty(), block_offset.0, size)?;
        if home == id {
            order.set(&mut bytes, index, 1);
        } else {
            self.change_refcount(st, block_offset, size, Change::Add(1), Reason::Never)?;
            self.write_refcount_block(st, home)?;
        }
        self.host.event(Event::RefblockAllocWrite);
        self.l2.discard(block_offset, size);
        file.write(block_offset.0, &bytes)?;
        table[id.0 as usize] = block_offset.0;

        let area_offset = self.geometry.offset_of(area);
        self.ensure_no_overlap(st, MetadataKind::empty(), area_offset.0, clusters * size)?;
        self.host.event(Event::RefblockAllocWriteBlocks);
        let mut left = clusters;
        for i in 0..blocks {
            let mut bytes = self.host.aligned(size as usize)?;
            for index in 0..left.min(per_block) {
                order.set(&mut bytes, index as usize, 1);
            }
            left = left.saturating_sub(per_block);
            let at = area_offset.add(i * size);
            file.write(at.0, &bytes)?;
            table[(first_block + i) as usize] = at.0;
        }
        self.host.event(Event::RefblockAllocWriteTable);
        let table_offset = area_offset.add(blocks * size);
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        file.write(table_offset.0, &bytes)?;
        // Blocks of the old table in memory stay valid: their places are kept.
        let old_offset = st.refcounts.table_offset();
        self.set_refcount_table(st, table_offset, table)?;
        self.free_table(st, old_offset, old_len);
        Ok(())
    }

    /// How many refcount blocks it takes to count `clusters` clusters, the
    /// blocks themselves, and a table for half as many again.
    fn blocks_for(&self, mut clusters: u64) -> u64 {
        let per_table_cluster = self.geometry.cluster_size() / 8;
        let per_block = self.geometry.refcounts_per_block();
        let (mut blocks, mut table) = (0, 0);
        let mut spare = true;
        loop {
            let before = (blocks, table);
            blocks = div_up(clusters + table + blocks, per_block);
            table = div_up(blocks, per_table_cluster);
            if (blocks, table) == before {
                if !spare {
                    return blocks;
                }
                clusters += div_up(table, 2);
                spare = false;
            }
        }
    }
}
