//! The bytes of every cluster of every layer, so that a read that ends in the
//! wrong layer or at the wrong place is seen.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Bytes that clusters are cut from.
const POOL: usize = 4 << 20;
/// The largest cluster.
const LARGEST: usize = 2 << 20;
/// Random bytes at the beginning of each part of a cluster that compresses.
const DENSE: usize = 96;
/// Bytes of such a part.
const PART: usize = 512;

/// Makes the content.
pub struct Content {
    seed: u64,
    pool: Vec<u8>,
}

impl Content {
    /// For one seed.
    pub fn new(seed: u64) -> Self {
        let mut pool = vec![0; POOL + LARGEST];
        ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut pool);
        Self { seed, pool }
    }

    /// Fills `cluster` with what cluster `number` of a layer holds, a stamp
    /// that a person can read in front. Compressible data compress to about a
    /// quarter.
    pub fn fill(&self, layer: usize, number: u64, compressible: bool, cluster: &mut [u8]) {
        let place = (layer as u64)
            .wrapping_mul(0x9E37_79B1)
            .wrapping_add(number.wrapping_mul(0x85EB_CA77));
        let start = (place.wrapping_mul(32) % POOL as u64) as usize;
        cluster.copy_from_slice(&self.pool[start..start + cluster.len()]);
        if compressible {
            for part in cluster.chunks_mut(PART) {
                let dense = DENSE.min(part.len());
                part[dense..].fill(b'.');
            }
        }
        let stamp = format!("seed {} layer {layer} cluster {number}\n", self.seed);
        let len = stamp.len().min(cluster.len());
        cluster[..len].copy_from_slice(&stamp.as_bytes()[..len]);
    }
}
