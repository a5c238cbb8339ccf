//! `measure`: what a chain costs with a real QEMU.

mod daemon;
pub mod pin;
pub mod process;
pub mod qemu;
pub mod run;
pub mod sample;
pub mod subject;
pub mod targets;

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::chain::{Chain, End, Kind};
use crate::cleanup::Unfinished;
use crate::cli::{Aio, Driver, Measure, Output, What};
use crate::model::calibration::Predicted;
use crate::model::figure::Figure;
use crate::model::shape::Shape;
use crate::predict;
use crate::text::{self, Progress, bytes, printable};
use qemu::Qemu;
use run::{Found, Task};
use sample::Sample;
use targets::Targets;

/// The whole answer. Keys are added, never changed.
#[derive(Serialize)]
struct Report {
    image: String,
    layers: usize,
    disk_size: u64,
    driver: Driver,
    qemu: String,
    aio: Aio,
    /// Where the predictions are from; `None` where there is no calibration.
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<String>,
    /// What makes the predictions doubtful.
    warnings: Vec<String>,
    figures: Vec<FigureReport>,
}

#[derive(Serialize)]
struct FigureReport {
    figure: Figure,
    queue_depth: u32,
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<Sample>,
    /// How the program crashed.
    #[serde(skip_serializing_if = "Option::is_none")]
    crash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted: Option<Predicted>,
}

/// Carries the command out.
pub fn run(args: &Measure) -> Result<()> {
    let chain = Chain::open(&args.image, &args.common.policy()?)?;
    ensure!(
        matches!(chain.end, End::Complete),
        "the chain is not complete: {}",
        chain.end
    );
    let (shape, targets) = Targets::draw(&chain, args.programs.driver, args.reads)?;
    let qemu = Qemu::new(&args.programs, &args.image)?;
    let temp = Temporary::new(args.programs.temp.as_deref())?;
    let figures: Vec<_> = Figure::ALL
        .into_iter()
        .filter(|figure| args.what.is_empty() || args.what.contains(&figure.what()))
        .collect();
    let task = Task {
        qemu: &qemu,
        top: &args.image,
        disk: shape.disk,
        raw: matches!(chain.layers[0].kind, Kind::Raw),
        targets: &targets,
        temp: &temp.0,
        queue_depths: &args.prediction.queue_depth,
        figures: &figures,
    };
    let mut found = Found::default();
    let rounds = args.rounds.max(1);
    let bar = Progress::new("measuring", rounds, args.common.quiet);
    for round in 0..rounds {
        task.round(&mut found)?;
        bar.at(round + 1);
    }
    drop(bar);
    let report = report(args, &shape, &qemu, &found)?;
    match args.common.output {
        Output::Json => text::print_json(&report),
        Output::Table => text::unless_closed(print(&report)),
    }
}

fn report(args: &Measure, shape: &Shape, qemu: &Qemu, found: &Found) -> Result<Report> {
    // Without a calibration there is nothing to compare with, unless one was named.
    let calibration = match predict::load(args.prediction.calibration.as_deref()) {
        Err(error) if args.prediction.calibration.is_some() => return Err(error),
        result => result.ok(),
    };
    let version = qemu.version()?;
    let mut warnings = Vec::new();
    let mut predictions = Vec::new();
    if let Some((calibration, _)) = &calibration {
        warnings = calibration.warnings();
        let mut drivers = calibration.drivers.iter();
        match drivers.find(|known| known.driver == qemu.driver) {
            None => warnings.push(format!("{} is not calibrated", qemu.driver.name())),
            Some(known) => {
                if (&known.qemu, known.aio) != (&version, qemu.aio) {
                    let (of, aio) = (&known.qemu, known.aio.name());
                    warnings.push(format!("calibrated with QEMU {of}, aio={aio}"));
                }
                predictions = predict::figures(known, shape, &args.prediction.queue_depth);
            }
        }
    }
    let samples = found.samples();
    let keys = samples
        .iter()
        .map(|(key, _)| *key)
        .chain(found.crashes.keys().copied());
    let mut keys: Vec<_> = keys.collect();
    keys.sort_unstable();
    keys.dedup();
    let figures = keys.into_iter().map(|key| FigureReport {
        figure: key.figure,
        queue_depth: key.queue_depth,
        unit: key.figure.unit(),
        measured: samples
            .iter()
            .find(|(other, _)| *other == key)
            .map(|(_, sample)| *sample),
        crash: found.crashes.get(&key).cloned(),
        predicted: predictions
            .iter()
            .find(|p| (p.figure, p.queue_depth) == (key.figure, key.queue_depth))
            .and_then(|p| p.predicted),
    });
    Ok(Report {
        image: args.image.display().to_string(),
        layers: shape.depth(),
        disk_size: shape.disk,
        driver: qemu.driver,
        qemu: version,
        aio: qemu.aio,
        calibration: calibration.map(|(_, path)| path),
        warnings,
        figures: figures.collect(),
    })
}

fn print(report: &Report) -> Result<()> {
    let out = &mut io::stdout().lock();
    writeln!(
        out,
        "{}: {} layers of a disk of {}; {}, QEMU {}, aio={}",
        printable(&report.image),
        report.layers,
        bytes(report.disk_size),
        report.driver.name(),
        printable(&report.qemu),
        report.aio.name()
    )?;
    for warning in &report.warnings {
        writeln!(
            out,
            "Predictions are not to be relied on: {}",
            printable(warning)
        )?;
    }
    let header = ["", "measured", "median", "most", "predicted", "off by"];
    let mut table = text::table(&header, &[0]);
    for line in &report.figures {
        let show = |value: f64| line.figure.show(value);
        let measured = match (&line.crash, &line.measured) {
            (Some(crash), _) => [printable(crash), String::new(), String::new()],
            (None, Some(s)) => [show(s.value(line.figure)), show(s.median), show(s.most)],
            (None, None) => Default::default(),
        };
        let [value, median, most] = measured;
        let predicted = line.predicted.map(|p| show(p.value)).unwrap_or_default();
        let off = match (&line.predicted, &line.measured) {
            (Some(p), Some(s)) if line.crash.is_none() => {
                format!("{:+.0} %", (p.value / s.value(line.figure) - 1.0) * 100.0)
            }
            _ => String::new(),
        };
        let name = predict::label(line.figure, line.queue_depth);
        table.add_row([name, value, median, most, predicted, off]);
    }
    text::print_table(out, &table)?;
    Ok(())
}

impl Figure {
    /// The part of the command's work that it belongs to.
    fn what(self) -> What {
        match self {
            Self::Open => What::Open,
            Self::MemoryOpen | Self::MemoryWarm => What::Memory,
            Self::ReadData | Self::ReadHole | Self::ReadDisk => What::Read,
            Self::Stream => What::Stream,
            Self::Merge => What::Merge,
        }
    }
}

/// A directory of ours that goes with everything in it, also when a signal ends
/// the program.
pub struct Temporary(
    pub PathBuf,
    #[allow(dead_code, reason = "it is there to be dropped")] Unfinished,
);

impl Temporary {
    /// Makes one.
    pub fn new(parent: Option<&Path>) -> Result<Self> {
        let unfinished = Unfinished::new();
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        for _ in 0..100 {
            let name = format!("qcow2-chain.{:016x}", rand::random::<u64>());
            let path = parent.join(name);
            match unfinished.tree(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                result => {
                    result.with_context(|| format!("cannot make {}", path.display()))?;
                    return Ok(Self(path, unfinished));
                }
            }
        }
        anyhow::bail!("no name for a temporary directory in {}", parent.display())
    }
}
