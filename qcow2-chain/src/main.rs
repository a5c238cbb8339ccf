//! Looks at, checks, plans and builds chains of qcow2 images.
#![forbid(unsafe_code)]

mod build;
mod calibrate;
mod chain;
mod check;
mod cleanup;
#[allow(missing_docs, reason = "the comments there are what users read")]
mod cli;
mod coverage;
mod live;
mod measure;
mod model;
mod plan;
mod predict;
mod survey;
mod text;
mod validate;
mod view;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use chain::Policy;
use cli::{Cli, Command, Common};

/// The command could not do its work.
const FAILED: u8 = 1;
/// The command line was wrong.
const USAGE: u8 = 2;

/// What is wrong with the command line, where only the whole of it shows that.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

fn main() -> ExitCode {
    let result = run(Cli::parse().command);
    cleanup::done();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let code = complain(&error);
            ExitCode::from(code)
        }
    }
}

/// Says what went wrong, where somebody can be told; the exit code.
fn complain(error: &anyhow::Error) -> u8 {
    if let Some(usage) = error.downcast_ref::<Usage>() {
        let message = text::printable(&usage.0);
        let _ = Cli::command()
            .error(ErrorKind::ValueValidation, message)
            .print();
        return USAGE;
    }
    let message = text::printable(&format!("{error:#}"));
    let _ = writeln!(io::stderr(), "qcow2-chain: {message}");
    FAILED
}

fn run(command: Command) -> Result<u8> {
    use Command::{Build, Calibrate, Measure, Validate};
    if matches!(command, Build(_) | Calibrate(_) | Measure(_) | Validate(_)) {
        cleanup::on_signals()?;
    }
    match command {
        Command::View(args) => view::run(&args).map(|()| 0),
        Command::Check(args) => check::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Top(args) => live::top(&args).map(|()| 0),
        Command::Metrics(args) => live::metrics(&args).map(|()| 0),
        Command::Predict(args) => predict::run(&args).map(|()| 0),
        Command::Calibrate(args) => calibrate::run(&args).map(|()| 0),
        Command::Validate(args) => validate::run(&args),
        Command::Measure(args) => measure::run(&args).map(|()| 0),
        Command::Build(args) => build::run(&args).map(|()| 0),
    }
}

impl Common {
    /// What may be opened.
    fn policy(&self) -> Result<Policy> {
        let allow = self
            .allow
            .iter()
            .map(|dir| {
                dir.canonicalize()
                    .with_context(|| format!("--allow {}", dir.display()))
            })
            .collect::<Result<_>>()?;
        Ok(Policy {
            allow,
            max_layers: self.max_layers,
        })
    }
}
