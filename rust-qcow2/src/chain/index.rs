//! The resolved index: guest bytes to layer and place, for all layers below an
//! image, in two array accesses.
//!
//! Entries are kept in slices of 512, which are filled when they are first
//! needed (`fill`). A slice knows how many layers it covers, counted
//! from the lowest one. So the index of a chain serves the next longer one:
//! after a snapshot it moves to the new top, and each slice is completed by
//! the one layer that it lacks when it is next used. And it serves the layer
//! that the image is right above, of which jobs ask what is below: what that
//! layer has decided itself is then to be asked for ([`Resolved::below`]).
//!
//! # When a layer changes
//!
//! What layers above have decided stays as it is; all other entries in the
//! range become "ask this layer", which is true whatever the change is. When
//! such an entry is next needed, the layers are asked from there on, and the
//! answer takes its place ([`Index::settle`]).
//!
//! A layer that lets a host cluster go first changes its tables, then calls
//! [`Index::changed`], then frees the cluster; and a cluster is not reused
//! while requests are counted in at the layer (see `image/inflight.rs`). A
//! reader takes an entry, counts itself in at the layer, and then looks whether
//! the slice is in its slot ([`Slice::is_valid`]) and the entry is the same
//! still: if so the cluster has not been freed before the reader was counted
//! in, and it will not be reused before the reader has left. Both sides use
//! sequentially consistent operations.
//!
//! A slice is filled from tables that may change meanwhile: a change spoils
//! the fills under way in its range, and what they have is not used.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use arc_swap::{ArcSwapOption, Guard};
use parking_lot::Mutex;

use super::entry::{Entry, Resolved};
use crate::cache::pool::{Evicted, Member, Pool};
use crate::host::Host;
use crate::units::{GuestOffset, div_up};

/// log2 of the entries in a slice; few under Miri, where each takes long.
pub(super) const SLICE_BITS: u32 = if cfg!(miri) { 3 } else { 9 };
/// Entries in a slice.
pub(super) const SLICE_ENTRIES: usize = 1 << SLICE_BITS;
/// Bytes of memory that a slice takes.
pub(crate) const SLICE_BYTES: usize = SLICE_ENTRIES * 8 + 64;
/// log2 of the slots in a page of the slice table.
const PAGE_BITS: u32 = if cfg!(miri) { 1 } else { 9 };
/// Pages of an index at most: 24 bytes each. With one layer of 512-byte clusters
/// on top of which the disk is larger than 128 TiB, or than 1 PiB with 4 KiB, there
/// is none, and each read asks one layer after the other.
const MAX_PAGES: u64 = 1 << 20;
/// An index keeps this many slices, however little memory there is.
const MIN_SLICES: usize = 16;

/// 512 entries that follow each other.
pub(super) struct Slice {
    /// How many layers from the lowest one are merged into it.
    pub(super) covers: usize,
    valid: AtomicBool,
    /// Looked at since the hand of the clock passed.
    used: AtomicBool,
    /// Looked at since the last cleaning.
    recent: AtomicBool,
    entries: Box<[AtomicU64]>,
}

impl Slice {
    pub(super) fn new(covers: usize, entries: &[Entry]) -> Self {
        Self {
            covers,
            entries: entries
                .iter()
                .map(|entry| AtomicU64::new(entry.0))
                .collect(),
            valid: AtomicBool::new(true),
            used: AtomicBool::new(true),
            recent: AtomicBool::new(true),
        }
    }

    /// An entry.
    #[inline]
    pub(super) fn get(&self, at: usize) -> Entry {
        Entry(self.entries[at].load(Ordering::SeqCst))
    }

    /// Has `layer` asked for entries from `from` to `to`, where no layer above
    /// it has decided.
    fn ask(&self, from: usize, to: usize, layer: usize) {
        if layer >= self.covers {
            return;
        }
        let asking = Entry::pack(Resolved::Ask(layer));
        for entry in &self.entries[from..to] {
            let above = match Entry(entry.load(Ordering::Relaxed)).unpack() {
                Resolved::Data(other, _) | Resolved::Zero(other) | Resolved::Ask(other) => {
                    other > layer
                }
                Resolved::Below => false,
            };
            if !above {
                entry.store(asking.0, Ordering::SeqCst);
            }
        }
    }

    /// Whether it still is in its slot: see the module.
    #[inline]
    pub(super) fn is_valid(&self) -> bool {
        self.valid.load(Ordering::SeqCst)
    }

    /// The slice has left its slot. Called under the lock of the index, so that
    /// a change that does not find it there knows that it is not used.
    fn retire(&self) {
        self.valid.store(false, Ordering::SeqCst);
    }

    #[inline]
    fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
            self.recent.store(true, Ordering::Relaxed);
        }
    }
}

type Slot = ArcSwapOption<Slice>;
type Page = Box<[Slot]>;

/// What is known of the layers below one image.
pub(crate) struct Index<H: Host> {
    /// log2 of the guest bytes per entry: the smallest cluster of all layers.
    bits: u32,
    /// Guest bytes from here on are not indexed.
    end: u64,
    /// Layers below the image that the index belongs to.
    layers: AtomicUsize,
    /// The slice table, in pages that are made when they are first needed.
    pages: Box<[OnceLock<Page>]>,
    /// Layers have changed beyond recognition: not to be used any more.
    dead: AtomicBool,
    control: Mutex<Control>,
    /// Held, without I/O, by those who begin or end filling slices.
    pub(super) gate: lock_api::Mutex<H::RawMutex, ()>,
    /// Where those wait whose slice is being filled by somebody else.
    pub(super) filled: H::WaitQueue,
    pub(super) counters: Counters,
}

/// What the statistics tell of an index.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) merged: AtomicU64,
    pub(super) table_reads: AtomicU64,
    pub(super) slices: AtomicUsize,
}

struct Control {
    /// Where the memory of the slices is counted.
    pool: Arc<Pool>,
    /// All slots that have a slice, and some that have lost theirs.
    clock: Vec<u64>,
    hand: usize,
    /// How often layers have changed.
    changes: u64,
    fills: Vec<Fill>,
}

/// Slices being filled.
struct Fill {
    first: u64,
    count: u64,
    /// Layers have changed in the range since.
    spoiled: bool,
}

impl<H: Host> Index<H> {
    /// An empty index for `end` bytes, one entry for `1 << bits` of them, whose
    /// slices are counted in `pool`.
    pub(super) fn new(bits: u32, end: u64, layers: usize, pool: &Arc<Pool>) -> Arc<Self> {
        let slots = div_up(end, 1 << (bits + SLICE_BITS));
        let pages = div_up(slots, 1 << PAGE_BITS);
        let index = Arc::new(Self {
            bits,
            end,
            layers: AtomicUsize::new(layers),
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            dead: AtomicBool::new(false),
            control: Mutex::new(Control {
                pool: Arc::clone(pool),
                clock: Vec::new(),
                hand: 0,
                changes: 0,
                fills: Vec::new(),
            }),
            gate: lock_api::Mutex::new(()),
            filled: H::WaitQueue::default(),
            counters: Counters::default(),
        });
        let member: Weak<Self> = Arc::downgrade(&index);
        pool.join(member);
        index
    }

    /// Whether the table of slices, which is there from the begin, is small.
    pub(super) fn fits(bits: u32, end: u64) -> bool {
        div_up(end, 1 << (bits + SLICE_BITS + PAGE_BITS)) <= MAX_PAGES
    }

    /// Whether it can say anything. One that cannot only watches layers.
    pub(super) fn is_of_use(&self) -> bool {
        !self.pages.is_empty()
    }

    /// Counts the slices in another pool from now on.
    pub(super) fn move_to(self: &Arc<Self>, pool: &Arc<Pool>) {
        {
            let mut control = self.control.lock();
            if Arc::ptr_eq(&control.pool, pool) {
                return;
            }
            let bytes = self.slices() * SLICE_BYTES;
            control.pool.give(bytes);
            control.pool = Arc::clone(pool);
            pool.take(bytes);
        }
        let member: Weak<Self> = Arc::downgrade(self);
        pool.join(member);
    }

    /// Layers below the image that the index belongs to.
    pub(super) fn layers(&self) -> usize {
        self.layers.load(Ordering::SeqCst)
    }

    /// The index belongs to the image above from now on.
    pub(super) fn move_up(&self) {
        self.layers.fetch_add(1, Ordering::SeqCst);
    }

    /// Number of slices that are filled.
    pub(super) fn slices(&self) -> usize {
        self.counters.slices.load(Ordering::Relaxed)
    }

    /// log2 of the guest bytes per entry.
    pub(super) fn bits(&self) -> u32 {
        self.bits
    }

    /// Guest bytes from here on are not indexed.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Number of slices there can be.
    pub(super) fn slots(&self) -> u64 {
        div_up(self.end, 1 << (self.bits + SLICE_BITS))
    }

    /// The slice that `guest` is in, and the entry in it.
    #[inline]
    pub(super) fn position(&self, guest: GuestOffset) -> (u64, usize) {
        let entry = guest.0 >> self.bits;
        (entry >> SLICE_BITS, (entry as usize) & (SLICE_ENTRIES - 1))
    }

    /// First guest byte of a slice.
    pub(super) fn start_of(&self, slot: u64) -> u64 {
        slot << (self.bits + SLICE_BITS)
    }

    #[inline]
    fn slot(&self, slot: u64) -> Option<&Slot> {
        let page = self.pages.get((slot >> PAGE_BITS) as usize)?.get()?;
        Some(&page[slot as usize & ((1 << PAGE_BITS) - 1)])
    }

    fn slot_for_change(&self, slot: u64) -> Option<&Slot> {
        let page = self.pages.get((slot >> PAGE_BITS) as usize)?;
        let page = page.get_or_init(|| (0..1 << PAGE_BITS).map(|_| Slot::empty()).collect());
        Some(&page[slot as usize & ((1 << PAGE_BITS) - 1)])
    }

    /// The slice in a slot, if it is there and covers `layers` layers, and
    /// perhaps more: see [`Resolved::below`].
    #[inline]
    pub(super) fn get(&self, slot: u64, layers: usize) -> Option<Guard<Option<Arc<Slice>>>> {
        let guard = self.slot(slot)?.load();
        let slice = guard.as_ref()?;
        if slice.covers < layers {
            return None;
        }
        slice.touch();
        Some(guard)
    }

    /// The slice in a slot, whatever it covers.
    pub(super) fn peek(&self, slot: u64) -> Option<Arc<Slice>> {
        self.slot(slot)?.load_full()
    }

    /// Whether the index may be used at all.
    #[inline]
    pub(super) fn is_alive(&self) -> bool {
        !self.dead.load(Ordering::SeqCst)
    }

    /// Takes the index out of use, for good, and forgets everything.
    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::SeqCst);
        let mut control = self.control.lock();
        control.changes += 1;
        for fill in &mut control.fills {
            fill.spoiled = true;
        }
        for slot in self.pages.iter().filter_map(OnceLock::get).flatten() {
            self.empty_slot(slot, &control.pool);
        }
    }

    /// Layer number `layer` has changed what it says of `len` guest bytes from
    /// `start` on. Called before host clusters are freed.
    pub(crate) fn changed(&self, layer: usize, start: u64, len: u64) {
        if start >= self.end || len == 0 {
            return;
        }
        let last = start.saturating_add(len - 1).min(self.end - 1) >> self.bits;
        let first = start >> self.bits;
        let (first_slot, last_slot) = (first >> SLICE_BITS, last >> SLICE_BITS);
        let mut control = self.control.lock();
        control.changes += 1;
        for fill in &mut control.fills {
            if fill.first <= last_slot && first_slot < fill.first + fill.count {
                fill.spoiled = true;
            }
        }
        let mut slot = first_slot;
        while slot <= last_slot {
            let Some(known) = self.slot(slot) else {
                // No slice in the whole page.
                slot = ((slot >> PAGE_BITS) + 1) << PAGE_BITS;
                continue;
            };
            if let Some(slice) = known.load().as_ref() {
                let base = slot << SLICE_BITS;
                let from = first.max(base) - base;
                let to = (last - base).min(SLICE_ENTRIES as u64 - 1) + 1;
                slice.ask(from as usize, to as usize, layer);
            }
            slot += 1;
        }
    }

    /// How often layers have changed: see [`Index::settle`].
    pub(super) fn changes(&self) -> u64 {
        self.control.lock().changes
    }

    /// Puts an answer in the place of the entry for `guest` that had a layer
    /// asked, where no layer has changed anything since `changes` was counted.
    pub(super) fn settle(&self, guest: GuestOffset, asking: Entry, answer: Resolved, changes: u64) {
        let control = self.control.lock();
        if control.changes != changes {
            return;
        }
        let (slot, at) = self.position(guest);
        let slice = self.slot(slot).map(ArcSwapOption::load);
        if let Some(slice) = slice.as_ref().and_then(|slice| slice.as_ref()) {
            if slice.get(at) == asking {
                slice.entries[at].store(Entry::pack(answer).0, Ordering::SeqCst);
            }
        }
    }

    /// Takes the slice out of a slot; the caller holds the lock.
    fn empty_slot(&self, slot: &Slot, pool: &Pool) {
        if slot.load().is_some() {
            if let Some(slice) = slot.swap(None) {
                slice.retire();
                self.counters.slices.fetch_sub(1, Ordering::Relaxed);
                pool.give(SLICE_BYTES);
            }
        }
    }

    /// Notes that `count` slices from `first` on are about to be filled. The
    /// caller holds the gate, has seen that nobody else fills them, and calls
    /// [`Index::end_fill`] whatever happens.
    pub(super) fn begin_fill(&self, first: u64, count: u64) {
        self.control.lock().fills.push(Fill {
            first,
            count,
            spoiled: false,
        });
    }

    /// Whether one of `count` slices from `first` on is being filled.
    pub(super) fn is_filling(&self, first: u64, count: u64) -> bool {
        let control = self.control.lock();
        let mut fills = control.fills.iter();
        fills.any(|fill| fill.first < first + count && first < fill.first + fill.count)
    }

    /// Ends what [`Index::begin_fill`] has begun, and puts the slices in place.
    /// Returns false where layers have changed meanwhile: nothing was put in
    /// place then.
    pub(super) fn end_fill(&self, first: u64, slices: Vec<Slice>) -> bool {
        let mut control = self.control.lock();
        let at = control.fills.iter().position(|fill| fill.first == first);
        let spoiled = at.is_none_or(|at| control.fills.swap_remove(at).spoiled);
        if spoiled || !self.is_alive() {
            return false;
        }
        for (slice, number) in slices.into_iter().zip(first..) {
            let Some(slot) = self.slot_for_change(number) else {
                continue;
            };
            match slot.swap(Some(Arc::new(slice))) {
                Some(old) => old.retire(),
                None => {
                    control.clock.push(number);
                    self.counters.slices.fetch_add(1, Ordering::Relaxed);
                    control.pool.take(SLICE_BYTES);
                }
            }
        }
        self.tidy(&mut control);
        let pool = Arc::clone(&control.pool);
        drop(control);
        pool.trim();
        true
    }

    /// Takes slots out of the clock that are empty or in it twice, once there
    /// are many of them.
    fn tidy(&self, control: &mut Control) {
        if control.clock.len() <= 2 * self.slices() + 64 {
            return;
        }
        control.clock.sort_unstable();
        control.clock.dedup();
        control
            .clock
            .retain(|number| self.slot(*number).is_some_and(|slot| slot.load().is_some()));
        control.hand = 0;
    }

    /// Drops slices that were not looked at since the last call.
    pub(crate) fn clean(&self) {
        let mut control = self.control.lock();
        let pool = Arc::clone(&control.pool);
        control.clock.retain(|number| {
            let Some(slot) = self.slot(*number) else {
                return false;
            };
            let Some(slice) = slot.load_full() else {
                return false;
            };
            if slice.recent.swap(false, Ordering::Relaxed) {
                slice.used.store(false, Ordering::Relaxed);
                return true;
            }
            self.empty_slot(slot, &pool);
            false
        });
        control.hand = 0;
    }

    /// Bytes of memory in use.
    pub(crate) fn memory(&self) -> usize {
        let pages = self.pages.iter().filter(|page| page.get().is_some());
        self.slices() * SLICE_BYTES
            + pages.count() * (size_of::<Slot>() << PAGE_BITS)
            + self.pages.len() * size_of::<OnceLock<Page>>()
    }
}

impl<H: Host> Member for Index<H> {
    /// Gives back a slice by the clock algorithm.
    fn evict(&self) -> Evicted {
        let mut control = self.control.lock();
        while control.clock.len() > MIN_SLICES {
            let hand = control.hand % control.clock.len();
            control.hand = hand + 1;
            let slot = self.slot(control.clock[hand]);
            let slice = slot.and_then(ArcSwapOption::load_full);
            match (slot, slice) {
                (Some(slot), Some(slice)) => {
                    if slice.used.swap(false, Ordering::Relaxed) {
                        return Evicted::Spared;
                    }
                    self.empty_slot(slot, &control.pool);
                    control.clock.swap_remove(hand);
                    control.hand = hand;
                    return Evicted::Piece;
                }
                // It was dropped when a layer changed.
                _ => {
                    control.clock.swap_remove(hand);
                    control.hand = hand;
                }
            }
        }
        Evicted::Nothing
    }
}

impl<H: Host> Drop for Index<H> {
    fn drop(&mut self) {
        let bytes = self.slices() * SLICE_BYTES;
        self.control.get_mut().pool.give(bytes);
    }
}
