//! Nobody reads from a cluster that was given to others: the protocol of
//! [`inflight`](super::inflight) with each kind of table, on threads.
//!
//! The order in which a processor lets others see what it does matters here.
//! x86 hides most mistakes of that kind; `tests/miri` runs these tests with as
//! many orders as the language allows.

use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use super::inflight::InFlight;
use super::inflight::{Freed, Token};
use super::refcounts::Reason;
use crate::units::HostOffset;

/// Reads of each reader, where they are short.
pub(crate) const ROUNDS: usize = if cfg!(miri) { 60 } else { 200_000 };
/// log2 of the cluster size.
const BITS: u32 = 16;

/// Lets other threads do as much as they do in a round, which Miri else seldom
/// does.
pub(crate) fn linger() {
    if cfg!(miri) {
        (0..40).for_each(|_| std::thread::yield_now());
    }
}

/// Says that a reader is at its end, or has failed.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One guest cluster is moved from host cluster to host cluster with `set`,
/// before the old one is freed, while readers count themselves in and look with
/// `find` where it is, `rounds` times each, which may fail.
pub(crate) fn move_while_reading(
    rounds: usize,
    set: impl Fn(HostOffset),
    find: impl for<'a> Fn(&'a InFlight) -> Option<(Token<'a>, HostOffset)> + Sync,
) {
    // Which clusters have the guest's data; others have them otherwise.
    let ours: [AtomicBool; 4] = Default::default();
    let number = |at: HostOffset| (at.0 >> BITS) as usize;
    let inflight = InFlight::default();
    let stop = AtomicBool::new(false);
    let read = || {
        linger();
        if let Some((token, at)) = find(&inflight) {
            assert!(ours[number(at)].load(Ordering::Relaxed), "at {at:?}");
            drop(token);
        }
    };
    ours[1].store(true, Ordering::Relaxed);
    set(HostOffset(1 << BITS));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let _end = End(&stop);
                for _ in 0..rounds {
                    read();
                }
            });
        }
        let mut now = HostOffset(1 << BITS);
        let mut free = vec![HostOffset(2 << BITS), HostOffset(3 << BITS)];
        while !stop.load(Ordering::Relaxed) {
            let mut reusable = inflight.released();
            if let Some(next) = free.pop() {
                ours[number(next)].store(true, Ordering::Relaxed);
                set(next);
                let freed = Freed {
                    offset: now,
                    len: 1 << BITS,
                    reason: Reason::Other,
                };
                if !inflight.must_wait(freed) {
                    reusable.push(freed);
                }
                now = next;
            } else {
                std::thread::yield_now();
            }
            for freed in reusable {
                ours[number(freed.offset)].store(false, Ordering::Relaxed);
                free.push(freed.offset);
            }
        }
    });
}

mod tests {
    use super::super::l1::L1Table;
    use super::*;
    use crate::cache::l2::{L2Cache, L2Slice};
    use crate::cache::pool::Pool;
    use crate::format::entry::{L1Entry, L2Entry, Mapping};
    use crate::format::subclusters::{ClusterEntry, Subclusters};

    fn a_table_moves(set: impl Fn(&L1Table, L1Entry)) {
        let table = L1Table::new([0; 2]);
        move_while_reading(
            ROUNDS,
            |at| set(&table, L1Entry::owned(at)),
            |inflight| {
                let token = inflight.enter();
                Some((token, table.get(1).table()?))
            },
        );
    }

    #[test]
    fn an_l2_table_moves() {
        a_table_moves(|table, entry| table.set(1, entry));
    }

    #[test]
    fn an_l1_table_is_replaced() {
        a_table_moves(|table, entry| table.replace([0, entry.0]));
    }

    fn a_cluster_moves(extended: bool) {
        let cache = L2Cache::new(4, 64, Pool::new(4096));
        let slice = cache.insert(L2Slice::from_bytes(HostOffset(0), &[0; 64], extended));
        let entry = |at| ClusterEntry {
            entry: L2Entry::normal(at),
            subclusters: Subclusters(at.0),
        };
        move_while_reading(
            ROUNDS,
            |at| cache.set(&slice, 2, entry(at)),
            |inflight| {
                let token = inflight.enter();
                let found = slice.try_get(2)?;
                let Mapping::Normal(at) = found.entry.mapping() else {
                    return None;
                };
                assert!(!extended || found == entry(at));
                Some((token, at))
            },
        );
    }

    #[test]
    fn a_cluster_moves_in_a_standard_slice() {
        a_cluster_moves(false);
    }

    #[test]
    fn a_cluster_moves_in_an_extended_slice() {
        a_cluster_moves(true);
    }
}
