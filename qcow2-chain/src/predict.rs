//! `predict`: what a chain will cost, from its metadata and a calibration.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Result, ensure};
use serde::Serialize;

use crate::chain::{Chain, End};
use crate::check::STACK;
use crate::cli::{Aio, Driver, Output, Predict};
use crate::model::calibration::{Calibrated, Calibration, DeepestRead, Measurement, Predicted};
use crate::model::figure::{Figure, Key};
use crate::model::shape::Shape;
use crate::model::terms::Model;
use crate::text::{self, Progress, bytes, printable};

/// The whole answer. Keys are added, never changed.
#[derive(Serialize)]
struct Report {
    image: String,
    layers: usize,
    disk_size: u64,
    data_bytes: u64,
    hole_bytes: u64,
    /// L2 tables that reads from the top go to.
    tables: u64,
    calibration: String,
    /// What makes the predictions doubtful.
    warnings: Vec<String>,
    drivers: Vec<DriverReport>,
}

#[derive(Serialize)]
struct DriverReport {
    driver: Driver,
    qemu: String,
    aio: Aio,
    /// A read that goes through all layers ends the process.
    crashes: bool,
    /// The chain at which that was seen to begin.
    #[serde(skip_serializing_if = "Option::is_none")]
    crashes_from: Option<usize>,
    figures: Vec<FigureReport>,
    /// What there is no prediction of.
    missing: Vec<Missing>,
}

#[derive(Serialize)]
struct Missing {
    figure: Figure,
    why: String,
}

/// A figure with its prediction.
#[derive(Serialize)]
pub struct FigureReport {
    pub figure: Figure,
    pub queue_depth: u32,
    pub unit: &'static str,
    /// `None` where the process crashes.
    #[serde(flatten)]
    pub predicted: Option<Predicted>,
}

/// Carries the command out.
pub fn run(args: &Predict) -> Result<()> {
    let chain = Chain::open(&args.image, &args.common.policy()?)?;
    ensure!(
        matches!(chain.end, End::Complete),
        "the chain is not complete: {}",
        chain.end
    );
    let (calibration, path) = load(args.prediction.calibration.as_deref())?;
    let bar = Progress::new("reading tables", chain.layers.len(), args.common.quiet);
    let (shape, _) = Shape::of(&chain, &mut |_| {}, &mut |done| bar.at(done))?;
    drop(bar);
    let mut warnings = calibration.warnings();
    let drivers = calibration.drivers.iter();
    warnings.extend(drivers.filter_map(|driver| extrapolated(driver, shape.depth())));
    let report = Report {
        image: args.image.display().to_string(),
        layers: shape.depth(),
        disk_size: shape.disk,
        data_bytes: shape.data_bytes(),
        hole_bytes: shape.holes.bytes,
        tables: shape.layers.iter().map(|layer| layer.tables_reached).sum(),
        calibration: path,
        warnings,
        drivers: calibration
            .drivers
            .iter()
            .map(|driver| driver_report(driver, &shape, &args.prediction.queue_depth))
            .collect(),
    };
    match args.common.output {
        Output::Json => text::print_json(&report),
        Output::Table => text::unless_closed(print(&report)),
    }
}

/// The calibration that the user means, and its name.
pub fn load(path: Option<&Path>) -> Result<(Calibration, String)> {
    let path = match path {
        Some(path) => path.to_owned(),
        None => Calibration::default_path()?,
    };
    Ok((Calibration::load(&path)?, path.display().to_string()))
}

/// All figures that there are models for.
pub fn figures(calibrated: &Calibrated, shape: &Shape, queue_depths: &[u32]) -> Vec<FigureReport> {
    let model = Model::new(shape, calibrated.driver);
    let crashes = calibrated.crashes_at(shape.depth());
    let mut figures = Vec::new();
    for figure in Figure::ALL {
        let keys: Vec<Key> = match figure {
            Figure::ReadDisk => queue_depths
                .iter()
                .map(|depth| Key::queue(*depth))
                .collect(),
            _ => vec![figure.into()],
        };
        for key in keys {
            if let Some(predicted) = calibrated.predict(&model, key) {
                figures.push(FigureReport {
                    figure,
                    queue_depth: key.queue_depth,
                    unit: figure.unit(),
                    predicted: Some(predicted).filter(|_| !(crashes && figure.reads())),
                });
            }
        }
    }
    figures
}

fn driver_report(calibrated: &Calibrated, shape: &Shape, queue_depths: &[u32]) -> DriverReport {
    let model = Model::new(shape, calibrated.driver);
    DriverReport {
        driver: calibrated.driver,
        qemu: calibrated.qemu.clone(),
        aio: calibrated.aio,
        crashes: calibrated.crashes_at(shape.depth()),
        crashes_from: calibrated.deepest_read.and_then(|deepest| deepest.crashes),
        figures: figures(calibrated, shape, queue_depths),
        missing: Figure::ALL
            .into_iter()
            .filter_map(|figure| {
                let why = why_missing(calibrated, &model, figure)?;
                Some(Missing { figure, why })
            })
            .collect(),
    }
}

/// A warning where the chain is deeper than all that were measured.
fn extrapolated(calibrated: &Calibrated, layers: usize) -> Option<String> {
    let deepest = calibrated.points.iter().map(|point| point.layers).max()?;
    if layers <= deepest {
        return None;
    }
    let tried = calibrated.deepest_read.map_or(0, |read| read.works);
    let crash = if calibrated.driver == Driver::Qcow2 && !tried_reads(calibrated, layers) {
        format!(
            ", and whether reads crash was tried through {tried} layers only (unpatched QEMU's do \
             from about {STACK} on)"
        )
    } else {
        String::new()
    };
    Some(format!(
        "{}: calibrated with chains of up to {deepest} layers, this one has {layers}{crash}",
        calibrated.driver.name()
    ))
}

/// Whether it is known if reads through so many layers crash.
fn tried_reads(calibrated: &Calibrated, layers: usize) -> bool {
    let tried = |read: DeepestRead| read.crashes.is_some() || layers <= read.works;
    calibrated.deepest_read.is_some_and(tried)
}

/// Why a figure is not there; `None` where it is.
fn why_missing(calibrated: &Calibrated, model: &Model, figure: Figure) -> Option<String> {
    if model.terms(figure.into()).is_none() {
        let why = match figure {
            Figure::ReadHole => "there are no holes",
            Figure::ReadDisk => "the disk is empty",
            _ => "there is no data",
        };
        return Some(why.to_owned());
    }
    if calibrated.models.iter().any(|model| model.figure == figure) {
        return None;
    }
    let has = |point: &&Measurement| point.figures.iter().any(|found| found.key.figure == figure);
    Some(match calibrated.points.iter().filter(has).count() {
        0 => "it was not calibrated".to_owned(),
        few => format!("{few} chains were calibrated, too few for it: calibrate with more layers"),
    })
}

fn print(report: &Report) -> Result<()> {
    let out = &mut io::stdout().lock();
    writeln!(
        out,
        "{}: {} layers of a disk of {}, {} of data, {} that no layer has",
        printable(&report.image),
        report.layers,
        bytes(report.disk_size),
        bytes(report.data_bytes),
        bytes(report.hole_bytes)
    )?;
    for warning in &report.warnings {
        writeln!(out, "Not to be relied on: {}", printable(warning))?;
    }
    for driver in &report.drivers {
        writeln!(
            out,
            "\n{}, QEMU {}, aio={}",
            driver.driver.name(),
            printable(&driver.qemu),
            driver.aio.name()
        )?;
        if driver.crashes {
            writeln!(
                out,
                "A read that goes through all layers crashes it, as at any depth from {} on.",
                driver.crashes_from.unwrap_or_default()
            )?;
        }
        let mut table = text::table(&["", "predicted", "from", "to"], &[0]);
        for figure in &driver.figures {
            let row = match &figure.predicted {
                Some(p) => [p.value, p.low, p.high].map(|value| figure.figure.show(value)),
                None => ["crashes".into(), String::new(), String::new()],
            };
            let [value, low, high] = row;
            table.add_row([label(figure.figure, figure.queue_depth), value, low, high]);
        }
        text::print_table(out, &table)?;
        for missing in &driver.missing {
            writeln!(
                out,
                "No prediction of {}: {}",
                missing.figure.label(),
                missing.why
            )?;
        }
    }
    Ok(())
}

/// A figure's name, with the queue depth where it has one.
pub fn label(figure: Figure, queue_depth: u32) -> String {
    match figure {
        Figure::ReadDisk => format!("{}, {queue_depth} at a time", figure.label()),
        _ => figure.label().to_owned(),
    }
}

impl Figure {
    /// It needs reads that go through the layers.
    pub fn reads(self) -> bool {
        !matches!(self, Self::Open | Self::MemoryOpen)
    }

    /// A value for a person.
    pub fn show(self, value: f64) -> String {
        match self.unit() {
            "B" => bytes(value as u64),
            "s" if value < 1.0 => format!("{:.3} ms", value * 1e3),
            "s" => format!("{value:.2} s"),
            _ if value < 1000.0 => format!("{value:.2} us"),
            _ => format!("{:.2} ms", value / 1e3),
        }
    }
}
