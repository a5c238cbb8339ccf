//! References to clusters, as they are counted from the tables.
//!
//! A damaged image may be a sparse file of any length, so memory is taken only
//! for the parts of the file that something refers to.

use rustc_hash::FxHashMap;

use crate::error::{Error, Result};

/// Clusters in one piece of memory.
const CHUNK: u64 = 2048;
/// The mark of a count that does not fit and is in the map.
const LARGE: u16 = u16::MAX;

/// One count for each cluster of a file.
pub(super) struct Counts {
    len: u64,
    max: u64,
    chunks: Vec<Option<Box<[u16]>>>,
    large: FxHashMap<u64, u64>,
}

impl Counts {
    /// No references yet. No count gets larger than `max`.
    pub(super) fn new(max: u64) -> Self {
        Self {
            len: 0,
            max,
            chunks: Vec::new(),
            large: FxHashMap::default(),
        }
    }

    /// Number of clusters.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Makes the file at least `len` clusters long.
    #[inline]
    pub(super) fn grow(&mut self, len: u64) -> Result<()> {
        if len > self.len {
            self.grow_to(len)
        } else {
            Ok(())
        }
    }

    #[cold]
    fn grow_to(&mut self, len: u64) -> Result<()> {
        let chunks = len.div_ceil(CHUNK) as usize;
        let more = chunks - self.chunks.len();
        self.chunks
            .try_reserve(more)
            .map_err(|_| Error::errno(libc::ENOMEM))?;
        self.chunks.resize(chunks, None);
        self.len = len;
        Ok(())
    }

    /// Forgets all references. The length stays.
    pub(super) fn clear(&mut self) {
        self.chunks.fill(None);
        self.large.clear();
    }

    /// The references to a cluster; none to one beyond the end.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let chunk = self
            .chunks
            .get((cluster / CHUNK) as usize)
            .and_then(Option::as_deref);
        match chunk.map_or(0, |counts| counts[(cluster % CHUNK) as usize]) {
            LARGE => self
                .large
                .get(&cluster)
                .copied()
                .unwrap_or(u64::from(LARGE)),
            count => u64::from(count),
        }
    }

    /// Counts a reference to a cluster before the end. `false` where the count
    /// is as large as it may be.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64) -> Result<bool> {
        let max = self.max;
        let count = &mut self.chunk(cluster)?[(cluster % CHUNK) as usize];
        if *count >= LARGE - 1 {
            return self.add_to_many(cluster);
        }
        let fits = u64::from(*count) < max;
        *count += u16::from(fits);
        Ok(fits)
    }

    /// [`Counts::add`] where the new count, if there is one, goes to the map.
    #[cold]
    fn add_to_many(&mut self, cluster: u64) -> Result<bool> {
        let old = self.get(cluster);
        if old >= self.max {
            return Ok(false);
        }
        self.large.insert(cluster, old + 1);
        self.chunk(cluster)?[(cluster % CHUNK) as usize] = LARGE;
        Ok(true)
    }

    #[inline]
    fn chunk(&mut self, cluster: u64) -> Result<&mut [u16]> {
        let slot = &mut self.chunks[(cluster / CHUNK) as usize];
        if slot.is_none() {
            *slot = Some(new_chunk()?);
        }
        Ok(slot.as_deref_mut().unwrap_or_default())
    }

    /// The first cluster with a reference from `from` on and below `end`.
    pub(super) fn next_used(&self, from: u64, end: u64) -> Option<u64> {
        let end = end.min(self.len);
        let mut at = from;
        while at < end {
            let chunk_end = (at / CHUNK + 1) * CHUNK;
            if let Some(counts) = self
                .chunks
                .get((at / CHUNK) as usize)
                .and_then(Option::as_deref)
            {
                let rest = &counts[(at % CHUNK) as usize..];
                if let Some(hit) = rest.iter().position(|count| *count != 0) {
                    return Some(at + hit as u64).filter(|cluster| *cluster < end);
                }
            }
            at = chunk_end;
        }
        None
    }

    /// Takes `count` clusters in a row without references, from `*first` on,
    /// appended to the file where there is no such gap, and counts one reference
    /// to each. `*first` becomes the first gap, too small or not.
    pub(super) fn take(&mut self, count: u64, first: &mut u64, limit: u64) -> Result<u64> {
        let mut start = *first;
        let mut gap_seen = false;
        let taken = loop {
            let used = self.next_used(start, self.len);
            let free = used.unwrap_or(u64::MAX) - start;
            if free > 0 && !gap_seen {
                gap_seen = true;
                *first = start;
            }
            match used {
                Some(used) if free < count => start = used + 1,
                _ => break start,
            }
        };
        let end = taken + count;
        if end > limit {
            return Err(Error::errno(libc::EFBIG));
        }
        self.grow(end)?;
        for cluster in taken..end {
            self.add(cluster)?;
        }
        Ok(taken)
    }
}

/// Clusters that nothing refers to.
#[cold]
fn new_chunk() -> Result<Box<[u16]>> {
    let mut counts = Vec::new();
    counts
        .try_reserve_exact(CHUNK as usize)
        .map_err(|_| Error::errno(libc::ENOMEM))?;
    counts.resize(CHUNK as usize, 0);
    Ok(counts.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counts(len: u64, max: u64) -> Counts {
        let mut counts = Counts::new(max);
        counts.grow(len).unwrap();
        counts
    }

    #[test]
    fn counts_saturate_at_the_width_of_the_image() {
        for max in [1, 3, 255, 65534, 65535, 65536, 70000] {
            let mut counts = counts(5000, max);
            for i in 0..max {
                assert_eq!(counts.get(3000), i);
                assert!(counts.add(3000).unwrap());
            }
            assert!(!counts.add(3000).unwrap());
            assert_eq!(counts.get(3000), max);
            assert_eq!(counts.get(2999), 0);
            counts.clear();
            assert_eq!(counts.get(3000), 0);
        }
    }

    #[test]
    fn a_huge_file_costs_what_is_used_of_it() {
        let mut counts = counts(1 << 31, 1);
        counts.add((1 << 31) - 1).unwrap();
        assert_eq!(counts.next_used(0, u64::MAX), Some((1 << 31) - 1));
        assert_eq!(counts.chunks.iter().flatten().count(), 1);
    }

    #[test]
    fn gaps_are_found_or_made() {
        let mut counts = counts(10, 1);
        for used in [0, 1, 3, 4, 7] {
            counts.add(used).unwrap();
        }
        let mut first = 0;
        assert_eq!(counts.take(2, &mut first, 100).unwrap(), 5);
        assert_eq!(first, 2);
        assert_eq!(counts.take(1, &mut first, 100).unwrap(), 2);
        assert_eq!(counts.take(3, &mut first, 100).unwrap(), 8);
        assert_eq!(counts.len(), 11);
        assert_eq!(counts.take(1, &mut 50, 100).unwrap(), 50);
        assert_eq!(
            counts.take(80, &mut 0, 100).unwrap_err().code(),
            libc::EFBIG
        );
    }

    proptest! {
        /// The next used cluster is what looking at each of them finds.
        #[test]
        fn next_used_skips_nothing(
            used in prop::collection::btree_set(0..10_000u64, 0..20),
            from in 0..11_000u64,
            end in 0..11_000u64,
        ) {
            let mut counts = counts(10_000, 9);
            for cluster in &used {
                counts.add(*cluster).unwrap();
            }
            let expected = (from..end).find(|cluster| used.contains(cluster));
            prop_assert_eq!(counts.next_used(from, end), expected);
        }
    }
}
