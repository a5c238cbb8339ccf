//! `check`: a chain as a whole, and each finding with what mends it.

mod layers;
mod limits;
mod links;

use std::io::{self, Write};

use anyhow::{Result, bail};
use serde::Serialize;

use crate::chain::{Chain, End, Kind, Layer};
use crate::cli::{Check, Output};
use crate::text::{self, Progress, printable};
pub use limits::STACK;

/// `check` found something that may become a problem.
const WARNINGS: u8 = 3;
/// `check` found an error.
const ERRORS: u8 = 4;
/// Findings of one kind that are printed one by one.
const SAME_KIND: usize = 4;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Note,
    /// May become a problem, or is one for some programs.
    Warning,
    /// The chain cannot be used as it is, or data are lost.
    Error,
}

/// Something that was found.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What kind of finding it is; stays the same in future versions.
    pub code: &'static str,
    /// The layer it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Its file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// What it is.
    pub message: String,
    /// The command that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// What else to do or to know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Finding {
    fn new(severity: Severity, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            severity,
            code,
            depth: None,
            file: None,
            message: message.into(),
            command: None,
            advice: None,
        }
    }

    fn error(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, code, message)
    }

    fn warning(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, code, message)
    }

    fn note(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Severity::Note, code, message)
    }

    fn at(mut self, depth: usize, layer: &Layer) -> Self {
        self.depth = Some(depth);
        self.file = Some(layer.real.display().to_string());
        self
    }

    fn command(mut self, command: impl Into<String>) -> Self {
        self.command = Some(command.into());
        self
    }

    fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

/// The whole answer. Keys are added, never changed.
#[derive(Debug, Serialize)]
struct Report {
    image: String,
    depth: usize,
    complete: bool,
    layers_verified: usize,
    errors: usize,
    warnings: usize,
    notes: usize,
    findings: Vec<Finding>,
}

/// Carries the command out; the result is the exit code.
pub fn run(args: &Check) -> Result<u8> {
    let chain = Chain::open(&args.image, &args.common.policy()?)?;
    require_qcow2(&chain.layers[0])?;
    let mut findings = Vec::new();
    links::check(&chain, &mut findings);
    let mut layers_verified = 0;
    if !args.links_only {
        let bar = Progress::new("verifying layers", chain.layers.len(), args.common.quiet);
        for (depth, layer) in chain.layers.iter().enumerate() {
            layers_verified += usize::from(layers::check(depth, layer, &mut findings));
            bar.at(depth + 1);
        }
    }
    limits::check(&chain, &mut findings);
    findings.sort_by(|a, b| b.severity.cmp(&a.severity).then(a.depth.cmp(&b.depth)));
    let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
    let report = Report {
        image: args.image.display().to_string(),
        depth: chain.layers.len(),
        complete: matches!(chain.end, End::Complete),
        layers_verified,
        errors: count(Severity::Error),
        warnings: count(Severity::Warning),
        notes: count(Severity::Note),
        findings,
    };
    match args.common.output {
        Output::Json => text::print_json(&report)?,
        Output::Table => text::unless_closed(print(&report))?,
    }
    Ok(match (report.errors, report.warnings) {
        (0, 0) => 0,
        (0, _) => WARNINGS,
        _ => ERRORS,
    })
}

/// There is nothing to check in another file, which must not pass for a sound
/// image.
fn require_qcow2(top: &Layer) -> Result<()> {
    let why = match &top.kind {
        Kind::Qcow2(_) => return Ok(()),
        Kind::Other(name) => format!(": it looks like {name}"),
        Kind::Raw if top.file.length == 0 => ": it is empty".to_owned(),
        Kind::Raw => String::new(),
    };
    bail!("{}: not a qcow2 image{why}", top.path.display())
}

fn print(report: &Report) -> Result<()> {
    let out = &mut io::stdout().lock();
    for (number, finding) in report.findings.iter().enumerate() {
        let same = |other: &&Finding| other.code == finding.code;
        let before = report.findings[..number].iter().filter(same).count();
        if before >= SAME_KIND {
            let left = report.findings[number..].iter().filter(same).count();
            if before == SAME_KIND {
                writeln!(
                    out,
                    "         {left} more findings {} (--output json has all)",
                    finding.code
                )?;
            }
            continue;
        }
        let severity = match finding.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "ERROR",
        };
        write!(out, "{severity:<8} {}: ", finding.code)?;
        if let (Some(depth), Some(file)) = (finding.depth, &finding.file) {
            writeln!(out, "depth {depth}, {}", printable(file))?;
            write!(out, "         ")?;
        }
        writeln!(out, "{}", printable(&finding.message))?;
        if let Some(command) = &finding.command {
            writeln!(out, "         run:  {}", text::printable_shell(command))?;
        }
        if let Some(advice) = &finding.advice {
            writeln!(out, "         {}", printable(advice))?;
        }
    }
    let s = |count: usize| if count == 1 { "" } else { "s" };
    writeln!(
        out,
        "{}: {} layer{}, {} verified: {} error{}, {} warning{}, {} note{}",
        printable(&report.image),
        report.depth,
        s(report.depth),
        report.layers_verified,
        report.errors,
        s(report.errors),
        report.warnings,
        s(report.warnings),
        report.notes,
        s(report.notes),
    )?;
    Ok(())
}
