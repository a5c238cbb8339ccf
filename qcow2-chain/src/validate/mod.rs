//! `validate`: how far off predictions are, on chains that nothing was fitted to.

mod draw;
mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::build;
use crate::calibrate::build_args;
use crate::cleanup::uninterrupted;
use crate::cli::{Output, Validate};
use crate::measure::Temporary;
use crate::measure::qemu::Qemu;
use crate::measure::sample::Sample;
use crate::measure::subject::Subject;
use crate::model::calibration::Machine;
use crate::model::figure::Key;
use crate::model::shape::Shape;
use crate::predict;
use crate::text::{self, Progress};
use draw::Recipe;
use report::Report;

/// Predictions are further off than they may be.
const TOO_FAR: u8 = 4;
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
            let text = std::fs::read_to_string(path);
            let text = text.with_context(|| format!("cannot read {}", path.display()))?;
            serde_json::from_str(&text).with_context(|| path.display().to_string())?
        }
        _ => Results::default(),
    };
    results.measured.entry(driver.name().into()).or_default();
    // Nor is it a time to learn that nothing can be written.
    results.save(args)?;
    let seeds: Vec<_> = (0..args.chains as u64)
        .map(|number| args.seed + number)
        .collect();
    let bar = Progress::new("measuring", seeds.len(), args.quiet);
    let missing: Vec<_> = seeds
        .iter()
        .copied()
        .filter(|seed| !results.measured[driver.name()].contains_key(seed))
        .collect();
    let mut left = missing.len();
    for batch in missing.chunks(BATCH) {
        let limit = args.seconds.map(Duration::from_secs);
        if limit.is_some_and(|limit| begin.elapsed() > limit) {
            break;
        }
        measure(args, batch, &mut |seed, measured| {
            let of_driver = results.measured.entry(driver.name().into()).or_default();
            of_driver.insert(seed, measured);
            left -= 1;
            bar.at(seeds.len() - left);
            results.save(args)
        })?;
    }
    drop(bar);
    let measured = results.measured[driver.name()].iter();
    let chosen = measured.filter(|(seed, _)| seeds.contains(seed));
    let report = Report::new(known, chosen, left, calibration.warnings());
    if let Some(path) = &args.markdown {
        std::fs::write(path, report.markdown())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    match args.output {
        Output::Json => text::print_json(&report)?,
        Output::Table => text::print(&report.markdown())?,
    }
    Ok(if report.within_limits { 0 } else { TOO_FAR })
}

/// A random chain that is there.
struct Drawn {
    recipe: Recipe,
    /// Where it is.
    temp: Temporary,
    qemu: Qemu,
    subject: Subject,
}

/// Measures the chains of some seeds, in rounds in which each has its turn: what
/// else goes on lasts for longer than a single chain takes. `found` gets each
/// after its last turn.
fn measure(
    args: &Validate,
    seeds: &[u64],
    found: &mut dyn FnMut(u64, Measured) -> Result<()>,
) -> Result<()> {
    let drawn = seeds.iter().map(|seed| {
        let drawn = Drawn::make(args, Recipe::draw(*seed));
        drawn.with_context(|| format!("seed {seed}"))
    });
    let mut drawn = drawn.collect::<Result<Vec<_>>>()?;
    // Or the files would be written while others are measured.
    rustix::fs::sync();
    for round in 0..args.rounds {
        for (drawn, seed) in drawn.iter_mut().zip(seeds) {
            let Drawn { qemu, temp, .. } = drawn;
            let queue_depths = &args.prediction.queue_depth;
            let done = drawn.subject.round(round, qemu, &temp.0, queue_depths);
            done.with_context(|| format!("seed {seed}"))?;
            if round + 1 == args.rounds {
                found(*seed, drawn.finish()?)?;
            }
        }
    }
    // Only now are the chains removed: that would disturb the others.
    Ok(())
}

impl Drawn {
    fn make(args: &Validate, recipe: Recipe) -> Result<Self> {
        let temp = Temporary::new(args.programs.temp.as_deref())?;
        let dir = temp.0.join("chain");
        let options: Vec<_> = recipe.options.iter().map(String::as_str).collect();
        let top = PathBuf::from(build::make(&build_args(&dir, &options)?)?.top);
        let qemu = Qemu::new(&args.programs, &top)?;
        Ok(Self {
            subject: Subject::open(top, recipe.layers, qemu.driver)?,
            recipe,
            temp,
            qemu,
        })
    }

    fn finish(&self) -> Result<Measured> {
        let Subject { shape, found, .. } = &self.subject;
        let crashes = found.crashes.iter();
        let crashes = crashes
            .map(|(key, how)| (predict::label(key.figure, key.queue_depth), how.clone()))
            .collect();
        Ok(Measured {
            recipe: self.recipe.clone(),
            machine: Machine::here(),
            qemu: self.qemu.version()?,
            samples: found.samples(),
            crashes,
            shape: shape.clone(),
        })
    }
}

impl Results {
    /// Writes them all, if the user wants to keep them: the old file or the new
    /// one is there at any time.
    fn save(&self, args: &Validate) -> Result<()> {
        let Some(path) = &args.results else {
            return Ok(());
        };
        let text = serde_json::to_string(self)? + "\n";
        // Where it is a symbolic link it stays one.
        let path = path.canonicalize().unwrap_or_else(|_| path.clone());
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let written = uninterrupted(|| {
            std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path))
        });
        written.with_context(|| format!("cannot write {}", path.display()))
    }
}
