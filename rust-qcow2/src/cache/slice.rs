//! A part of an L2 table in memory, which is read without a lock.
//!
//! # Extended entries
//!
//! A standard entry is one word, so a reader sees it as it was before a change
//! or after it. An extended one is two words, whose combination decides: the
//! place of one state with the bitmap of another would send a reader to a
//! cluster that has other data, or make a good image look damaged. So a slice
//! counts the changes of its extended entries, as in a sequence lock: the
//! count is odd while the two words are being stored, and a reader takes what
//! it has read only if the count was even before and is the same afterwards.
//! There is one who changes entries at a time, and he does nothing else
//! between the two words, so a reader seldom tries twice; one that was unlucky
//! several times over asks under the metadata lock ([`L2Slice::try_get`]
//! returns `None`), where nothing changes.
//!
//! The fences make that true on every machine. The stores of the words come
//! after the odd count for everybody who sees one of them (release fence), so
//! a reader that saw a new word sees the count changed afterwards (acquire
//! fence); and a reader that saw the even count of a change sees both its words
//! (release store, acquire load).
//!
//! # Readers of the data
//!
//! A reader counts itself in (`image/inflight.rs`) and then looks at the entry;
//! who changes the entry looks afterwards whether anybody is counted in, before
//! the cluster is given away. One of the two has to see the other, so all four
//! are sequentially consistent.
//!
//! In a file the 16 bytes lie in one sector, as tables and slices are aligned.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use crate::format::entry::L2Entry;
use crate::format::subclusters::ClusterEntry;
use crate::units::HostOffset;

/// How often a reader tries to see an extended entry between two changes.
const TRIES: usize = 16;

/// Slices are written in whole blocks of so many bytes: what direct I/O wants.
const BLOCK: usize = 4096;

/// A part of an L2 table, in memory.
pub struct L2Slice {
    pub(super) offset: HostOffset,
    /// Entries; extended ones are two words.
    words: Box<[AtomicU64]>,
    extended: bool,
    /// How often the words of extended entries were changed, twice; odd in
    /// between.
    changes: AtomicU64,
    pub(super) dirty: AtomicBool,
    /// The first byte that was changed since the slice was written, and the end
    /// of the last one. Of no concern but to the holder of the metadata lock.
    changed_from: AtomicUsize,
    changed_to: AtomicUsize,
    /// Looked up since the hand of the clock passed.
    pub(super) used: AtomicBool,
    /// Looked up since the last cleaning.
    pub(super) recent: AtomicBool,
}

impl L2Slice {
    /// A slice from its bytes in the file at `offset`, of extended entries or
    /// of standard ones.
    #[must_use]
    pub fn from_bytes(offset: HostOffset, bytes: &[u8], extended: bool) -> Self {
        let words = bytes
            .chunks_exact(8)
            .map(|word| {
                let mut be = [0; 8];
                be.copy_from_slice(word);
                AtomicU64::new(u64::from_be_bytes(be))
            })
            .collect();
        Self {
            offset,
            words,
            extended,
            changes: AtomicU64::new(0),
            dirty: AtomicBool::new(false),
            changed_from: AtomicUsize::new(usize::MAX),
            changed_to: AtomicUsize::new(0),
            used: AtomicBool::new(false),
            recent: AtomicBool::new(true),
        }
    }

    /// Where the slice is in the file.
    #[must_use]
    pub fn offset(&self) -> HostOffset {
        self.offset
    }

    /// Bytes of the slice in the file.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.words.len() * 8
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words.len() >> u32::from(self.extended)
    }

    /// Whether the slice has no entries (never the case in practice).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Entry number `index` of a slice of standard entries.
    #[inline]
    #[must_use]
    pub fn get_standard(&self, index: usize) -> L2Entry {
        debug_assert!(!self.extended);
        L2Entry(self.words[index].load(Ordering::SeqCst))
    }

    /// Entry number `index` of the slice for the holder of the metadata lock.
    #[must_use]
    pub fn get(&self, index: usize) -> ClusterEntry {
        if self.extended {
            self.pair(index)
        } else {
            ClusterEntry::standard(self.get_standard(index))
        }
    }

    /// Entry number `index` of the slice for anybody. `None` where it keeps
    /// changing.
    #[inline]
    #[must_use]
    pub fn try_get(&self, index: usize) -> Option<ClusterEntry> {
        if !self.extended {
            return Some(ClusterEntry::standard(self.get_standard(index)));
        }
        for _ in 0..TRIES {
            let before = self.changes.load(Ordering::SeqCst);
            let entry = self.pair(index);
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.changes.load(Ordering::Relaxed) == before {
                return Some(entry);
            }
            std::hint::spin_loop();
        }
        None
    }

    /// The words of an extended entry, which may be of different age.
    #[inline]
    fn pair(&self, index: usize) -> ClusterEntry {
        let pair = &self.words[2 * index..2 * index + 2];
        ClusterEntry::extended(
            pair[0].load(Ordering::Relaxed),
            pair[1].load(Ordering::Relaxed),
        )
    }

    /// Changes an entry; the caller is the only one who does.
    pub(super) fn set(&self, index: usize, new: ClusterEntry) {
        let size = 8 << u32::from(self.extended);
        let (from, to) = (index * size, (index + 1) * size);
        self.changed_from.fetch_min(from, Ordering::Relaxed);
        self.changed_to.fetch_max(to, Ordering::Relaxed);
        if !self.extended {
            self.words[index].store(new.entry.0, Ordering::SeqCst);
            return;
        }
        let changes = self.changes.load(Ordering::Relaxed);
        self.changes.store(changes | 1, Ordering::Relaxed);
        fence(Ordering::Release);
        let pair = &self.words[2 * index..2 * index + 2];
        pair[0].store(new.entry.0, Ordering::Relaxed);
        pair[1].store(new.subclusters.0, Ordering::Relaxed);
        self.changes.store((changes | 1) + 1, Ordering::SeqCst);
    }

    /// Whether the file does not have the slice as it is here.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Notes that the file has the slice as it is here.
    pub(super) fn set_clean(&self) {
        self.dirty.store(false, Ordering::Relaxed);
        self.changed_from.store(usize::MAX, Ordering::Relaxed);
        self.changed_to.store(0, Ordering::Relaxed);
    }

    /// The part of the slice that the file has not as it is here, in whole
    /// blocks: in bytes from the begin of the slice.
    #[must_use]
    pub fn changed(&self) -> Range<usize> {
        let to = self.changed_to.load(Ordering::Relaxed);
        let from = self.changed_from.load(Ordering::Relaxed).min(to);
        let end = to.next_multiple_of(BLOCK).min(self.bytes());
        from - from % BLOCK..end
    }

    /// The slice from byte `from` on as it is in the file.
    pub fn to_bytes(&self, from: usize, out: &mut [u8]) {
        for (bytes, word) in out.chunks_exact_mut(8).zip(&self.words[from / 8..]) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::subclusters::Subclusters;

    #[test]
    fn extended_entries_are_in_the_file_as_in_memory() {
        let bytes: Vec<u8> = (0..64u8).map(|i| i & !1).collect();
        let slice = L2Slice::from_bytes(HostOffset(0), &bytes, true);
        assert_eq!((slice.len(), slice.bytes()), (4, 64));
        let entry = slice.get(1);
        assert_eq!(entry.entry.0, 0x1010_1212_1414_1616);
        assert_eq!(entry.subclusters.0, 0x1818_1a1a_1c1c_1e1e);
        assert_eq!(slice.try_get(1), Some(entry));
        let mut out = vec![0; 64];
        slice.to_bytes(0, &mut out);
        assert_eq!(out, bytes);
        slice.to_bytes(48, &mut out[..16]);
        assert_eq!(out[..16], bytes[48..]);
    }

    #[test]
    fn changes_are_written_in_blocks() {
        for extended in [false, true] {
            let slice = L2Slice::from_bytes(HostOffset(0), &[0; 16384], extended);
            let per_block = BLOCK / if extended { 16 } else { 8 };
            assert!(slice.changed().is_empty());
            slice.set(per_block, ClusterEntry::UNALLOCATED);
            assert_eq!(slice.changed(), BLOCK..2 * BLOCK);
            slice.set(3 * per_block - 1, ClusterEntry::UNALLOCATED);
            assert_eq!(slice.changed(), BLOCK..3 * BLOCK);
            slice.set(per_block - 1, ClusterEntry::UNALLOCATED);
            assert_eq!(slice.changed(), 0..3 * BLOCK);
            slice.set_clean();
            assert!(slice.changed().is_empty());
            slice.set(4 * per_block - 1, ClusterEntry::UNALLOCATED);
            assert_eq!(slice.changed(), 3 * BLOCK..4 * BLOCK);
        }
        // As long as a block, or shorter.
        let slice = L2Slice::from_bytes(HostOffset(0), &[0; 512], false);
        slice.set(63, ClusterEntry::UNALLOCATED);
        assert_eq!(slice.changed(), 0..512);
    }

    /// One thread changes both words of some entries as fast as it can, others
    /// read: they see no pair that was never there.
    #[test]
    fn readers_see_no_torn_pair() {
        let slice = L2Slice::from_bytes(HostOffset(0), &[0; 64], true);
        let pair = |number: u64| ClusterEntry {
            entry: L2Entry(number << 9),
            subclusters: Subclusters(number.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let (mut seen, mut last) = (0u64, [0; 4]);
                        while !stop.load(Ordering::Relaxed) {
                            for (index, last) in last.iter_mut().enumerate() {
                                let Some(entry) = slice.try_get(index) else {
                                    continue;
                                };
                                let number = entry.entry.0 >> 9;
                                if entry != pair(number) || number < *last {
                                    stop.store(true, Ordering::Relaxed);
                                    panic!("{entry:?} after {last}");
                                }
                                *last = number;
                                seen += 1;
                            }
                        }
                        seen
                    })
                })
                .collect();
            for number in 1..2_000_000u64 {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                slice.set(number as usize % 4, pair(number));
            }
            stop.store(true, Ordering::Relaxed);
            let seen: u64 = readers
                .into_iter()
                .map(|reader| reader.join().unwrap())
                .sum();
            assert!(seen > 0);
        });
    }
}
