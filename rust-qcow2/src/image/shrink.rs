//! Giving back what a smaller disk does not need: L2 tables, refcount blocks,
//! the end of the file.

use super::refcounts::{BlockId, Reason, TABLE_OFFSET_MASK};
use super::zero::After;
use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::{L1Entry, MetadataKind};
use crate::host::{Event, File, Host, Preallocation};
use crate::units::{ClusterIndex, GuestOffset, HostOffset, div_up, round_up};

impl<H: Host> Image<H> {
    /// Takes back what a disk of `old` bytes has beyond `new`.
    pub(super) fn shrink(&self, st: &mut StateGuard<'_, H>, old: u64, new: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let cut = round_up(new, bits);
        self.discard_clusters(
            st,
            GuestOffset(cut),
            self.mapped_end(old).saturating_sub(cut),
            Reason::Always,
            After::Unallocated,
        )
        .map_err(|error| error.context("Failed to discard cropped clusters"))?;
        self.shrink_l1(st, self.geometry.l1_entries_for(new))
            .map_err(|error| error.context("Failed to reduce the number of L2 tables"))?;
        self.shrink_refcounts(st)
            .map_err(|error| error.context("Failed to discard unused refblocks"))?;
        self.shrink_file(st)
            .map(drop)
            .map_err(|error| error.context("Failed to find the last cluster"))
    }

    /// The end of what the L1 table maps, behind a disk of `size` bytes: there
    /// may be the state of a machine, after going back to a snapshot.
    pub(super) fn mapped_end(&self, size: u64) -> u64 {
        let end = self.l1.len() << self.geometry.l2_span_bits();
        end.max(round_up(size, self.geometry.cluster_bits))
    }

    /// Frees the L2 tables from L1 entry `keep` on. The L1 table keeps its
    /// length.
    pub(super) fn shrink_l1(&self, st: &mut StateGuard<'_, H>, keep: u64) -> Result<()> {
        let before = self.l1.to_vec();
        let Some(cut) = before.get(keep as usize..) else {
            return Ok(());
        };
        if cut.iter().all(|entry| *entry == 0) {
            return Ok(());
        }
        // What the tables let go is durable before the tables are unlinked.
        self.write_back(st)?;
        let offset = self.shared.read().header.l1_table_offset + keep * 8;
        for index in keep..before.len() as u64 {
            self.l1.set(index, L1Entry(0));
        }
        let zeroes = vec![0; cut.len() * 8];
        self.host.event(Event::L1Update);
        if let Err(error) = self.write_pointer(st, MetadataKind::ACTIVE_L1, offset, &zeroes) {
            for (index, entry) in before.iter().enumerate() {
                self.l1.set(index as u64, L1Entry(*entry));
            }
            return Err(error);
        }
        for entry in cut {
            if let Some(table) = L1Entry(*entry).table() {
                self.free(st, table, self.geometry.cluster_size(), Reason::Always);
            }
        }
        self.pass_discards(st)
    }

    /// Cuts the file behind its last cluster in use; returns where that ends.
    pub(super) fn shrink_file(&self, st: &mut StateGuard<'_, H>) -> Result<u64> {
        let file = self.host.file();
        let length = file.length()?;
        let end = self.used_end(st, length)?;
        if end < length {
            // Metadata first: nothing on disk may refer to what is cut off.
            self.write_back(st)?;
            file.flush()?;
            // A file that cannot shrink costs space, nothing else.
            let _ = file.truncate(end, false, Preallocation::Off, false);
        }
        Ok(end)
    }

    /// The offset behind the last cluster in use of a file of `length` bytes.
    pub(super) fn used_end(&self, st: &mut StateGuard<'_, H>, length: u64) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let mut cluster = div_up(length, 1 << bits);
        while cluster > 0 {
            let (id, _) = self.block_of(ClusterIndex(cluster - 1));
            if st.refcounts.block_offset(id).is_none() {
                cluster = id.0 * self.geometry.refcounts_per_block();
                continue;
            }
            if self.refcount(st, ClusterIndex(cluster - 1))? != 0 {
                return Ok(cluster << bits);
            }
            cluster -= 1;
        }
        Err(Error::errno(libc::EIO))
    }

    /// Frees refcount blocks that count nothing but themselves. The refcount
    /// table keeps its length.
    fn shrink_refcounts(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let before = st.refcounts.table().to_vec();
        let mut unused = Vec::new();
        for index in 0..before.len() as u64 {
            if self.counts_only_itself(st, BlockId(index))? {
                unused.push(BlockId(index));
            }
        }
        if unused.is_empty() {
            return Ok(());
        }
        // Nothing on disk may need the counts that go.
        self.write_back(st)?;
        let mut table = before.clone();
        for id in &unused {
            table[id.0 as usize] = 0;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let at = st.refcounts.table_offset();
        self.write_pointer(st, MetadataKind::REFCOUNT_TABLE, at.0, &bytes)?;
        for id in &unused {
            st.refcounts.remove_block(*id);
        }
        for id in unused {
            let offset = HostOffset(before[id.0 as usize] & TABLE_OFFSET_MASK);
            let (home, _) = self.block_of(self.geometry.cluster_of(offset));
            if st.refcounts.block_offset(home).is_some() {
                self.free_table(st, offset, self.geometry.cluster_size());
            } else if home == id {
                // The count has gone with the block.
                self.forget_metadata(offset);
            } else {
                let message = format!(
                    "Refblock at {:#x} is not covered by the refcount structures",
                    offset.0
                );
                return Err(self.corrupt(st, true, None, None, message));
            }
        }
        self.pass_discards(st)
    }

    /// Whether a refcount block exists that has no count but its own.
    fn counts_only_itself(&self, st: &mut StateGuard<'_, H>, id: BlockId) -> Result<bool> {
        let Some(offset) = st.refcounts.block_offset(id) else {
            return Ok(false);
        };
        if !offset.is_aligned(self.geometry.cluster_bits) {
            let message = format!(
                "Cannot get entry from refcount block cache: Offset {:#x} is unaligned",
                offset.0
            );
            return Err(self.corrupt(st, true, None, None, message));
        }
        let per_block = self.geometry.refcounts_per_block();
        let mut next = ClusterIndex(id.0 * per_block);
        let end = ClusterIndex(next.0 + per_block);
        let own = self.geometry.cluster_of(offset);
        while let Some(used) = self.scan_block(st, next..end, false)? {
            if used != own {
                return Ok(false);
            }
            next = ClusterIndex(used.0 + 1);
        }
        Ok(true)
    }
}
