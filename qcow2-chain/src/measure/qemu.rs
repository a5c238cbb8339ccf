//! What is asked of QEMU's programs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;

use super::process::Program;
use crate::cli::{Aio, Driver, Programs};

/// How long a single thing may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Blocks between one request of `qemu-img bench` and the next: an odd number,
/// so that every block of a disk whose size is a power of two is visited once
/// before any of them twice, far apart.
const SCATTER: u64 = 18517;
/// Bytes of a request.
pub const BLOCK: u64 = 4096;

/// A set of programs, and the driver in them that is looked at.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// Where the programs are.
    pub dir: PathBuf,
    /// Name of the format.
    pub driver: Driver,
    /// How files are read.
    pub aio: Aio,
}

impl Driver {
    /// As QEMU knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Rqcow2 => "rqcow2",
        }
    }
}

impl Aio {
    /// As QEMU knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::IoUring => "io_uring",
            Self::Native => "native",
        }
    }
}

// The command line is compiled into the build script as well, where nothing
// but clap is.
macro_rules! by_name {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(self.name())
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let name = String::deserialize(from)?;
                let all = <$type>::value_variants();
                let found = all.iter().find(|known| known.name() == name);
                found
                    .copied()
                    .ok_or_else(|| D::Error::custom(format!("unknown: {name}")))
            }
        }
    };
}

by_name!(Driver);
by_name!(Aio);

impl Qemu {
    /// The programs that the user named. `image` is there to try ways to read.
    pub fn new(programs: &Programs, image: &Path) -> anyhow::Result<Self> {
        let mut qemu = Self {
            dir: programs.qemu.clone(),
            driver: programs.driver,
            aio: programs.aio.unwrap_or(Aio::IoUring),
        };
        if programs.aio.is_none() && !qemu.can_read(image) {
            qemu.aio = Aio::Threads;
        }
        Ok(qemu)
    }

    /// Its version, as it says.
    pub fn version(&self) -> anyhow::Result<String> {
        let mut program =
            Program::start(&self.program("qemu-img"), &["--version".into()], PATIENCE)?;
        let text = program.finish()?;
        let first = text.lines().next().unwrap_or_default();
        Ok(first.trim_start_matches("qemu-img version ").to_owned())
    }

    /// One of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// An image as one word, whatever its name is.
    pub fn image(&self, path: &Path) -> anyhow::Result<String> {
        Ok(format!(
            "json:{}",
            self.node(path)?.to_string().replace(' ', "\\u0020")
        ))
    }

    /// The description of a block node.
    pub fn node(&self, path: &Path) -> anyhow::Result<serde_json::Value> {
        let path = std::path::absolute(path)?;
        let name = path.to_str().context("the name is not UTF-8")?;
        Ok(json!({
            "driver": self.driver.name(),
            "file": {"driver": "file", "filename": name},
        }))
    }

    /// Opens an image for reading.
    pub fn open(&self, path: &Path) -> anyhow::Result<Session> {
        let mut program = Program::start(&self.program("qemu-io"), &[], PATIENCE)?;
        program.hear(PROMPT)?;
        let command = format!("open -r -U -i {} {}\n", self.aio.name(), self.image(path)?);
        let begin = Instant::now();
        program.say(&command)?;
        let answer = program.hear(PROMPT)?;
        let opened = begin.elapsed().as_secs_f64();
        let said = without_prompt(&answer);
        ensure!(said.is_empty(), "{said}");
        let complaint = program.complaint();
        // Without an image, too, it asks for the next command.
        program.say("length\n")?;
        let length = program.hear(PROMPT)?;
        let length = without_prompt(&length);
        if !length.starts_with(|c: char| c.is_ascii_digit()) {
            let why = if complaint.is_empty() {
                length
            } else {
                &complaint
            };
            bail!("{why}");
        }
        Ok(Session { program, opened })
    }

    /// Seconds for so many 4 KiB reads that are scattered over the disk, so many
    /// at a time, without open and close.
    pub fn bench(&self, path: &Path, queue_depth: u32, count: u64) -> anyhow::Result<f64> {
        let args = [
            "bench",
            "-U",
            "-t",
            "writeback",
            "-i",
            self.aio.name(),
            "-d",
            &queue_depth.to_string(),
            "-c",
            &count.to_string(),
            "-s",
            &BLOCK.to_string(),
            "-S",
            &(SCATTER * BLOCK).to_string(),
            &self.image(path)?,
        ]
        .map(str::to_owned);
        let mut program = Program::start(&self.program("qemu-img"), &args, PATIENCE)?;
        let text = program.finish()?;
        let seconds = text
            .split("Run completed in ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next()?.parse().ok());
        seconds.with_context(|| format!("qemu-img bench: {text}"))
    }

    /// Whether the kernel and the programs know this way to read.
    pub fn can_read(&self, path: &Path) -> bool {
        self.bench(path, 1, 1).is_ok()
    }
}

const PROMPT: &[u8] = b"qemu-io> ";

/// What was said before the program asked for the next command.
fn without_prompt(answer: &str) -> &str {
    answer.trim_end_matches("qemu-io> ").trim()
}

/// `qemu-io` with an image open.
pub struct Session {
    program: Program,
    /// Seconds that opening took.
    pub opened: f64,
}

impl Session {
    /// Reads a block; the seconds that the request took.
    pub fn read(&mut self, offset: u64) -> anyhow::Result<f64> {
        self.program.say(&format!("read {offset} {BLOCK}\n"))?;
        let answer = self.program.hear(PROMPT)?;
        let rate = answer
            .split(" and ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        let rate = rate.with_context(|| format!("qemu-io: {}", answer.trim()))?;
        Ok(1.0 / rate.max(1e-9))
    }

    /// Bytes of memory that are resident.
    pub fn resident(&self) -> anyhow::Result<u64> {
        self.program.resident()
    }
}
