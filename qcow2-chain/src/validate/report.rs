//! Predicted beside measured.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::Measured;
use crate::cli::{Aio, Driver};
use crate::model::calibration::Calibrated;
use crate::model::figure::{Figure, Key};
use crate::model::terms::Model;
use crate::predict::label;
use crate::text::{bytes, percent};

/// The whole answer. Keys are added, never changed.
#[derive(Serialize)]
pub struct Report {
    driver: Driver,
    qemu: String,
    aio: Aio,
    machine: String,
    warnings: Vec<String>,
    /// Chains that were not measured as yet.
    chains_left: usize,
    pub within_limits: bool,
    figures: Vec<Summary>,
    chains: Vec<ChainReport>,
}

/// How far off the predictions of a figure are.
#[derive(Serialize)]
struct Summary {
    figure: Figure,
    queue_depth: u32,
    chains: usize,
    /// Mean of the absolute relative errors.
    mean_error: f64,
    worst_error: f64,
    /// The share of chains that were within the error bar.
    within_bar: f64,
    /// What the mean may be; there is no limit for jobs.
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<f64>,
}

#[derive(Serialize)]
struct ChainReport {
    seed: u64,
    layers: usize,
    disk_size: u64,
    cluster_size: u64,
    place: String,
    data_bytes: u64,
    options: Vec<String>,
    crashes: BTreeMap<String, String>,
    figures: Vec<Pair>,
}

#[derive(Serialize)]
struct Pair {
    figure: Figure,
    queue_depth: u32,
    unit: &'static str,
    measured: f64,
    predicted: f64,
    low: f64,
    high: f64,
}

impl Report {
    pub fn new<'a>(
        known: &Calibrated,
        measured: impl Iterator<Item = (&'a u64, &'a Measured)>,
        chains_left: usize,
        warnings: Vec<String>,
    ) -> Self {
        let mut machine = String::new();
        let mut chains = Vec::new();
        for (seed, found) in measured {
            machine = format!(
                "{}, {} CPUs, Linux {}",
                found.machine.cpu, found.machine.cpus, found.machine.kernel
            );
            let model = Model::new(&found.shape, known.driver);
            let pair = |(key, sample): &(Key, _)| pair(known, &model, *key, sample);
            chains.push(ChainReport {
                seed: *seed,
                layers: found.shape.depth(),
                disk_size: found.shape.disk,
                cluster_size: found.shape.layers.first().map_or(0, |layer| layer.cluster),
                place: found.recipe.place.clone(),
                data_bytes: found.shape.data_bytes(),
                options: found.recipe.options.clone(),
                crashes: found.crashes.clone(),
                figures: found.samples.iter().filter_map(pair).collect(),
            });
        }
        let figures = summaries(&chains);
        let within =
            |summary: &Summary| summary.limit.is_none_or(|most| summary.mean_error <= most);
        Self {
            driver: known.driver,
            qemu: known.qemu.clone(),
            aio: known.aio,
            machine,
            warnings,
            chains_left,
            within_limits: figures.iter().all(within),
            figures,
            chains,
        }
    }

    /// The tables for people and for the documentation.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        // Writing to memory does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "{}, QEMU {}, aio={}; {}; {} chains\n",
            self.driver.name(),
            self.qemu,
            self.aio.name(),
            self.machine,
            self.chains.len()
        )?;
        for warning in &self.warnings {
            writeln!(out, "Not to be relied on: {warning}\n")?;
        }
        if self.chains_left > 0 {
            writeln!(out, "{} chains are not measured yet.\n", self.chains_left)?;
        }
        writeln!(
            out,
            "| figure | chains | mean error | may be | worst | within the error bar |"
        )?;
        writeln!(out, "|---|---|---|---|---|---|")?;
        for summary in &self.figures {
            writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} |",
                label(summary.figure, summary.queue_depth),
                summary.chains,
                percent(summary.mean_error),
                summary.limit.map(percent).unwrap_or_default(),
                percent(summary.worst_error),
                percent(summary.within_bar)
            )?;
        }
        let keys = self.keys();
        write!(out, "\n| seed | layers | disk | cluster | data | place |")?;
        for (figure, queue_depth) in &keys {
            write!(out, " {} |", label(*figure, *queue_depth))?;
        }
        writeln!(out, "\n|{}", "---|".repeat(6 + keys.len()))?;
        for chain in &self.chains {
            write!(
                out,
                "| {} | {} | {} | {} | {} | {} |",
                chain.seed,
                chain.layers,
                bytes(chain.disk_size),
                bytes(chain.cluster_size),
                bytes(chain.data_bytes),
                chain.place
            )?;
            for (figure, queue_depth) in &keys {
                let mut pairs = chain.figures.iter();
                let pair = pairs.find(|p| (p.figure, p.queue_depth) == (*figure, *queue_depth));
                match pair {
                    None => write!(out, " |")?,
                    Some(p) => write!(
                        out,
                        " {} / {} |",
                        figure.show(p.predicted),
                        figure.show(p.measured)
                    )?,
                }
            }
            writeln!(out)?;
        }
        Ok(())
    }

    fn keys(&self) -> Vec<(Figure, u32)> {
        let each = self.figures.iter();
        each.map(|summary| (summary.figure, summary.queue_depth))
            .collect()
    }
}

fn pair(
    known: &Calibrated,
    model: &Model<'_>,
    key: Key,
    sample: &crate::measure::sample::Sample,
) -> Option<Pair> {
    let predicted = known.predict(model, key)?;
    Some(Pair {
        figure: key.figure,
        queue_depth: key.queue_depth,
        unit: key.figure.unit(),
        measured: sample.value(key.figure),
        predicted: predicted.value,
        low: predicted.low,
        high: predicted.high,
    })
}

fn summaries(chains: &[ChainReport]) -> Vec<Summary> {
    let mut by_key: BTreeMap<(Figure, u32), Vec<&Pair>> = BTreeMap::new();
    for pair in chains.iter().flat_map(|chain| &chain.figures) {
        by_key
            .entry((pair.figure, pair.queue_depth))
            .or_default()
            .push(pair);
    }
    let summary = |((figure, queue_depth), pairs): ((Figure, u32), Vec<&Pair>)| {
        let error = |pair: &&Pair| (pair.predicted / pair.measured - 1.0).abs();
        let errors: Vec<f64> = pairs.iter().map(error).collect();
        let inside = |pair: &&&Pair| (pair.low..=pair.high).contains(&pair.measured);
        Summary {
            figure,
            queue_depth,
            chains: pairs.len(),
            mean_error: errors.iter().sum::<f64>() / errors.len() as f64,
            worst_error: errors.iter().copied().fold(0.0, f64::max),
            within_bar: pairs.iter().filter(inside).count() as f64 / pairs.len() as f64,
            limit: figure.limit(),
        }
    };
    by_key.into_iter().map(summary).collect()
}

impl Figure {
    /// How far off predictions may be, in the mean.
    fn limit(self) -> Option<f64> {
        match self {
            Self::Open | Self::MemoryOpen | Self::MemoryWarm => Some(0.10),
            Self::ReadData | Self::ReadHole | Self::ReadDisk => Some(0.15),
            Self::Stream | Self::Merge => None,
        }
    }
}
