//! `plan`: its commands carried out by QEMU leave the same disk.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use common::{
    backing_name, calibration, empty_chain, expect, json, layers, name, qemu, run, same_shape,
};
use serde_json::Value;

/// Builds a chain; the top and the file with the expected content.
fn chain(dir: &std::path::Path, more: &[&str]) -> (String, String) {
    let (path, raw) = (name(&dir.join("chain")), name(&dir.join("raw")));
    let mut args = vec![
        "build",
        "--disk",
        "64M",
        "--expected",
        &raw,
        "--zeroes",
        "0.1",
    ];
    args.extend(more);
    args.push(&path);
    let report = json(0, &args);
    (report["top"].as_str().unwrap().into(), raw)
}

/// Runs the commands for qemu-img of all merges.
fn carry_out(plan: &Value) {
    let img = qemu("qemu-img").unwrap();
    for merge in plan["merges"].as_array().unwrap() {
        for command in merge["commands"]["qemu_img"].as_array().unwrap() {
            let command = command.as_str().unwrap().replace("qemu-img", &name(&img));
            let output = Command::new("sh").args(["-c", &command]).output().unwrap();
            let err = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{command}: {err}");
        }
        for file in merge["dropped"].as_array().unwrap() {
            std::fs::remove_file(file.as_str().unwrap()).unwrap();
        }
    }
}

/// The file on top then: where all was committed it is another one.
fn top_after(plan: &Value, top: String) -> String {
    let merges = plan["merges"].as_array().unwrap();
    match merges.iter().find(|merge| merge["top"] == 0) {
        Some(merge) => merge["into"].as_str().unwrap().to_owned(),
        None => top,
    }
}

#[test]
fn the_disk_stays_the_same() {
    let Some(img) = qemu("qemu-img") else { return };
    for (goal, left, more) in [
        (["--depth", "4"], 4, vec!["--layers", "12"]),
        (
            ["--keep-last", "3"],
            5,
            vec!["--layers", "10", "--raw-base"],
        ),
        (
            ["--depth", "5"],
            5,
            vec!["--layers", "30", "--place", "ageing"],
        ),
        (
            ["--depth", "2"],
            2,
            vec!["--layers", "8", "--place", "zipf", "--absolute"],
        ),
    ] {
        for method in ["auto", "commit", "stream"] {
            let dir = tempfile::tempdir().unwrap();
            let (top, raw) = chain(dir.path(), &more);
            let mut args = vec!["plan", "--method", method];
            args.extend(goal);
            args.push(&top);
            let plan = json(0, &args);
            assert_eq!(plan["after"]["layers"], left);
            carry_out(&plan);
            let top = top_after(&plan, top);
            run(&img, &["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
            assert_eq!(json(0, &["view", &top])["depth"], left);
        }
    }
}

/// The names that images record lead to the right files, relative ones stay so.
#[test]
fn links_lead_to_the_same_files() {
    let Some(img) = qemu("qemu-img") else { return };
    for (names, top, committed, streamed) in [
        // Through other directories.
        (
            [
                ("a/0", ""),
                ("a/1", "0"),
                ("b/2", "../a/1"),
                ("c/3", "../b/2"),
            ],
            "c/3",
            "../a/1",
            "../a/0",
        ),
        // What is before a colon could be a protocol.
        (
            [("x:0", ""), ("x:1", "./x:0"), ("2", "./x:1"), ("3", "2")],
            "3",
            "./x:1",
            "./x:0",
        ),
        // Layers 2 and 3 through symbolic links.
        (
            [("a/0", ""), ("a/1", "0"), ("a/2", "DIR/a/1"), ("a/3", "2")],
            "b/3",
            "../a/1",
            "../a/0",
        ),
    ] {
        for (args, recorded) in [
            (["--method", "commit", "--keep-last", "1"], committed),
            (["--method", "stream", "--depth", "2"], streamed),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let place = name(dir.path());
            let names = names.map(|(file, backing)| (file, backing.replace("DIR", &place)));
            let Some(raw) = layers(dir.path(), &names) else {
                return;
            };
            if top == "b/3" {
                std::fs::create_dir(dir.path().join("b")).unwrap();
                for layer in ["2", "3"] {
                    symlink(format!("../a/{layer}"), dir.path().join("b").join(layer)).unwrap();
                }
            }
            let top = name(&dir.path().join(top));
            run(&img, &["convert", "-f", "qcow2", "-O", "raw", &top, &raw]);
            let plan = json(
                0,
                &[&["plan", "--allow", &place], &args[..], &[&top]].concat(),
            );
            carry_out(&plan);
            assert_eq!(backing_name(&top), recorded, "{args:?}");
            run(&img, &["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
        }
    }
}

/// Whatever is in a name, the program gets it as it is, and as a name.
#[test]
fn what_is_printed_can_be_pasted() {
    let Some(img) = qemu("qemu-img") else { return };
    let dir = tempfile::tempdir().unwrap();
    let names = [
        ("0", ""),
        ("a\t'\n\u{202e}b", "0"),
        ("2", "./a\t'\n\u{202e}b"),
        ("x:3", "2"),
    ];
    let into = name(&dir.path().join(names[1].0));
    let names = names.map(|(file, backing)| (file, backing.to_owned()));
    let Some(raw) = layers(dir.path(), &names) else {
        return;
    };
    let top = name(&dir.path().join("x:3"));
    run(&img, &["convert", "-f", "qcow2", "-O", "raw", &top, &raw]);
    let plan = Command::new(env!("CARGO_BIN_EXE_qcow2-chain"))
        .args(["plan", "--depth", "2", "--method", "commit", "x:3"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    let plan = String::from_utf8(plan.stdout).unwrap();
    let command = plan
        .lines()
        .find_map(|line| line.strip_prefix("  qemu-img  qemu-img"));
    let status = Command::new("bash")
        .args(["-c", &format!("{}{}", name(&img), command.unwrap())])
        .current_dir(dir.path())
        .status();
    assert!(status.unwrap().success(), "{plan}");
    run(&img, &["compare", "-f", "qcow2", "-F", "raw", &into, &raw]);
}

/// QEMU records the names by which it has files open, unless it is told others.
#[test]
fn links_of_a_running_qemu_lead_somewhere() {
    let (Some(img), Some(daemon)) = (qemu("qemu-img"), qemu("qemu-storage-daemon")) else {
        return;
    };
    for (args, recorded) in [
        (["--method", "commit", "--keep-last", "1"], "b/../a/1"),
        (["--method", "stream", "--depth", "2"], "b/../a/0"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let names = [("a/0", ""), ("a/1", "0"), ("b/2", "../a/1"), ("b/3", "2")];
        let names = names.map(|(file, backing)| (file, backing.to_owned()));
        let Some(raw) = layers(dir.path(), &names) else {
            return;
        };
        let top = name(&dir.path().join("b/3"));
        run(&img, &["convert", "-f", "qcow2", "-O", "raw", &top, &raw]);
        let place = name(dir.path());
        let words = ["plan", "--allow", &place, "--device", "disk"];
        let plan = json(0, &[&words[..], &args, &[&top]].concat());
        let mut child = Command::new(&daemon)
            .args(["--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"])
            .arg("--blockdev")
            .arg("driver=qcow2,node-name=disk,file.driver=file,file.filename=b/3")
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut until = |what: &str| {
            let found = output.find_map(|line| {
                let line = line.unwrap();
                assert!(!line.contains("error"), "{line}");
                line.contains(what).then_some(())
            });
            assert!(found.is_some(), "no {what}");
        };
        writeln!(input, r#"{{"execute": "qmp_capabilities"}}"#).unwrap();
        until("return");
        for command in plan["merges"][0]["commands"]["qmp"].as_array().unwrap() {
            writeln!(input, "{}", command.as_str().unwrap()).unwrap();
        }
        until("BLOCK_JOB_COMPLETED");
        writeln!(input, r#"{{"execute": "quit"}}"#).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(backing_name(&top), format!("{place}/{recorded}"));
        run(&img, &["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
    }
}

#[test]
fn both_methods_in_one_plan() {
    let Some(img) = qemu("qemu-img") else { return };
    // From the base up: what each layer has, in MiB.
    for (sizes, methods) in [
        ([1, 8, 2, 2, 8, 1], ["commit", "stream"]),
        ([1, 2, 8, 8, 2, 1], ["stream", "commit"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let trace = dir.path().join("trace");
        let mut lines = String::new();
        for (layer, size) in sizes.iter().enumerate() {
            let start = layer as u64 * (10 << 20);
            lines += &format!("write {start} {}\nsnapshot\n", size << 20);
        }
        std::fs::write(&trace, lines).unwrap();
        let (top, raw) = chain(
            dir.path(),
            &["--layers", "6", "--zeroes", "0", "--trace", &name(&trace)],
        );
        let plan = json(0, &["plan", "--depth", "4", "--keep-last", "1", &top]);
        // The lowest one first.
        let merges = plan["merges"].as_array().unwrap();
        let found: Vec<_> = merges
            .iter()
            .map(|merge| merge["method"].as_str().unwrap())
            .collect();
        assert_eq!(found, methods);
        assert_eq!(plan["bytes_to_copy"], 4 << 20);
        carry_out(&plan);
        run(&img, &["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
        assert_eq!(json(0, &["view", &top])["depth"], 4);
    }
}

/// A layer that is smaller than one below it hides what is behind its end.
#[test]
fn layers_of_any_size() {
    let (Some(img), Some(io)) = (qemu("qemu-img"), qemu("qemu-io")) else {
        return;
    };
    for sizes in [
        [4, 4, 2, 4, 4],
        [4, 4, 4, 4, 1],
        [1, 2, 3, 4, 5],
        [5, 1, 4, 2, 3],
        [3, 5, 1, 1, 4],
    ] {
        for method in ["auto", "commit", "stream"] {
            let dir = tempfile::tempdir().unwrap();
            let path = |layer: usize| name(&dir.path().join(format!("l{layer}.qcow2")));
            for (layer, mib) in sizes.iter().enumerate() {
                let size = format!("{mib}M");
                let mut args = vec!["create", "-q", "-f", "qcow2"];
                let below = layer.checked_sub(1).map(path);
                if let Some(below) = &below {
                    args.extend(["-b", below, "-F", "qcow2"]);
                }
                let path = path(layer);
                run(&img, &[&args[..], &[&path, &size]].concat());
                let write = format!("write -P {} 0 {}k", layer + 1, 512 - 64 * layer);
                // Up to its very end.
                let last = format!("write -P {} {}k 192k", layer + 11, mib * 1024 - 192);
                run(&io, &["-f", "qcow2", "-c", &write, "-c", &last, &path]);
            }
            let (top, raw) = (path(sizes.len() - 1), name(&dir.path().join("raw")));
            run(&img, &["convert", "-f", "qcow2", "-O", "raw", &top, &raw]);
            let args = ["plan", "--depth", "1", "--into-base", "--method", method];
            // What a commit would not keep is left alone.
            let code = u8::from(method == "commit" && !sizes.is_sorted()) * 5;
            let plan = json(code.into(), &[&args[..], &[&top]].concat());
            assert_eq!(plan["warnings"].as_array().unwrap().is_empty(), code == 0);
            carry_out(&plan);
            let top = top_after(&plan, top);
            run(&img, &["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
            let size = std::fs::metadata(&raw).unwrap().len();
            assert_eq!(json(0, &["view", &top])["disk_size"], size);
        }
    }
}

#[test]
fn what_is_lost_is_told_and_damage_is_refused() {
    let Some(img) = qemu("qemu-img") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (top, _) = chain(dir.path(), &["--layers", "4", "--zeroes", "0"]);
    let args = ["plan", "--keep-last", "1", "--method", "commit", &top];
    let plan = json(0, &args);
    assert_eq!(plan["warnings"].as_array().unwrap().len(), 0);
    let dropped = plan["merges"][0]["dropped"][0].as_str().unwrap();
    run(&img, &["snapshot", "-c", "kept", dropped]);
    run(&img, &["bitmap", "--add", "-f", "qcow2", dropped, "bits"]);
    let plan = json(0, &args);
    let warnings: Vec<_> = plan["warnings"].as_array().unwrap().iter().collect();
    assert_eq!(warnings.len(), 2);
    for (warning, what) in warnings.iter().zip(["snapshots", "bitmaps"]) {
        let warning = warning.as_str().unwrap();
        assert!(warning.contains(what) && warning.contains(dropped));
    }
    assert!(expect(0, &args).contains(&format!("not needed afterwards: {dropped}")));
    // The first L1 entry, behind the end of the file.
    let mut bytes = std::fs::read(dropped).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    bytes[l1..l1 + 8].copy_from_slice(&((1u64 << 50) | (1 << 63)).to_be_bytes());
    std::fs::write(dropped, bytes).unwrap();
    assert!(expect(1, &args).contains(dropped));
}

#[test]
fn bytes_are_those_that_are_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (top, _) = chain(dir.path(), &["--layers", "6", "--zeroes", "0"]);
    let bytes = |args: &[&str]| {
        let mut all = vec!["plan", "--depth", "2"];
        all.extend(args);
        all.push(&top);
        json(0, &all)["bytes_to_copy"].as_u64().unwrap()
    };
    let view = json(0, &["view", &top]);
    let layer = |n: usize| view["layers"][n]["data_bytes"].as_u64().unwrap();
    let visible: u64 = (0..5)
        .map(|n| view["layers"][n]["visible_bytes"].as_u64().unwrap())
        .sum();
    // The base stays: the other five become one, which has all that is visible.
    assert_eq!(bytes(&["--method", "stream"]), visible - layer(0));
    assert!(bytes(&[]) <= bytes(&["--method", "stream"]));
    assert!(bytes(&[]) <= bytes(&["--method", "commit"]));
}

/// Version 2 has no zero clusters, zeroes that go there are data. `qemu-img
/// rebase` makes data of them in any image.
#[test]
fn zeroes_that_become_data() {
    let (Some(img), Some(io)) = (qemu("qemu-img"), qemu("qemu-io")) else {
        return;
    };
    const ALL: u64 = 4 << 20;
    for (method, old, bytes, zero_bytes) in [
        ("commit", Some(1usize), ALL, 0),
        ("stream", Some(3), ALL, 0),
        ("stream", None, 0, ALL),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = |layer: usize| name(&dir.path().join(layer.to_string()));
        for layer in 0..4 {
            let compat = if Some(layer) == old {
                "compat=0.10"
            } else {
                "compat=1.1"
            };
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", compat];
            let below = layer.checked_sub(1).map(path);
            if let Some(below) = &below {
                args.extend(["-b", below, "-F", "qcow2"]);
            }
            run(&img, &[&args[..], &[&path(layer), "8M"]].concat());
            let write = match layer {
                0 => "write 0 8M",
                2 => "write -z 0 4M",
                _ => continue,
            };
            run(&io, &["-f", "qcow2", "-c", write, &path(layer)]);
        }
        let plan = json(0, &["plan", "--method", method, "--depth", "2", &path(3)]);
        assert_eq!(plan["bytes_to_copy"], bytes, "{method}");
        assert_eq!(plan["merges"][0]["zero_bytes"], zero_bytes, "{method}");
        carry_out(&plan);
        let kept = plan["merges"][0]["into"].as_str().unwrap();
        let data = json(0, &["view", kept])["layers"][0]["data_bytes"].as_u64();
        assert_eq!(data, Some(ALL), "{method}");
    }
}

#[test]
fn goals() {
    let dir = tempfile::tempdir().unwrap();
    let (top, _) = chain(dir.path(), &["--layers", "9"]);
    let plan = json(0, &["plan", "--depth", "3", &top]);
    same_shape(&plan, "plan.txt");
    assert_eq!(plan["before"]["layers"], 9);
    let left = |code, args: &[&str]| {
        let mut all = vec!["plan"];
        all.extend(args);
        all.push(&top);
        json(code, &all)["after"]["layers"].as_u64().unwrap()
    };
    assert_eq!(left(0, &["--depth", "20"]), 9);
    assert_eq!(left(0, &["--depth", "1", "--into-base"]), 1);
    assert_eq!(left(5, &["--depth", "1"]), 2);
    assert_eq!(left(5, &["--depth", "2", "--keep-last", "4"]), 6);
    assert_eq!(left(0, &["--keep-last", "20"]), 9);
    assert_eq!(left(0, &["--max-bytes", "100P"]), 2);
    let some = left(0, &["--max-bytes", "3M"]);
    assert!(2 < some && some < 9, "{some}");
    assert_eq!(left(5, &["--depth", "2", "--max-bytes", "1M"]), 8);
    let text = expect(0, &["plan", "--depth", "3", "--domain", "vm1", &top]);
    assert!(
        text.contains("virsh blockcommit vm1") && text.contains("\"execute\":\"block-commit\"")
    );
    expect(2, &["plan", &top]);
}

#[test]
fn long_and_broken_chains() {
    let dir = tempfile::tempdir().unwrap();
    let top = empty_chain(dir.path(), 3000);
    assert_eq!(
        json(0, &["plan", "--depth", "10", &top])["after"]["layers"],
        10
    );
    std::fs::remove_file(dir.path().join("7")).unwrap();
    let error = expect(1, &["plan", "--depth", "10", &top]);
    assert!(error.contains("is missing"), "{error}");
}

/// What the models say of a chain now.
fn predicted(constants: &str, top: &str, figure: &str) -> f64 {
    let report = json(0, &["predict", "--calibration", constants, top]);
    let figures = report["drivers"][0]["figures"].as_array().unwrap();
    let found = figures.iter().find(|found| found["figure"] == figure);
    found.unwrap()["value"].as_f64().unwrap()
}

#[test]
fn what_reads_and_memory_may_cost() {
    let dir = tempfile::tempdir().unwrap();
    let constants = calibration(dir.path());
    let (top, _) = chain(dir.path(), &["--layers", "16", "--zeroes", "0"]);
    let plan = |code, goal: &[&str]| {
        let words = ["plan", "--calibration", &constants, "--driver", "qcow2"];
        json(code, &[&words[..], goal, &[&top]].concat())
    };
    let before = predicted(&constants, &top, "read_data");
    let most = format!("{}", before * 0.7);
    let found = plan(0, &["--latency", &most]);
    same_shape(&found, "plan-goals.txt");
    let costs = &found["predicted"];
    let cost = |when: &str, what: &str| costs[when][what].as_f64().unwrap();
    assert_eq!(cost("before", "read_microseconds"), before);
    assert!(cost("after", "read_microseconds") <= before * 0.7);
    let layers = found["after"]["layers"].as_u64().unwrap();
    assert!((2..16).contains(&layers), "{layers}");
    // No more is merged than that takes.
    let longer = format!("{}", layers + 1);
    let longer = plan(0, &["--latency", "1000", "--depth", &longer]);
    let after = longer["predicted"]["after"]["read_microseconds"].as_f64();
    assert!(after.unwrap() > before * 0.7);

    // What is good already stays as it is; what cannot be is told.
    let found = plan(0, &["--latency", "1000", "--memory", "1G"]);
    assert_eq!(found["merges"].as_array().unwrap().len(), 0);
    let found = plan(5, &["--latency", "1"]);
    assert_eq!(found["goal_reached"], false);
    assert_eq!(found["after"]["layers"], 2);
    let text = expect(
        0,
        &["plan", "--calibration", &constants, "--memory", "1G", &top],
    );
    assert!(text.contains("4 KiB read of data"), "{text}");
    let nowhere = name(&dir.path().join("none"));
    let words = ["plan", "--calibration", &nowhere, "--memory", "1G", &top];
    let error = expect(1, &words);
    assert!(error.contains("qcow2-chain calibrate"), "{error}");
}

#[test]
fn what_is_predicted_of_a_plan_is_predicted_of_its_result() {
    let Some(img) = qemu("qemu-img") else { return };
    for (goal, most, figure, cost) in [
        ("--latency", "20", "read_data", "read_microseconds"),
        ("--memory", "9M", "memory_warm", "memory_bytes"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let constants = calibration(dir.path());
        let (top, raw) = chain(dir.path(), &["--layers", "16", "--zeroes", "0"]);
        let words = ["plan", "--calibration", &constants, "--driver", "qcow2"];
        let plan = json(0, &[&words[..], &[goal, most, &top]].concat());
        assert!(!plan["merges"].as_array().unwrap().is_empty());
        carry_out(&plan);
        run(&img, &["compare", "-f", "qcow2", "-F", "raw", &top, &raw]);
        let promised = plan["predicted"]["after"][cost].as_f64().unwrap();
        let now = predicted(&constants, &top, figure);
        assert!(
            (now / promised - 1.0).abs() < 0.01,
            "{goal}: {promised} {now}"
        );
    }
}
