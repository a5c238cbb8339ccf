//! The command line. The build makes man pages and completions of it, so that
//! nothing but clap is used here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Looks at and checks chains of qcow2 images.
///
/// Needs no QEMU and no privileges. Images are opened for reading only.
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
  4  `check` found an error

Images are not trusted: of the files that a chain names only those in the
directory of its top are opened, and in directories given with --allow.
json: names, protocols (nbd:, ssh:, ...) and data files are never followed.";

#[derive(Debug, Subcommand)]
pub enum Command {
    View(View),
    Check(Check),
}

/// Which files may be opened, and what the output is.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Also open layers in this directory (`/` for everywhere); may be repeated
    #[arg(long, value_name = "DIR")]
    pub allow: Vec<PathBuf>,

    /// The longest chain that is followed
    #[arg(long, value_name = "N", default_value_t = 10_000)]
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

    /// Draw the layers over the disk's addresses into this SVG file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,

    /// Write picture, histogram and table into this HTML page, which needs
    /// nothing else
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
/// Every finding comes with the command that mends it, or what else to do.
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
