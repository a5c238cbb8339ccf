//! `top` and `metrics`, on a socket with answers that are known, and on the
//! storage daemon where that has been built.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Daemon, expect, json, name, same_shape};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use serde_json::{Value, json};

fn node(name: &str, layers: u64) -> Value {
    json!({
        "node-name": name,
        "stats": {"rd_operations": 7, "rd_bytes": 4096, "wr_operations": 1, "wr_bytes": 512},
        "driver-specific": {
            "driver": "rqcow2", "layers": layers, "index-bytes": 100, "cache-bytes": 200,
            "cache-limit": 33_554_432, "hits": 90, "misses": 10, "merged-slices": 3, "table-reads": 4,
            "zero-reads": 5, "below-reads": 6, "reads-by-depth": [1, 2, 3, 4]
        }
    })
}

/// Answers one connection, so many commands.
fn serve(path: &Path, commands: usize) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(
            stream,
            "{}",
            json!({"QMP": {"version": {}, "capabilities": []}})
        )
        .unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        for line in lines.take(commands) {
            let command: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let answer = match command["execute"].as_str().unwrap() {
                "qmp_capabilities" => json!({"return": {}}),
                "query-blockstats" => json!({"return": [
                    node("top \"x\"\u{1b}", 2), node("below", 1), {"node-name": "file", "stats": {}},
                ]}),
                "x-debug-query-block-graph" => json!({"return": {
                    "nodes": [{"id": 1, "name": "top \"x\"\u{1b}"}, {"id": 2, "name": "below"}],
                    "edges": [{"parent": 1, "child": 2, "name": "backing"}],
                }}),
                "query-jobs" => json!({"return": [{
                    "id": "job", "type": "commit", "status": "running", "current-progress": 1,
                    "total-progress": 4,
                }]}),
                other => panic!("{other}"),
            };
            // Events come whenever they like.
            writeln!(stream, "{}\n{answer}", json!({"event": "X"})).unwrap();
        }
    })
}

fn with_server(test: impl FnOnce(&str)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let server = serve(&path, usize::MAX);
    test(&name(&path));
    server.join().unwrap();
}

#[test]
fn known_answers() {
    with_server(|socket| {
        let sample = json(0, &["top", "--count", "1", socket]);
        assert_eq!(sample["chains"].as_array().unwrap().len(), 1);
        same_shape(&sample, "top.txt");
    });
    with_server(|socket| {
        let text = expect(0, &["top", "--count", "2", "--interval", "0.1", socket]);
        assert!(
            text.contains("2 layers") && text.contains("25.0 %"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'));
    });
    with_server(|socket| {
        let text = expect(0, &["metrics", socket]);
        for line in [
            "rqcow2_chain_layers{node=\"top \\\"x\\\"\u{1b}\"} 2\n",
            "rqcow2_served_extents_total{node=\"top \\\"x\\\"\u{1b}\",depth=\"4-7\"} 4\n",
            "rqcow2_job_progress_end{id=\"job\",type=\"commit\",state=\"running\"} 4\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    });
}

/// That is no end of who reads the output.
#[test]
fn a_program_that_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let server = serve(&path, 4);
    let error = expect(1, &["top", "--interval", "0.1", &name(&path)]);
    assert!(error.contains("the connection was closed"), "{error}");
    server.join().unwrap();
}

#[test]
fn no_such_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    expect(1, &["metrics", &name(&path)]);
    // One that hangs up, and one that talks of something else.
    for greeting in ["", "220 smtp\n", "{}\n"] {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(greeting.as_bytes()).unwrap();
        });
        expect(1, &["metrics", &name(&path)]);
        server.join().unwrap();
    }
}

#[test]
fn a_socket_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    // As QEMU does it: the next one may wait, and hears nothing.
    let listener = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    let listener = listener.unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    let run = |quiet: &[&str]| {
        let begin = Instant::now();
        let error = expect(1, &[&["metrics"], quiet, &[&name(&path)]].concat());
        assert!(begin.elapsed() < Duration::from_secs(20), "{error}");
        assert!(error.contains("one client at a time"), "{error}");
        error.contains("waiting for")
    };
    std::thread::scope(|scope| {
        // More than there is room for in the queue.
        let all = [&[][..], &[], &[], &["-q"]].map(|quiet| scope.spawn(move || run(quiet)));
        let told = all.map(|one| one.join().unwrap());
        assert_eq!(told, [true, true, true, false]);
    });
}

#[test]
fn the_storage_daemon() {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/bin/qemu-storage-daemon");
    if !program.exists() {
        eprintln!("skipped: no {}", program.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let chain = name(&dir.path().join("c"));
    let report = json(0, &["build", "--layers", "20", "--disk", "64M", &chain]);
    let top = report["top"].as_str().unwrap();
    let disk = format!("driver=rqcow2,node-name=disk,file.driver=file,file.filename={top}");
    let daemon = Daemon::new(&program, dir.path(), &["--blockdev".into(), disk]);
    let socket = &daemon.socket;
    let sample = json(0, &["top", "--count", "1", socket]);
    assert_eq!(sample["chains"][0]["node"], "disk", "{sample}");
    assert_eq!(sample["chains"].as_array().unwrap().len(), 1);
    assert_eq!(sample["chains"][0]["driver"]["layers"], 20);
    let text = expect(0, &["metrics", socket]);
    assert!(
        text.contains("rqcow2_chain_layers{node=\"disk\"} 20\n"),
        "{text}"
    );
}
