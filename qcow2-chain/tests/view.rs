//! `view` beside `qemu-img map` of unpatched QEMU, on random chains.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use common::{Random, expect, json, name, qemu, run, same_shape};
use serde_json::Value;

/// Bytes by depth, as `qemu-img map` tells them.
#[derive(Debug, Default, PartialEq)]
struct Served {
    data: BTreeMap<u64, u64>,
    zeroes: BTreeMap<u64, u64>,
    /// Zeroes past the end of a short layer, and what no layer has.
    holes: u64,
}

fn by_qemu(image: &str) -> Served {
    let program = qemu("qemu-img").unwrap();
    let map = run(&program, &["map", "--output=json", "-f", "qcow2", image]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let mut served = Served::default();
    for entry in map.as_array().unwrap() {
        let (depth, len) = (
            entry["depth"].as_u64().unwrap(),
            entry["length"].as_u64().unwrap(),
        );
        if entry["data"] == true {
            *served.data.entry(depth).or_default() += len;
        } else if entry["present"] == true {
            *served.zeroes.entry(depth).or_default() += len;
        } else {
            served.holes += len;
        }
    }
    served
}

fn by_view(image: &str) -> Served {
    let report = json(0, &["view", image]);
    let mut served = Served {
        holes: report["hole_bytes"].as_u64().unwrap(),
        ..Served::default()
    };
    for layer in report["layers"].as_array().unwrap() {
        let depth = layer["depth"].as_u64().unwrap();
        for (key, map) in [
            ("visible_bytes", &mut served.data),
            ("visible_zero_bytes", &mut served.zeroes),
        ] {
            let bytes = layer[key].as_u64().unwrap();
            if bytes > 0 {
                map.insert(depth, bytes);
            }
        }
        assert_eq!(
            layer["data_bytes"].as_u64().unwrap(),
            layer["visible_bytes"].as_u64().unwrap() + layer["shadowed_bytes"].as_u64().unwrap()
        );
    }
    served
}

/// Writes a chain with QEMU's own programs. Layers of one size unless `sizes`.
fn random_chain(dir: &Path, random: &mut Random, sizes: bool) -> String {
    let (img, io) = (qemu("qemu-img").unwrap(), qemu("qemu-io").unwrap());
    let layers = 2 + random.below(6);
    let mut below: Option<(String, &str)> = None;
    let mut path = String::new();
    for number in 0..layers {
        let size = (64 << 20) + if sizes { random.below(64) << 16 } else { 0 };
        let raw = number == 0 && random.below(3) == 0;
        path = name(&dir.join(format!("l{number}")));
        let text = size.to_string();
        let mut args = vec!["create", "-q", "-f", if raw { "raw" } else { "qcow2" }];
        let bits = 9 + random.below(13);
        let mut options = format!("cluster_size={}", 1 << bits);
        let extended = bits >= 14 && random.below(3) == 0;
        if extended {
            options += ",extended_l2=on";
        } else if random.below(5) == 0 {
            options += ",compat=0.10";
        }
        if !raw {
            args.extend(["-o", &options]);
        }
        if let Some((name, format)) = &below {
            args.extend(["-b", name, "-F", format]);
        }
        args.extend([path.as_str(), &text]);
        run(&img, &args);
        let mut commands = Vec::new();
        for _ in 0..random.below(30) {
            let unit = 512 << random.below(8);
            let len = (1 + random.below(40)) * unit;
            let at = random.below((size - len) / unit) * unit;
            let what = match random.below(8) {
                0 => "write -z",
                1 => "write -z -u",
                2 => "discard",
                3 if !raw => {
                    let at = at >> bits << bits;
                    commands.push(format!("write -c {at} {}", 1 << bits));
                    continue;
                }
                _ => "write",
            };
            commands.push(format!("{what} {at} {len}"));
        }
        let mut args = vec!["-f", if raw { "raw" } else { "qcow2" }, "-d", "unmap"];
        for command in &commands {
            args.extend(["-c", command]);
        }
        args.push(&path);
        // Some commands may fail (unaligned compressed writes at the end).
        std::process::Command::new(&io)
            .args(&args)
            .output()
            .unwrap();
        below = Some((format!("l{number}"), if raw { "raw" } else { "qcow2" }));
    }
    path
}

#[test]
fn the_same_as_qemu_img_map() {
    if qemu("qemu-img").is_none() {
        return;
    }
    for seed in 0..14 {
        let dir = tempfile::tempdir().unwrap();
        let top = random_chain(dir.path(), &mut Random(seed), false);
        assert_eq!(by_view(&top), by_qemu(&top), "seed {seed}");
    }
}

#[test]
fn the_same_with_layers_of_different_size() {
    if qemu("qemu-img").is_none() {
        return;
    }
    for seed in 100..110 {
        let dir = tempfile::tempdir().unwrap();
        let top = random_chain(dir.path(), &mut Random(seed), true);
        let (ours, theirs) = (by_view(&top), by_qemu(&top));
        assert_eq!(ours.data, theirs.data, "seed {seed}");
        // QEMU says that zeroes past its end are those of the short layer.
        let all = |served: &Served| served.holes + served.zeroes.values().sum::<u64>();
        assert_eq!(all(&ours), all(&theirs), "seed {seed}");
    }
}

#[test]
fn answers_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let top = common::empty_chain(dir.path(), 3);
    same_shape(&json(0, &["view", &top]), "view.txt");
    let text = expect(0, &["view", &top]);
    assert!(text.contains("3 layers of a disk of 1 GiB"), "{text}");
}

#[test]
fn pictures() {
    let dir = tempfile::tempdir().unwrap();
    common::empty_chain(dir.path(), 2);
    let evil = dir
        .path()
        .join("<img src=x onerror=alert(1)>'\x1b[2J.qcow2");
    common::Empty {
        backing: Some("1"),
        ..Default::default()
    }
    .write(&evil);
    let (svg, html) = (dir.path().join("a.svg"), dir.path().join("a.html"));
    let text = expect(
        0,
        &[
            "view",
            "--svg",
            &name(&svg),
            "--html",
            &name(&html),
            &name(&evil),
        ],
    );
    assert!(!text.contains('\x1b'));
    for path in [svg, html] {
        let page = std::fs::read_to_string(path).unwrap();
        assert!(page.contains("<svg") && page.contains("</svg>"));
        assert!(!page.contains("<img") && !page.contains('\x1b'), "{page}");
    }
}

/// A loop device, where this user may have one.
struct Loop(String);

impl Loop {
    fn new(file: &str) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["-f", "--show", "-r", file])
            .output()
            .ok()?;
        let device = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && std::fs::File::open(&device).is_ok()).then_some(Self(device))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn an_image_on_a_block_device() {
    let dir = tempfile::tempdir().unwrap();
    let chain = name(&dir.path().join("c"));
    let built = json(0, &["build", "--layers", "1", "--disk", "16M", &chain]);
    let top = built["top"].as_str().unwrap();
    let Some(device) = Loop::new(top) else {
        eprintln!("skipped: no loop device");
        return;
    };
    let (file, there) = (json(0, &["view", top]), json(0, &["view", &device.0]));
    assert_eq!(file["hole_bytes"], there["hole_bytes"]);
    assert_eq!(file["totals"]["data_bytes"], there["totals"]["data_bytes"]);
    assert!(there["totals"]["allocated_bytes"].as_u64() > Some(0));
    assert_eq!(json(0, &["check", &device.0])["layers_verified"], 1);
}
