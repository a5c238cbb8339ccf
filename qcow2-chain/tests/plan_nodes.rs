//! `plan --qmp`: commands for the nodes of a running program, carried out by it.

mod common;

use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use common::{Daemon, backing_name, expect, json, layers, name, qemu, run};
use serde_json::{Value, json};
use tempfile::TempDir;

const FILES: [&str; 6] = ["a/0", "a/1", "a/2", "b/3", "b/4", "b/5"];
const LINKS: [&str; 6] = ["", "0", "1", "../a/2", "3", "4"];

/// Six layers in two directories, that record relative names, and what they
/// show.
fn six_layers() -> Option<(TempDir, String, String)> {
    let img = qemu("qemu-img")?;
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<_> = FILES.into_iter().zip(LINKS.map(str::to_owned)).collect();
    let raw = layers(dir.path(), &names)?;
    let top = name(&dir.path().join(FILES[5]));
    run(&img, &["convert", "-f", "qcow2", "-O", "raw", &top, &raw]);
    Some((dir, top, raw))
}

/// The unpatched storage daemon, in `dir`.
fn daemon(dir: &Path, args: &[String]) -> Daemon {
    Daemon::new(&qemu("qemu-storage-daemon").unwrap(), dir, args)
}

/// Each layer a node `n0` to `n5` of its own, by a name from `dir`, and a
/// filter above them.
fn node_by_node(dir: &Path) -> Daemon {
    let mut args = vec!["--object".into(), "throttle-group,id=g".into()];
    for (at, file) in FILES.iter().enumerate() {
        let backing = at
            .checked_sub(1)
            .map_or("null".into(), |b| format!("\"n{b}\""));
        args.push("--blockdev".into());
        args.push(format!(
            r#"{{"driver": "qcow2", "node-name": "n{at}", "read-only": {}, "backing": {backing},
            "file": {{"driver": "file", "filename": "{file}"}}}}"#,
            at < 5
        ));
    }
    args.push("--blockdev".into());
    args.push("driver=throttle,node-name=disk,throttle-group=g,file=n5".into());
    daemon(dir, &args)
}

/// Carries the merges out and ends the daemon.
fn carry_out(mut daemon: Daemon, plan: &Value) {
    let mut qmp = Qmp::connect(&daemon.socket);
    for merge in plan["merges"].as_array().unwrap() {
        for command in merge["commands"]["qmp"].as_array().unwrap() {
            let command = command.as_str().unwrap();
            if command.contains("job-complete") {
                qmp.until("BLOCK_JOB_READY");
            }
            qmp.send(command);
        }
        qmp.until("BLOCK_JOB_COMPLETED");
    }
    qmp.send(r#"{"execute": "quit"}"#);
    assert!(daemon.child.wait().unwrap().success());
}

struct Qmp {
    writer: UnixStream,
    lines: Lines<BufReader<UnixStream>>,
}

impl Qmp {
    fn connect(socket: &str) -> Self {
        let writer = UnixStream::connect(socket).unwrap();
        let lines = BufReader::new(writer.try_clone().unwrap()).lines();
        let mut qmp = Self { writer, lines };
        qmp.send(r#"{"execute": "qmp_capabilities"}"#);
        qmp.until("return");
        qmp
    }

    fn send(&mut self, command: &str) {
        writeln!(self.writer, "{command}").unwrap();
    }

    fn until(&mut self, what: &str) {
        let found = self.lines.find_map(|line| {
            let line = line.unwrap();
            assert!(!line.contains("\"error\""), "{line}");
            line.contains(what).then_some(())
        });
        assert!(found.is_some(), "no {what}");
    }
}

/// Relative names, which QEMU does not find again, need not be found, and stay.
#[test]
fn merged_by_nodes() {
    for (args, left, recorded) in [
        (
            &["--method", "commit", "--keep-last", "1"][..],
            5,
            json!("../a/1"),
        ),
        (&["--method", "stream", "--depth", "2"], 5, json!("../a/0")),
        (&["--method", "stream", "--keep-last", "2"], 5, json!("4")),
        (&["--depth", "4"], 5, json!("3")),
        (
            &["--into-base", "--method", "commit", "--depth", "1"],
            0,
            Value::Null,
        ),
    ] {
        let Some((dir, top, raw)) = six_layers() else {
            return;
        };
        let place = name(dir.path());
        let daemon = node_by_node(dir.path());
        let words = ["plan", "--allow", &place, "--qmp", &daemon.socket];
        let plan = json(0, &[&words[..], args, &[&top]].concat());
        carry_out(daemon, &plan);
        let top = name(&dir.path().join(FILES[left]));
        assert_eq!(backing_name(&top), recorded, "{args:?}");
        let img = qemu("qemu-img").unwrap();
        run(&img, &["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
        for merge in plan["merges"].as_array().unwrap() {
            for file in merge["dropped"].as_array().unwrap() {
                std::fs::remove_file(file.as_str().unwrap()).unwrap();
            }
        }
        run(&img, &["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
    }
}

/// Where it is not clear which nodes are meant, or they are others than those
/// on disk, there is no plan.
#[test]
fn nodes_that_are_not_the_chain() {
    let Some((dir, top, _)) = six_layers() else {
        return;
    };
    let node = |name: &str, more: &str| {
        let file = format!(
            r#""file": {{"driver": "file", "filename": "{}"}}"#,
            FILES[5]
        );
        let node = format!(
            r#"{{"driver": "qcow2", "node-name": "{name}", "read-only": true, {file}{more}}}"#
        );
        ["--blockdev".to_owned(), node]
    };
    let plan = |socket: &str, more: &[&str], code: i32| {
        let place = name(dir.path());
        let words = ["plan", "--allow", &place, "--depth", "3", "--qmp", socket];
        expect(code, &[&words[..], more, &[&top]].concat())
    };
    {
        let daemon = daemon(dir.path(), &[node("x", ""), node("y", "")].concat());
        let told = plan(&daemon.socket, &[], 1);
        assert!(told.contains("--device which one: x, y"), "{told}");
        let told = plan(&daemon.socket, &["--device", "y"], 0);
        assert!(told.contains(r#""device":"y""#), "{told}");
        let told = plan(&daemon.socket, &["--device", "z"], 1);
        assert!(told.contains("no node z, or below it, has"), "{told}");
    }
    std::fs::remove_file(dir.path().join("qmp")).unwrap();
    {
        let daemon = daemon(dir.path(), &node("x", r#", "backing": null"#));
        let told = plan(&daemon.socket, &[], 1);
        assert!(told.contains("below node x the image at depth 1"), "{told}");
    }
    std::fs::remove_file(dir.path().join("qmp")).unwrap();
    let daemon = daemon(dir.path(), &[]);
    let told = plan(&daemon.socket, &[], 1);
    assert!(told.contains("no node has"), "{told}");
}
