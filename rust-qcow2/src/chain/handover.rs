//! Nobody reads what the index said of a cluster that a layer has let go
//! since: see [`index`](super::index), and [`crate::image::handover`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::entry::{Entry, Resolved};
use super::index::{Index, SLICE_ENTRIES, Slice};
use super::view::Links;
use crate::cache::pool::Pool;
use crate::host::local::LocalHost;
use crate::image::handover::{InFlight, ROUNDS, linger, move_while_reading};
use crate::units::{GuestOffset, HostOffset};

const BITS: u32 = 16;
const END: u64 = (SLICE_ENTRIES as u64) << BITS;
const GUEST: GuestOffset = GuestOffset(5 << BITS);

fn data_at(at: HostOffset) -> Entry {
    Entry::pack(Resolved::Data(0, at))
}

/// Fills the only slice from what `table` says now.
fn fill(index: &Index<LocalHost>, table: &AtomicU64) {
    let gate = index.gate.lock();
    if index.is_filling(0, 1) {
        return;
    }
    index.begin_fill(0, 1);
    drop(gate);
    let entry = data_at(HostOffset(table.load(Ordering::SeqCst)));
    let _gate = index.gate.lock();
    index.end_fill(0, vec![Slice::new(1, &[entry; SLICE_ENTRIES])]);
}

/// `disturb` is called with the index before each change.
fn move_below_an_index(disturb: impl Fn(&Index<LocalHost>) + Sync) {
    // The table of the only layer.
    let table = AtomicU64::new(0);
    let index = Index::<LocalHost>::new(BITS, END, 1, &Pool::new(1 << 20));
    move_while_reading(
        ROUNDS / 3,
        |at| {
            disturb(&index);
            table.store(at.0, Ordering::SeqCst);
            index.changed(0, GUEST.0, 1 << BITS);
        },
        |layer| {
            let Some(known) = index.look_up(GUEST, 512, 1) else {
                fill(&index, &table);
                return None;
            };
            match known.resolved {
                Resolved::Data(0, at) => {
                    linger();
                    let token = layer.enter();
                    known.is_still_true(BITS).then_some((token, at))
                }
                Resolved::Ask(0) => {
                    let changes = index.changes();
                    let token = layer.enter();
                    let at = HostOffset(table.load(Ordering::SeqCst));
                    let asking = Entry::pack(Resolved::Ask(0));
                    index.settle(GUEST, asking, Resolved::Data(0, at), changes);
                    Some((token, at))
                }
                other => panic!("{other:?}"),
            }
        },
    );
}

#[test]
fn a_cluster_moves_below_an_index() {
    move_below_an_index(|_| ());
}

#[test]
fn a_cluster_moves_while_slices_are_dropped() {
    move_below_an_index(|index| {
        // What was looked at since the last time stays the first time.
        index.clean();
        index.clean();
    });
}

/// A layer tells nobody what it changes until somebody has looked it up.
#[test]
fn a_cluster_moves_as_an_index_begins() {
    for round in 0..(ROUNDS / 5).min(1000) {
        let table = AtomicU64::new(1 << BITS);
        let reused = AtomicBool::new(false);
        let filled = AtomicBool::new(false);
        let inflight = InFlight::default();
        let links = Links::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                let index = Index::<LocalHost>::new(BITS, END, 1, &Pool::new(1 << 20));
                links.add_watcher(&index, 0);
                fill(&index, &table);
                let Some(known) = index.look_up(GUEST, 512, 1) else {
                    return;
                };
                filled.store(true, Ordering::Relaxed);
                linger();
                let _token = inflight.enter();
                if known.resolved == Resolved::Data(0, HostOffset(1 << BITS))
                    && known.is_still_true(BITS)
                {
                    assert!(!reused.load(Ordering::Relaxed));
                }
            });
            // Half of the time one is as late as it can be.
            while round & 1 == 0 && !filled.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            table.store(2 << BITS, Ordering::SeqCst);
            links.changed(GUEST.0, 1 << BITS);
            if inflight.is_unused() {
                reused.store(true, Ordering::Relaxed);
            }
        });
    }
}
