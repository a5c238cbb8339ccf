//! `validate`: how far off predictions are, on chains that nothing was fitted to.

mod draw;
mod report;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::build;
use crate::calibrate::build_args;
use crate::chain::{Chain, Policy};
use crate::cli::{Driver, Output, Validate};
use crate::measure::Temporary;
use crate::measure::qemu::Qemu;
use crate::measure::run::{Found, Task};
use crate::measure::sample::Sample;
use crate::measure::targets::Targets;
use crate::model::calibration::Machine;
use crate::model::figure::{Figure, Key};
use crate::model::shape::Shape;
use crate::predict;
use crate::text::{self, Progress};
use draw::Recipe;
use report::Report;

/// Predictions are further off than they may be.
const TOO_FAR: u8 = 4;
/// As with `calibrate`.
const READS: u64 = 60;
const DEEPEST_JOB: usize = 200;

/// What was measured so far.
#[derive(Default, Serialize, Deserialize)]
struct Results {
    /// By driver and seed.
    measured: BTreeMap<String, BTreeMap<u64, Measured>>,
}

/// A chain that was measured.
#[derive(Serialize, Deserialize)]
pub struct Measured {
    recipe: Recipe,
    machine: Machine,
    qemu: String,
    shape: Shape,
    samples: Vec<(Key, Sample)>,
    crashes: BTreeMap<String, String>,
}

/// Carries the command out; the result is the exit code.
pub fn run(args: &Validate) -> Result<u8> {
    let begin = Instant::now();
    // It would be a pity to learn later that there is none.
    let (calibration, path) = predict::load(args.prediction.calibration.as_deref())?;
    let driver = args.programs.driver;
    let known = calibration
        .drivers
        .iter()
        .find(|known| known.driver == driver);
    let known = known.with_context(|| format!("{path}: {} is not calibrated", driver.name()))?;
    let mut results = match &args.results {
        Some(path) if path.exists() => {
            let text = std::fs::read_to_string(path)?;
            serde_json::from_str(&text).with_context(|| path.display().to_string())?
        }
        _ => Results::default(),
    };
    let of_driver = results.measured.entry(driver.name().into()).or_default();
    let seeds: Vec<_> = (0..args.chains as u64)
        .map(|number| args.seed + number)
        .collect();
    let bar = Progress::new("measuring", seeds.len(), args.quiet);
    let mut left = 0;
    for (number, seed) in seeds.iter().enumerate() {
        if of_driver.contains_key(seed) {
            continue;
        }
        let limit = args.seconds.map(Duration::from_secs);
        if limit.is_some_and(|limit| begin.elapsed() > limit) {
            left += 1;
            continue;
        }
        of_driver.insert(
            *seed,
            measure(args, *seed).with_context(|| format!("seed {seed}"))?,
        );
        bar.at(number + 1);
    }
    drop(bar);
    let chosen = of_driver.iter().filter(|(seed, _)| seeds.contains(seed));
    let report = Report::new(known, chosen, left, calibration.warnings());
    if let Some(path) = &args.results {
        save(path, &results)?;
    }
    if let Some(path) = &args.markdown {
        std::fs::write(path, report.markdown())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    match args.output {
        Output::Json => text::print_json(&report)?,
        Output::Table => print!("{}", report.markdown()),
    }
    Ok(if report.within_limits { 0 } else { TOO_FAR })
}

fn measure(args: &Validate, seed: u64) -> Result<Measured> {
    let recipe = Recipe::draw(seed);
    let temp = Temporary::new(args.programs.temp.as_deref())?;
    let dir = temp.0.join("chain");
    let options: Vec<_> = recipe.options.iter().map(String::as_str).collect();
    let built = build::make(&build_args(&dir, &options)?)?;
    // Or the files would be written while they are measured.
    rustix::fs::sync();
    let top = Path::new(&built.top);
    let policy = Policy {
        allow: Vec::new(),
        max_layers: recipe.layers,
    };
    let chain = Chain::open(top, &policy)?;
    let driver = args.programs.driver;
    let (shape, targets) = Targets::draw(&chain, driver, READS)?;
    let qemu = Qemu::new(&args.programs, top)?;
    let jobs = recipe.layers <= DEEPEST_JOB || driver == Driver::Rqcow2;
    let figures = Figure::ALL.into_iter();
    let figures: Vec<_> = figures
        .filter(|figure| jobs || !matches!(figure, Figure::Stream | Figure::Merge))
        .collect();
    let task = Task {
        qemu: &qemu,
        top,
        disk: shape.disk,
        raw: false,
        targets: &targets,
        temp: &temp.0,
        queue_depths: &args.prediction.queue_depth,
        figures: &figures,
    };
    let mut found = Found::default();
    task.round(&mut found)?;
    let job = |figure: &Figure| matches!(figure, Figure::Stream | Figure::Merge);
    let figures: Vec<_> = figures
        .iter()
        .copied()
        .filter(|figure| !job(figure))
        .collect();
    let task = Task {
        figures: &figures,
        ..task
    };
    for _ in 1..args.rounds {
        task.round(&mut found)?;
    }
    let crashes = found.crashes.iter();
    Ok(Measured {
        recipe,
        machine: Machine::here(),
        qemu: qemu.version()?,
        samples: found.samples(),
        crashes: crashes
            .map(|(key, how)| (predict::label(key.figure, key.queue_depth), how.clone()))
            .collect(),
        shape,
    })
}

fn save(path: &Path, results: &Results) -> Result<()> {
    let text = serde_json::to_string(results)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}
