//! Emptying an image, as after its content was committed to the backing file.

use super::refcounts::{Change, Reason};
use super::zero::After;
use super::{Image, StateGuard};
use crate::error::Result;
use crate::format::header::{Encryption, field};
use crate::host::{Event, File, Host, Preallocation, ZeroFlags};
use crate::units::{GuestOffset, HostOffset, div_up};

/// Header, refcount table and one refcount block: what comes before the L1
/// table in an empty image, in clusters.
const BEFORE_L1: u64 = 3;

impl<H: Host> Image<H> {
    /// Empties the image: everything reads as in the backing file, and the
    /// file shrinks to what an empty image needs. No request is in flight.
    ///
    /// # Errors
    /// Those of the file. Where one comes halfway the image cannot be used any
    /// more; it is repaired when it is opened next.
    pub fn make_empty(&self) -> Result<()> {
        let mut st = self.lock();
        self.ensure_usable()?;
        self.reclaim_all(&mut st)?;
        let l1_clusters = div_up(self.l1.len() * 8, self.geometry.cluster_size());
        // Bitmaps and snapshots would be overwritten.
        if self.geometry.version >= 3
            && !self.has_data_file()
            && self.encryption != Some(Encryption::Luks)
            && !self.has_bitmaps()
            && self.shared.read().snapshots.list.is_empty()
            && BEFORE_L1 + l1_clusters <= self.geometry.refcounts_per_block()
        {
            return self.lay_out_anew(&mut st, l1_clusters);
        }
        let size = self.mapped_end(self.size());
        let after = After::Unallocated;
        self.discard_clusters(&mut st, GuestOffset(0), size, Reason::Snapshot, after)?;
        self.shrink_l1(&mut st, 0)?;
        self.shrink_file(&mut st)?;
        self.write_back(&mut st)
    }

    /// Writes the tables of an empty image to the begin of the file, under the
    /// dirty bit: whatever is interrupted is repaired at the next open, to an
    /// image that is as full as before or empty.
    fn lay_out_anew(&self, st: &mut StateGuard<'_, H>, l1_clusters: u64) -> Result<()> {
        self.write_back_all(st)?;
        self.l2.clear();
        st.refcounts.forget_blocks();
        self.mark_dirty(st)?;
        let result = self.write_empty_tables(st, l1_clusters);
        if result.is_err() {
            // Memory and file do not agree any more.
            self.set_broken();
            return result;
        }
        self.mark_clean(st)?;
        let len = (BEFORE_L1 + l1_clusters) << self.geometry.cluster_bits;
        self.host
            .file()
            .truncate(len, false, Preallocation::Off, false)
    }

    fn write_empty_tables(&self, st: &mut StateGuard<'_, H>, l1_clusters: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        let file = self.host.file();
        let l1_offset = self.shared.read().header.l1_table_offset;

        self.host.event(Event::L1Update);
        file.write_zeroes(l1_offset, l1_clusters * size, ZeroFlags::default())?;
        // Before what the old table refers to is written over.
        file.flush()?;
        let entries = self.l1.len();
        self.l1.replace((0..entries).map(|_| 0));
        self.links().changed_altogether();

        self.host.event(Event::EmptyImagePrepare);
        file.write_zeroes(
            size,
            (BEFORE_L1 - 1 + l1_clusters) * size,
            ZeroFlags::default(),
        )?;

        self.host.event(Event::L1Update);
        self.host.event(Event::ReftableUpdate);
        let (table, block, l1) = (HostOffset(size), HostOffset(2 * size), BEFORE_L1 * size);
        // The place of the L1 table and the refcount table, in one write.
        let mut pointers = Vec::with_capacity(20);
        pointers.extend_from_slice(&l1.to_be_bytes());
        pointers.extend_from_slice(&table.0.to_be_bytes());
        pointers.extend_from_slice(&1u32.to_be_bytes());
        file.flush()?;
        file.write(field::L1 + 4, &pointers)?;
        file.flush()?;
        {
            let mut shared = self.shared.write();
            shared.header.l1_table_offset = l1;
            shared.header.refcount_table_offset = table.0;
            shared.header.refcount_table_clusters = 1;
        }
        self.forget_overlap_map();

        self.host.event(Event::RefblockAlloc);
        file.write(table.0, &block.0.to_be_bytes())?;
        file.flush()?;
        let mut entries = vec![0; (size / 8) as usize];
        entries[0] = block.0;
        st.refcounts.replace_table(entries, table);
        st.refcounts.free_hint = 0;
        let used = (BEFORE_L1 + l1_clusters) * size;
        self.change_refcount(st, HostOffset(0), used, Change::Add(1), Reason::Never)
    }
}
