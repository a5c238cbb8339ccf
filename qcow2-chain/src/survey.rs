//! What each layer holds, and what of it is seen from the top: one pass over
//! the mapping tables of all layers, from the top down.

use anyhow::{Context, Result};
use rust_qcow2::host::{Content, File};
use rust_qcow2::inspect::{Extent, ExtentKind};
use serde::Serialize;

use crate::chain::{Chain, Kind, Layer};
use crate::coverage::Coverage;

/// What a part of the disk is in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Of the layer.
    pub depth: usize,
    /// First byte of the disk.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Data, or else zeroes.
    pub data: bool,
    /// Seen from the top: no layer further up has it.
    pub visible: bool,
}

/// Figures of one layer. Bytes of data are bytes of the guest's disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LayerFigures {
    /// Bytes for which the layer has data.
    pub data_bytes: u64,
    /// Those of them that the guest sees.
    pub visible_bytes: u64,
    /// Those that layers further up hide, or that lie beyond the disk.
    pub shadowed_bytes: u64,
    /// Bytes that the layer says are zero.
    pub zero_bytes: u64,
    /// Those of them that the guest sees.
    pub visible_zero_bytes: u64,
    /// Clusters that are compressed.
    pub compressed_clusters: u64,
    /// Bytes of the file that they take, an upper bound.
    pub compressed_file_bytes: u64,
    /// Stretches of data that are in one piece in the file.
    pub extents: u64,
    /// The share of clusters with data that do not follow the one before in
    /// the file, from 0 to 1.
    pub fragmentation: f64,
    /// Number of L2 tables.
    pub l2_tables: u64,
    /// Bytes of L1 table, L2 tables, refcount table and refcount blocks.
    pub table_bytes: u64,
    /// L2 tables that some read from the top goes to: where layers further up
    /// do not have all of their range.
    #[serde(skip)]
    pub l2_tables_reached: u64,
    /// References to tables and clusters that make no sense.
    pub bad_references: u64,
    /// Why the figures are not complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a walk over a chain yields.
pub struct Survey {
    /// One for each layer, from the top.
    pub layers: Vec<LayerFigures>,
    /// Bytes that no layer has.
    pub hole_bytes: u64,
    coverage: Coverage,
    /// Bytes of the disk that a raw layer has: all of them from 0 on.
    raw_end: u64,
}

impl Survey {
    /// Tells what no layer has, in whole units where a layer ends within one.
    pub fn holes(&self, size: u64, tell: &mut dyn FnMut(u64, u64)) {
        self.coverage.holes(size, &mut |from, upto| {
            let from = from.max(self.raw_end);
            if from < upto {
                tell(from, upto);
            }
        });
    }
}

/// Walks the tables of all layers. `see` gets every piece, `progress` the
/// number of layers done.
pub fn survey(
    chain: &Chain,
    see: &mut dyn FnMut(Piece),
    progress: &mut dyn FnMut(usize),
) -> Result<Survey> {
    let mut coverage = Coverage::new(chain.unit());
    // What a layer has beyond the end of one further up is not seen: a short
    // layer reads as zeroes there.
    let mut limit = u64::MAX;
    let mut raw_end = 0;
    let mut layers = Vec::with_capacity(chain.layers.len());
    for (depth, layer) in chain.layers.iter().enumerate() {
        limit = limit.min(layer.disk_size().unwrap_or(u64::MAX));
        if matches!(layer.kind, Kind::Raw) {
            // The last one; nothing is left for others to claim.
            raw_end = limit;
        }
        let mut walk = LayerWalk {
            depth,
            limit,
            coverage: &mut coverage,
            see,
            figures: LayerFigures::default(),
        };
        let result = walk.layer(layer);
        let mut figures = walk.figures;
        if let Err(error) = result {
            // The top is what was asked for; of others the rest is of use.
            if depth == 0 {
                return Err(error);
            }
            figures.error = Some(format!("{error:#}"));
        }
        layers.push(figures);
        progress(depth + 1);
    }
    let seen: u64 = layers
        .iter()
        .map(|layer| layer.visible_bytes + layer.visible_zero_bytes)
        .sum();
    let hole_bytes = chain.disk_size().saturating_sub(seen);
    Ok(Survey {
        layers,
        hole_bytes,
        coverage,
        raw_end,
    })
}

struct LayerWalk<'a> {
    depth: usize,
    limit: u64,
    coverage: &'a mut Coverage,
    see: &'a mut dyn FnMut(Piece),
    figures: LayerFigures,
}

impl LayerWalk<'_> {
    fn layer(&mut self, layer: &Layer) -> Result<()> {
        match &layer.kind {
            Kind::Qcow2(_) => self.qcow2(layer),
            Kind::Raw => self.raw(layer),
            Kind::Other(name) => {
                anyhow::bail!(
                    "{}: images of the format {name} are not looked into",
                    layer.real.display()
                )
            }
        }
    }

    fn qcow2(&mut self, layer: &Layer) -> Result<()> {
        let image = layer.inspect()?;
        let cluster = image.geometry().cluster_size();
        let (mut clusters, mut fragments, mut expected) = (0, 0, None);
        let (span_bits, mut next_span) = (image.geometry().l2_span_bits(), 0);
        let mut spans = 0;
        let walked = image
            .walk(&mut |extent: Extent| {
                match extent.kind {
                    ExtentKind::Data(at) => {
                        // A compressed cluster or a hole in between is none.
                        self.figures.extents += 1;
                        clusters += extent.len.div_ceil(cluster);
                        if expected.is_some_and(|next| next != at.0) {
                            fragments += 1;
                        }
                        expected = Some(at.0 + extent.len);
                    }
                    ExtentKind::Compressed { len, .. } => {
                        self.figures.compressed_clusters += 1;
                        self.figures.compressed_file_bytes += len;
                    }
                    ExtentKind::Zero { .. } => {}
                }
                let last = (extent.guest.0 + extent.len - 1) >> span_bits;
                for span in next_span.max(extent.guest.0 >> span_bits)..=last {
                    let start = span << span_bits;
                    let end = (start + (1 << span_bits)).min(self.limit);
                    spans += 1;
                    if start < end && !self.coverage.has_all(start, end) {
                        self.figures.l2_tables_reached += 1;
                    }
                }
                next_span = next_span.max(last + 1);
                let data = !matches!(extent.kind, ExtentKind::Zero { .. });
                self.piece(extent.guest.0, extent.guest.0 + extent.len, data);
            })
            .with_context(|| layer.real.display().to_string())?;
        let figures = &mut self.figures;
        figures.fragmentation = ratio(fragments, clusters);
        figures.l2_tables = walked.l2_tables;
        // Tables without entries: nobody knows where they are.
        figures.l2_tables_reached += walked.l2_tables.saturating_sub(spans);
        figures.bad_references = walked.bad_tables + walked.bad_entries;
        let refcounts = image.refcount_blocks().unwrap_or(0)
            + u64::from(image.header().refcount_table_clusters);
        figures.table_bytes = (u64::from(image.header().l1_size) * 8)
            .saturating_add(walked.l2_tables.saturating_mul(cluster))
            .saturating_add(refcounts.saturating_mul(cluster));
        Ok(())
    }

    /// A raw image has all of its disk; where the file has holes it is zero.
    fn raw(&mut self, layer: &Layer) -> Result<()> {
        let file = layer.reopen()?;
        let (length, end) = (layer.file.length, layer.disk_size().unwrap_or(0));
        let mut at = 0;
        while at < length {
            let (content, len) = file.content(at, length - at, true)?;
            // The last sector is what the end of the file makes it.
            let len = if at + len >= length { end - at } else { len };
            let data = content == Content::Data;
            self.figures.extents += u64::from(data);
            self.account(at, len, data, false);
            let mut visible = Vec::new();
            self.coverage
                .gaps(at, (at + len).min(self.limit), &mut |from, upto| {
                    visible.push((from, upto));
                });
            for (from, upto) in visible {
                self.account(from, upto - from, data, true);
            }
            at += len.max(1);
        }
        let figures = &mut self.figures;
        figures.shadowed_bytes = figures.data_bytes - figures.visible_bytes;
        Ok(())
    }

    /// A part of the disk that the layer decides.
    fn piece(&mut self, start: u64, end: u64, data: bool) {
        self.account(start, end - start, data, false);
        let end = end.min(self.limit);
        if start < end {
            let (depth, see, figures) = (self.depth, &mut self.see, &mut self.figures);
            self.coverage.claim(start, end, &mut |from, upto| {
                count(figures, see, depth, from, upto - from, data, true);
            });
        }
        self.figures.shadowed_bytes = self.figures.data_bytes - self.figures.visible_bytes;
    }

    fn account(&mut self, start: u64, len: u64, data: bool, visible: bool) {
        count(
            &mut self.figures,
            &mut self.see,
            self.depth,
            start,
            len,
            data,
            visible,
        );
    }
}

fn count(
    figures: &mut LayerFigures,
    see: &mut dyn FnMut(Piece),
    depth: usize,
    start: u64,
    len: u64,
    data: bool,
    visible: bool,
) {
    let counter = match (data, visible) {
        (true, false) => &mut figures.data_bytes,
        (true, true) => &mut figures.visible_bytes,
        (false, false) => &mut figures.zero_bytes,
        (false, true) => &mut figures.visible_zero_bytes,
    };
    *counter += len;
    see(Piece {
        depth,
        start,
        len,
        data,
        visible,
    });
}

/// `part / whole`, 0 where there is nothing.
pub fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}
