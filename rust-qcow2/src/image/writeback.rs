//! The order in which metadata reaches the file.
//!
//! After a crash an image may have clusters that nobody refers to (leaks) but
//! never a reference to a cluster that may be given to somebody else, nor a
//! mapping to data that were not written. So, of what one operation changes:
//!
//! 1. data come before the L2 entries that point there: copied data always, as
//!    they were durable where they came from; the guest's, which it flushes if
//!    it wants to keep them, with the flush that rule 2 takes;
//! 2. refcounts that grow come before the L2 entries that need them;
//! 3. L2 entries that let a cluster go come before the refcounts that shrink,
//!    and before anything is written there for somebody else;
//! 4. tables come before the L1 entries, refcount table entries and header
//!    fields that point to them.
//!
//! The first three are kept here, for tables that wait in caches: [`Order`]
//! remembers which cache has to be on disk before the other may be written,
//! and every write of a cached table goes through [`Image::write_slices`],
//! [`Image::write_victim`] or [`Image::write_refcount_block`]. The fourth is
//! kept by writing table, then flushing, then writing the pointer:
//! [`Image::write_pointer`]. Where that fails, and the file may have the new
//! pointer nevertheless, the old one is written again before anything that the
//! new one refers to is given away.

use std::sync::Arc;

use super::refcounts::BlockId;
use super::{Image, StateGuard};
use crate::cache::l2::L2Slice;
use crate::error::Result;
use crate::format::entry::MetadataKind;
use crate::host::{Event, File, Host};

/// What a device writes at one stroke, in bytes.
const SECTOR: u64 = 512;

/// What has to be durable before cached tables may be written.
///
/// At most one of the two caches waits for the other.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// L2 slices wait for all refcount blocks that are dirty.
    l2_after_refcounts: bool,
    /// L2 slices wait for data that were written without a flush.
    l2_after_data: bool,
    /// Refcount blocks wait for all L2 slices that are dirty.
    refcounts_after_l2: bool,
    /// What the file has to say again at an offset, if it does not.
    old_pointer: Option<(u64, Vec<u8>)>,
}

impl<H: Host> Image<H> {
    /// From now on no L2 slice is written before the refcounts as they are now.
    pub(super) fn l2_waits_for_refcounts(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        if st.order.refcounts_after_l2 {
            self.settle_refcounts(st)?;
        }
        st.order.l2_after_refcounts = true;
        Ok(())
    }

    /// From now on no L2 slice is written before the data written so far.
    pub(super) fn l2_waits_for_data(&self, st: &mut StateGuard<'_, H>) {
        st.order.l2_after_data = true;
    }

    /// From now on no refcount block is written before the L2 slices as they
    /// are now, if any of them has changed.
    pub(super) fn refcounts_wait_for_l2(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        if self.l2.is_clean() {
            return Ok(());
        }
        if st.order.l2_after_refcounts {
            self.settle_l2(st)?;
        }
        st.order.refcounts_after_l2 = true;
        Ok(())
    }

    /// Makes durable that L2 entries let clusters go, before those are given to
    /// somebody else.
    pub(super) fn settle_freed(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        self.settle_refcounts(st)
    }

    /// Makes durable what L2 slices wait for.
    fn settle_l2(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        if st.order.l2_after_refcounts {
            for id in st.refcounts.dirty_blocks() {
                self.put_refcount_block(st, id)?;
            }
        } else if !st.order.l2_after_data {
            return Ok(());
        }
        if st.order.l2_after_data {
            self.flush_data_file()?;
        }
        self.host.file().flush()?;
        st.order.l2_after_refcounts = false;
        st.order.l2_after_data = false;
        Ok(())
    }

    /// Makes durable what refcount blocks wait for.
    fn settle_refcounts(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        if st.order.refcounts_after_l2 {
            if st.order.l2_after_data {
                self.flush_data_file()?;
                self.host.file().flush()?;
                st.order.l2_after_data = false;
            }
            for slice in self.l2.dirty() {
                self.put_slice(st, &slice)?;
            }
            self.host.file().flush()?;
            st.order.refcounts_after_l2 = false;
        }
        Ok(())
    }

    /// Writes an L2 slice that makes room for another one, after what it waits
    /// for. If that takes a flush all that are dirty are written, so that those
    /// that go next need none of their own.
    pub(super) fn write_victim(
        &self,
        st: &mut StateGuard<'_, H>,
        slice: &Arc<L2Slice>,
    ) -> Result<()> {
        if st.order.l2_after_refcounts || st.order.l2_after_data {
            return self.write_slices(st);
        }
        self.put_slice(st, slice)
    }

    /// Writes one refcount block, after what it waits for.
    pub(super) fn write_refcount_block(
        &self,
        st: &mut StateGuard<'_, H>,
        id: BlockId,
    ) -> Result<()> {
        if st.refcounts.dirty_bytes(id).is_none() {
            return Ok(());
        }
        self.settle_refcounts(st)?;
        self.put_refcount_block(st, id)
    }

    /// Writes all dirty tables, each after what it waits for. Refcounts of an
    /// image whose dirty bit is set stay in memory: they are rebuilt anyway.
    pub(super) fn write_back(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        self.settle_pointer(st)?;
        self.write_slices(st)?;
        if self.needs_accurate_refcounts() {
            let dirty = st.refcounts.dirty_blocks();
            if !dirty.is_empty() {
                self.settle_refcounts(st)?;
                for id in dirty {
                    self.put_refcount_block(st, id)?;
                }
            }
        }
        Ok(())
    }

    /// Writes all dirty L2 slices, after what they wait for.
    pub(super) fn write_slices(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        if self.l2.is_clean() {
            return Ok(());
        }
        self.settle_l2(st)?;
        self.l2
            .dirty()
            .iter()
            .try_for_each(|slice| self.put_slice(st, slice))
    }

    /// [`Image::write_back`] and a flush of the file, refcounts included.
    pub(super) fn write_back_all(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        self.write_back(st)?;
        for id in st.refcounts.dirty_blocks() {
            self.write_refcount_block(st, id)?;
        }
        self.host.file().flush()
    }

    /// Writes something that points to a table, between two flushes: what it
    /// points to is durable before, and the pointer itself after.
    ///
    /// Where that fails the caller goes on with the old pointer, and the file
    /// gets it back: at once or, if that fails as well, before counts change.
    pub(super) fn write_pointer(
        &self,
        st: &mut StateGuard<'_, H>,
        kind: MetadataKind,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        self.settle_pointer(st)?;
        self.ensure_no_overlap(st, kind, offset, bytes.len() as u64)?;
        let file = self.host.file();
        if bytes.is_empty() {
            return file.flush();
        }
        let mut before = vec![0; bytes.len()];
        file.read(offset, &mut before)?;
        file.flush()?;
        let written = file.write(offset, bytes);
        // A sector is written or not.
        let last = offset + bytes.len() as u64 - 1;
        let changed = written.is_ok() || offset / SECTOR != last / SECTOR;
        let result = written.and_then(|()| file.flush());
        if result.is_err() && changed {
            st.order.old_pointer = Some((offset, before));
            let _ = self.settle_pointer(st);
        }
        result
    }

    /// Puts a pointer back whose change has failed. Until then the file may
    /// refer to what memory knows nothing of, so nothing of that is given away.
    pub(super) fn settle_pointer(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        if let Some((offset, bytes)) = st.order.old_pointer.take() {
            let result = self.host.file().write(offset, &bytes);
            if result.is_err() {
                st.order.old_pointer = Some((offset, bytes));
            }
            return result;
        }
        Ok(())
    }

    fn put_slice(&self, st: &mut StateGuard<'_, H>, slice: &Arc<L2Slice>) -> Result<()> {
        if !slice.is_dirty() {
            return Ok(());
        }
        // A flush after each small write would write long slices over and over.
        let changed = slice.changed();
        let offset = slice.offset().add(changed.start as u64);
        self.ensure_no_overlap(st, MetadataKind::ACTIVE_L2, offset.0, changed.len() as u64)?;
        let mut bytes = self.host.scratch(changed.len())?;
        slice.to_bytes(changed.start, &mut bytes);
        self.host.event(Event::L2Update);
        self.host.file().write(offset.0, &bytes)?;
        self.l2.mark_clean(slice);
        Ok(())
    }

    fn put_refcount_block(&self, st: &mut StateGuard<'_, H>, id: BlockId) -> Result<()> {
        let Some(offset) = st.refcounts.block_offset(id) else {
            return Ok(());
        };
        let len = self.geometry.cluster_size();
        self.ensure_no_overlap(st, MetadataKind::REFCOUNT_BLOCK, offset.0, len)?;
        let Some(bytes) = st.refcounts.dirty_bytes(id) else {
            return Ok(());
        };
        self.host.event(Event::RefblockUpdate);
        self.host.file().write(offset.0, bytes)?;
        st.refcounts.mark_clean(id);
        Ok(())
    }
}
