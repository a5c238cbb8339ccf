//! What was measured on a machine, and the constants that follow from it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::figure::{Figure, Key};
use super::fit::{Fit, Point, fit};
use super::shape::Shape;
use super::terms::Model;
use crate::cli::{Aio, Driver};
use crate::measure::sample::Sample;

/// The format of the file.
const VERSION: u32 = 1;
/// Bytes of a calibration file at most.
const MAX_FILE: u64 = 64 << 20;

/// The file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    pub version: u32,
    pub machine: Machine,
    pub drivers: Vec<Calibrated>,
}

/// Where it was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cpus: usize,
    pub kernel: String,
    pub name: String,
}

/// One driver of one QEMU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibrated {
    pub driver: Driver,
    pub qemu: String,
    pub aio: Aio,
    /// Seconds since 1970.
    pub measured_at: u64,
    /// The longest chain through which a read does not crash, and whether a
    /// longer one was seen to crash.
    pub deepest_read: Option<DeepestRead>,
    pub models: Vec<Fitted>,
    pub points: Vec<Measurement>,
}

/// How deep a read can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeepestRead {
    /// This works.
    pub works: usize,
    /// This crashes; `None` where nothing was seen to.
    pub crashes: Option<usize>,
}

/// The constants of a figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fitted {
    pub figure: Figure,
    pub terms: Vec<String>,
    pub fit: Fit,
    /// The points again, as the constants have them.
    pub residuals: Vec<Residual>,
}

/// A point beside what was fitted to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Residual {
    pub chain: String,
    pub layers: usize,
    pub queue_depth: u32,
    pub measured: f64,
    pub fitted: f64,
}

/// What was measured of a chain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    pub name: String,
    pub layers: usize,
    pub figures: Vec<MeasuredFigure>,
}

/// A figure of it, with the terms that it is the sum of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeasuredFigure {
    #[serde(flatten)]
    pub key: Key,
    #[serde(flatten)]
    pub sample: Sample,
    pub terms: Vec<(String, f64)>,
    pub known: f64,
}

impl Measurement {
    /// Keeps of a chain what the models need.
    pub fn new(name: &str, shape: &Shape, driver: Driver, samples: &[(Key, Sample)]) -> Self {
        let model = Model::new(shape, driver);
        let figure = |(key, sample): &(Key, Sample)| {
            let terms = model.terms(*key)?;
            Some(MeasuredFigure {
                key: *key,
                sample: *sample,
                terms: terms
                    .list
                    .iter()
                    .map(|(name, value)| ((*name).to_owned(), *value))
                    .collect(),
                known: terms.known,
            })
        };
        Self {
            name: name.to_owned(),
            layers: shape.depth(),
            figures: samples.iter().filter_map(figure).collect(),
        }
    }
}

/// A value with an error bar of two standard deviations.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Predicted {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let info = read("/proc/cpuinfo");
        let cpu = info.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then(|| value.trim().to_owned())
        });
        let system = rustix::system::uname();
        Self {
            cpu: cpu.unwrap_or_else(|| system.machine().to_string_lossy().into_owned()),
            // Not how many this process may use, which changes while it measures.
            cpus: info
                .lines()
                .filter(|line| line.starts_with("processor"))
                .count(),
            kernel: system.release().to_string_lossy().into_owned(),
            name: system.nodename().to_string_lossy().into_owned(),
        }
    }
}

impl Calibrated {
    /// Fits the constants of all figures to the points.
    pub fn fit(&mut self) {
        self.models.clear();
        for figure in Figure::ALL {
            let mut points = Vec::new();
            let mut names = Vec::new();
            let mut residuals = Vec::new();
            for measured in &self.points {
                let of_figure = measured.figures.iter();
                for found in of_figure.filter(|found| found.key.figure == figure) {
                    let value = found.sample.value(figure);
                    names = found.terms.iter().map(|(name, _)| name.clone()).collect();
                    points.push(Point {
                        terms: found.terms.iter().map(|(_, value)| *value).collect(),
                        known: found.known,
                        value,
                    });
                    residuals.push(Residual {
                        chain: measured.name.clone(),
                        layers: measured.layers,
                        queue_depth: found.key.queue_depth,
                        measured: value,
                        fitted: 0.0,
                    });
                }
            }
            if let Some(fit) = fit(&points) {
                for (point, residual) in points.iter().zip(&mut residuals) {
                    residual.fitted = fit.predict(&point.terms, point.known).0;
                }
                self.models.push(Fitted {
                    figure,
                    terms: names,
                    fit,
                    residuals,
                });
            }
        }
    }

    /// What a chain will cost; `None` where the figure was not calibrated or
    /// means nothing for the chain.
    pub fn predict(&self, model: &Model<'_>, key: Key) -> Option<Predicted> {
        let fitted = self
            .models
            .iter()
            .find(|model| model.figure == key.figure)?;
        let terms = model.terms(key)?;
        let values: Vec<_> = terms.list.iter().map(|(_, value)| *value).collect();
        let (value, error) = fitted.fit.predict(&values, terms.known);
        let wide = 1.0 + 2.0 * error.hypot(key.figure.scatter());
        Some(Predicted {
            value,
            low: value / wide,
            high: value * wide,
        })
    }

    /// Whether a walk through so many layers is seen to crash.
    pub fn crashes_at(&self, layers: usize) -> bool {
        self.deepest_read
            .and_then(|deepest| deepest.crashes)
            .is_some_and(|depth| layers >= depth)
    }
}

impl Calibration {
    /// Nothing measured as yet.
    pub fn new() -> Self {
        Self {
            version: VERSION,
            machine: Machine::here(),
            drivers: Vec::new(),
        }
    }

    /// Where it is unless the user says something else.
    pub fn default_path() -> Result<PathBuf> {
        let config = std::env::var_os("XDG_CONFIG_HOME").filter(|dir| !dir.is_empty());
        let dir = config.map(PathBuf::from).or_else(|| {
            let home = std::env::var_os("HOME")?;
            Some(Path::new(&home).join(".config"))
        });
        let dir = dir.context("neither XDG_CONFIG_HOME nor HOME is set: --calibration FILE")?;
        Ok(dir.join("qcow2-chain/calibration.json"))
    }

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let data = std::fs::metadata(path).with_context(|| {
            format!("no calibration in {name}: make one with `qcow2-chain calibrate --qemu DIR`")
        })?;
        ensure!(
            data.is_file() && data.len() <= MAX_FILE,
            "{name} is no calibration"
        );
        let text = std::fs::read_to_string(path).with_context(|| name.clone())?;
        let found: Self = serde_json::from_str(&text).with_context(|| name.clone())?;
        ensure!(
            found.version == VERSION,
            "{name}: version {}, not {VERSION}",
            found.version
        );
        for driver in &found.drivers {
            for model in &driver.models {
                // They were fitted to these terms and to no others.
                let known = Model::names(driver.driver, model.figure);
                let count = known.len();
                ensure!(
                    known == model.terms
                        && model.fit.constants.len() == count
                        && model.fit.inverse.len() == count * count,
                    "{name} is of another version of this program: calibrate again"
                );
            }
        }
        Ok(found)
    }

    /// Writes a file, whole or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        if let Some(dir) = dir {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let text = serde_json::to_string(self)?;
        std::fs::write(&new, text + "\n")
            .and_then(|()| std::fs::rename(&new, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// What makes its predictions doubtful here.
    pub fn warnings(&self) -> Vec<String> {
        let here = Machine::here();
        let mut warnings = Vec::new();
        let there = &self.machine;
        if (&there.cpu, there.cpus, &there.name) != (&here.cpu, here.cpus, &here.name) {
            warnings.push(format!(
                "calibrated on another machine: {}, {} x {}",
                there.name, there.cpus, there.cpu
            ));
        } else if there.kernel != here.kernel {
            warnings.push(format!("calibrated with another kernel: {}", there.kernel));
        }
        warnings
    }
}
