//! Random chains.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Bytes that the files of a chain have, about, at most.
const MOST_BYTES: f64 = (600u64 << 20) as f64;

/// How a chain is built.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    pub layers: usize,
    pub place: String,
    /// What `build` is called with.
    pub options: Vec<String>,
}

impl Recipe {
    /// Draws one. Sizes are drawn by their logarithm, so that small chains and
    /// large ones are as many.
    pub fn draw(seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed ^ 0x0076_616c_6964_6174);
        let layers = between(&mut random, 2.0, 500.0) as usize;
        let disk = between(&mut random, (192u64 << 20) as f64, (8u64 << 30) as f64);
        let disk = disk as u64 >> 20 << 20;
        let cluster = 1u64 << [14, 15, 16, 16, 16, 17, 18][random.random_range(0..7)];
        let most = (MOST_BYTES / layers as f64).min(disk as f64 / 4.0);
        let data = between(
            &mut random,
            (128u64 << 10) as f64,
            most.min((8u64 << 20) as f64),
        );
        let base = between(&mut random, data, (disk as f64 / 3.0).min(MOST_BYTES / 2.0));
        let places = ["uniform", "deal", "zipf", "sequential", "ageing"];
        let place = places[random.random_range(0..places.len())];
        let run = 1 << random.random_range(0..4);
        let zeroes = [0.0, 0.0, 0.05, 0.2][random.random_range(0..4)];
        let mut options = vec![
            format!("--layers={layers}"),
            format!("--disk={disk}"),
            format!("--cluster-size={cluster}"),
            format!("--data-per-layer={}", data as u64),
            format!("--base-data={}", base as u64),
            format!("--place={place}"),
            format!("--run={run}"),
            format!("--zeroes={zeroes}"),
            format!("--seed={seed}"),
        ];
        if random.random_bool(0.3) {
            options.push("--scatter".into());
        }
        Self {
            layers,
            place: place.into(),
            options,
        }
    }
}

/// A number whose logarithm is anywhere between those of two.
fn between(random: &mut ChaCha8Rng, least: f64, most: f64) -> f64 {
    let most = most.max(least * 1.001);
    random.random_range(least.ln()..most.ln()).exp()
}
