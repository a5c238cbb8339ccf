//! What is wrong with a command line is told before anything else, and what
//! the exit code says does not depend on who listens.

mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use common::{Empty, empty_chain, expect, name};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
    command.args(args);
    command
}

#[test]
fn values_that_make_no_sense() {
    let dir = tempfile::tempdir().unwrap();
    let top = empty_chain(dir.path(), 2);
    for args in [
        vec!["top", "--interval", "nan", &top],
        vec!["top", "--interval", "inf", &top],
        vec!["top", "--interval", "0", &top],
        vec!["top", "--interval=-1", &top],
        vec!["top", "--count", "0", &top],
        vec!["plan", &top],
        vec!["plan", "--depth", "0", &top],
        vec!["plan", "--latency", "nan", &top],
        vec!["plan", "--latency", "0", &top],
        vec!["plan", "--depth", "1", "--max-layers", "0", &top],
        vec!["plan", "--max-bytes", "10MB", &top],
        vec!["plan", "--max-bytes", "10ib", &top],
        vec!["view", "--max-layers", "0", &top],
        vec!["validate", "--qemu", "x", "--chains", "0"],
        vec!["measure", "--qemu", "x", "--rounds", "0", &top],
    ] {
        expect(2, &args);
    }
    let output = command(&["plan", "--max-bytes", "10MB", &top]).output();
    let error = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(
        error.contains("MiB") && !error.contains("panicked"),
        "{error}"
    );
}

#[test]
fn nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("top");
    // The backing file is not there, which is an error that is found.
    Empty {
        backing: Some("nowhere"),
        ..Empty::default()
    }
    .write(&path);
    let top = name(&path);
    let (reader, writer) = UnixStream::pair().unwrap();
    drop(reader);
    let status = command(&["check", "-q", "--output", "json", &top])
        .stdout(OwnedFd::from(writer))
        .status();
    assert_eq!(status.unwrap().code(), Some(4));
    for nowhere in ["check", "view"] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let status = command(&[nowhere, "nix"]).stderr(full).status().unwrap();
        assert_eq!(status.code(), Some(1));
    }
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = command(&["view", "--output", "json", &top])
        .stdout(Stdio::from(full))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn pictures_spare_the_layers() {
    let dir = tempfile::tempdir().unwrap();
    let top = empty_chain(dir.path(), 2);
    let base = dir.path().join("0");
    let before = std::fs::read(&base).unwrap();
    let (link, same) = (dir.path().join("link"), dir.path().join("same"));
    std::os::unix::fs::symlink("0", &link).unwrap();
    std::fs::hard_link(&base, &same).unwrap();
    for path in [&base, &link, &same] {
        for option in ["--svg", "--html"] {
            let error = expect(1, &["view", option, &name(path), &top]);
            assert!(error.contains("is a layer of the chain"), "{error}");
        }
    }
    assert_eq!(std::fs::read(&base).unwrap(), before);
    let page = name(&dir.path().join("page"));
    for _ in 0..2 {
        expect(0, &["view", "--html", &page, &top]);
    }
}
