//! Slices of L2 tables.
//!
//! A slice is looked up under a short lock and then read without any: its
//! entries are atomics. Only the holder of the image's metadata lock changes
//! entries and inserts slices. He also removes them; others do only with those
//! that are clean and that nobody holds. A reader that still holds a slice
//! which was evicted meanwhile sees it as it was at its lookup, which is as if
//! the lookup had happened before the eviction.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use super::pool::{Evicted, Member, Pool};
pub use super::slice::L2Slice;
use crate::format::subclusters::ClusterEntry;
use crate::units::HostOffset;

/// Parts of the map that is looked up, so that requests in several threads
/// seldom meet in one.
const PARTS: usize = 8;

/// The slices of one image.
pub struct L2Cache {
    /// All slices by their offset. Changed only under the lock of `inner`.
    parts: [RwLock<FxHashMap<u64, Arc<L2Slice>>>; PARTS],
    /// Bytes of a slice. Changes only while no request is in flight.
    slice_size: AtomicUsize,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Where the memory of the slices is counted.
    pool: Arc<Pool>,
    slice_size: usize,
    /// Where slices are in `slots`.
    map: FxHashMap<u64, usize>,
    slots: Vec<Arc<L2Slice>>,
    /// Slices that may be dirty, each once.
    dirty: Vec<Arc<L2Slice>>,
    hand: usize,
    capacity: usize,
}

/// What [`L2Cache::make_room`] found.
pub enum Room {
    /// One more slice fits.
    Free,
    /// This slice has to be written before it can make room.
    Dirty(Arc<L2Slice>),
}

impl L2Cache {
    /// A cache for `capacity` slices of `slice_size` bytes, which are counted in
    /// `pool`. Memory is taken as slices come in.
    #[must_use]
    pub fn new(capacity: usize, slice_size: usize, pool: Arc<Pool>) -> Arc<Self> {
        let cache = Arc::new(Self {
            parts: Default::default(),
            slice_size: AtomicUsize::new(slice_size),
            inner: Mutex::new(Inner {
                pool: Arc::clone(&pool),
                slice_size,
                map: FxHashMap::default(),
                slots: Vec::new(),
                dirty: Vec::new(),
                hand: 0,
                capacity: capacity.max(2),
            }),
        });
        let member: Weak<Self> = Arc::downgrade(&cache);
        pool.join(member);
        cache
    }

    /// Counts the slices in another pool from now on.
    pub fn move_to(self: &Arc<Self>, pool: &Arc<Pool>) {
        {
            let mut inner = self.inner.lock();
            if Arc::ptr_eq(&inner.pool, pool) {
                return;
            }
            let bytes = inner.slots.len() * inner.slice_size;
            inner.pool.give(bytes);
            inner.pool = Arc::clone(pool);
            pool.take(bytes);
        }
        let member: Weak<Self> = Arc::downgrade(self);
        pool.join(member);
    }

    /// The pool in which the slices are counted.
    #[must_use]
    pub fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.inner.lock().pool)
    }

    /// Bytes of a slice.
    #[inline]
    #[must_use]
    pub fn slice_size(&self) -> usize {
        self.slice_size.load(Ordering::Relaxed)
    }

    /// The slice at `offset`, if it is here.
    #[inline]
    #[must_use]
    pub fn get(&self, offset: HostOffset) -> Option<Arc<L2Slice>> {
        let part = self.part(offset).read();
        let slice = part.get(&offset.0)?;
        if !slice.used.load(Ordering::Relaxed) {
            slice.used.store(true, Ordering::Relaxed);
            slice.recent.store(true, Ordering::Relaxed);
        }
        Some(Arc::clone(slice))
    }

    /// The slice at `offset`, if it is here, for somebody who does not count as
    /// using it.
    #[must_use]
    pub fn peek(&self, offset: HostOffset) -> Option<Arc<L2Slice>> {
        self.part(offset).read().get(&offset.0).map(Arc::clone)
    }

    fn part(&self, offset: HostOffset) -> &RwLock<FxHashMap<u64, Arc<L2Slice>>> {
        // Slices lie at multiples of at least 512 bytes, most at larger ones.
        let mixed = (offset.0 >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.parts[(mixed >> 61) as usize % PARTS]
    }

    /// Takes a slice out.
    fn remove_slot(&self, inner: &mut Inner, slot: usize) {
        let offset = inner.slots[slot].offset;
        self.part(offset).write().remove(&offset.0);
        inner.remove_slot(slot);
    }

    fn remove(&self, inner: &mut Inner, offset: HostOffset) {
        if let Some(slot) = inner.map.get(&offset.0) {
            let slot = *slot;
            self.remove_slot(inner, slot);
        }
    }

    fn remove_all(&self, inner: &mut Inner) {
        for part in &self.parts {
            part.write().clear();
        }
        inner.clear();
    }

    /// Makes room for one more slice, by the clock algorithm. Slices that were
    /// only ever loaded go before those that were looked up again, so that a
    /// scan of the disk does not flush out what is in use.
    #[must_use]
    pub fn make_room(&self) -> Room {
        let mut inner = self.inner.lock();
        while inner.slots.len() >= inner.capacity {
            let hand = inner.hand % inner.slots.len();
            inner.hand = hand + 1;
            let slice = &inner.slots[hand];
            if slice.used.swap(false, Ordering::Relaxed) {
                continue;
            }
            if slice.is_dirty() {
                let victim = Arc::clone(slice);
                // It is the next to go, once it is written.
                inner.hand = hand;
                return Room::Dirty(victim);
            }
            self.remove_slot(&mut inner, hand);
        }
        Room::Free
    }

    /// How many slices can come in before others have to go for them, here or
    /// with whom the memory is shared.
    #[must_use]
    pub fn spare_slices(&self) -> usize {
        let inner = self.inner.lock();
        let memory = inner.pool.limit().saturating_sub(inner.pool.used());
        let slots = inner.capacity.saturating_sub(inner.slots.len());
        slots.min(memory / inner.slice_size)
    }

    /// Adds a slice. One that is already here under that offset is replaced.
    pub fn insert(&self, slice: L2Slice) -> Arc<L2Slice> {
        let slice = Arc::new(slice);
        let pool = {
            let mut inner = self.inner.lock();
            self.remove(&mut inner, slice.offset);
            let slot = inner.slots.len();
            inner.map.insert(slice.offset.0, slot);
            inner.slots.push(Arc::clone(&slice));
            let mut part = self.part(slice.offset).write();
            part.insert(slice.offset.0, Arc::clone(&slice));
            inner.pool.take(inner.slice_size);
            Arc::clone(&inner.pool)
        };
        pool.trim();
        slice
    }

    /// Changes an entry and notes that the slice has to be written.
    pub fn set(&self, slice: &Arc<L2Slice>, index: usize, entry: ClusterEntry) {
        slice.set(index, entry);
        self.mark_dirty(slice);
    }

    fn mark_dirty(&self, slice: &Arc<L2Slice>) {
        if !slice.dirty.swap(true, Ordering::Relaxed) {
            self.inner.lock().dirty.push(Arc::clone(slice));
        }
    }

    /// Notes that the slice was written.
    pub fn mark_clean(&self, slice: &Arc<L2Slice>) {
        slice.set_clean();
        self.inner
            .lock()
            .dirty
            .retain(|other| !Arc::ptr_eq(other, slice));
    }

    /// The slices that have to be written, by their place in the file.
    #[must_use]
    pub fn dirty(&self) -> Vec<Arc<L2Slice>> {
        let mut list = self.inner.lock().dirty.clone();
        list.sort_unstable_by_key(|slice| slice.offset);
        list
    }

    /// Whether nothing has to be written.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.inner.lock().dirty.is_empty()
    }

    /// Forgets all slices within `len` bytes from `offset`, dirty or not: their
    /// table is gone.
    pub fn discard(&self, offset: HostOffset, len: u64) {
        let mut inner = self.inner.lock();
        let step = self.slice_size() as u64;
        for at in (offset.0..offset.0.saturating_add(len)).step_by(step as usize) {
            self.remove(&mut inner, HostOffset(at));
        }
    }

    /// Forgets everything, dirty or not.
    pub fn clear(&self) {
        let mut inner = self.inner.lock();
        self.remove_all(&mut inner);
        inner.dirty.clear();
    }

    /// Changes the number of slices. What is too much goes with the next ones
    /// that come in.
    pub fn set_capacity(&self, capacity: usize) {
        self.inner.lock().capacity = capacity.max(2);
    }

    /// Changes the sizes; a cache whose slices change or that holds too many is
    /// emptied, so it has to be clean.
    pub fn resize(&self, capacity: usize, slice_size: usize) {
        let mut inner = self.inner.lock();
        debug_assert!(inner.dirty.is_empty());
        inner.capacity = capacity.max(2);
        let before = self.slice_size.swap(slice_size, Ordering::Relaxed);
        if before != slice_size || inner.slots.len() > inner.capacity {
            self.remove_all(&mut inner);
        }
        inner.slice_size = slice_size;
    }

    /// Drops clean slices that were not looked up since the last call and that
    /// nobody holds.
    pub fn clean(&self) {
        let mut inner = self.inner.lock();
        let mut slot = 0;
        while slot < inner.slots.len() {
            let slice = &inner.slots[slot];
            let recent = slice.recent.swap(false, Ordering::Relaxed);
            slice.used.store(false, Ordering::Relaxed);
            if recent || !self.remove_unheld(&mut inner, slot) {
                slot += 1;
            }
        }
    }

    /// Takes a slice out if it is clean and nobody holds it: who is about to
    /// change an entry holds its slice.
    fn remove_unheld(&self, inner: &mut Inner, slot: usize) -> bool {
        let slice = &inner.slots[slot];
        let mut part = self.part(slice.offset).write();
        // One count each for the two places where it is; nobody gets at it
        // while the part is locked.
        if slice.is_dirty() || Arc::strong_count(slice) != 2 {
            return false;
        }
        part.remove(&slice.offset.0);
        drop(part);
        inner.remove_slot(slot);
        true
    }
}

impl Member for L2Cache {
    /// Gives back a slice that nobody holds.
    fn evict(&self) -> Evicted {
        let mut inner = self.inner.lock();
        for _ in 0..inner.slots.len() {
            let hand = inner.hand % inner.slots.len();
            inner.hand = hand + 1;
            let slice = &inner.slots[hand];
            if slice.used.swap(false, Ordering::Relaxed) {
                return Evicted::Spared;
            }
            if self.remove_unheld(&mut inner, hand) {
                inner.hand = hand;
                return Evicted::Piece;
            }
        }
        Evicted::Nothing
    }
}

impl Drop for L2Cache {
    fn drop(&mut self) {
        self.inner.get_mut().clear();
    }
}

impl Inner {
    fn clear(&mut self) {
        self.pool.give(self.slots.len() * self.slice_size);
        self.map.clear();
        self.slots.clear();
        self.hand = 0;
    }

    fn remove_slot(&mut self, slot: usize) {
        let slice = self.slots.swap_remove(slot);
        self.pool.give(self.slice_size);
        self.map.remove(&slice.offset.0);
        if slice.is_dirty() {
            slice.dirty.store(false, Ordering::Relaxed);
            self.dirty.retain(|other| !Arc::ptr_eq(other, &slice));
        }
        if let Some(moved) = self.slots.get(slot) {
            self.map.insert(moved.offset.0, slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::entry::L2Entry;

    fn slice(offset: u64) -> L2Slice {
        L2Slice::from_bytes(HostOffset(offset), &[0; 4096], false)
    }

    #[test]
    fn looked_up_slices_survive_a_scan() {
        let cache = L2Cache::new(4, 4096, Pool::new(1 << 20));
        cache.insert(slice(0));
        for i in 1..100 {
            assert!(cache.get(HostOffset(0)).is_some());
            assert!(matches!(cache.make_room(), Room::Free));
            cache.insert(slice(i * 4096));
        }
        assert_eq!(cache.inner.lock().slots.len(), 4);
    }

    #[test]
    fn dirty_slices_are_handed_out_for_writing() {
        let cache = L2Cache::new(2, 4096, Pool::new(1 << 20));
        for i in 0..2 {
            let slice = cache.insert(slice(i * 4096));
            cache.set(&slice, 3, ClusterEntry::standard(L2Entry::ZERO_PLAIN));
        }
        assert_eq!(cache.dirty().len(), 2);
        let Room::Dirty(victim) = cache.make_room() else {
            panic!("both are dirty")
        };
        let mut bytes = [0; 4096];
        victim.to_bytes(0, &mut bytes);
        assert_eq!(bytes[31], 1);
        cache.mark_clean(&victim);
        assert!(matches!(cache.make_room(), Room::Free));
        assert_eq!(cache.dirty().len(), 1);
    }

    #[test]
    fn cleaning_keeps_what_was_used() {
        let cache = L2Cache::new(8, 4096, Pool::new(1 << 20));
        cache.insert(slice(0));
        cache.insert(slice(4096));
        cache.clean();
        assert!(cache.get(HostOffset(0)).is_some());
        cache.clean();
        assert!(cache.get(HostOffset(4096)).is_none());
        assert!(cache.get(HostOffset(0)).is_some());
    }

    /// Who holds a slice may change it: a copy loaded beside it would be stale.
    #[test]
    fn cleaning_keeps_what_is_held() {
        let cache = L2Cache::new(8, 4096, Pool::new(1 << 20));
        let held = cache.insert(slice(0));
        cache.clean();
        cache.clean();
        cache.set(&held, 3, ClusterEntry::standard(L2Entry::ZERO_PLAIN));
        let found = cache.get(HostOffset(0)).unwrap();
        assert!(Arc::ptr_eq(&found, &held));
        cache.mark_clean(&held);
        drop((held, found));
        cache.clean();
        cache.clean();
        assert!(cache.get(HostOffset(0)).is_none());
    }

    #[test]
    fn discard_forgets_dirty_slices() {
        let cache = L2Cache::new(8, 4096, Pool::new(1 << 20));
        for i in 0..4 {
            let slice = cache.insert(slice(i * 4096));
            cache.mark_dirty(&slice);
        }
        cache.discard(HostOffset(4096), 8192);
        assert_eq!(cache.dirty().len(), 2);
        assert!(cache.get(HostOffset(4096)).is_none());
        assert!(cache.get(HostOffset(3 * 4096)).is_some());
    }
}
