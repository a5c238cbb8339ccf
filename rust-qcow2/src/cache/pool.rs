//! One amount of memory for all that a chain caches.
//!
//! Each image has a cache of L2 slices, and the image on top has the index of
//! those below. All of them count what they hold in one pool. Whoever takes
//! more than there is lets the members give something back, in turns, until it
//! fits again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustc_hash::FxHashSet;

/// What came of asking a member for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evicted {
    /// It gave back a piece.
    Piece,
    /// It spared a piece that was used lately; not again the next time.
    Spared,
    /// It has nothing that it could give.
    Nothing,
}

/// Something that holds memory of a pool.
pub trait Member: Send + Sync {
    /// Gives back one piece that is not in use and can be had again. Pieces
    /// that were used lately are spared once.
    fn evict(&self) -> Evicted;
}

/// No piece is smaller than this.
const MIN_PIECE: usize = 512;

/// An amount of memory that is shared.
pub struct Pool {
    limit: AtomicUsize,
    used: AtomicUsize,
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    list: Vec<Weak<dyn Member>>,
    hand: usize,
    /// The length of the list at which it is looked through for members that are
    /// gone, or are there twice as they were in another pool meanwhile.
    tidy_at: usize,
}

impl Pool {
    /// A pool of `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(limit),
            used: AtomicUsize::new(0),
            members: Mutex::default(),
        })
    }

    /// Bytes that may be in use.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Changes the amount; [`Pool::trim`] makes it true.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Adds somebody who can give memory back.
    pub fn join(&self, member: Weak<dyn Member>) {
        let mut members = self.members.lock();
        if members.list.len() >= members.tidy_at {
            let mut seen = FxHashSet::default();
            members.list.retain(|member| {
                member.strong_count() > 0 && seen.insert(member.as_ptr().cast::<()>().addr())
            });
            members.tidy_at = 2 * members.list.len() + 16;
        }
        members.list.push(member);
    }

    /// Counts memory that a member has taken. May be called under its lock.
    pub fn take(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts memory that a member has given back.
    pub fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Makes members give back what is too much. Called without any lock of a
    /// member. What is dirty or in use stays.
    pub fn trim(&self) {
        if self.used() <= self.limit() {
            return;
        }
        let mut members = self.members.lock();
        // Members in a row that had nothing. That each piece is spared once is
        // no reason to give up; that others use them meanwhile is one.
        let mut idle = 0;
        let mut spared = 0;
        let pieces = self.used() / MIN_PIECE;
        while self.used() > self.limit() && idle < members.list.len() && spared <= pieces {
            if members.hand >= members.list.len() {
                members.hand = 0;
            }
            let member = members.list[members.hand].upgrade();
            match member.map_or(Evicted::Nothing, |member| member.evict()) {
                Evicted::Piece => idle = 0,
                Evicted::Spared => {
                    // The same once more: the others may be a thousand, and empty.
                    (idle, spared) = (0, spared + 1);
                    continue;
                }
                Evicted::Nothing => idle += 1,
            }
            members.hand += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::OnceLock;

    struct Holder {
        pieces: AtomicUsize,
        spares: AtomicUsize,
        pool: OnceLock<Arc<Pool>>,
    }

    impl Member for Holder {
        fn evict(&self) -> Evicted {
            if self.spares.load(Ordering::Relaxed) > 0 {
                self.spares.fetch_sub(1, Ordering::Relaxed);
                return Evicted::Spared;
            }
            if self.pieces.load(Ordering::Relaxed) == 0 {
                return Evicted::Nothing;
            }
            self.pieces.fetch_sub(1, Ordering::Relaxed);
            self.pool.get().unwrap().give(1000);
            Evicted::Piece
        }
    }

    #[test]
    fn all_members_give_in_turns() {
        let pool = Pool::new(10_000);
        let holders: Vec<_> = (0..3)
            .map(|_| {
                Arc::new(Holder {
                    pieces: AtomicUsize::new(5),
                    // Whatever was used lately goes all the same.
                    spares: AtomicUsize::new(5),
                    pool: OnceLock::from(Arc::clone(&pool)),
                })
            })
            .collect();
        for holder in &holders {
            let weak: Weak<Holder> = Arc::downgrade(holder);
            pool.join(weak);
            pool.take(5000);
        }
        pool.trim();
        assert_eq!(pool.used(), 10_000);
        for holder in &holders {
            assert!(holder.pieces.load(Ordering::Relaxed) >= 3);
        }
        pool.set_limit(0);
        pool.trim();
        assert_eq!(pool.used(), 0);
        // Nobody has anything: that ends as well.
        pool.take(1000);
        pool.trim();
        assert_eq!(pool.used(), 1000);
    }
}
