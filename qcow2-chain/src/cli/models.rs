//! The commands around the models.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::values::count;
use super::{Common, Output};

/// A driver for qcow2 images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// QEMU's own
    Qcow2,
    /// This project's
    Rqcow2,
}

/// How QEMU reads files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Aio {
    Threads,
    IoUring,
    Native,
}

/// A QEMU that is measured.
#[derive(Args, Clone, Debug)]
pub struct Programs {
    /// Where qemu-img, qemu-io and qemu-storage-daemon are
    #[arg(long, value_name = "DIR")]
    pub qemu: PathBuf,

    /// Which driver of it serves the chain
    #[arg(long, value_enum, default_value_t = Driver::Qcow2)]
    pub driver: Driver,

    /// How it reads files; io-uring where that works, else threads
    #[arg(long, value_enum)]
    pub aio: Option<Aio>,

    /// Where files go that are made to measure, instead of $TMPDIR
    #[arg(long, value_name = "DIR")]
    pub temp: Option<PathBuf>,
}

/// What calibrated models are asked for.
#[derive(Args, Clone, Debug)]
pub struct Prediction {
    /// The calibration, instead of qcow2-chain/calibration.json in
    /// $XDG_CONFIG_HOME or ~/.config
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,

    /// Requests at a time, of reads in a row
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,16",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub queue_depth: Vec<u32>,
}

/// Predicts what a chain costs: open, memory, reads, stream, merge
///
/// From metadata alone, for each driver that was calibrated on this machine
/// (see `calibrate`). Every figure has an error bar of two standard
/// deviations.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  qcow2-chain predict top.qcow2
  qcow2-chain predict --queue-depth 1,8,64 --output json top.qcow2")]
pub struct Predict {
    #[command(flatten)]
    pub common: Common,

    #[command(flatten)]
    pub prediction: Prediction,

    /// The image on top
    pub image: PathBuf,
}

/// Measures the constants of this machine that `predict` needs
///
/// Builds four chains in a temporary directory, measures them at several
/// depths, and writes what was found into a file. Takes a few minutes, in which
/// the machine should do nothing else. Other drivers that are in the file
/// stay, if they were calibrated on the same machine.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  qcow2-chain calibrate --qemu /usr/bin
  qcow2-chain calibrate --qemu build/bin --driver rqcow2 --temp /dev/shm")]
pub struct Calibrate {
    #[command(flatten)]
    pub programs: Programs,

    /// Where it is written; as for `predict`
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,

    /// Every figure is the best of so many
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count())]
    pub rounds: usize,

    /// Measure no longer chains: faster, but what is longer is then predicted
    /// beyond what was seen
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(8..))]
    pub max_layers: u64,

    /// How the result is printed
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// No progress on the terminal
    #[arg(long, short)]
    pub quiet: bool,
}

/// Compares predictions with measurements of many other chains
///
/// Builds random chains, other ones than `calibrate` has, measures each and
/// tells how far off its predictions are. What was measured is kept in a file,
/// so that it can be done in parts.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  qcow2-chain validate --qemu /usr/bin
  qcow2-chain validate --qemu build/bin --driver rqcow2 --results found.json --seconds 240
  qcow2-chain validate --qemu build/bin --driver rqcow2 --results found.json --markdown table.md

Exit code 4: predictions are further off than they may be, in the mean 10 % for
open and memory, 15 % for reads.")]
pub struct Validate {
    #[command(flatten)]
    pub programs: Programs,

    #[command(flatten)]
    pub prediction: Prediction,

    /// So many chains
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = count())]
    pub chains: usize,

    /// Other chains
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Every figure is the best of so many, as with `calibrate`
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count())]
    pub rounds: usize,

    /// Keep what was measured in this file, after each chain, and go on where it
    /// ends
    #[arg(long, value_name = "FILE")]
    pub results: Option<PathBuf>,

    /// Begin no more chains (eight take turns) after so many seconds; call it again for the rest
    #[arg(long, value_name = "N")]
    pub seconds: Option<u64>,

    /// Write the table of predicted and measured into this file; one that is
    /// there is replaced
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,

    /// How the result is printed
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// No progress on the terminal
    #[arg(long, short)]
    pub quiet: bool,
}

/// What `measure` looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    Open,
    Memory,
    Read,
    Stream,
    Merge,
}

/// Measures with a real QEMU what `predict` predicts, and shows both
///
/// Images are opened for reading only. What has to be written goes into a
/// temporary directory. The chain should be in the page cache; a machine that
/// does something else at the same time shows in the figures.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  qcow2-chain measure --qemu /usr/bin top.qcow2
  qcow2-chain measure --qemu build/bin --driver rqcow2 --output json top.qcow2
  qcow2-chain measure --qemu /usr/bin --what open,memory top.qcow2

A program that crashes, as unpatched QEMU does on reads through some 870
layers, is reported as such.")]
pub struct Measure {
    #[command(flatten)]
    pub common: Common,

    #[command(flatten)]
    pub programs: Programs,

    #[command(flatten)]
    pub prediction: Prediction,

    /// Every figure is the best of so many
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count())]
    pub rounds: usize,

    /// Places of data, and of holes, that are read one by one
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub reads: u64,

    /// What is measured; everything unless given
    #[arg(long, value_enum, value_delimiter = ',')]
    pub what: Vec<What>,

    /// The image on top
    pub image: PathBuf,
}
