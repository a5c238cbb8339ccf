//! Another width of the refcounts.
//!
//! Blocks and a table of the new width are made beside those in force, which
//! count them like everything else; the header then goes over to them at once.
//! A crash before that leaks the new ones, one after it the old ones.

use super::super::refcounts::BlockId;
use super::super::{Image, StateGuard};
use super::{NOT_UPDATED, Progress};
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::geometry::MAX_REFTABLE_BYTES;
use crate::format::refcount::RefcountOrder;
use crate::host::{File, Host};
use crate::units::{ClusterIndex, HostOffset, div_up};

/// The refcount table and blocks that are not in force any more: offset and
/// bytes of each.
#[must_use = "they are leaked unless they are given back"]
pub struct Superseded(Vec<(HostOffset, u64)>);

/// The table that is being made.
struct NewTable {
    order: RefcountOrder,
    /// Where each block is, 0 where all counts are 0.
    blocks: Vec<u64>,
    /// Where the table itself is, and its length in clusters.
    place: Option<(HostOffset, u64)>,
}

impl<H: Host> Image<H> {
    /// Gives the refcounts another width. The file is complete afterwards; this
    /// value is not to be used any more, but for another one that is opened in
    /// its place, and gives back what it is told to.
    ///
    /// # Errors
    /// `EINVAL` where a count does not fit, `EFBIG` where the table would get
    /// too long; those of the file. The image is as it was then.
    pub fn change_refcount_width(
        &self,
        order: RefcountOrder,
        tell: Progress<'_>,
    ) -> Result<Superseded> {
        if self.info().version < 3 && order != RefcountOrder::BITS_16 {
            return Err(Error::invalid(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                 (use compat=1.1 or greater)",
            ));
        }
        self.inactivate()?;
        let mut st = self.lock();
        self.begin_change_of_snapshots(&mut st)?;
        self.need_refcounts(&mut st)?;
        self.ensure_counts_fit(&mut st, order)?;
        let mut new = NewTable {
            order,
            blocks: Vec::new(),
            place: None,
        };
        let made = self.make_new_table(&mut st, &mut new, tell);
        let result = made.and_then(|()| self.switch_to(&mut st, &new));
        if result.is_err() {
            for (offset, len) in new.parts(self.geometry.cluster_size()) {
                self.free_table(&mut st, offset, len);
            }
        }
        result
    }

    /// Gives back what another image, whose place this one has taken, had.
    ///
    /// # Errors
    /// Those of the file.
    pub fn release(&self, superseded: Superseded) -> Result<()> {
        let mut st = self.lock();
        self.need_refcounts(&mut st)?;
        for (offset, len) in superseded.0 {
            self.free_table(&mut st, offset, len);
        }
        self.pass_discards(&mut st)
    }

    fn ensure_counts_fit(&self, st: &mut StateGuard<'_, H>, order: RefcountOrder) -> Result<()> {
        let end = self.counted_clusters(st);
        let mut next = ClusterIndex(0);
        while let Some(cluster) = self.next_used(st, next, end)? {
            let count = self.refcount(st, cluster)?;
            if count > order.max() {
                return Err(Error::invalid(format!(
                    "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has \
                     a refcount of {count}",
                    order.bits(),
                    self.geometry.offset_of(cluster).0,
                )));
            }
            next = ClusterIndex(cluster.0 + 1);
        }
        Ok(())
    }

    /// How many clusters the blocks that are there count.
    fn counted_clusters(&self, st: &StateGuard<'_, H>) -> u64 {
        let mut table = (0..st.refcounts.table().len() as u64).rev();
        let last = table.find(|id| st.refcounts.block_offset(BlockId(*id)).is_some());
        last.map_or(0, |id| (id + 1) * self.geometry.refcounts_per_block())
    }

    /// The first cluster from `from` on, before `end`, that is in use.
    fn next_used(
        &self,
        st: &mut StateGuard<'_, H>,
        from: ClusterIndex,
        end: u64,
    ) -> Result<Option<ClusterIndex>> {
        let per_block = self.geometry.refcounts_per_block();
        let mut at = from.0;
        while at < end {
            let found = self.scan_block(st, ClusterIndex(at)..ClusterIndex(end), false)?;
            if found.is_some() {
                return Ok(found);
            }
            at = (at / per_block + 1) * per_block;
        }
        Ok(None)
    }

    fn make_new_table(
        &self,
        st: &mut StateGuard<'_, H>,
        new: &mut NewTable,
        tell: Progress<'_>,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let mut walks = 0;
        // What is allocated has to be counted, too.
        while self.allocate_new_blocks(st, new, walks, tell)? {
            walks += 1;
            let clusters = div_up(new.blocks.len() as u64 * 8, size);
            if clusters * size > MAX_REFTABLE_BYTES {
                return Err(Error::new(
                    libc::EFBIG,
                    "The refcount table would be too long for this width",
                ));
            }
            if let Some((offset, clusters)) = new.place.take() {
                self.free_table(st, offset, clusters * size);
            }
            let offset = self
                .allocate_metadata(st, clusters * size)
                .map_err(|error| {
                    Error::with_errno(error.code(), "Failed to allocate the new reftable")
                })?;
            new.place = Some((offset, clusters));
        }
        walks += 1;
        self.write_new_blocks(st, new, walks, tell)?;
        let Some((offset, clusters)) = new.place else {
            // An image whose header is not counted.
            return Err(Error::errno(libc::EIO));
        };
        let mut bytes = vec![0; (clusters * size) as usize];
        for (at, block) in bytes.chunks_exact_mut(8).zip(&new.blocks) {
            at.copy_from_slice(&block.to_be_bytes());
        }
        self.ensure_no_overlap(st, MetadataKind::empty(), offset.0, bytes.len() as u64)?;
        self.host
            .file()
            .write(offset.0, &bytes)
            .and_then(|()| self.write_back_all(st))
            .map_err(|error| Error::with_errno(error.code(), "Failed to write the new reftable"))
    }

    /// Makes room for each new block that has anything to count. Returns
    /// whether there was any.
    fn allocate_new_blocks(
        &self,
        st: &mut StateGuard<'_, H>,
        new: &mut NewTable,
        walk: u64,
        tell: Progress<'_>,
    ) -> Result<bool> {
        let size = self.geometry.cluster_size();
        let per_block = new.order.per_bytes(size);
        let total = (walk + 2).max(3);
        let mut made = false;
        let mut id = 0;
        loop {
            // More blocks of the old width may come while this goes on.
            let blocks = div_up(self.counted_clusters(st), per_block);
            tell(walk * blocks + id.min(blocks), total * blocks);
            if id >= blocks {
                return Ok(made);
            }
            let end = (id + 1) * per_block;
            if self
                .next_used(st, ClusterIndex(id * per_block), end)?
                .is_some()
            {
                let at = id as usize;
                if new.blocks.len() <= at {
                    new.blocks.resize(at + 1, 0);
                }
                if new.blocks[at] == 0 {
                    let offset = self.allocate_metadata(st, size).map_err(|error| {
                        Error::with_errno(error.code(), "Failed to allocate refblock")
                    })?;
                    new.blocks[at] = offset.0;
                    made = true;
                }
            }
            id += 1;
            if id * 8 > MAX_REFTABLE_BYTES {
                return Ok(made);
            }
        }
    }

    fn allocate_metadata(&self, st: &mut StateGuard<'_, H>, len: u64) -> Result<HostOffset> {
        let offset = self.allocate(st, len)?;
        if offset.0 == 0 {
            let message = "Preventing invalid allocation of refcount block at offset 0".to_owned();
            return Err(self.corrupt(st, true, None, None, message));
        }
        Ok(offset)
    }

    fn write_new_blocks(
        &self,
        st: &mut StateGuard<'_, H>,
        new: &NewTable,
        walk: u64,
        tell: Progress<'_>,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let per_block = new.order.per_bytes(size);
        let blocks = new.blocks.len() as u64;
        for (id, offset) in (0..).zip(&new.blocks) {
            tell(walk * blocks + id, (walk + 1) * blocks);
            if *offset == 0 {
                continue;
            }
            let mut bytes = self.host.aligned(size as usize)?;
            let first = id * per_block;
            let mut next = ClusterIndex(first);
            while let Some(cluster) = self.next_used(st, next, first + per_block)? {
                let count = self.refcount(st, cluster)?;
                let index = (cluster.0 - first) as usize;
                new.order.set(&mut bytes, index, count);
                next = ClusterIndex(cluster.0 + 1);
            }
            self.ensure_no_overlap(st, MetadataKind::empty(), *offset, size)?;
            self.host
                .file()
                .write(*offset, &bytes)
                .map_err(|error| Error::with_errno(error.code(), "Failed to write refblock"))?;
        }
        tell((walk + 1) * blocks, (walk + 1) * blocks);
        Ok(())
    }

    /// Puts the new table, which is durable, in force.
    fn switch_to(&self, st: &mut StateGuard<'_, H>, new: &NewTable) -> Result<Superseded> {
        let (offset, clusters) = new.place.ok_or(Error::errno(libc::EIO))?;
        let size = self.geometry.cluster_size();
        let old = NewTable {
            order: self.geometry.refcount_order,
            blocks: st.refcounts.table().to_vec(),
            place: Some((
                st.refcounts.table_offset(),
                div_up(st.refcounts.table().len() as u64 * 8, size),
            )),
        };
        self.set_width(new.order, offset, clusters);
        if let Err(error) = self.switch_header(st) {
            if let Some((offset, clusters)) = old.place {
                self.set_width(old.order, offset, clusters);
            }
            return Err(Error::with_errno(error.code(), NOT_UPDATED));
        }
        Ok(Superseded(old.parts(size)))
    }

    fn set_width(&self, order: RefcountOrder, table: HostOffset, clusters: u64) {
        let header = &mut self.shared.write().header;
        header.refcount_order = order;
        header.refcount_table_offset = table.0;
        header.refcount_table_clusters = clusters as u32;
    }
}

impl NewTable {
    /// Blocks and table: offset and bytes.
    fn parts(&self, cluster_size: u64) -> Vec<(HostOffset, u64)> {
        let places = self.blocks.iter().map(|entry| {
            let offset = entry & super::super::refcounts::TABLE_OFFSET_MASK;
            (HostOffset(offset), cluster_size)
        });
        let table = self
            .place
            .map(|(at, clusters)| (at, clusters * cluster_size));
        places.filter(|(at, _)| at.0 != 0).chain(table).collect()
    }
}
