//! `build`: chains that QEMU finds clean and that read as expected.

mod common;

use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{expect, json, name, qemu, run, same_shape, thousand_layers};

/// Builds a chain and compares it with what it should be, by QEMU.
fn sound(args: &[&str]) {
    let Some(img) = qemu("qemu-img") else { return };
    let dir = tempfile::tempdir().unwrap();
    let chain = name(&dir.path().join("chain"));
    let raw = name(&dir.path().join("raw"));
    let mut all = vec!["build", "--expected", &raw, "--disk", "40M"];
    all.extend(args);
    all.push(&chain);
    let report = json(0, &all);
    let top = report["top"].as_str().unwrap();
    for entry in std::fs::read_dir(&chain).unwrap() {
        let path = name(&entry.unwrap().path());
        if path.ends_with(".qcow2") {
            run(&img, &["check", "-q", "-f", "qcow2", &path]);
        }
    }
    run(&img, &["compare", "-f", "qcow2", "-F", "raw", top, &raw]);
    // Not for nothing.
    let seen = json(0, &["view", top]);
    assert!(seen["totals"]["visible_bytes"].as_u64().unwrap() > 0);
    json(0, &["check", top]);
}

#[test]
fn plain() {
    sound(&["--layers", "7"]);
    sound(&["--layers", "1", "--base-data", "100P"]);
    sound(&[
        "--layers",
        "5",
        "--compat",
        "2",
        "--cluster-size",
        "4K",
        "--run",
        "3",
    ]);
    sound(&[
        "--layers",
        "4",
        "--cluster-size",
        "512",
        "--disk",
        "3M",
        "--zeroes",
        "0.3",
    ]);
    sound(&[
        "--layers",
        "4",
        "--cluster-size",
        "2M",
        "--data-per-layer",
        "6M",
    ]);
    sound(&[
        "--layers",
        "5",
        "--raw-base",
        "--base-data",
        "20M",
        "--absolute",
    ]);
    for bits in ["1", "2", "4", "8", "32", "64"] {
        sound(&["--layers", "3", "--refcount-bits", bits]);
    }
}

#[test]
fn patterns() {
    for place in ["uniform", "deal", "zipf", "sequential", "ageing"] {
        sound(&[
            "--layers",
            "9",
            "--place",
            place,
            "--data-per-layer",
            "5M",
            "--scatter",
        ]);
        // More than there is room for in hot spots, and all of the disk.
        sound(&["--layers", "3", "--place", place, "--data-per-layer", "39M"]);
        sound(&["--layers", "3", "--place", place, "--data-per-layer", "40M"]);
    }
}

#[test]
fn kinds_of_clusters() {
    for codec in ["zlib", "zstd"] {
        sound(&[
            "--layers",
            "6",
            "--compressed",
            "0.5",
            "--zeroes",
            "0.2",
            "--compression",
            codec,
        ]);
        sound(&[
            "--layers",
            "3",
            "--compressed",
            "1",
            "--cluster-size",
            "2M",
            "--compression",
            codec,
        ]);
        sound(&[
            "--layers",
            "3",
            "--compressed",
            "1",
            "--cluster-size",
            "512",
            "--compression",
            codec,
        ]);
        sound(&[
            "--layers",
            "3",
            "--compressed",
            "0.7",
            "--refcount-bits",
            "1",
            "--compression",
            codec,
        ]);
        sound(&[
            "--layers",
            "3",
            "--compressed",
            "0.7",
            "--refcount-bits",
            "2",
            "--compression",
            codec,
        ]);
    }
    sound(&[
        "--layers",
        "6",
        "--extended-l2",
        "--subclusters",
        "0.7",
        "--zeroes",
        "0.2",
        "--compressed",
        "0.1",
    ]);
    sound(&[
        "--layers",
        "6",
        "--extended-l2",
        "--cluster-size",
        "16K",
        "--subclusters",
        "1",
    ]);
}

#[test]
fn mixtures() {
    sound(&[
        "--layers",
        "9",
        "--cluster-size",
        "64K,4K,512,2M",
        "--zeroes",
        "0.2",
        "--compressed",
        "0.2",
    ]);
    sound(&[
        "--layers",
        "6",
        "--grow",
        "1000K",
        "--cluster-size",
        "64K,2M",
        "--zeroes",
        "0.1",
    ]);
    sound(&[
        "--layers",
        "6",
        "--grow",
        "512",
        "--cluster-size",
        "16K,64K",
        "--extended-l2",
        "--subclusters",
        "0.5",
    ]);
}

#[test]
fn traces() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let lines: String = (0..200)
        .map(|n| {
            format!(
                "vda {} {} {}\n",
                ["write", "read", "trim"][n % 3],
                n * 100_000,
                70_000
            )
        })
        .collect();
    std::fs::write(&trace, lines).unwrap();
    sound(&["--layers", "6", "--trace", &name(&trace)]);
}

#[test]
fn the_same_for_the_same_seed() {
    let dir = tempfile::tempdir().unwrap();
    let build = |to: &str, seed: &str| {
        let path = name(&dir.path().join(to));
        let args = [
            "build",
            "--layers",
            "4",
            "--place",
            "zipf",
            "--compressed",
            "0.3",
            "--seed",
            seed,
            &path,
        ];
        expect(0, &args);
        (0..4)
            .map(|n| std::fs::read(format!("{path}/l{n}.qcow2")).unwrap())
            .collect::<Vec<_>>()
    };
    assert!(build("a", "5") == build("b", "5"));
    assert!(build("c", "6") != build("d", "5"));
    // What is there is not lost by mistake.
    let there = name(&dir.path().join("a"));
    let error = expect(1, &["build", &there]);
    assert!(error.contains("--force"), "{error}");
    expect(0, &["build", "--layers", "2", "--force", &there]);
    assert!(!dir.path().join("a/l3.qcow2").exists());
}

#[test]
fn wrong_arguments() {
    let dir = tempfile::tempdir().unwrap();
    let dir = name(dir.path());
    for args in [
        ["--layers", "0"],
        ["--run", "0"],
        ["--disk", "100"],
        ["--cluster-size", "3K"],
        ["--cluster-size", "4M"],
        ["--refcount-bits", "3"],
        ["--refcount-bits", "128"],
        ["--compressed", "2"],
        ["--subclusters", "0.5"],
        ["--zipf-exponent", "0"],
        ["--disk", "1X"],
        ["--hot-spots", "0"],
        ["--compressed", "nan"],
    ] {
        let mut all = vec!["build"];
        all.extend(args);
        all.push(&dir);
        expect(2, &all);
    }
    expect(2, &["build"]);
    expect(1, &["build", "--disk", "1000P", &dir]);
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn two_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let chain = name(&dir.path().join("c"));
    let words = ["build", "--layers", "100", &chain];
    let mut both = [0, 1].map(|_| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_qcow2-chain"));
        let command = command.args(words).stdout(Stdio::null());
        command.stderr(Stdio::piped()).spawn().unwrap()
    });
    let ends = both.each_mut().map(|child| {
        let mut text = String::new();
        let error = child.stderr.as_mut().unwrap();
        error.read_to_string(&mut text).unwrap();
        (child.wait().unwrap().code(), text)
    });
    let (_, error) = ends.iter().find(|(code, _)| *code == Some(1)).unwrap();
    assert!(error.contains(&chain), "{error}");
    assert!(ends.iter().any(|(code, _)| *code == Some(0)), "{ends:?}");
    // What the other one made is whole.
    assert_eq!(
        json(0, &["check", &format!("{chain}/l99.qcow2")])["depth"],
        100
    );
}

#[test]
fn where_the_expected_content_goes() {
    let dir = tempfile::tempdir().unwrap();
    let chain = name(&dir.path().join("c"));
    // Before anything is made.
    for nowhere in [name(&dir.path().join("no/raw")), "/dev/null".into()] {
        let error = expect(1, &["build", "--expected", &nowhere, &chain]);
        assert!(error.contains(&nowhere), "{error}");
        assert!(!Path::new(&chain).exists());
    }
    expect(0, &["build", "--layers", "2", &chain]);
    let base = format!("{chain}/l0.qcow2");
    let before = std::fs::read(&base).unwrap();
    let (link, same) = (
        name(&dir.path().join("link")),
        name(&dir.path().join("same")),
    );
    std::os::unix::fs::symlink(&base, &link).unwrap();
    std::fs::hard_link(&base, &same).unwrap();
    for path in [base.clone(), format!("{chain}/l7.qcow2"), link, same] {
        let words = [
            "build",
            "--force",
            "--layers",
            "2",
            "--expected",
            &path,
            &chain,
        ];
        let error = expect(1, &words);
        assert!(error.contains("a layer of the chain"), "{error}");
    }
    assert_eq!(std::fs::read(&base).unwrap(), before);
    assert_eq!(std::fs::read_dir(&chain).unwrap().count(), 2);
    // Longer than what replaces it.
    let raw = format!("{chain}/raw");
    std::fs::write(&raw, vec![1; 1 << 20]).unwrap();
    let words = [
        "build",
        "--force",
        "--layers",
        "2",
        "--disk",
        "64K",
        "--expected",
        &raw,
        &chain,
    ];
    expect(0, &words);
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 65536);
}

#[test]
fn traces_beyond_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (trace, chain) = (dir.path().join("trace"), name(&dir.path().join("c")));
    std::fs::write(&trace, "vda write 0 4096\nvda write 1048576 1\n").unwrap();
    let trace = name(&trace);
    let words = [
        "build", "--layers", "2", "--disk", "1M", "--trace", &trace, &chain,
    ];
    let error = expect(1, &words);
    assert!(
        error.contains("line 2") && error.contains(&trace),
        "{error}"
    );
    assert!(!Path::new(&chain).exists());
    // The second layer's disk is larger.
    expect(0, &[&words[..], &["--grow", "512"]].concat());
}

#[test]
fn a_thousand_layers() {
    let dir = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let report = thousand_layers(dir.path());
    assert!(begin.elapsed() < Duration::from_secs(30));
    same_shape(&report, "build.txt");
    let begin = Instant::now();
    let seen = json(0, &["view", report["top"].as_str().unwrap()]);
    assert_eq!(seen["depth"], 1000);
    assert!(begin.elapsed() < Duration::from_secs(10));
}
