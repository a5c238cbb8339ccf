//! The command line. The build makes man pages and completions of it, so that
//! nothing but clap is used here.

mod models;
mod values;

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

#[allow(unused_imports, reason = "the build script needs only some")]
pub use models::{Aio, Calibrate, Driver, Measure, Predict, Programs, Validate, What};
use values::{count, positive, power_of_two, share, size};

/// Looks at, checks, plans and builds chains of qcow2 images.
///
/// Needs no privileges, and QEMU only for `measure`, `calibrate` and
/// `validate`. Images are opened for reading only; the one command that writes
/// images where the user says is `build`.
#[derive(Debug, Parser)]
#[command(name = "qcow2-chain", version, max_term_width = 100, after_long_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done; `check` found nothing that matters
  1  the command could not do its work
  2  the command line was wrong
  3  `check` found something that may become a problem
  4  `check` found an error; `validate` found predictions too far off
  5  `plan` found no way to reach the goal

Images are not trusted: of the files that a chain names only those in the
directory of its top are opened, and in directories given with --allow.
json: names, protocols (nbd:, ssh:, ...) and data files are never followed.";

#[derive(Debug, Subcommand)]
pub enum Command {
    View(View),
    Check(Check),
    Plan(Plan),
    Top(Top),
    Metrics(Metrics),
    Predict(Predict),
    Calibrate(Calibrate),
    Measure(Measure),
    Validate(Validate),
    Build(Build),
}

/// Which files may be opened, and what the output is.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Also open layers in this directory (`/` for everywhere); may be repeated
    #[arg(long, value_name = "DIR")]
    pub allow: Vec<PathBuf>,

    /// The longest chain that is followed
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = count())]
    pub max_layers: usize,

    /// How the result is printed
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// No progress on the terminal
    #[arg(long, short)]
    pub quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Shows a chain: what each layer holds and what of it the guest sees
///
/// Depth 0 is the image given. `data` is what a layer holds, `visible` what of
/// it is seen from the top, `shadowed` what layers further up have replaced.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  qcow2-chain view top.qcow2
  qcow2-chain view --output json top.qcow2 | jq .totals
  qcow2-chain view --html chain.html --allow /srv/base top.qcow2")]
pub struct View {
    #[command(flatten)]
    pub common: Common,

    /// Draw the layers over the disk's addresses into this SVG file; one that is
    /// there is replaced
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,

    /// Write picture, histogram and table into this HTML page, which needs
    /// nothing else; one that is there is replaced
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,

    /// Rows of the table, the first and last layers; 0 for all
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub rows: usize,

    /// The image on top
    pub image: PathBuf,
}

/// Checks a chain as a whole: links, layers, limits ahead
///
/// With a finding comes the command that mends it, or what else to do, if there is anything to do.
/// Nothing is changed.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  qcow2-chain check top.qcow2
  qcow2-chain check --links-only --output json top.qcow2
  qcow2-chain check --allow /srv/base top.qcow2 || echo \"exit code $?\"")]
pub struct Check {
    #[command(flatten)]
    pub common: Common,

    /// Do not verify tables and refcounts of each layer
    #[arg(long)]
    pub links_only: bool,

    /// The image on top
    pub image: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Place {
    /// Each layer draws on its own; newer layers hide parts of older ones
    Uniform,
    /// The shuffled disk is dealt out, no place twice before all were given
    Deal,
    /// Few places are written often (see --zipf-exponent)
    Zipf,
    /// Each layer goes on where the last one stopped
    Sequential,
    /// Hot spots, one of which moves with each layer (see --hot-spots)
    Ageing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Codec {
    Zlib,
    Zstd,
}

/// Builds a chain to measure or test with, the same for the same arguments
///
/// DIR/l0.qcow2 is the base, the highest number the top, whose path is
/// printed. What is in a cluster depends on seed, layer and place, so that a
/// read that ends in the wrong layer or at the wrong offset is seen. Any
/// qemu-img finds the layers clean.
#[derive(Args, Debug)]
#[command(
    args_override_self = true,
    after_long_help = "\
Examples:
  qcow2-chain build --layers 1000 --disk 16G --data-per-layer 1M chain
  qcow2-chain build --place ageing --compressed 0.2 --zeroes 0.1 --expected chain.raw chain
  qcow2-chain build --trace fio.log --layers 50 --base-data 100P --raw-base chain

A trace is a text file whose lines end in `write OFFSET LENGTH` or
`trim OFFSET LENGTH`, in bytes, like fio's write_iolog. Lines `snapshot` begin
the next layer; without any the layers get equal parts."
)]
pub struct Build {
    /// Number of files in the chain, the base included
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = count().range(1..=1_000_000))]
    pub layers: usize,

    /// Size of the disk
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1G")]
    pub disk: u64,

    /// Each layer's disk is larger than the one below by this
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0")]
    pub grow: u64,

    /// 512 to 2M; of several the layers take turns
    #[arg(long, value_name = "SIZE", value_parser = size, value_delimiter = ',', default_value = "64K")]
    pub cluster_size: Vec<u64>,

    /// Clusters that each layer has, rounded up to whole runs
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1M")]
    pub data_per_layer: u64,

    /// The same for the base; more than the disk fills it
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub base_data: Option<u64>,

    /// The base is a raw image, DIR/l0.raw
    #[arg(long)]
    pub raw_base: bool,

    /// Where the data go
    #[arg(long, value_enum, default_value_t = Place::Uniform)]
    pub place: Place,

    /// Where the data go, as recorded
    #[arg(long, value_name = "FILE", conflicts_with = "place")]
    pub trace: Option<PathBuf>,

    /// The higher, the fewer places are written most
    #[arg(long, value_name = "S", default_value_t = 1.1, value_parser = positive)]
    pub zipf_exponent: f64,

    /// Number of hot spots, each a two hundredth of the disk
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count())]
    pub hot_spots: usize,

    /// Share of the data that goes to hot spots
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = share)]
    pub hot_share: f64,

    /// Clusters side by side at each place
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub run: u64,

    /// Clusters lie in each file in random order
    #[arg(long)]
    pub scatter: bool,

    /// Share of clusters that are compressed
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub compressed: f64,

    /// How they are
    #[arg(long, value_enum, default_value_t = Codec::Zlib)]
    pub compression: Codec,

    /// Share of clusters that are zero clusters
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub zeroes: f64,

    /// Images with subclusters
    #[arg(long)]
    pub extended_l2: bool,

    /// Share of clusters of which only some subclusters are there
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub subclusters: f64,

    /// Version of the format
    #[arg(long, value_name = "2|3", default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=3))]
    pub compat: u32,

    /// Width of the refcounts, a power of two from 1 to 64
    #[arg(long, value_name = "BITS", default_value_t = 16, value_parser = power_of_two)]
    pub refcount_bits: u32,

    /// Links are absolute names
    #[arg(long)]
    pub absolute: bool,

    /// Another seed makes another chain
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// Also write what the guest sees into this file, raw and sparse; one that
    /// is there is replaced
    #[arg(long, value_name = "FILE")]
    pub expected: Option<PathBuf>,

    /// Replace a chain that is in DIR
    #[arg(long)]
    pub force: bool,

    /// How the result is printed
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// No progress on the terminal
    #[arg(long, short)]
    pub quiet: bool,

    /// Where the layers go; made if it is not there
    pub dir: PathBuf,
}

/// How layers are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// Whatever copies less, for each merge
    Auto,
    /// Into the lowest layer
    Commit,
    /// Into the topmost layer
    Stream,
}

/// Plans which neighbouring layers to merge, and what it costs
///
/// Merges the neighbours that cost the fewest bytes, again and again, until
/// the goal is reached. Nothing is changed: the commands for QMP, virsh and
/// qemu-img are printed. The lowest layer stays as it is, as other chains may
/// use it, unless --into-base is given.
#[derive(Args, Debug)]
#[command(
    group = ArgGroup::new("goal").required(true).multiple(true)
        .args(["depth", "keep_last", "max_bytes", "latency", "memory"]),
    after_long_help = "\
Examples:
  qcow2-chain plan --depth 50 top.qcow2
  qcow2-chain plan --keep-last 7 --domain vm1 --target vda top.qcow2
  qcow2-chain plan --max-bytes 10G --output json top.qcow2 | jq '.after.layers'
  qcow2-chain plan --latency 200 --memory 100M top.qcow2
  qcow2-chain plan --depth 50 --qmp /run/vm1.qmp top.qcow2

Exit code 5: the goal is not reached, as --keep-last or --max-bytes stand in
the way, or no chain is short enough. What can be done is printed all the same."
)]
pub struct Plan {
    #[command(flatten)]
    pub common: Common,

    /// At most this many layers are left
    #[arg(long, value_name = "N", value_parser = count())]
    pub depth: Option<usize>,

    /// The topmost N layers stay as they are; without --depth all that are
    /// below them become one
    #[arg(long, value_name = "N")]
    pub keep_last: Option<usize>,

    /// Copy no more than this; without --depth as few layers as possible
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_bytes: Option<u64>,

    /// A 4 KiB read of data takes no longer than so many microseconds
    #[arg(long, value_name = "US", value_parser = positive)]
    pub latency: Option<f64>,

    /// QEMU needs no more memory for the chain than this, itself included
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: Option<u64>,

    /// The driver for which --latency and --memory are predicted
    #[arg(long, value_enum, default_value_t = Driver::Qcow2)]
    pub driver: Driver,

    /// The calibration for that; as for `predict`
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,

    /// The lowest layer may be written to as well
    #[arg(long)]
    pub into_base: bool,

    /// Where merged layers go
    #[arg(long, value_enum, default_value_t = Method::Auto)]
    pub method: Method,

    /// QMP socket of the program that has the chain open: the QMP commands then
    /// say by which nodes it has the layers open, whatever it was given
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,

    /// Device or node name of the disk, for the QMP commands; with --qmp only
    /// where several nodes have the image open [default: DEVICE]
    #[arg(long)]
    pub device: Option<String>,

    /// Name of the guest, for the virsh commands
    #[arg(long, default_value = "DOMAIN")]
    pub domain: String,

    /// Its disk, for the virsh commands
    #[arg(long, default_value = "TARGET")]
    pub target: String,

    /// The image on top
    pub image: PathBuf,
}

/// Shows what a running guest or storage daemon does with its chains
///
/// Asks over a QMP socket, which nobody else may be connected to meanwhile.
/// Rates and shares are those since the last look, at first since the image
/// was opened.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  qemu-system-x86_64 -qmp unix:/run/vm1.qmp,server=on,wait=off ...
  qcow2-chain top /run/vm1.qmp
  qcow2-chain top --count 1 --output json /run/vm1.qmp")]
pub struct Top {
    /// Seconds between two looks
    #[arg(long, short, value_name = "SECONDS", default_value_t = 2.0, value_parser = positive)]
    pub interval: f64,

    /// End after so many looks
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,

    /// How the result is printed; JSON is one line for each look
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub output: Output,

    /// Do not say that the socket is waited for
    #[arg(long, short)]
    pub quiet: bool,

    /// The socket
    pub socket: PathBuf,
}

/// Prints the same once in the text format of Prometheus
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  qcow2-chain metrics /run/vm1.qmp
  qcow2-chain metrics /run/vm1.qmp > /var/lib/node_exporter/vm1.prom.new &&
    mv /var/lib/node_exporter/vm1.prom.new /var/lib/node_exporter/vm1.prom")]
pub struct Metrics {
    /// Do not say that the socket is waited for
    #[arg(long, short)]
    pub quiet: bool,

    /// The socket
    pub socket: PathBuf,
}
