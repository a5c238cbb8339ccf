//! `calibrate`: the constants of this machine.

use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;

use crate::build;
use crate::cli::{Aio, Build, Calibrate, Cli, Command, Driver, Output};
use crate::measure::Temporary;
use crate::measure::process::Crash;
use crate::measure::qemu::Qemu;
use crate::measure::subject::Subject;
use crate::model::calibration::{Calibrated, Calibration, DeepestRead, Measurement};
use crate::model::figure::Figure;
use crate::text::{self, Progress, percent, printable};

/// The chains, and the layers of each that are measured as tops. Between them
/// they differ in everything that a model has a term for: depth, disk, how
/// much of it has data, size of clusters, tables.
const CHAINS: [(&str, &[usize], &[&str]); 4] = [
    (
        "spread",
        &[1, 8, 40, 100, 200, 320, 500],
        &[
            "--layers=500",
            "--disk=1G",
            "--data-per-layer=1M",
            "--place=deal",
        ],
    ),
    (
        "small clusters",
        &[20, 70, 150],
        &[
            "--layers=150",
            "--disk=512M",
            "--data-per-layer=512K",
            "--cluster-size=16K",
        ],
    ),
    (
        "large disk",
        &[1, 12, 60],
        &[
            "--layers=60",
            "--disk=8G",
            "--data-per-layer=4M",
            "--base-data=256M",
            "--run=4",
        ],
    ),
    (
        // Most layers have no table where a read passes.
        "few tables",
        &[30, 120, 300],
        &[
            "--layers=300",
            "--disk=4G",
            "--data-per-layer=1M",
            "--base-data=256M",
            "--cluster-size=16K",
            "--run=64",
        ],
    ),
];
/// Requests at a time.
const QUEUE_DEPTHS: [u32; 2] = [1, 16];
/// The chain whose reads are looked for crashes, and how exactly.
const DEEPEST_CHAIN: usize = 1000;
const DEEPEST_STEP: usize = 8;

/// The whole answer. Keys are added, never changed.
#[derive(Serialize)]
struct Report {
    calibration: String,
    driver: Driver,
    qemu: String,
    aio: Aio,
    points: usize,
    deepest_read: Option<DeepestRead>,
    models: Vec<ModelReport>,
}

#[derive(Serialize)]
struct ModelReport {
    figure: Figure,
    /// Of one prediction, one standard deviation.
    relative_error: f64,
    constants: Vec<Constant>,
}

#[derive(Serialize)]
struct Constant {
    term: String,
    value: f64,
}

/// A chain to measure.
struct Point {
    name: String,
    subject: Subject,
}

/// Carries the command out.
pub fn run(args: &Calibrate) -> Result<()> {
    let path = match &args.calibration {
        Some(path) => path.clone(),
        None => Calibration::default_path()?,
    };
    let temp = Temporary::new(args.programs.temp.as_deref())?;
    let most = usize::try_from(args.max_layers)?;
    let mut points = points(&temp.0, args.programs.driver, most)?;
    // Or the files would be written while others are measured.
    rustix::fs::sync();
    let qemu = Qemu::new(&args.programs, &points[0].subject.top)?;
    let version = qemu.version()?;
    let total = points.len() * args.rounds;
    let bar = Progress::new("measuring", total, args.quiet);
    for round in 0..args.rounds {
        let count = points.len();
        for (number, point) in points.iter_mut().enumerate() {
            let Point { subject, .. } = point;
            subject
                .round(round, &qemu, &temp.0, &QUEUE_DEPTHS)
                .with_context(|| format!("{} layers", subject.shape.depth()))?;
            bar.at(round * count + number + 1);
        }
    }
    drop(bar);
    let mut calibrated = Calibrated {
        driver: qemu.driver,
        qemu: version,
        aio: qemu.aio,
        measured_at: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        deepest_read: Some(deepest(&qemu, &temp.0, most.min(DEEPEST_CHAIN))?),
        models: Vec::new(),
        points: points
            .into_iter()
            .map(|point| {
                let samples = point.subject.found.samples();
                Measurement::new(&point.name, &point.subject.shape, qemu.driver, &samples)
            })
            .collect(),
    };
    calibrated.fit();
    let report = report(&path, &calibrated);
    let mut all = match Calibration::load(&path) {
        Ok(found) if found.machine == Calibration::new().machine => found,
        _ => Calibration::new(),
    };
    all.drivers
        .retain(|other| other.driver != calibrated.driver);
    all.drivers.push(calibrated);
    all.save(&path)?;
    match args.output {
        Output::Json => text::print_json(&report),
        Output::Table => text::unless_closed(print(&report)),
    }
}

/// Builds the chains; of each, layers are tops down to `most` deep.
fn points(temp: &Path, driver: Driver, most: usize) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for (name, depths, options) in CHAINS {
        let dir = temp.join(name.replace(' ', "-"));
        build::make(&build_args(&dir, options)?)?;
        for depth in depths.iter().filter(|depth| **depth <= most) {
            let top = dir.join(format!("l{}.qcow2", depth - 1));
            points.push(Point {
                name: name.to_owned(),
                subject: Subject::open(top, 10_000, driver)?,
            });
        }
    }
    Ok(points)
}

/// The command line that builds a chain.
pub fn build_args(dir: &Path, options: &[&str]) -> Result<Build> {
    let words = ["qcow2-chain", "build", "--quiet"]
        .into_iter()
        .chain(options.iter().copied());
    let words = words.map(Into::into).chain([dir.as_os_str().to_owned()]);
    match Cli::try_parse_from(words)?.command {
        Command::Build(args) => Ok(args),
        _ => anyhow::bail!("not a chain to build"),
    }
}

/// Looks for the depth from which on a read that goes through all layers ends
/// the process, up to `most`.
fn deepest(qemu: &Qemu, temp: &Path, most: usize) -> Result<DeepestRead> {
    let dir = temp.join("deep");
    let layers = format!("--layers={most}");
    build::make(&build_args(
        &dir,
        &[&layers, "--disk=64M", "--data-per-layer=0"],
    )?)?;
    let works = |depth: usize| -> Result<bool> {
        let mut session = qemu.open(&dir.join(format!("l{}.qcow2", depth - 1)))?;
        match session.read(0) {
            Ok(_) => Ok(true),
            Err(error) if error.is::<Crash>() => Ok(false),
            Err(error) => Err(error),
        }
    };
    if works(most)? {
        return Ok(DeepestRead {
            works: most,
            crashes: None,
        });
    }
    let (mut good, mut bad) = (0, most);
    // It mostly is near 870.
    let mut next = if most > 870 { 870 } else { most / 2 };
    while bad - good > DEEPEST_STEP {
        if works(next)? {
            good = next;
        } else {
            bad = next;
        }
        next = match (good, bad) {
            (870, DEEPEST_CHAIN) => 880,
            (_, 870) if good == 0 => 800,
            _ => good.midpoint(bad),
        };
    }
    Ok(DeepestRead {
        works: good,
        crashes: Some(bad),
    })
}

fn report(path: &Path, calibrated: &Calibrated) -> Report {
    let models = calibrated.models.iter().map(|model| ModelReport {
        figure: model.figure,
        relative_error: model.fit.relative_error,
        constants: model
            .terms
            .iter()
            .zip(&model.fit.constants)
            .map(|(term, value)| Constant {
                term: term.clone(),
                value: *value,
            })
            .collect(),
    });
    Report {
        calibration: path.display().to_string(),
        driver: calibrated.driver,
        qemu: calibrated.qemu.clone(),
        aio: calibrated.aio,
        points: calibrated.points.len(),
        deepest_read: calibrated.deepest_read,
        models: models.collect(),
    }
}

fn print(report: &Report) -> Result<()> {
    let out = &mut io::stdout().lock();
    writeln!(
        out,
        "{}, QEMU {}, aio={}: {} chains measured",
        report.driver.name(),
        printable(&report.qemu),
        report.aio.name(),
        report.points
    )?;
    match report.deepest_read {
        Some(DeepestRead {
            works,
            crashes: Some(depth),
        }) => {
            writeln!(
                out,
                "A read through {works} layers works, through {depth} it crashes."
            )?;
        }
        Some(DeepestRead { works, .. }) => writeln!(out, "A read through {works} layers works.")?,
        None => {}
    }
    let mut table = text::table(&["", "error", "constant", ""], &[0, 3]);
    for model in &report.models {
        let mut name = model.figure.label();
        let mut error = percent(model.relative_error);
        for constant in &model.constants {
            let value = format!("{:.4e}", constant.value);
            table.add_row([
                name.to_owned(),
                std::mem::take(&mut error),
                value,
                constant.term.clone(),
            ]);
            name = "";
        }
    }
    text::print_table(out, &table)?;
    writeln!(out, "Written to {}", printable(&report.calibration))?;
    Ok(())
}
