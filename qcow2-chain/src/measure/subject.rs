//! A chain that models are fitted to, or compared with.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::qemu::Qemu;
use super::run::{Found, Task};
use super::targets::Targets;
use crate::chain::{Chain, Policy};
use crate::cli::Driver;
use crate::model::figure::Figure;
use crate::model::shape::Shape;

/// Jobs on deeper chains would take minutes with QEMU's driver.
const DEEPEST_JOB: usize = 200;
/// Places of data, and of holes, that are read.
const READS: u64 = 60;

/// The chain, and what was measured of it.
pub struct Subject {
    /// The image on top.
    pub top: PathBuf,
    pub shape: Shape,
    targets: Targets,
    pub found: Found,
}

impl Subject {
    /// A chain of at most so many layers that is there.
    pub fn open(top: PathBuf, max_layers: usize, driver: Driver) -> Result<Self> {
        let policy = Policy {
            allow: Vec::new(),
            max_layers,
        };
        let chain = Chain::open(&top, &policy)?;
        let (shape, targets) = Targets::draw(&chain, driver, READS)?;
        Ok(Self {
            top,
            shape,
            targets,
            found: Found::default(),
        })
    }

    /// Measures everything once; jobs, which take longest, in the first round
    /// only.
    pub fn round(
        &mut self,
        number: usize,
        qemu: &Qemu,
        temp: &Path,
        queue_depths: &[u32],
    ) -> Result<()> {
        let shallow = self.shape.depth() <= DEEPEST_JOB || qemu.driver == Driver::Rqcow2;
        let jobs = number == 0 && shallow;
        let figures = Figure::ALL.into_iter();
        let figures: Vec<_> = figures.filter(|figure| jobs || !figure.is_job()).collect();
        let task = Task {
            qemu,
            top: &self.top,
            disk: self.shape.disk,
            raw: false,
            targets: &self.targets,
            temp,
            queue_depths,
            figures: &figures,
        };
        task.round(&mut self.found)
    }
}
