//! Where to read: places that go through all tables, and samples of data and
//! holes.

use anyhow::Result;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustc_hash::FxHashMap;

use super::qemu::BLOCK;
use crate::chain::Chain;
use crate::cli::Driver;
use crate::model::shape::Shape;
use crate::survey::{Piece, survey};

/// Places that are read to have everything in memory, at most.
const MAX_WARM: u64 = 10_240;
/// Units of mapping that one such place is enough for: a slice of the index,
/// and a part of a table.
const UNITS: u64 = 512;

/// Offsets on the disk.
#[derive(Debug, Default)]
pub struct Targets {
    /// Reads here go to all tables that there is a way to.
    pub warm: Vec<u64>,
    /// Parts of the disk that have to be read before everything is in memory.
    pub tables: u64,
    /// Data, each byte of them as likely as any other.
    pub data: Vec<u64>,
    /// The same of what no layer has.
    pub holes: Vec<u64>,
}

impl Targets {
    /// Draws `count` places of data and of holes.
    pub fn draw(chain: &Chain, driver: Driver, count: u64) -> Result<(Shape, Self)> {
        let mut warm = Warm::new(chain.disk_size(), chain.unit());
        let (shape, found) = Shape::of(
            chain,
            &mut |piece: Piece| {
                if piece.visible {
                    warm.add(piece.start, piece.start + piece.len, piece.depth);
                }
            },
            &mut |_| {},
        )?;
        let mut holes = Sample::new(shape.holes.bytes, count, 1);
        found.holes(shape.disk, &mut |from, upto| {
            warm.add(from, upto, shape.depth());
            holes.pass(from, upto - from);
        });
        // Once more, now that it is known how much there is.
        let mut data = Sample::new(shape.data_bytes(), count, 2);
        survey(
            chain,
            &mut |piece| {
                if piece.visible && piece.data {
                    data.pass(piece.start, piece.len);
                }
            },
            &mut |_| {},
        )?;
        let warm = warm.finish();
        let targets = Self {
            // QEMU's driver loads whole tables.
            tables: match driver {
                Driver::Qcow2 => shape.disk.div_ceil(table_span(chain)),
                Driver::Rqcow2 => warm.len() as u64,
            },
            warm,
            data: data.finish(),
            holes: holes.finish(),
        };
        Ok((shape, targets))
    }
}

/// Bytes of the disk that the smallest L2 table covers.
fn table_span(chain: &Chain) -> u64 {
    let images = chain.layers.iter().filter_map(|layer| layer.qcow2());
    let spans = images.map(|image| {
        let entry_bits = if image.extended_l2 { 4 } else { 3 };
        image.cluster_size * (image.cluster_size >> entry_bits)
    });
    spans.min().unwrap_or(1 << 29)
}

/// For each part of the disk the place that is served at the greatest depth.
struct Warm {
    size: u64,
    stride: u64,
    deepest: FxHashMap<u64, (usize, u64)>,
}

impl Warm {
    fn new(disk: u64, unit: u64) -> Self {
        let size = unit * UNITS;
        Self {
            size,
            stride: disk.div_ceil(size).div_ceil(MAX_WARM).max(1),
            deepest: FxHashMap::default(),
        }
    }

    fn add(&mut self, from: u64, upto: u64, depth: usize) {
        let step = self.size * self.stride;
        let mut slot = from / step * step;
        if slot + self.size <= from {
            slot += step;
        }
        while slot < upto {
            let place = slot.max(from);
            let entry = self.deepest.entry(slot).or_insert((depth, place));
            if depth > entry.0 {
                *entry = (depth, place);
            }
            slot += step;
        }
    }

    fn finish(self) -> Vec<u64> {
        let mut all: Vec<_> = self.deepest.into_values().map(|(_, at)| at).collect();
        all.sort_unstable();
        align(all)
    }
}

/// Draws places at even distances in the order in which they come by: as many
/// from each depth as there are bytes, or one more or less.
struct Sample {
    /// Bytes that have come by.
    passed: u64,
    /// In descending order: how many bytes have come by before.
    wanted: Vec<u64>,
    found: Vec<u64>,
    random: ChaCha8Rng,
}

impl Sample {
    fn new(total: u64, count: u64, seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let count = count.min(total / BLOCK);
        let step = total as f64 / count.max(1) as f64;
        let place = |number| (number as f64 + random.random::<f64>()) * step;
        let mut wanted: Vec<_> = (0..count).map(place).map(|at| at as u64).collect();
        wanted.reverse();
        Self {
            passed: 0,
            wanted,
            found: Vec::new(),
            random,
        }
    }

    fn pass(&mut self, start: u64, len: u64) {
        while let Some(next) = self.wanted.last().copied() {
            if next >= self.passed + len {
                break;
            }
            self.found.push(start + (next - self.passed));
            self.wanted.pop();
        }
        self.passed += len;
    }

    fn finish(mut self) -> Vec<u64> {
        self.found.shuffle(&mut self.random);
        align(self.found)
    }
}

fn align(mut places: Vec<u64>) -> Vec<u64> {
    places.iter_mut().for_each(|at| *at -= *at % BLOCK);
    places
}
