//! Makes the man pages and shell completions: into `OUT_DIR`, and into the
//! directory that `QCOW2_CHAIN_SHARE` names.

use std::io::Result;
use std::path::{Path, PathBuf};
use std::{env, fs};

use clap::{CommandFactory, ValueEnum};
use clap_complete::{Shell, generate_to};

#[allow(missing_docs, dead_code, reason = "it belongs to the program")]
#[path = "src/cli/mod.rs"]
mod cli;

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed=src/cli");
    println!("cargo::rerun-if-env-changed=QCOW2_CHAIN_SHARE");
    let out = env::var_os("OUT_DIR").map(PathBuf::from);
    let share = env::var_os("QCOW2_CHAIN_SHARE").map(PathBuf::from);
    for dir in out.iter().chain(&share) {
        generate(dir)?;
    }
    Ok(())
}

fn generate(dir: &Path) -> Result<()> {
    let (man, completions) = (dir.join("man/man1"), dir.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(cli::Cli::command(), &man)?;
    for shell in Shell::value_variants() {
        generate_to(
            *shell,
            &mut cli::Cli::command(),
            "qcow2-chain",
            &completions,
        )?;
    }
    Ok(())
}
