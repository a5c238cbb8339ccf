//! Goals that need the models: what a read may take, and how much memory.

use anyhow::{Context, Result};
use rustc_hash::FxHashSet;
use serde::Serialize;

use super::merge::Group;
use crate::cli::{Driver, Plan};
use crate::model::calibration::Calibrated;
use crate::model::figure::Figure;
use crate::model::shape::{LayerShape, Served, Shape};
use crate::model::terms::Model;
use crate::predict;

/// What is wanted of a chain.
pub struct Goals {
    calibrated: Calibrated,
    latency: Option<f64>,
    memory: Option<u64>,
}

/// What a chain is predicted to cost; `None` where a read crashes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    /// Of a 4 KiB read of data.
    pub read_microseconds: Option<f64>,
    /// When every table was read.
    pub memory_bytes: Option<u64>,
}

/// Before and after.
#[derive(Debug, Serialize)]
pub struct Costs {
    pub driver: Driver,
    pub before: Cost,
    pub after: Cost,
    /// What makes the predictions doubtful.
    pub warnings: Vec<String>,
}

impl Goals {
    /// Those that the user gave, if any.
    pub fn new(args: &Plan) -> Result<Option<(Self, Vec<String>)>> {
        if args.latency.is_none() && args.memory.is_none() {
            return Ok(None);
        }
        let (calibration, path) = predict::load(args.calibration.as_deref())?;
        let warnings = calibration.warnings();
        let mut drivers = calibration.drivers.into_iter();
        let calibrated = drivers
            .find(|known| known.driver == args.driver)
            .with_context(|| format!("{path}: {} is not calibrated", args.driver.name()))?;
        let goals = Self {
            calibrated,
            latency: args.latency,
            memory: args.memory,
        };
        Ok(Some((goals, warnings)))
    }

    /// What a chain costs.
    pub fn cost(&self, shape: &Shape) -> Cost {
        let model = Model::new(shape, self.calibrated.driver);
        let crashes = self.calibrated.crashes_at(shape.depth());
        let value = |figure: Figure| {
            let predicted = self.calibrated.predict(&model, figure.into());
            predicted
                .filter(|_| !crashes)
                .map(|predicted| predicted.value)
        };
        Cost {
            read_microseconds: value(Figure::ReadData),
            memory_bytes: value(Figure::MemoryWarm).map(|bytes| bytes as u64),
        }
    }

    /// Whether it costs no more than it may.
    pub fn reached(&self, shape: &Shape) -> bool {
        let cost = self.cost(shape);
        // A chain without data has no reads of any.
        let no_data = shape.data_bytes() == 0 && !self.calibrated.crashes_at(shape.depth());
        let latency = self.latency.is_none_or(|most| {
            no_data || cost.read_microseconds.is_some_and(|value| value <= most)
        });
        let memory = self
            .memory
            .is_none_or(|most| cost.memory_bytes.is_some_and(|bytes| bytes <= most));
        latency && memory
    }

    /// Costs before and after.
    pub fn costs(&self, before: &Shape, after: &Shape, warnings: Vec<String>) -> Costs {
        Costs {
            driver: self.calibrated.driver,
            before: self.cost(before),
            after: self.cost(after),
            warnings,
        }
    }
}

/// The shape of a chain whose layers from the first group on are merged as the
/// groups say.
pub fn merged(shape: &Shape, groups: &[Group]) -> Shape {
    let mut layers = Vec::with_capacity(shape.layers.len());
    let mut depth = 0;
    for group in groups {
        layers.extend_from_slice(&shape.layers[depth..group.top]);
        let members = &shape.layers[group.top..=group.bottom];
        layers.push(match members {
            [one] => *one,
            _ => join(shape, members, group),
        });
        depth = group.bottom + 1;
    }
    layers.extend_from_slice(&shape.layers[depth..]);
    Shape {
        layers,
        ..shape.clone()
    }
}

fn join(shape: &Shape, members: &[LayerShape], group: &Group) -> LayerShape {
    let lowest = members.last().copied().unwrap_or_default();
    let span = (lowest.cluster * (lowest.cluster / 8)).max(1);
    let mut spans = FxHashSet::default();
    for (start, end) in group.all.ranges() {
        // No more than there are tables now, whatever a hostile layer says.
        let most = members.iter().map(|layer| layer.tables).sum::<u64>();
        let upto = (end.saturating_sub(1) / span).min(start / span + most);
        spans.extend(start / span..=upto);
    }
    let tables = spans.len() as u64;
    let add = |a: Served, b: Served| Served {
        bytes: a.bytes + b.bytes,
        pieces: a.pieces + b.pieces,
        steps: a.steps + b.steps,
    };
    let reached = members
        .iter()
        .map(|layer| layer.tables_reached)
        .sum::<u64>();
    LayerShape {
        tables,
        tables_reached: tables.min(reached),
        table_share: (tables as f64 / shape.disk.div_ceil(span).max(1) as f64).min(1.0),
        data: members
            .iter()
            .map(|layer| layer.data)
            .fold(Served::default(), add),
        zeroes: members
            .iter()
            .map(|layer| layer.zeroes)
            .fold(Served::default(), add),
        ..lowest
    }
}
