//! Looks at, checks, plans and builds chains of qcow2 images.
#![forbid(unsafe_code)]

mod build;
mod calibrate;
mod chain;
mod check;
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

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use chain::Policy;
use cli::{Cli, Command, Common};

/// The command could not do its work.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
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
    };
    match result {
        Ok(code) => ExitCode::from(code),
        // Somebody has seen enough: `qcow2-chain view ... | head`.
        Err(error) if text::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qcow2-chain: {}", text::printable(&format!("{error:#}")));
            ExitCode::from(FAILED)
        }
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
            max_layers: self.max_layers.max(1),
        })
    }
}
