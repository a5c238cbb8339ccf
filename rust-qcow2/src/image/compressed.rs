//! Compressed clusters: reading one, and writing new ones.
//!
//! They are written once and never in place: what writes to one gives the
//! guest cluster a cluster of its own. Several of them may share a host
//! cluster, whose refcount says how many.

use std::sync::Arc;

use super::pending::Allocation;
use super::refcounts::{Change, Reason};
use super::{Image, MAX_PIECES, MAX_WORKERS, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::{CompressedExtent, L2Entry, MetadataKind, OFFSET_MASK};
use crate::format::subclusters::ClusterEntry;
use crate::host::{Buf, Event, File, GuestBuf, Host, Preallocation, Task, WaitQueue};
use crate::units::{GuestOffset, HostOffset, round_up};

impl<H: Host> Image<H> {
    /// The guest cluster whose compressed data are at `extent`, as a whole.
    /// Somebody holds the place meanwhile.
    pub(crate) fn read_compressed(&self, extent: CompressedExtent) -> Result<H::Aligned> {
        let kind = self.shared.read().header.compression_type()?;
        let mut packed = self.host.scratch(extent.len as usize)?;
        self.host.event(Event::ReadCompressed);
        self.host.file().read(extent.offset.0, &mut packed)?;
        let mut cluster = self.host.scratch(self.geometry.cluster_size() as usize)?;
        self.host
            .offload(|| kind.decompress(&packed, &mut cluster))?;
        Ok(cluster)
    }

    /// Writes whole clusters of guest memory, compressed where that makes them
    /// smaller. The last cluster of the disk may be cut short. No bytes at all
    /// end a series of such writes.
    ///
    /// # Errors
    /// `EINVAL` where the range does not consist of clusters, `EIO` for a
    /// cluster that has data already, `ENOTSUP` with an external data file;
    /// those of the file.
    pub fn write_compressed(
        &self,
        guest: GuestOffset,
        len: u64,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<()> {
        self.ensure_usable()?;
        if self.has_data_file() {
            return Err(Error::errno(libc::ENOTSUP));
        }
        if len == 0 {
            // What was packed last may end within a sector.
            let file = self.host.file();
            let end = file.length()?;
            return file.truncate(end, false, Preallocation::Off, false);
        }
        let size = self.geometry.cluster_size();
        let end = guest.0 + len;
        if !guest.is_aligned(self.geometry.cluster_bits)
            || (!GuestOffset(end).is_aligned(self.geometry.cluster_bits) && end != self.size())
        {
            return Err(Error::errno(libc::EINVAL));
        }
        let mut next = guest;
        while next.0 < end {
            let mut tasks: Vec<Task<'_>> = Vec::new();
            while next.0 < end && tasks.len() < MAX_PIECES {
                let (start, here) = (next, size.min(end - next.0));
                let place = at + (start.0 - guest.0) as usize;
                tasks.push(Box::new(move || {
                    self.write_cluster_compressed(start, here, buf, place)
                }));
                next = next.add(here);
            }
            self.host.parallel(MAX_WORKERS, tasks)?;
        }
        Ok(())
    }

    fn write_cluster_compressed(
        &self,
        guest: GuestOffset,
        len: u64,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<()> {
        let size = self.geometry.cluster_size() as usize;
        let kind = self.shared.read().header.compression_type()?;
        let mut cluster = self.host.scratch(size)?;
        let (data, rest) = cluster.split_at_mut(len as usize);
        buf.get(at, data);
        rest.fill(0);
        let packed = self.host.offload(|| kind.compress(&cluster, size - 1))?;
        let Some(packed) = packed else {
            return self.write(guest, len, buf, at);
        };
        let allocation = self.begin_compressed(guest, packed.len() as u64)?;
        self.host.event(Event::WriteCompressed);
        let written = self.host.file().write(allocation.host.0, &packed);
        let mut st = self.lock();
        let len = packed.len() as u64;
        let result = written.and_then(|()| self.link_compressed(&mut st, &allocation, len));
        if result.is_err() {
            self.free(&mut st, allocation.host, len, Reason::Never);
        }
        st.allocations.remove(&allocation);
        allocation.done.wake_all();
        result
    }

    /// Finds a place for the compressed data of a cluster.
    fn begin_compressed(&self, guest: GuestOffset, len: u64) -> Result<Arc<Allocation<H>>> {
        let mut st = self.lock();
        let size = self.geometry.cluster_size();
        self.await_all_allocations(&mut st, guest, size);
        let at = self.entry_for_change(&mut st, guest)?;
        let entry = at.slice.get(at.index);
        self.ensure_good_entry(&mut st, guest, entry)?;
        // Compression does not overwrite anything.
        if entry.entry.0 & OFFSET_MASK != 0 {
            return Err(Error::errno(libc::EIO));
        }
        let host = self.allocate_bytes(&mut st, len)?;
        if let Err(error) = self.ensure_no_overlap(&mut st, MetadataKind::empty(), host.0, len) {
            self.free(&mut st, host, len, Reason::Never);
            return Err(error);
        }
        let allocation = Arc::new(Allocation::new(guest, guest.add(size), host));
        st.allocations.push(&allocation);
        Ok(allocation)
    }

    fn link_compressed(
        &self,
        st: &mut StateGuard<'_, H>,
        allocation: &Allocation<H>,
        len: u64,
    ) -> Result<()> {
        self.ensure_usable()?;
        let guest = allocation.start;
        if self.shared.read().options.lazy_refcounts {
            self.mark_dirty(st)?;
        }
        if self.needs_accurate_refcounts() {
            self.l2_waits_for_refcounts(st)?;
        }
        self.l2_waits_for_data(st);
        self.host.event(Event::L2UpdateCompressed);
        let at = self.entry_for_change(st, guest)?;
        let old = at.slice.get(at.index);
        let entry = L2Entry::packed(allocation.host, len, self.geometry.cluster_bits);
        self.l2
            .set(&at.slice, at.index, ClusterEntry::standard(entry));
        self.links().changed(guest.0, self.geometry.cluster_size());
        self.free_entry(st, old.entry, Reason::Never);
        Ok(())
    }

    /// Takes `len` bytes, at most a cluster, for compressed data: behind those
    /// that were taken last as far as there is room.
    fn allocate_bytes(&self, st: &mut StateGuard<'_, H>, len: u64) -> Result<HostOffset> {
        self.ensure_usable()?;
        self.reclaim(st)?;
        self.host.event(Event::ClusterAllocBytes);
        let bits = self.geometry.cluster_bits;
        let size = self.geometry.cluster_size();
        let limit = L2Entry::packed_limit(bits);
        loop {
            let mut begin = st.refcounts.packed_end;
            if let Some(at) = begin {
                let count = self.refcount(st, self.geometry.cluster_of(at))?;
                // As often as the width of the refcounts lets it be shared.
                if count == 0 || count >= self.geometry.refcount_order.max() {
                    begin = None;
                }
            }
            let room = begin.map_or(0, |at| size - at.within(bits));
            if room < len {
                let cluster = self.search_free(st, 1)?;
                if self.ensure_blocks(st, cluster, 1)? {
                    // A new block may sit where the search ended.
                    st.refcounts.free_hint = st.refcounts.free_hint.min(cluster.0);
                    continue;
                }
                let new = self.geometry.offset_of(cluster);
                if new.0 == 0 {
                    let message = "Preventing invalid allocation of compressed cluster at offset 0"
                        .to_owned();
                    return Err(self.corrupt(st, true, None, None, message));
                }
                begin = begin
                    .filter(|at| round_up(at.0, bits) == new.0)
                    .or(Some(new));
            }
            let Some(begin) = begin else { continue };
            if begin.0 + len > limit {
                return Err(Error::errno(libc::EFBIG));
            }
            self.change_refcount(st, begin, len, Change::Add(1), Reason::Never)?;
            let end = begin.add(len);
            st.refcounts.packed_end = (!end.is_aligned(bits)).then_some(end);
            return Ok(begin);
        }
    }
}
