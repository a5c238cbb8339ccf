//! `predict`, `measure`, `calibrate`: with constants that are known, and with
//! QEMU where that has been built.

mod common;

use std::time::{Duration, Instant};

use common::{calibration, expect, json, name, qemu, same_shape, thousand_layers};
use serde_json::Value;

fn figure<'a>(report: &'a Value, driver: usize, figure: &str) -> &'a Value {
    let figures = report["drivers"][driver]["figures"].as_array().unwrap();
    figures.iter().find(|f| f["figure"] == figure).unwrap()
}

#[test]
fn what_the_constants_say() {
    let dir = tempfile::tempdir().unwrap();
    let constants = calibration(dir.path());
    let top = common::empty_chain(dir.path(), 4);
    let args = ["predict", "--calibration", &constants, &top];
    let report = json(0, &args);
    same_shape(&report, "predict.txt");
    // 1 + 4 / 2 + 4 * 4 / 2 / 4
    let open = figure(&report, 0, "open");
    assert_eq!(open["value"].as_f64(), Some(5.0));
    assert!(open["low"].as_f64().unwrap() < 4.3 && open["high"].as_f64().unwrap() > 5.9);
    // 10 + 4 levels + (4 + 4 + 3 + 2 + 1) visits / 8
    assert_eq!(
        figure(&report, 0, "read_hole")["value"].as_f64(),
        Some(15.75)
    );
    assert_eq!(figure(&report, 1, "read_hole")["value"].as_f64(), Some(1.5));
    // A refcount table of 64 KiB in each layer, an L1 table of two entries.
    let memory = figure(&report, 0, "memory_warm")["value"].as_f64();
    assert_eq!(memory, Some(8.4e6 + 4.0 * (65536.0 + 16.0)));
    assert!(
        report["warnings"][0]
            .as_str()
            .unwrap()
            .contains("another machine")
    );
    assert!(expect(0, &args).contains("Not to be relied on"));
}

#[test]
fn crashes_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let constants = calibration(dir.path());
    let top = common::empty_chain(dir.path(), 30);
    let report = json(0, &["predict", "--calibration", &constants, &top]);
    assert_eq!(report["drivers"][0]["crashes"], true);
    assert!(figure(&report, 0, "read_hole").get("value").is_none());
    assert!(figure(&report, 0, "open")["value"].is_number());
    assert_eq!(report["drivers"][1]["crashes"], false);
    assert!(figure(&report, 1, "read_hole")["value"].is_number());
}

#[test]
fn deeper_than_calibrated() {
    let dir = tempfile::tempdir().unwrap();
    let constants = calibration(dir.path());
    let text = std::fs::read_to_string(&constants).unwrap();
    let points = "\"points\":[{\"name\":\"x\",\"layers\":12,\"figures\":[]}]";
    let text = text.replace("\"points\":[]", points);
    let text = text.replace("\"crashes\":25", "\"crashes\":null");
    std::fs::write(&constants, text).unwrap();
    let predict = |layers| {
        let top = common::empty_chain(dir.path(), layers);
        let report = json(0, &["predict", "--calibration", &constants, &top]);
        // The first one is that it is of another machine.
        let warnings = report["warnings"].as_array().unwrap()[1..].to_vec();
        (report, warnings)
    };
    assert_eq!(predict(12).1.len(), 0);
    let (report, warnings) = predict(30);
    let first = warnings[0].as_str().unwrap();
    for part in ["12 layers", "has 30", "20 layers", "870"] {
        assert!(first.contains(part), "{first}");
    }
    assert_eq!(warnings.len(), 2);
    let missing = report["drivers"][0]["missing"].as_array().unwrap();
    let why = |figure: &str| {
        let found = missing.iter().find(|one| one["figure"] == figure);
        found.map(|one| one["why"].as_str().unwrap())
    };
    assert_eq!(why("stream"), Some("it was not calibrated"));
    assert_eq!(why("read_data"), Some("there is no data"));
    assert_eq!(why("open"), None);
}

/// A raw layer has all of its disk, up to a whole sector.
#[test]
fn raw_layers_leave_no_holes() {
    let dir = tempfile::tempdir().unwrap();
    let constants = calibration(dir.path());
    let raw = dir.path().join("raw");
    std::fs::write(&raw, vec![1; 100_000]).unwrap();
    let top = dir.path().join("top");
    common::Empty {
        size: 1 << 20,
        backing: Some("raw"),
        format: Some("raw"),
    }
    .write(&top);
    for (image, size) in [(&top, 1 << 20), (&raw, 100_352)] {
        let predicted = json(0, &["predict", "--calibration", &constants, &name(image)]);
        let seen = json(0, &["view", &name(image)]);
        assert_eq!(predicted["disk_size"], size);
        assert_eq!(predicted["hole_bytes"], seen["hole_bytes"]);
        assert_eq!(predicted["hole_bytes"], size - 100_352);
        assert_eq!(predicted["data_bytes"], 100_352);
    }
}

#[test]
fn no_calibration() {
    let dir = tempfile::tempdir().unwrap();
    let top = common::empty_chain(dir.path(), 2);
    let nowhere = name(&dir.path().join("none"));
    let error = expect(1, &["predict", "--calibration", &nowhere, &top]);
    assert!(error.contains("qcow2-chain calibrate"), "{error}");
    for nonsense in [
        "",
        "{}",
        "[1]",
        "{\"version\":9,\"machine\":{},\"drivers\":[]}",
    ] {
        std::fs::write(&nowhere, nonsense).unwrap();
        expect(1, &["predict", "--calibration", &nowhere, &top]);
    }
    // Terms that the models here do not have.
    let constants = calibration(dir.path());
    let text = std::fs::read_to_string(&constants).unwrap();
    std::fs::write(&constants, text.replace("us/level", "us/mile")).unwrap();
    let error = expect(1, &["predict", "--calibration", &constants, &top]);
    assert!(error.contains("calibrate again"), "{error}");
}

#[test]
fn hostile_chains() {
    let dir = tempfile::tempdir().unwrap();
    let constants = calibration(dir.path());
    let at = |file: &str| name(&dir.path().join(file));
    common::Empty {
        backing: Some("b"),
        ..Default::default()
    }
    .write(&dir.path().join("a"));
    common::Empty {
        backing: Some("a"),
        ..Default::default()
    }
    .write(&dir.path().join("b"));
    // A disk of 32 TiB of which nothing is there.
    common::Empty {
        size: 1 << 45,
        ..Default::default()
    }
    .write(&dir.path().join("wide"));
    std::fs::write(at("cut"), &std::fs::read(at("a")).unwrap()[..80]).unwrap();
    let error = expect(1, &["predict", "--calibration", &constants, &at("a")]);
    assert!(
        error.contains("/a, is the layer at depth 0: a loop") && error.contains("chain check"),
        "{error}"
    );
    for (file, code) in [("a", 1), ("cut", 1)] {
        let begin = Instant::now();
        expect(code, &["predict", "--calibration", &constants, &at(file)]);
        expect(code, &["measure", "--qemu", "/nowhere", &at(file)]);
        assert!(begin.elapsed() < Duration::from_secs(2));
    }
    let begin = Instant::now();
    let result = common::tool(&["predict", "--calibration", &constants, &at("wide")]);
    assert!(result.status.code().is_some_and(|code| code <= 1));
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_thousand_layers_of_a_large_disk() {
    let dir = tempfile::tempdir().unwrap();
    let constants = calibration(dir.path());
    let built = thousand_layers(dir.path());
    let top = built["top"].as_str().unwrap();
    let begin = Instant::now();
    let report = json(0, &["predict", "--calibration", &constants, top]);
    assert_eq!(report["layers"], 1000);
    // The programs under test are built with little optimization.
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_real_qemu() {
    let Some(io) = qemu("qemu-io") else { return };
    let programs = name(io.parent().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let constants = calibration(dir.path());
    let chain = name(&dir.path().join("a chain, with a comma"));
    let built = json(0, &["build", "--layers", "12", "--disk", "64M", &chain]);
    let top = built["top"].as_str().unwrap();
    let before = std::fs::metadata(top).unwrap().modified().unwrap();
    let args = [
        "measure",
        "--qemu",
        &programs,
        "--aio",
        "threads",
        "--rounds",
        "1",
        "--reads",
        "5",
        "--calibration",
        &constants,
        "--queue-depth",
        "4",
        top,
    ];
    let report = json(0, &args);
    same_shape(&report, "measure.txt");
    for figure in report["figures"].as_array().unwrap() {
        assert!(
            figure["measured"]["median"].as_f64().unwrap() > 0.0,
            "{figure}"
        );
    }
    assert_eq!(report["figures"].as_array().unwrap().len(), 8);
    // Only its overlay was written to, and that is gone.
    assert_eq!(std::fs::metadata(top).unwrap().modified().unwrap(), before);
    assert_eq!(std::fs::read_dir(&chain).unwrap().count(), 12);
    let text = expect(0, &[&args[..], &["--what", "open"]].concat());
    assert!(text.contains("open") && !text.contains("stream"), "{text}");
}

/// `calibrate` writes what `predict` reads and `validate` compares.
#[test]
fn calibrated_here() {
    let Some(io) = qemu("qemu-io") else { return };
    let programs = name(io.parent().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let constants = name(&dir.path().join("calibration.json"));
    let common = ["--qemu", &programs, "--rounds", "1", "--quiet"];
    let words = [
        "calibrate",
        "--max-layers",
        "12",
        "--calibration",
        &constants,
    ];
    let report = json(0, &[&words[..], &common].concat());
    same_shape(&report, "calibrate.txt");
    assert_eq!(report["deepest_read"]["works"], 12);
    // Between a bare program and one with a few layers open.
    let top = common::empty_chain(dir.path(), 4);
    let report = json(0, &["predict", "--calibration", &constants, &top]);
    assert_eq!(report["warnings"].as_array().unwrap().len(), 0);
    let memory = figure(&report, 0, "memory_open")["value"].as_f64().unwrap();
    assert!(4e6 < memory && memory < 5e7, "{memory}");

    // A chain of three layers; predictions may well be too far off.
    let results = name(&dir.path().join("results.json"));
    let table = name(&dir.path().join("table.md"));
    let words = [
        "validate",
        "--calibration",
        &constants,
        "--chains",
        "1",
        "--seed",
        "8",
    ];
    let files = [
        "--results",
        &results,
        "--markdown",
        &table,
        "--output",
        "json",
    ];
    let words = [&words[..], &common, &files].concat();
    let run = || {
        let output = common::tool(&words);
        assert!(matches!(output.status.code(), Some(0 | 4)), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let report = run();
    same_shape(&report, "validate.txt");
    assert_eq!(report["chains"][0]["layers"], 3);
    assert!(
        std::fs::read_to_string(&table)
            .unwrap()
            .contains("| open |")
    );
    // What was measured is not measured again.
    let begin = Instant::now();
    assert_eq!(run(), report);
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_crash_is_a_result() {
    let Some(io) = qemu("qemu-io") else { return };
    let programs = name(io.parent().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let top = common::empty_chain(dir.path(), 960);
    let args = [
        "measure",
        "--qemu",
        &programs,
        "--aio",
        "threads",
        "--rounds",
        "1",
        "--reads",
        "1",
        "--what",
        "open,memory",
        &top,
    ];
    let report = json(0, &args);
    let figures = report["figures"].as_array().unwrap();
    let of = |name: &str| {
        figures
            .iter()
            .find(|figure| figure["figure"] == name)
            .unwrap()
    };
    assert!(of("open")["measured"]["median"].is_number());
    assert!(
        of("memory_warm")["crash"]
            .as_str()
            .unwrap()
            .contains("SIGSEGV"),
        "{report}"
    );
}

#[test]
fn what_qemu_does_not_open_is_not_measured() {
    let Some(io) = qemu("qemu-io") else { return };
    let programs = name(io.parent().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let top = common::empty_chain(dir.path(), 2);
    let args = ["measure", "--qemu", &programs, "--rounds", "1", &top];
    for (options, why) in [
        // Unpatched QEMU does not know it.
        (&["--aio", "threads", "--driver", "rqcow2"][..], "rqcow2"),
        // Not with the page cache.
        (&["--aio", "native"], "cache.direct"),
    ] {
        for what in ["open", "memory", "read", "merge"] {
            if what == "merge" && why == "cache.direct" {
                continue;
            }
            let error = expect(1, &[&args[..], options, &["--what", what]].concat());
            assert!(error.contains(why) && error.contains(&top), "{error}");
            assert!(!error.contains("no file open"), "{error}");
        }
    }
}
