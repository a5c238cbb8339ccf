//! What people can watch: where reads find their data.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::host::Host;
use crate::image::Image;
use crate::shard::{self, SHARDS};

/// Classes of depth: the image itself, then 1, 2 to 3, 4 to 7 layers below and
/// so on, up to the longest chain that is indexed.
const CLASSES: usize = 17;

/// Counters that several threads increase without getting in each other's way.
#[derive(Default)]
pub(crate) struct ReadCounters(OnceLock<Box<[Shard; SHARDS]>>);

/// On cache lines of its own.
#[derive(Default)]
#[repr(align(128))]
struct Shard {
    by_depth: [AtomicU64; CLASSES],
    zero: AtomicU64,
    below: AtomicU64,
    misses: AtomicU64,
}

impl ReadCounters {
    #[inline]
    fn shard(&self) -> &Shard {
        &self.0.get_or_init(Box::default)[shard::number()]
    }

    /// Data, so many layers below the image.
    #[inline]
    pub(super) fn data(&self, depth: usize) {
        let class = (usize::BITS - depth.leading_zeros()) as usize;
        self.shard().by_depth[class.min(CLASSES - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// Zeroes, whoever says so.
    #[inline]
    pub(super) fn zero(&self) {
        self.shard().zero.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes that no layer has.
    #[inline]
    pub(super) fn below(&self) {
        self.shard().below.fetch_add(1, Ordering::Relaxed);
    }

    /// The index did not know.
    #[inline]
    pub(super) fn miss(&self) {
        self.shard().misses.fetch_add(1, Ordering::Relaxed);
    }

    fn sum(&self, of: impl Fn(&Shard) -> &AtomicU64) -> u64 {
        let shards = self.0.get().map_or(&[][..], |shards| &shards[..]);
        let counts = shards.iter().map(|shard| of(shard).load(Ordering::Relaxed));
        counts.sum()
    }
}

/// Statistics of an image and the chain below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChainStatistics {
    /// Images in the chain, this one included, as far as it is served in one.
    pub layers: u64,
    /// Bytes of memory that the index of the layers below takes.
    pub index_bytes: u64,
    /// Bytes of memory that index and table caches of the chain take.
    pub cache_bytes: u64,
    /// Bytes that these may take.
    pub cache_limit: u64,
    /// Extents that were looked up, but for `misses`: in the top's own tables
    /// or in the index.
    pub hits: u64,
    /// Extents for which the index had to be completed from the layers' tables.
    pub misses: u64,
    /// Slices of the index that were merged.
    pub merged_slices: u64,
    /// Parts of L2 tables that were read for that.
    pub table_reads: u64,
    /// Extents that were zeroes.
    pub zero_reads: u64,
    /// Extents that no image of the chain has.
    pub below_reads: u64,
    /// Extents by the depth at which they were found: in the image itself, 1
    /// layer below, 2 to 3, 4 to 7 and so on.
    pub reads_by_depth: Vec<u64>,
}

impl<H: Host> Image<H> {
    /// Number of layers below, and the lowest of them. Makes no view of them, as
    /// this may be asked of every layer of a chain.
    pub fn layers_below(&self) -> (u64, Option<Arc<Self>>) {
        let (mut count, mut lowest) = (0, None);
        while let Some(layer) = lowest.as_deref().unwrap_or(self).host().layer_below() {
            count += 1;
            lowest = Some(layer);
        }
        (count, lowest)
    }

    /// What has been counted since the image was opened. The figures of the
    /// index begin anew when the chain is another one.
    pub fn chain_statistics(&self) -> ChainStatistics {
        let reads = self.links().reads();
        let view = self.links().last_view();
        let pool = self.pool();
        let mut by_depth: Vec<_> = (0..CLASSES)
            .map(|class| reads.sum(|shard| &shard.by_depth[class]))
            .collect();
        let classes = by_depth.iter().rposition(|count| *count > 0);
        by_depth.truncate(classes.map_or(1, |last| last + 1));
        let misses = reads.sum(|shard| &shard.misses);
        let (zero_reads, below_reads) = (
            reads.sum(|shard| &shard.zero),
            reads.sum(|shard| &shard.below),
        );
        let all = by_depth.iter().sum::<u64>() + zero_reads + below_reads;
        let index = view.index();
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        ChainStatistics {
            layers: self.layers_below().0 + 1,
            index_bytes: index.map_or(0, |index| index.memory() as u64),
            cache_bytes: pool.used() as u64,
            cache_limit: pool.limit() as u64,
            hits: all.saturating_sub(misses),
            misses,
            merged_slices: index.map_or(0, |index| count(&index.counters.merged)),
            table_reads: index.map_or(0, |index| count(&index.counters.table_reads)),
            zero_reads,
            below_reads,
            reads_by_depth: by_depth,
        }
    }
}
