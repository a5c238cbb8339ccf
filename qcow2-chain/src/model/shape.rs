//! What the cost of a chain depends on, from its metadata alone.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::chain::{Chain, Kind};
use crate::survey::{Piece, Survey, survey};

/// Bytes that block jobs copy at most in one go.
const CHUNK: u64 = 512 << 10;

/// Parts of the disk that cost the same to find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Served {
    /// Bytes of the disk.
    pub bytes: u64,
    /// Stretches of them, each in one piece in the layer's file.
    pub pieces: u64,
    /// The requests of a job that copies them, of 512 KiB at most.
    pub steps: u64,
}

impl Served {
    fn add(&mut self, len: u64) {
        self.bytes += len;
        self.pieces += 1;
        self.steps += len.div_ceil(CHUNK);
    }
}

/// One layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerShape {
    /// Bytes of a cluster; 0 for a layer that is not qcow2.
    pub cluster: u64,
    /// Bytes of the L1 table.
    pub l1_bytes: u64,
    /// Bytes of the refcount table.
    pub refcount_table_bytes: u64,
    /// L2 tables.
    pub tables: u64,
    /// Those that a read from the top goes to.
    pub tables_reached: u64,
    /// The share of the disk that the tables cover.
    pub table_share: f64,
    /// Data that the guest sees.
    pub data: Served,
    /// Zeroes that the guest sees.
    pub zeroes: Served,
    /// Of the data, what is compressed: a share of the clusters.
    pub compressed_share: f64,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Bytes of the disk.
    pub disk: u64,
    /// Bytes of the finest unit of mapping.
    pub unit: u64,
    /// From the top down.
    pub layers: Vec<LayerShape>,
    /// What no layer has.
    pub holes: Served,
}

impl Shape {
    /// Reads the tables of a chain. `see` gets every piece, too.
    pub fn of(
        chain: &Chain,
        see: &mut dyn FnMut(Piece),
        progress: &mut dyn FnMut(usize),
    ) -> Result<(Self, Survey)> {
        let mut layers = vec![LayerShape::default(); chain.layers.len()];
        let found = survey(
            chain,
            &mut |piece: Piece| {
                if piece.visible {
                    let layer = &mut layers[piece.depth];
                    let part = if piece.data {
                        &mut layer.data
                    } else {
                        &mut layer.zeroes
                    };
                    part.add(piece.len);
                }
                see(piece);
            },
            progress,
        )?;
        let disk = chain.disk_size();
        for ((layer, figures), shape) in chain.layers.iter().zip(&found.layers).zip(&mut layers) {
            let Kind::Qcow2(image) = &layer.kind else {
                continue;
            };
            shape.cluster = image.cluster_size;
            shape.l1_bytes = image.l1_bytes;
            shape.refcount_table_bytes = image.refcount_table_bytes;
            shape.tables = figures.l2_tables;
            shape.tables_reached = figures.l2_tables_reached;
            let entry_bits = if image.extended_l2 { 4 } else { 3 };
            let span = image.cluster_size * (image.cluster_size >> entry_bits);
            let spans = disk.min(image.size).div_ceil(span).max(1);
            shape.table_share = (figures.l2_tables as f64 / spans as f64).min(1.0);
            let clusters = figures.data_bytes.div_ceil(image.cluster_size).max(1);
            shape.compressed_share =
                (figures.compressed_clusters as f64 / clusters as f64).min(1.0);
        }
        let mut holes = Served::default();
        found.holes(disk, &mut |from, upto| holes.add(upto - from));
        // To the byte, which pieces are not where layers end within a unit.
        holes.bytes = found.hole_bytes;
        let shape = Self {
            disk,
            unit: chain.unit(),
            layers,
            holes,
        };
        Ok((shape, found))
    }

    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Bytes of data that the guest sees.
    pub fn data_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.data.bytes).sum()
    }
}
