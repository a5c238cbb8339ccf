//! `validate`: how far off predictions are, on chains that nothing was fitted to.

mod draw;
mod report;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
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
/// Chains that take turns, and are there at a time.
const BATCH: usize = 8;

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
    let missing: Vec<_> = seeds
        .iter()
        .copied()
        .filter(|seed| !of_driver.contains_key(seed))
        .collect();
    let mut left = missing.len();
    for batch in missing.chunks(BATCH) {
        let limit = args.seconds.map(Duration::from_secs);
        if limit.is_some_and(|limit| begin.elapsed() > limit) {
            break;
        }
        of_driver.extend(measure(args, batch)?);
        left -= batch.len();
        bar.at(seeds.len() - left);
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

/// A chain that is measured.
struct Subject {
    recipe: Recipe,
    /// Where it is.
    temp: Temporary,
    top: PathBuf,
    shape: Shape,
    targets: Targets,
    qemu: Qemu,
    found: Found,
}

/// Measures the chains of some seeds, in rounds in which each has its turn: what
/// else goes on lasts for longer than a single chain takes.
fn measure(args: &Validate, seeds: &[u64]) -> Result<Vec<(u64, Measured)>> {
    let subjects = seeds.iter().map(|seed| {
        let subject = Subject::make(args, Recipe::draw(*seed));
        subject.with_context(|| format!("seed {seed}"))
    });
    let mut subjects = subjects.collect::<Result<Vec<_>>>()?;
    // Or the files would be written while others are measured.
    rustix::fs::sync();
    for round in 0..args.rounds.max(1) {
        for (subject, seed) in subjects.iter_mut().zip(seeds) {
            let done = subject.round(args, round == 0);
            done.with_context(|| format!("seed {seed}"))?;
        }
    }
    let measured = subjects.into_iter().map(Subject::finish);
    seeds
        .iter()
        .zip(measured)
        .map(|(seed, measured)| Ok((*seed, measured?)))
        .collect()
}

impl Subject {
    fn make(args: &Validate, recipe: Recipe) -> Result<Self> {
        let temp = Temporary::new(args.programs.temp.as_deref())?;
        let dir = temp.0.join("chain");
        let options: Vec<_> = recipe.options.iter().map(String::as_str).collect();
        let top = PathBuf::from(build::make(&build_args(&dir, &options)?)?.top);
        let policy = Policy {
            allow: Vec::new(),
            max_layers: recipe.layers,
        };
        let chain = Chain::open(&top, &policy)?;
        let (shape, targets) = Targets::draw(&chain, args.programs.driver, READS)?;
        Ok(Self {
            recipe,
            qemu: Qemu::new(&args.programs, &top)?,
            temp,
            top,
            shape,
            targets,
            found: Found::default(),
        })
    }

    /// Jobs take longest; once is enough for them.
    fn round(&mut self, args: &Validate, jobs: bool) -> Result<()> {
        let shallow = self.recipe.layers <= DEEPEST_JOB || self.qemu.driver == Driver::Rqcow2;
        let jobs = jobs && shallow;
        let figures = Figure::ALL.into_iter();
        let figures: Vec<_> = figures
            .filter(|figure| jobs || !matches!(figure, Figure::Stream | Figure::Merge))
            .collect();
        let task = Task {
            qemu: &self.qemu,
            top: &self.top,
            disk: self.shape.disk,
            raw: false,
            targets: &self.targets,
            temp: &self.temp.0,
            queue_depths: &args.prediction.queue_depth,
            figures: &figures,
        };
        task.round(&mut self.found)
    }

    fn finish(self) -> Result<Measured> {
        let crashes = self.found.crashes.iter();
        let crashes = crashes
            .map(|(key, how)| (predict::label(key.figure, key.queue_depth), how.clone()))
            .collect();
        Ok(Measured {
            recipe: self.recipe,
            machine: Machine::here(),
            qemu: self.qemu.version()?,
            samples: self.found.samples(),
            crashes,
            shape: self.shape,
        })
    }
}

fn save(path: &Path, results: &Results) -> Result<()> {
    let text = serde_json::to_string(results)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}
