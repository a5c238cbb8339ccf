//! The forms of the models: what a figure is the sum of. docs/models.md has
//! the reasons.

use super::figure::{Figure, Key};
use super::shape::{LayerShape, Served, Shape};
use super::walk::{Walk, Walks};
use crate::cli::Driver;

const MIB: f64 = (1u64 << 20) as f64;
/// What QEMU's driver caches of L2 tables for each layer, at most.
const L2_CACHE: u64 = 32 << 20;
/// What rqcow2 caches for the whole chain, at most.
const BUDGET: u64 = 32 << 20;
/// Entries in a slice of its index, and the bytes that one takes.
const SLICE_UNITS: u64 = 512;
const SLICE_BYTES: u64 = 512 * 8 + 64;

/// Files from which on their data structures are more out of the CPU's caches
/// than in them.
const MANY: f64 = 100.0;
/// Bytes of tables from which on entries are more out of the CPU's caches than
/// in them.
const CPU_CACHE: f64 = 32.0 * MIB;

/// A figure as a sum: each term times a constant of the machine, plus what
/// needs no constant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Terms {
    /// Name, with the unit of the constant, and value.
    pub list: Vec<(&'static str, f64)>,
    /// In the unit of the figure.
    pub known: f64,
}

/// A chain, with what its terms have in common.
pub struct Model<'a> {
    shape: &'a Shape,
    walks: Walks,
    driver: Driver,
}

impl<'a> Model<'a> {
    pub fn new(shape: &'a Shape, driver: Driver) -> Self {
        Self {
            shape,
            walks: Walks::of(shape),
            driver,
        }
    }

    /// The names of a figure's terms.
    pub fn names(driver: Driver, figure: Figure) -> Vec<&'static str> {
        let some = Served {
            bytes: 1,
            pieces: 1,
            steps: 1,
        };
        let shape = Shape {
            disk: 2,
            unit: 65536,
            layers: vec![LayerShape {
                data: some,
                ..LayerShape::default()
            }],
            holes: some,
        };
        let terms = Model::new(&shape, driver).terms(figure.into());
        let names = terms.unwrap_or_default().list.into_iter();
        names.map(|(name, _)| name).collect()
    }

    /// The terms of a figure; `None` where the chain has nothing to measure.
    pub fn terms(&self, key: Key) -> Option<Terms> {
        let shape = self.shape;
        let nothing = match key.figure {
            Figure::ReadData => shape.data_bytes() == 0,
            Figure::ReadHole => shape.holes.bytes == 0,
            Figure::ReadDisk => shape.disk == 0,
            _ => false,
        };
        if nothing {
            return None;
        }
        let rqcow2 = self.driver == Driver::Rqcow2;
        let list = match key.figure {
            Figure::Open => self.open(),
            Figure::MemoryOpen | Figure::MemoryWarm => self.memory(),
            Figure::ReadData | Figure::ReadHole | Figure::ReadDisk if rqcow2 => {
                self.indexed_read(key)
            }
            Figure::ReadData | Figure::ReadHole | Figure::ReadDisk => self.read(key),
            Figure::Stream | Figure::Merge if rqcow2 => self.indexed_copy(key.figure),
            Figure::Stream | Figure::Merge => self.copy(key.figure),
        };
        let known = match key.figure {
            Figure::MemoryOpen => self.tables_of_open_layers(),
            Figure::MemoryWarm => self.tables_of_open_layers() + self.cached(),
            _ => 0,
        };
        Some(Terms {
            list,
            known: known as f64,
        })
    }

    fn depth(&self) -> f64 {
        self.shape.depth() as f64
    }

    fn sum(&self, of: impl Fn(&LayerShape) -> u64) -> u64 {
        self.shape.layers.iter().map(of).sum()
    }

    /// Every layer is opened; for each of them, unpatched QEMU goes through all
    /// that are there already, more than once.
    fn open(&self) -> Vec<(&'static str, f64)> {
        let depth = self.depth();
        let read = self.sum(|layer| layer.l1_bytes + layer.refcount_table_bytes);
        vec![
            ("s: a chain", 1.0),
            ("s/layer", depth),
            ("s/pair of layers", depth * depth / 2.0),
            ("s/MiB of L1 and refcount tables", read as f64 / MIB),
        ]
    }

    fn memory(&self) -> Vec<(&'static str, f64)> {
        vec![("B: the program", 1.0), ("B/layer", self.depth())]
    }

    /// Bytes of tables in memory from the start. rqcow2 has of the L1 table
    /// nothing but its entries, and no refcount table of what it only reads.
    fn tables_of_open_layers(&self) -> u64 {
        match self.driver {
            Driver::Qcow2 => self.sum(|layer| layer.l1_bytes + layer.refcount_table_bytes),
            Driver::Rqcow2 => 0,
        }
    }

    /// Bytes of tables in memory when all have been needed.
    fn cached(&self) -> u64 {
        let shape = self.shape;
        if self.driver == Driver::Qcow2 {
            return self.cached_tables();
        }
        let index = match shape.layers.len() {
            0 | 1 => 0,
            _ => shape.disk.div_ceil(shape.unit * SLICE_UNITS) * SLICE_BYTES,
        };
        let own = shape
            .layers
            .first()
            .map_or(0, |top| top.tables * top.cluster);
        index.saturating_add(own).min(BUDGET)
    }

    /// Bytes of tables that QEMU's driver caches.
    fn cached_tables(&self) -> u64 {
        self.sum(|layer| {
            let bytes = layer.tables_reached.saturating_mul(layer.cluster);
            bytes.min(L2_CACHE)
        })
    }

    /// Unpatched: the request falls through the layers.
    fn read(&self, key: Key) -> Vec<(&'static str, f64)> {
        let bytes = |part: &Served| part.bytes;
        let (walk, data) = match key.figure {
            Figure::ReadData => {
                let (count, sum) = self.walks.data(self.shape, bytes);
                (sum.mean(count), 1.0)
            }
            Figure::ReadHole => (self.walks.hole(), 0.0),
            _ => {
                let (count, sum) = self.walks.disk(self.shape, bytes);
                (sum.mean(count), self.data_share())
            }
        };
        let mut terms = self.request(key, data);
        terms.extend(walked(&walk));
        if key.figure == Figure::ReadDisk {
            // All over the disk: no entry is used twice in a short time.
            let bytes = self.cached_tables() as f64;
            let far = walk.lookups * bytes / (bytes + CPU_CACHE);
            terms.push(("us/lookup among 32 MiB of tables", far * 2.0));
        }
        terms
    }

    /// What a request costs in any case.
    fn request(&self, key: Key, data: f64) -> Vec<(&'static str, f64)> {
        match key.figure {
            Figure::ReadDisk => vec![
                ("us: a request", 1.0),
                // Polled once for all that are under way.
                (
                    "us: a turn of the event loop",
                    1.0 / f64::from(key.queue_depth.max(1)),
                ),
                ("us: reading data", data),
            ],
            _ => vec![("us: a request", 1.0)],
        }
    }

    fn data_share(&self) -> f64 {
        self.shape.data_bytes() as f64 / self.shape.disk.max(1) as f64
    }

    /// rqcow2: two array accesses, whatever the depth. Many layers are many
    /// files, whose data structures are in no cache of the CPU.
    fn indexed_read(&self, key: Key) -> Vec<(&'static str, f64)> {
        let data = match key.figure {
            Figure::ReadData => 1.0,
            Figure::ReadHole => 0.0,
            _ => self.data_share(),
        };
        let mut terms = self.request(key, data);
        let depth = self.depth();
        // All of it misses when there are many.
        let many = depth / (depth + MANY);
        terms.push(("us: many files", many));
        if key.figure == Figure::ReadDisk {
            terms.push(("us: data of many files", data * many));
        }
        terms
    }

    /// Unpatched: a job looks step by step where the data are, which walks
    /// through the layers, and reads what there is, which walks once more.
    fn copy(&self, figure: Figure) -> Vec<(&'static str, f64)> {
        let count = steps(figure);
        let (all, status) = self.walks.disk(self.shape, count);
        let (data, reads) = self.walks.data(self.shape, count);
        let mut terms = self.copying(figure, all, data);
        terms.push(("s: status of a layer", status.levels));
        terms.push(("s: request to a layer", reads.levels));
        terms.push(("s: visit of a node", reads.visits));
        terms.push(("s: visit among a thousand nodes", reads.far_visits));
        terms
    }

    /// rqcow2: a step costs the same at any depth; each table is read once.
    fn indexed_copy(&self, figure: Figure) -> Vec<(&'static str, f64)> {
        let count = steps(figure);
        let (all, _) = self.walks.disk(self.shape, count);
        let (data, _) = self.walks.data(self.shape, count);
        let mut terms = self.copying(figure, all, data);
        let tables = self.sum(|layer| layer.tables_reached);
        terms.push(("s/table", tables as f64));
        terms
    }

    fn copying(&self, figure: Figure, all: f64, data: f64) -> Vec<(&'static str, f64)> {
        let depth = self.depth();
        let mut terms = vec![
            ("s: a job", 1.0),
            // The chain is closed at the end, by the copy opened as well.
            ("s/layer", depth),
            ("s/pair of layers", depth * depth / 2.0),
            ("s/step", all),
            ("s/step with data", data),
            ("s/MiB of data", self.shape.data_bytes() as f64 / MIB),
        ];
        if figure == Figure::Merge {
            // Status is asked for a range as far as a table reaches.
            let spans = self.shape.disk / (self.shape.unit * SLICE_UNITS);
            terms.push(("s/span of a table", spans as f64));
        }
        terms
    }
}

/// Steps of a stream are at most 512 KiB, those of a copy whole pieces.
fn steps(figure: Figure) -> fn(&Served) -> u64 {
    match figure {
        Figure::Stream => |part| part.steps,
        _ => |part| part.pieces,
    }
}

fn walked(walk: &Walk) -> [(&'static str, f64); 4] {
    [
        ("us/level", walk.levels),
        ("us/lookup in a table", walk.lookups),
        ("us/visit of a node", walk.visits),
        ("us/visit among a thousand nodes", walk.far_visits),
    ]
}
