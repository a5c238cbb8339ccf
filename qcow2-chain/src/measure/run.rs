//! Measures a chain with a real QEMU.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rust_qcow2::format::header::CompressionType;
use rust_qcow2::format::refcount::RefcountOrder;
use serde_json::json;

use super::daemon::Daemon;
use super::pin::Pin;
use super::process::{Crash, Program};
use super::qemu::{Qemu, Session};
use super::sample::Sample;
use super::targets::Targets;
use crate::build::writer::{Format, write};
use crate::model::figure::{Figure, Key};

/// How long a job may take.
const PATIENCE: Duration = Duration::from_secs(1800);
/// Seconds that requests in a row are measured for: short enough that there
/// are runs in which nobody else wanted the CPU.
const BENCH_SECONDS: f64 = 0.1;
/// How often, in each round.
const BENCHES: usize = 4;
/// Requests that load tables at most.
const MAX_LOADING: u64 = 20_000;
/// What is measured again and again is known when the two least values are as
/// near to each other as this.
const AGREE: f64 = 1.03;
/// How often that is at the least and at the most, and the seconds after which
/// it has to do.
const REPEATS: std::ops::RangeInclusive<usize> = 6..=40;
const REPEAT_SECONDS: f64 = 2.0;
/// The same for a block job.
const JOB_SECONDS: f64 = 1.5;
/// How often each place is read by a process.
const READS: usize = 4;
/// In so many processes, one after the other, each with other pages of memory:
/// what a microsecond's read takes differs between them by half. Fewer if they
/// take more seconds than this.
const PROCESSES: usize = 5;
const PROCESSES_SECONDS: f64 = 3.0;
/// Between one time and the next: somebody else's turn may end meanwhile.
const BETWEEN: Duration = Duration::from_millis(60);

/// What is measured, and how.
#[derive(Clone)]
pub struct Task<'a> {
    pub qemu: &'a Qemu,
    /// The image on top.
    pub top: &'a Path,
    /// Bytes of the disk.
    pub disk: u64,
    /// The top is raw.
    pub raw: bool,
    pub targets: &'a Targets,
    /// Where copies go.
    pub temp: &'a Path,
    pub queue_depths: &'a [u32],
    /// What is wanted.
    pub figures: &'a [Figure],
}

/// What was found, in several rounds.
#[derive(Debug, Default)]
pub struct Found {
    values: BTreeMap<Key, Vec<f64>>,
    runs: BTreeMap<Key, Runs>,
    /// What could not be measured as a program crashed.
    pub crashes: BTreeMap<Key, String>,
}

/// Seconds that requests in a row took.
#[derive(Debug, Default)]
struct Runs {
    /// So many requests more in the second run.
    more: u64,
    first: Vec<f64>,
    second: Vec<f64>,
}

impl Runs {
    /// Microseconds for each of those: the difference of what both took at the
    /// least, in the middle, and at the most.
    fn sample(&self) -> Option<Sample> {
        let first = Sample::of(self.first.clone())?;
        let second = Sample::of(self.second.clone())?;
        let each = |a: f64, b: f64| (b - a).max(1e-6) / self.more.max(1) as f64 * 1e6;
        Some(Sample {
            median: each(first.median, second.median),
            low: each(first.low, second.low),
            least: each(first.least, second.least),
            most: each(first.least, second.most),
            count: second.count,
        })
    }
}

impl Task<'_> {
    /// Measures everything that is wanted once.
    pub fn round(&self, found: &mut Found) -> Result<()> {
        self.all(found)
            .with_context(|| format!("cannot measure {}", self.top.display()))
    }

    fn all(&self, found: &mut Found) -> Result<()> {
        const SESSION: [Figure; 5] = [
            Figure::Open,
            Figure::MemoryOpen,
            Figure::MemoryWarm,
            Figure::ReadData,
            Figure::ReadHole,
        ];
        let pin = Pin::new();
        if SESSION.iter().any(|figure| self.wants(*figure)) {
            let mut first = Vec::new();
            let result = self.session(
                found.crashes.contains_key(&Figure::MemoryWarm.into()),
                &mut |figure, value| first.push((figure, value)),
            );
            for (figure, value) in first {
                found.put(figure.into(), value);
            }
            if let Err(error) = result {
                for figure in [Figure::MemoryWarm, Figure::ReadData, Figure::ReadHole] {
                    if self.wants(figure) {
                        found.crash(&error, figure.into());
                    }
                }
                only_crashes(error)?;
            }
        }
        for depth in self.queue_depths {
            let key = Key::queue(*depth);
            if self.wants(Figure::ReadDisk) {
                self.requests(key, found)?;
            }
        }
        // Jobs have several threads.
        drop(pin);
        for (figure, job) in [
            (Figure::Stream, Self::stream as fn(&Self) -> Result<f64>),
            (Figure::Merge, Self::merge),
        ] {
            if self.wants(figure) {
                let mut jobs = Repeat::within(JOB_SECONDS);
                while let Some(seconds) = found.take(figure.into(), || job(self))? {
                    if !jobs.wants_more(seconds) {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    fn wants(&self, figure: Figure) -> bool {
        self.figures.contains(&figure)
    }

    /// Open, memory, and single reads.
    fn session(&self, only_open: bool, put: &mut dyn FnMut(Figure, f64)) -> Result<()> {
        let mut session = self.qemu.open(self.top)?;
        put(Figure::Open, session.opened);
        if self.wants(Figure::Open) {
            let mut opens = Repeat::within(REPEAT_SECONDS);
            while opens.wants_more(session.opened) {
                std::thread::sleep(BETWEEN);
                session = self.qemu.open(self.top)?;
                put(Figure::Open, session.opened);
            }
        }
        put(Figure::MemoryOpen, session.resident()? as f64);
        if only_open
            || !(self.wants(Figure::MemoryWarm)
                || self.wants(Figure::ReadData)
                || self.wants(Figure::ReadHole))
        {
            return Ok(());
        }
        let begin = Instant::now();
        for done in 1..=PROCESSES {
            self.reads(&mut session, put)?;
            // Another one would take about as long as one of these.
            let next = begin.elapsed().as_secs_f64() * (done + 1) as f64 / done as f64;
            if done == PROCESSES || next > PROCESSES_SECONDS {
                break;
            }
            session = self.qemu.open(self.top)?;
            put(Figure::Open, session.opened);
        }
        Ok(())
    }

    /// Single reads in a process that has just opened the chain.
    fn reads(&self, session: &mut Session, put: &mut dyn FnMut(Figure, f64)) -> Result<()> {
        // Twice: the first read in a neighbourhood need not load all of it.
        for at in self.targets.warm.iter().chain(&self.targets.warm) {
            session.read(*at)?;
        }
        put(Figure::MemoryWarm, session.resident()? as f64);
        for (figure, places) in [
            (Figure::ReadData, &self.targets.data),
            (Figure::ReadHole, &self.targets.holes),
        ] {
            if !self.wants(figure) || places.is_empty() {
                continue;
            }
            // Of each place the least, so that what else goes on does not count;
            // of the places the mean, as they differ in depth.
            let mut least = vec![f64::INFINITY; places.len()];
            for _ in 0..READS {
                for (place, least) in places.iter().zip(&mut least) {
                    *least = least.min(session.read(*place)?);
                }
                std::thread::sleep(BETWEEN);
            }
            put(
                figure,
                least.iter().sum::<f64>() / places.len() as f64 * 1e6,
            );
        }
        Ok(())
    }

    /// Many requests in a row, all over the disk: a longer run, and a shorter
    /// one that loads the tables.
    fn requests(&self, key: Key, found: &mut Found) -> Result<()> {
        if found.crashes.contains_key(&key) {
            return Ok(());
        }
        let result = self.two_runs(key.queue_depth, found.runs.get(&key));
        match result {
            Ok(runs) => {
                let all = found.runs.entry(key).or_default();
                all.more = runs.more;
                all.first.extend(runs.first);
                all.second.extend(runs.second);
            }
            Err(error) => {
                found.crash(&error, key);
                only_crashes(error)?;
            }
        }
        Ok(())
    }

    fn two_runs(&self, queue_depth: u32, before: Option<&Runs>) -> Result<Runs> {
        let warm = (self.targets.tables.saturating_mul(3)).clamp(50, MAX_LOADING);
        let bench = |count| self.qemu.bench(self.top, queue_depth, count);
        let mut runs = Runs::default();
        let first = bench(warm)?;
        // Two processes never cost quite the same, so that the first should be short.
        let guess = (BENCH_SECONDS / first.max(1e-3) * warm as f64) as u64;
        runs.more = guess.clamp(2 * warm, 100_000.max(2 * warm));
        if let Some(before) = before {
            runs.more = before.more;
        } else {
            // Loading tables is slower than what follows.
            loop {
                // Twice, or something else that goes on would make it look long.
                let all = warm + runs.more;
                let spent = bench(all)?.min(bench(all)?) - first;
                if spent >= BENCH_SECONDS / 2.0 || runs.more >= 400_000 {
                    break;
                }
                let scale = BENCH_SECONDS / spent.max(BENCH_SECONDS / 20.0) * 1.2;
                runs.more = (runs.more as f64 * scale) as u64;
            }
        }
        let begin = Instant::now();
        for done in 0..BENCHES {
            if done > 0 && begin.elapsed().as_secs_f64() > REPEAT_SECONDS {
                break;
            }
            std::thread::sleep(BETWEEN);
            runs.first.push(bench(warm)?);
            runs.second.push(bench(warm + runs.more)?);
        }
        Ok(runs)
    }

    /// Seconds of a `block-stream` of everything into a new overlay of ours.
    fn stream(&self) -> Result<f64> {
        let path = self.temp.join("stream.qcow2");
        let _remove = Remove(&path);
        let below = std::path::absolute(self.top)?;
        let name = below.to_str().unwrap_or_default().to_owned();
        let format = Format {
            size: self.disk,
            version: 3,
            cluster_bits: 16,
            refcount_order: RefcountOrder::BITS_16,
            extended_l2: false,
            compression: CompressionType::Zlib,
            backing: Some((name, if self.raw { "raw" } else { "qcow2" }.into())),
            scatter: None,
        };
        write(&path, &format, &[], &|_, _, _| {})?;
        let mut daemon = Daemon::start(self.qemu, PATIENCE)?;
        let mut node = self.qemu.node(&path)?;
        node["node-name"] = "top".into();
        daemon.command("blockdev-add", node)?;
        let begin = Instant::now();
        daemon.command("block-stream", json!({"device": "top", "job-id": "stream"}))?;
        let end = daemon.event("BLOCK_JOB_COMPLETED")?;
        let seconds = begin.elapsed().as_secs_f64();
        ensure!(
            end.get("error").is_none(),
            "block-stream: {}",
            end["error"].as_str().unwrap_or_default()
        );
        Ok(seconds)
    }

    /// Seconds of a copy of everything into a new image of ours, start, open and
    /// close of the program included.
    fn merge(&self) -> Result<f64> {
        let path = self.temp.join("merge.qcow2");
        let _remove = Remove(&path);
        let args = [
            "convert",
            "-U",
            "-O",
            self.qemu.driver.name(),
            &self.qemu.image(self.top)?,
            &path.display().to_string(),
        ]
        .map(str::to_owned);
        let begin = Instant::now();
        Program::start(&self.qemu.program("qemu-img"), &args, PATIENCE)?.finish()?;
        Ok(begin.elapsed().as_secs_f64())
    }
}

/// Whether something was measured often enough.
#[derive(Debug, Default)]
struct Repeat {
    /// Seconds after which it has to do.
    limit: f64,
    count: usize,
    least: Option<f64>,
    /// The one after that.
    second: Option<f64>,
    /// All of them.
    spent: f64,
}

impl Repeat {
    fn within(limit: f64) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    /// Counts a value, which took as long as it says.
    fn wants_more(&mut self, value: f64) -> bool {
        self.spent += value;
        self.count += 1;
        match self.least {
            Some(least) if least <= value => {
                self.second = Some(self.second.map_or(value, |second| second.min(value)));
            }
            _ => self.second = self.least.replace(value),
        }
        let agree = match (self.least, self.second) {
            (Some(least), Some(second)) => second <= least * AGREE,
            _ => false,
        };
        if self.count < *REPEATS.start() {
            return self.count < 2 || self.spent < self.limit;
        }
        !agree && self.count < *REPEATS.end() && self.spent < self.limit
    }
}

impl Found {
    /// What the rounds have in common.
    pub fn samples(&self) -> Vec<(Key, Sample)> {
        let samples = self.values.iter();
        let samples = samples.filter_map(|(key, values)| Some((*key, Sample::of(values.clone())?)));
        let runs = self.runs.iter();
        let runs = runs.filter_map(|(key, runs)| Some((*key, runs.sample()?)));
        samples.chain(runs).collect()
    }

    fn put(&mut self, key: Key, value: f64) {
        self.values.entry(key).or_default().push(value);
    }

    /// Measures a figure, unless it has crashed before; `None` where it did.
    fn take(&mut self, key: Key, measure: impl FnOnce() -> Result<f64>) -> Result<Option<f64>> {
        if self.crashes.contains_key(&key) {
            return Ok(None);
        }
        match measure() {
            Ok(value) => {
                self.put(key, value);
                Ok(Some(value))
            }
            Err(error) => {
                self.crash(&error, key);
                only_crashes(error)?;
                Ok(None)
            }
        }
    }

    fn crash(&mut self, error: &anyhow::Error, key: Key) {
        if let Some(Crash(how)) = error.downcast_ref() {
            self.crashes.insert(key, how.clone());
        }
    }
}

/// A crash is a result; other errors are ours.
fn only_crashes(error: anyhow::Error) -> Result<()> {
    if error.is::<Crash>() {
        Ok(())
    } else {
        Err(error)
    }
}

/// A file of ours that goes when it is not needed any more.
struct Remove<'a>(&'a Path);

impl Drop for Remove<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.0);
    }
}
