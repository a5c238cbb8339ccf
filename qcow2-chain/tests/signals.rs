//! A signal ends the program at any time and leaves nothing behind.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{calibration, json, name, qemu};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

/// In the background of a shell, and under nohup, signals are ignored, which
/// the program inherits and leaves so.
fn start(args: &[&str]) -> Child {
    Command::new("env")
        .arg("--default-signal=HUP,INT,TERM")
        .arg(env!("CARGO_BIN_EXE_qcow2-chain"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits for something.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(180), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends it by a signal, which is how its end is reported.
fn end(mut child: Child, signal: Signal) {
    let id = Pid::from_child(&child);
    assert!(child.try_wait().unwrap().is_none(), "ended too early");
    kill_process(id, signal).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(signal.as_raw()), "{status}");
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[test]
fn no_half_made_chain() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let dir = tempfile::tempdir().unwrap();
        let (new, there) = (dir.path().join("a/b"), dir.path().join("c"));
        fs::create_dir(&there).unwrap();
        fs::write(there.join("mine"), "").unwrap();
        for chain in [new, there] {
            let raw = name(&dir.path().join("raw"));
            let mut words = vec!["build", "--layers", "100000", "--data-per-layer", "64K"];
            let path = name(&chain);
            words.extend(["--expected", &raw, &path]);
            let child = start(&words);
            until("layers", || entries(&chain).len() > 3);
            end(child, signal);
        }
        assert_eq!(entries(dir.path()), [dir.path().join("c")]);
        assert_eq!(entries(&dir.path().join("c")).len(), 1);
    }
}

#[test]
fn nohup_stays() {
    let dir = tempfile::tempdir().unwrap();
    let chain = dir.path().join("c");
    let program = env!("CARGO_BIN_EXE_qcow2-chain");
    let script = format!(
        "trap '' HUP; exec {program} build --layers 100000 {}",
        name(&chain)
    );
    let mut child = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    until("layers", || entries(&chain).len() > 3);
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    let before = entries(&chain).len();
    until("more layers", || entries(&chain).len() > before + 3);
    assert!(child.try_wait().unwrap().is_none());
    end(child, Signal::TERM);
    assert!(!chain.exists());
}

/// Programs that tell who they are, and then do nothing for a long time.
fn lazy_qemu(dir: &Path) -> (String, PathBuf) {
    let (bin, id) = (dir.join("bin"), dir.join("id"));
    fs::create_dir(&bin).unwrap();
    let lazy = format!(
        "#!/bin/sh\necho $$ >{0}.new && mv {0}.new {0}\nexec sleep 1000\n",
        name(&id)
    );
    let quick = "#!/bin/sh\necho 'Run completed in 1.0 seconds.'\n";
    for (program, script) in [("qemu-img", quick), ("qemu-io", &lazy)] {
        let path = bin.join(program);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    (name(&bin), id)
}

/// Whether a process, somebody else's child, still runs.
fn runs(id: &Path) -> bool {
    let id = fs::read_to_string(id).unwrap().trim().parse().unwrap();
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    test_kill_process(Pid::from_raw(id).unwrap()).is_ok() && !stat.contains(") Z ")
}

#[test]
fn no_temporary_directories_and_programs() {
    let dir = tempfile::tempdir().unwrap();
    let chain = name(&dir.path().join("chain"));
    let report = json(0, &["build", "--layers", "3", "--disk", "64M", &chain]);
    let top = report["top"].as_str().unwrap();
    let (bin, id) = lazy_qemu(dir.path());
    let constants = calibration(dir.path());
    let temp = dir.path().join("temp");
    fs::create_dir(&temp).unwrap();
    let place = name(&temp);
    let qemu = ["--qemu", &bin, "--temp", &place];
    let of_chain = [&["measure"], &qemu[..], &[top]].concat();
    let of_many = [
        &["validate"],
        &qemu[..],
        &["--chains", "1", "--calibration", &constants],
    ];
    for (words, signal) in [(of_chain, Signal::INT), (of_many.concat(), Signal::TERM)] {
        let _ = fs::remove_file(&id);
        let child = start(&words);
        until("a program", || id.exists());
        assert_eq!(entries(&temp).len(), 1);
        end(child, signal);
        assert!(entries(&temp).is_empty());
        until("no program", || !runs(&id));
    }
}

#[test]
fn what_was_measured_is_kept() {
    let Some(img) = qemu("qemu-img") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (results, temp) = (dir.path().join("found"), dir.path().join("temp"));
    fs::create_dir(&temp).unwrap();
    let constants = calibration(dir.path());
    let (bin, place, file) = (name(img.parent().unwrap()), name(&temp), name(&results));
    let mut words = vec![
        "validate",
        "--rounds",
        "1",
        "--queue-depth",
        "1",
        "--chains",
        "3",
    ];
    words.extend(["--qemu", &bin, "--temp", &place]);
    words.extend(["--calibration", &constants, "--results", &file]);
    let child = start(&words);
    let kept = || -> usize {
        let text = fs::read_to_string(&results).unwrap_or_default();
        // Never half a file.
        let all: Value = if text.is_empty() {
            Value::Null
        } else {
            text.parse().unwrap()
        };
        let kept = all["measured"]["qcow2"].as_object();
        kept.map_or(0, |kept| kept.len())
    };
    until("a chain", || kept() > 0);
    end(child, Signal::INT);
    assert!((1..3).contains(&kept()));
    assert_eq!(entries(&temp).len(), 0);
    assert!(!dir.path().join("found.new").exists());
}
