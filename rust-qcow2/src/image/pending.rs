//! Allocations under way: guest clusters from the decision where they go until
//! their L2 entries say so.

use std::sync::Arc;

use super::inflight::Freed;
use super::refcounts::Reason;
use super::{Image, StateGuard};
use crate::error::Result;
use crate::format::entry::{L2Entry, Mapping};
use crate::format::subclusters::ClusterEntry;
use crate::host::{Host, WaitQueue};
use crate::units::{GuestOffset, HostOffset};

/// Guest clusters that get host clusters, from the decision until the L2
/// entries say so. Whoever wants to change the same clusters waits.
pub(super) struct Allocation<H: Host> {
    /// First guest cluster.
    pub(super) start: GuestOffset,
    /// End of the last guest cluster.
    pub(super) end: GuestOffset,
    /// Where the clusters go.
    pub(super) host: HostOffset,
    /// First guest byte that is written, copied ones included: that of the
    /// first cluster, unless there are subclusters.
    pub(super) written_start: GuestOffset,
    /// End of what is written.
    pub(super) written_end: GuestOffset,
    /// The host clusters were reserved for these guest clusters before.
    pub(super) reserved: bool,
    /// Some of what the guest writes is data at this place already, and is to
    /// be read until then as it was.
    pub(super) over_data: bool,
    pub(super) done: H::WaitQueue,
}

impl<H: Host> Allocation<H> {
    /// Space that was not reserved before.
    pub(super) fn new(start: GuestOffset, end: GuestOffset, host: HostOffset) -> Self {
        Self {
            start,
            end,
            host,
            written_start: start,
            written_end: end,
            reserved: false,
            over_data: false,
            done: H::WaitQueue::default(),
        }
    }

    /// Where guest bytes go.
    pub(super) fn host_of(&self, guest: GuestOffset) -> HostOffset {
        // The write itself may begin before, on clusters that are data already.
        HostOffset(self.host.0 + guest.0 - self.start.0)
    }
}

/// How an allocation changes the bitmaps of extended entries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Marking {
    /// What was written is data from now on.
    Written,
    /// The clusters have a place, and read as before.
    Reserved,
}

/// Allocations under way.
pub(super) struct PendingAllocations<H: Host>(Vec<Arc<Allocation<H>>>);

impl<H: Host> Default for PendingAllocations<H> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<H: Host> PendingAllocations<H> {
    /// The pending allocation that touches the range and begins lowest.
    fn first_overlap(&self, start: GuestOffset, end: GuestOffset) -> Option<&Arc<Allocation<H>>> {
        self.0
            .iter()
            .filter(|pending| pending.start < end && start < pending.end)
            .min_by_key(|pending| pending.start)
    }

    pub(super) fn push(&mut self, allocation: &Arc<Allocation<H>>) {
        self.0.push(Arc::clone(allocation));
    }

    pub(super) fn remove(&mut self, allocation: &Arc<Allocation<H>>) {
        self.0.retain(|other| !Arc::ptr_eq(other, allocation));
    }
}

impl<H: Host> Image<H> {
    /// Waits until no allocation is under way at `guest`, and returns how many
    /// of the `len` bytes are clear of allocations further on.
    pub(super) fn await_allocations(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
        may_wait: bool,
    ) -> Option<u64> {
        let bits = self.geometry.cluster_bits;
        let start = guest.align_down(bits);
        loop {
            let Some(pending) = st.allocations.first_overlap(start, guest.add(len)) else {
                return Some(len);
            };
            if pending.start > start {
                return Some(pending.start.0 - guest.0);
            }
            if !may_wait {
                return None;
            }
            let pending = Arc::clone(pending);
            pending.done.wait(st);
        }
    }

    /// Waits until no allocation is under way in a range, for operations that
    /// change mappings without writing data.
    pub(super) fn await_all_allocations(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
    ) {
        while let Some(pending) = st.allocations.first_overlap(guest, guest.add(len)) {
            let pending = Arc::clone(pending);
            pending.done.wait(st);
        }
    }

    /// Makes the L2 entries of an allocation say so, or takes it back.
    pub(super) fn end_allocation(
        &self,
        st: &mut StateGuard<'_, H>,
        allocation: &Arc<Allocation<H>>,
        written: Result<bool>,
        marking: Marking,
    ) -> Result<()> {
        let result = written.and_then(|copied| self.link(st, allocation, copied, marking));
        if result.is_err() && !allocation.reserved && !self.has_data_file() {
            let len = allocation.end.0 - allocation.start.0;
            self.free(st, allocation.host, len, Reason::Never);
        }
        st.allocations.remove(allocation);
        allocation.done.wake_all();
        result
    }

    fn link(
        &self,
        st: &mut StateGuard<'_, H>,
        allocation: &Allocation<H>,
        copied: bool,
        marking: Marking,
    ) -> Result<()> {
        self.ensure_usable()?;
        let bits = self.geometry.cluster_bits;
        if self.shared.read().options.lazy_refcounts {
            self.mark_dirty(st)?;
        }
        if self.needs_accurate_refcounts() {
            self.l2_waits_for_refcounts(st)?;
        }
        if copied {
            self.l2_waits_for_data(st);
        }
        let at = self.entry_for_change(st, allocation.start)?;
        let count = (allocation.end.0 - allocation.start.0) >> bits;
        let mut replaced = Vec::new();
        for i in 0..count {
            let host = allocation.host.add(i << bits);
            let index = at.index + i as usize;
            let old = at.slice.get(index);
            // A discard that came in between wins: the cluster is gone.
            let place = self.geometry.mapping(old.entry).host_cluster();
            if allocation.reserved && place != Some(host) {
                continue;
            }
            let new = ClusterEntry {
                entry: L2Entry::normal(host),
                subclusters: self.marked(allocation, i, old, marking),
            };
            self.l2.set(&at.slice, index, new);
            let keeps = allocation.reserved || self.has_data_file();
            let had_place = old.entry.mapping().host_cluster().is_some();
            if !keeps && (had_place || old.entry.is_compressed()) {
                replaced.push(old.entry);
            }
        }
        self.links().changed(allocation.start.0, count << bits);
        for old in replaced {
            self.free_entry(st, old, Reason::Never);
        }
        Ok(())
    }

    /// Gives back what an L2 entry referred to.
    pub(super) fn free_entry(&self, st: &mut StateGuard<'_, H>, entry: L2Entry, reason: Reason) {
        let size = self.geometry.cluster_size();
        match self.geometry.mapping(entry) {
            // There the guest cluster keeps its place.
            _ if self.has_data_file() => {}
            Mapping::Normal(host) | Mapping::ZeroAllocated(host) => {
                if host.is_aligned(self.geometry.cluster_bits) {
                    self.free_data(st, host, size, reason);
                } else {
                    let message = format!("Cannot free unaligned cluster {:#x}", host.0);
                    let _ = self.corrupt(st, false, None, None, message);
                }
            }
            Mapping::Compressed => {
                let extent = entry.compressed(self.geometry.cluster_bits);
                let (offset, len) = (extent.offset, extent.len);
                let freed = Freed {
                    offset,
                    len,
                    reason,
                };
                st.refcounts.unfreed.push(freed);
            }
            Mapping::Unallocated | Mapping::ZeroPlain => {}
        }
    }
}
