//! When a freed host cluster may be used again.
//!
//! A request looks up host offsets and then reads or writes there without the
//! metadata lock. If a discard frees such a cluster meanwhile and another
//! request gets it, the first one would read or overwrite data that are not
//! its own. So a request is counted in ([`InFlight::enter`]) before its first
//! lookup and out after its last I/O, and a cluster that is freed while
//! requests are counted in stays in a waiting room until all of those have
//! left.
//!
//! One side counts itself in and then looks into the tables, the other changes
//! the tables and then looks at the counters: all four are sequentially
//! consistent operations, or each side could miss what the other did first.
//! `handover` tests that.
//!
//! Two counters alternate, as in read-copy-update: new requests count in the
//! current epoch, and what was freed in an epoch is released when the requests
//! of that epoch and of the one before have left, however many came since.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::Image;
use crate::host::Host;
use crate::shard::{self, SHARDS};
use crate::units::HostOffset;

/// Counts requests and keeps clusters waiting for them.
#[derive(Default)]
#[repr(C)]
pub(crate) struct InFlight {
    epoch: AtomicU64,
    waiting: Mutex<Waiting>,
    /// Spread over threads, as each request changes them.
    active: [Active; SHARDS],
}

/// Requests of some threads, for even and odd epochs.
#[derive(Default)]
#[repr(align(64))]
struct Active([AtomicUsize; 2]);

#[derive(Default)]
struct Waiting {
    /// Freed in the current epoch.
    current: Vec<Freed>,
    /// Freed in the epoch before.
    previous: Vec<Freed>,
}

/// A range of host clusters that no table refers to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) offset: HostOffset,
    pub(super) len: u64,
    pub(super) reason: super::refcounts::Reason,
}

/// A request that is counted in; dropping it counts it out.
pub(crate) struct Token<'a>(&'a AtomicUsize);

impl Drop for Token<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The same for a request that came through an image above, and keeps this one
/// alive.
pub(crate) struct Held<H: Host> {
    image: Arc<Image<H>>,
    shard: usize,
    epoch: usize,
}

impl<H: Host> Held<H> {
    /// Counts a request in.
    #[inline]
    pub(crate) fn enter(image: Arc<Image<H>>) -> Self {
        let (shard, epoch) = image.inflight.count_in();
        Self {
            image,
            shard,
            epoch,
        }
    }

    /// The image.
    #[inline]
    pub(crate) fn image(&self) -> &Image<H> {
        &self.image
    }
}

impl<H: Host> Drop for Held<H> {
    fn drop(&mut self) {
        let active = &self.image.inflight.active[self.shard];
        active.0[self.epoch].fetch_sub(1, Ordering::SeqCst);
    }
}

impl InFlight {
    /// What is behind the memory that is touched when the first of the threads
    /// counts a request in.
    pub(super) fn hot_end(&self) -> &impl Sized {
        &self.active[1]
    }

    /// Counts a request in.
    #[inline]
    pub(crate) fn enter(&self) -> Token<'_> {
        let (shard, epoch) = self.count_in();
        Token(&self.active[shard].0[epoch])
    }

    /// Counts a request in, and returns in which counter.
    #[inline]
    fn count_in(&self) -> (usize, usize) {
        let shard = shard::number();
        let active = &self.active[shard].0;
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let index = (epoch & 1) as usize;
            active[index].fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return (shard, index);
            }
            active[index].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Whether nobody is counted in an even (0) or odd (1) epoch.
    fn is_idle(&self, epoch: usize) -> bool {
        let mut shards = self.active.iter();
        shards.all(|active| active.0[epoch].load(Ordering::SeqCst) == 0)
    }

    /// Whether no request is counted in.
    pub(crate) fn is_unused(&self) -> bool {
        self.is_idle(0) && self.is_idle(1)
    }

    /// Whether a range may be freed at once. If not it was taken into the
    /// waiting room. The tables do not refer to the range any more.
    pub(super) fn must_wait(&self, freed: Freed) -> bool {
        if self.is_unused() {
            return false;
        }
        self.waiting.lock().current.push(freed);
        true
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        let waiting = self.waiting.lock();
        waiting.current.is_empty() && waiting.previous.is_empty()
    }

    /// The ranges that nobody can be using any more. Called under the
    /// metadata lock.
    pub(super) fn released(&self) -> Vec<Freed> {
        let mut waiting = self.waiting.lock();
        let mut free = Vec::new();
        for _ in 0..2 {
            if waiting.current.is_empty() && waiting.previous.is_empty() {
                break;
            }
            let epoch = self.epoch.load(Ordering::SeqCst);
            if !self.is_idle(((epoch ^ 1) & 1) as usize) {
                break;
            }
            // Nobody is left who entered before the current epoch began.
            free.append(&mut waiting.previous);
            waiting.previous = std::mem::take(&mut waiting.current);
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::super::refcounts::Reason;
    use super::*;

    fn freed(offset: u64) -> Freed {
        Freed {
            offset: HostOffset(offset),
            len: 512,
            reason: Reason::Other,
        }
    }

    #[test]
    fn nothing_waits_without_requests() {
        assert!(!InFlight::default().must_wait(freed(0)));
    }

    #[test]
    fn waits_for_those_who_were_there() {
        let inflight = InFlight::default();
        let first = inflight.enter();
        assert!(inflight.must_wait(freed(1)));
        assert!(inflight.released().is_empty());
        // Requests that come later do not keep it waiting for ever.
        let second = inflight.enter();
        assert!(inflight.released().is_empty());
        drop(first);
        let mut later = vec![second];
        let mut free = Vec::new();
        for _ in 0..4 {
            later.push(inflight.enter());
            later.remove(0);
            free.extend(inflight.released());
        }
        assert_eq!(free, [freed(1)]);
        assert!(inflight.is_empty());
    }

    #[test]
    fn a_long_request_holds_back_what_it_may_use() {
        let inflight = InFlight::default();
        let long = inflight.enter();
        for i in 0..10 {
            drop(inflight.enter());
            assert!(inflight.must_wait(freed(i)));
            assert!(inflight.released().is_empty());
        }
        drop(long);
        assert_eq!(inflight.released().len(), 10);
    }
}
