//! What `view` has to tell, in the form of its JSON.

use serde::Serialize;

use crate::chain::{Chain, End};
use crate::survey::{LayerFigures, Survey, ratio};

/// The whole answer. Keys are added, never changed.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The image on top, as given.
    pub image: String,
    /// Number of layers.
    pub depth: usize,
    /// Bytes of the disk that the guest sees.
    pub disk_size: u64,
    /// Bytes that no layer has.
    pub hole_bytes: u64,
    /// Sums over all layers.
    pub totals: Totals,
    /// Mean depth of the bytes of data that the guest sees.
    pub mean_depth: f64,
    /// Where reads are served: depth 0, 1, 2 to 3, 4 to 7, ...
    pub served_by_depth: Vec<DepthShare>,
    /// What is below the last layer.
    pub end: EndReport,
    /// The layers, from the top.
    pub layers: Vec<LayerReport>,
}

/// Sums over all layers.
#[derive(Debug, Default, Serialize)]
pub struct Totals {
    /// Bytes of the files.
    pub file_bytes: u64,
    /// Bytes that the files take on the storage.
    pub allocated_bytes: u64,
    /// Bytes of data.
    pub data_bytes: u64,
    /// Bytes of data that the guest sees.
    pub visible_bytes: u64,
    /// Bytes of data that it does not.
    pub shadowed_bytes: u64,
    /// Bytes of tables.
    pub table_bytes: u64,
    /// L2 tables.
    pub l2_tables: u64,
    /// Compressed clusters.
    pub compressed_clusters: u64,
}

/// A class of depths.
#[derive(Debug, Serialize)]
pub struct DepthShare {
    /// The first depth of the class.
    pub from: usize,
    /// The last one.
    pub to: usize,
    /// Bytes of data that are served there.
    pub data_bytes: u64,
    /// Bytes of zeroes that a layer there knows of.
    pub zero_bytes: u64,
    /// The share of the disk, 0 to 1.
    pub share: f64,
}

/// What is below the last layer.
#[derive(Debug, Serialize)]
pub struct EndReport {
    /// The last layer has no backing file.
    pub complete: bool,
    /// Else why the chain was not followed any further.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// One layer.
#[derive(Debug, Serialize)]
pub struct LayerReport {
    /// 0 for the top.
    pub depth: usize,
    /// As named by the layer above.
    pub name: String,
    /// The file.
    pub file: String,
    /// Its format.
    pub format: String,
    /// Bytes of the layer's disk; `null` where the format is not known.
    pub disk_size: Option<u64>,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes that the file takes on the storage.
    pub allocated_bytes: u64,
    /// What only a qcow2 image has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qcow2: Option<Qcow2Report>,
    /// What the tables say.
    #[serde(flatten)]
    pub figures: LayerFigures,
}

/// What the header says.
#[derive(Debug, Serialize)]
pub struct Qcow2Report {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bytes of a subcluster, where there are some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subcluster_size: Option<u64>,
    /// Internal snapshots.
    pub snapshots: u32,
    /// `zlib` or `zstd`.
    pub compression_type: &'static str,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Whether guest data are in a file of their own.
    pub data_file: bool,
}

impl Report {
    /// Puts what was found together.
    pub fn new(chain: &Chain, survey: Survey) -> Self {
        let disk_size = chain.disk_size();
        let served_by_depth = classes(&survey.layers, disk_size);
        let mut totals = Totals::default();
        let mut weighted = 0.0;
        for (depth, (layer, figures)) in chain.layers.iter().zip(&survey.layers).enumerate() {
            totals.file_bytes = totals.file_bytes.saturating_add(layer.file.length);
            totals.allocated_bytes += layer.file.allocated;
            totals.data_bytes = totals.data_bytes.saturating_add(figures.data_bytes);
            totals.visible_bytes += figures.visible_bytes;
            totals.shadowed_bytes = totals.shadowed_bytes.saturating_add(figures.shadowed_bytes);
            totals.table_bytes = totals.table_bytes.saturating_add(figures.table_bytes);
            totals.l2_tables += figures.l2_tables;
            totals.compressed_clusters += figures.compressed_clusters;
            weighted += depth as f64 * figures.visible_bytes as f64;
        }
        let mean_depth = match totals.visible_bytes {
            0 => 0.0,
            visible => weighted / visible as f64,
        };
        let layers = chain.layers.iter().zip(survey.layers).enumerate();
        let layers = layers
            .map(|(depth, (layer, figures))| LayerReport {
                depth,
                name: layer.name.clone(),
                file: layer.real.display().to_string(),
                format: layer.format().to_owned(),
                disk_size: layer.disk_size(),
                file_bytes: layer.file.length,
                allocated_bytes: layer.file.allocated,
                qcow2: layer.qcow2().map(|image| Qcow2Report {
                    version: image.version,
                    cluster_size: image.cluster_size,
                    subcluster_size: image.extended_l2.then_some(image.unit),
                    snapshots: image.snapshots,
                    compression_type: image.compression.name(),
                    encrypted: image.crypt_method != 0,
                    data_file: image
                        .incompatible
                        .contains(rust_qcow2::format::header::Incompatible::DATA_FILE),
                }),
                figures,
            })
            .collect();
        Self {
            image: chain.layers[0].name.clone(),
            depth: chain.layers.len(),
            disk_size,
            hole_bytes: survey.hole_bytes,
            totals,
            mean_depth,
            served_by_depth,
            end: EndReport {
                complete: matches!(chain.end, End::Complete),
                problem: match &chain.end {
                    End::Complete => None,
                    end => Some(end.to_string()),
                },
            },
            layers,
        }
    }
}

/// Depth 0, 1, 2 to 3, 4 to 7 and so on, as the driver's statistics have them.
fn classes(layers: &[LayerFigures], disk_size: u64) -> Vec<DepthShare> {
    let mut classes = Vec::new();
    let mut from = 0;
    while from < layers.len() {
        let to = (2 * from).max(1).min(layers.len()) - 1;
        let to = to.max(from);
        let part = &layers[from..=to];
        let data_bytes = part.iter().map(|layer| layer.visible_bytes).sum();
        let zero_bytes = part.iter().map(|layer| layer.visible_zero_bytes).sum();
        classes.push(DepthShare {
            from,
            to,
            data_bytes,
            zero_bytes,
            share: ratio(data_bytes + zero_bytes, disk_size),
        });
        from = to + 1;
    }
    classes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_the_driver() {
        let layers = vec![LayerFigures::default(); 10];
        let found: Vec<_> = classes(&layers, 1)
            .iter()
            .map(|class| (class.from, class.to))
            .collect();
        assert_eq!(found, [(0, 0), (1, 1), (2, 3), (4, 7), (8, 9)]);
    }
}
