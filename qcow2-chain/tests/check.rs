//! `check` on chains with one flaw each, and on hostile ones.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Empty, Random, codes, empty_chain, expect, json, name, qemu, run, same_shape};

/// A top whose backing file is named so.
fn top(dir: &Path, backing: &str, format: Option<&str>) -> String {
    let path = dir.join("top");
    Empty {
        backing: Some(backing),
        format,
        ..Empty::default()
    }
    .write(&path);
    name(&path)
}

fn only(code: i32, image: &str) -> Vec<String> {
    codes(&json(code, &["check", image]))
}

#[test]
fn a_sound_chain() {
    let dir = tempfile::tempdir().unwrap();
    let report = json(0, &["check", &empty_chain(dir.path(), 5)]);
    assert_eq!(codes(&report), [""; 0]);
    assert_eq!(report["layers_verified"], 5);
}

#[test]
fn links() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    empty_chain(dir, 1);
    fs::write(dir.join("raw"), vec![1; 4096]).unwrap();
    let link = |code, backing: &str, format| only(code, &top(dir, backing, format));
    let qcow2 = Some("qcow2");
    assert_eq!(link(4, "gone", qcow2), ["link-missing"]);
    assert_eq!(link(4, "top", qcow2), ["link-loop"]);
    assert_eq!(link(4, "./top", qcow2), ["link-loop"]);
    assert_eq!(link(3, "0", None), ["format-missing"]);
    assert_eq!(
        link(3, "0", Some("raw")),
        ["format-wrong", "smaller-than-overlay"]
    );
    assert_eq!(link(4, "raw", qcow2), ["format-wrong"]);
    assert_eq!(
        link(
            3,
            "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
            qcow2
        ),
        ["link-not-followed"]
    );
    assert_eq!(link(3, "nbd://localhost", qcow2), ["link-not-followed"]);
    for (code, backing) in [(3, "nbd://localhost"), (3, "/etc/passwd"), (4, ".")] {
        let report = json(code, &["check", &top(dir, backing, Some("raw"))]);
        assert!(report["findings"][0]["advice"].is_string(), "{report}");
    }
    assert_eq!(
        link(3, "/etc/passwd", Some("raw")),
        ["absolute-names", "link-not-followed"]
    );
    assert_eq!(
        link(3, "../../etc/passwd", Some("raw")),
        ["link-not-followed"]
    );
    let allowed = json(
        0,
        &[
            "check",
            "--allow",
            "/etc",
            &top(dir, "/etc/passwd", Some("raw")),
        ],
    );
    assert_eq!(codes(&allowed), ["absolute-names", "smaller-than-overlay"]);
}

#[test]
fn names() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    empty_chain(dir, 1);
    let long = format!("{}0", "./".repeat(500));
    assert_eq!(only(3, &top(dir, &long, Some("qcow2"))), ["name-long"]);
    let longer = format!("{}0", "./".repeat(520));
    let error = expect(1, &["check", &top(dir, &longer, Some("qcow2"))]);
    assert!(error.contains("Backing file name too long"), "{error}");

    fs::create_dir(dir.join("links")).unwrap();
    std::os::unix::fs::symlink(dir.join("top"), dir.join("links/top")).unwrap();
    top(dir, "0", Some("qcow2"));
    let report = json(4, &["check", &name(&dir.join("links/top"))]);
    assert_eq!(codes(&report), ["link-missing", "relative-through-link"]);
    // It is found where the file is, and the command says so.
    let command = report["findings"][0]["command"].as_str().unwrap();
    assert!(command.ends_with("/links/top") && command.contains(&name(&dir.join("0"))));
}

#[test]
fn written_after_its_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let image = empty_chain(dir.path(), 2);
    let base = fs::File::options()
        .write(true)
        .open(dir.path().join("0"))
        .unwrap();
    base.set_modified(std::time::SystemTime::now() + Duration::from_secs(600))
        .unwrap();
    let report = json(3, &["check", &image]);
    assert_eq!(codes(&report), ["written-after-overlay"]);
    assert_eq!(report["findings"][0]["depth"], 1);
    same_shape(&report, "check.txt");
}

#[test]
fn damage_is_found_and_mended_by_the_command() {
    let Some(img) = qemu("qemu-img") else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = empty_chain(dir.path(), 2);
    let base = fs::File::options()
        .write(true)
        .open(dir.path().join("0"))
        .unwrap();
    // A cluster that is counted and not used.
    base.set_len(0x50000).unwrap();
    base.write_all_at(&[0, 1], 0x20000 + 8).unwrap();
    let report = json(3, &["check", &image]);
    assert_eq!(codes(&report), ["layer-leaks"]);
    let command = report["findings"][0]["command"].as_str().unwrap();
    let args: Vec<_> = command.split(' ').skip(1).collect();
    run(&img, &args);
    assert_eq!(only(0, &image), [""; 0]);
    // One that is used and not counted.
    base.write_all_at(&[0, 0], 0x20000 + 6).unwrap();
    assert_eq!(only(4, &image), ["layer-damaged"]);
    // The corrupt bit.
    base.write_all_at(&[0, 1], 0x20000 + 6).unwrap();
    base.write_all_at(&[2], 79).unwrap();
    assert_eq!(only(4, &image), ["marked-corrupt"]);
}

#[test]
fn nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let image = empty_chain(dir.path(), 3);
    let base = fs::File::options()
        .write(true)
        .open(dir.path().join("0"))
        .unwrap();
    base.write_all_at(&[0, 9], 0x20000 + 8).unwrap();
    // The dirty bit, which opening for writing would clear.
    base.write_all_at(&[1], 79).unwrap();
    let content = || (0..3).map(|n| fs::read(dir.path().join(n.to_string())).unwrap());
    let before: Vec<_> = content().collect();
    json(3, &["check", &image]);
    json(0, &["view", &image]);
    assert!(content().eq(before));
}

#[test]
fn hostile_files() {
    let dir = tempfile::tempdir().unwrap();
    let image = empty_chain(dir.path(), 2);
    let below = dir.path().join("0");
    let good = fs::read(&below).unwrap();
    let mut random = Random(7);
    for round in 0..150 {
        let mut bytes = good.clone();
        match round % 3 {
            0 => bytes.truncate(random.below(bytes.len() as u64) as usize),
            1 => {
                // Any field of the header, with values at the edges.
                let at = random.below(112) as usize;
                let value = [0, 1, 0x7f, 0x80, 0xff][random.below(5) as usize];
                let len = 1 + random.below(8) as usize;
                bytes[at..(at + len).min(112)].fill(value);
            }
            _ => {
                for _ in 0..40 {
                    let at = 0x10000 * (1 + random.below(3)) + random.below(64);
                    bytes[at as usize] = random.below(256) as u8;
                }
            }
        }
        fs::write(&below, &bytes).unwrap();
        for command in ["view", "check"] {
            let begin = Instant::now();
            let output = common::tool(&[command, &image]);
            let err = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.code().is_some_and(|code| code <= 4), "{err}");
            assert!(!err.contains("panicked"), "{err}");
            assert!(begin.elapsed() < Duration::from_secs(5));
        }
    }
}

#[test]
fn strange_files_are_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    std::process::Command::new("mkfifo")
        .arg(&fifo)
        .status()
        .unwrap();
    assert_eq!(
        only(4, &top(dir.path(), "fifo", Some("raw"))),
        ["link-unreadable"]
    );
    assert_eq!(
        only(4, &top(dir.path(), ".", Some("raw"))),
        ["link-unreadable"]
    );
    let zero = json(
        4,
        &[
            "check",
            "--allow",
            "/",
            &top(dir.path(), "/dev/zero", Some("raw")),
        ],
    );
    assert!(codes(&zero).contains(&"link-unreadable".into()));
}

#[test]
fn a_table_of_tables_without_end() {
    // 32 MiB of references to one and the same table of 2 MiB: to be read
    // 4 million times by who does not look.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("top");
    let mut header = Empty::default().header();
    header.cluster_bits = 21;
    header.size = 1 << 60;
    header.l1_size = 1 << 22;
    header.l1_table_offset = 3 << 21;
    header.refcount_table_offset = 1 << 21;
    let first = rust_qcow2::format::extension::Extensions::default()
        .encode(&mut header, None)
        .unwrap();
    let file = fs::File::create(&path).unwrap();
    file.write_all_at(&first, 0).unwrap();
    let table: Vec<u8> = (0..1 << 22)
        .flat_map(|_| ((1u64 << 63) | (20 << 21)).to_be_bytes())
        .collect();
    file.write_all_at(&table, 3 << 21).unwrap();
    file.write_all_at(&1u64.to_be_bytes(), 20 << 21).unwrap();
    file.set_len(22 << 21).unwrap();
    let begin = Instant::now();
    assert!(only(4, &name(&path)).contains(&"layer-damaged".into()));
    // Every table in a hole of an endless file.
    let table: Vec<u8> = (0..1u64 << 22)
        .flat_map(|n| ((1u64 << 63) | ((20 + n) << 21)).to_be_bytes())
        .collect();
    file.write_all_at(&table, 3 << 21).unwrap();
    file.set_len(12 << 40).unwrap();
    assert_eq!(only(0, &name(&path)), ["not-verified"]);
    json(0, &["view", &name(&path)]);
    assert!(begin.elapsed() < Duration::from_secs(30));
}

#[test]
fn other_files_do_not_pass() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("top");
    let short = [0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3, 0, 0];
    let mut vdi = vec![0; 512];
    vdi[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
    for (content, why) in [
        (&b""[..], "not a qcow2 image: it is empty"),
        (&short, "qcow2 header too short"),
        (&[7; 70_000], "not a qcow2 image\n"),
        (&b"KDMV..."[..], "not a qcow2 image: it looks like vmdk"),
        (&vdi, "not a qcow2 image: it looks like vdi"),
    ] {
        fs::write(&path, content).unwrap();
        let error = expect(1, &["check", &name(&path)]);
        assert!(
            error.contains(why) && error.contains(&name(&path)),
            "{error}"
        );
    }
    // `view` does not take them for raw disks either.
    let error = expect(1, &["view", &name(&path)]);
    assert!(
        error.contains("vdi") && error.contains(&name(&path)),
        "{error}"
    );
}

#[test]
fn a_layer_of_another_format() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("below"), b"KDMV").unwrap();
    let report = json(0, &["check", &top(dir.path(), "below", Some("vmdk"))]);
    assert_eq!(codes(&report), ["not-verified"]);
    assert_eq!(report["findings"][0]["depth"], 1);
    assert_eq!(report["layers_verified"], 1);
}

#[test]
fn encrypted_images_need_no_key() {
    let Some(img) = qemu("qemu-img") else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = name(&dir.path().join("luks"));
    let secret = "secret,id=s,data=x";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let create = ["create", "-q", "-f", "qcow2", "--object", secret];
    run(&img, &[&create[..], &["-o", options, &path, "4M"]].concat());
    assert_eq!(only(0, &path), [""; 0]);
    // A cluster that is counted and not used.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let length = file.metadata().unwrap().len().next_multiple_of(0x10000);
    file.set_len(length + 0x10000).unwrap();
    let mut table = [0; 8];
    file.read_exact_at(&mut table, 0x10000).unwrap();
    let block = u64::from_be_bytes(table);
    file.write_all_at(&[0, 1], block + length / 0x10000 * 2)
        .unwrap();
    assert_eq!(only(3, &path), ["layer-leaks"]);
    let opened = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
    let theirs = std::process::Command::new(&img)
        .args(["check", "--object", secret, "--image-opts", &opened])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&theirs.stdout);
    assert!(said.contains("\n1 leaked clusters"), "{said}");
}

#[test]
fn an_image_in_use() {
    use rustix::fs::{FlockOperation, fcntl_lock};
    let dir = tempfile::tempdir().unwrap();
    let image = empty_chain(dir.path(), 2);
    let file = fs::File::open(&image).unwrap();
    let writer = fs::File::options().write(true).open(&image).unwrap();
    writer.set_len(0x50000).unwrap();
    writer.write_all_at(&[0, 1], 0x20000 + 8).unwrap();
    assert_eq!(only(3, &image), ["layer-leaks"]);
    // Of all bytes, the one that QEMU locks among them.
    fcntl_lock(&file, FlockOperation::LockShared).unwrap();
    let report = json(0, &["check", &image]);
    assert_eq!(codes(&report), ["in-use"]);
    assert_eq!(report["findings"][0]["depth"], 0);
    assert_eq!(report["layers_verified"], 2);
    // With lazy refcounts nothing in the file can be relied on.
    writer.write_all_at(&[1], 79).unwrap();
    assert_eq!(only(0, &image), ["in-use", "not-verified"]);
    fcntl_lock(&file, FlockOperation::Unlock).unwrap();
    assert_eq!(only(3, &image), ["layer-leaks", "not-closed"]);
}

#[test]
fn in_use_by_qemu() {
    use std::io::{Read, Write};
    let Some(io) = qemu("qemu-io") else { return };
    let dir = tempfile::tempdir().unwrap();
    let image = empty_chain(dir.path(), 2);
    let mut child = std::process::Command::new(io)
        .args(["-f", "qcow2", &image])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Its prompt comes when the image is open.
    let mut input = child.stdin.take().unwrap();
    let mut piece = [0; 64];
    let said = child.stdout.as_mut().unwrap().read(&mut piece).unwrap();
    assert!(said > 0);
    let found = only(0, &image);
    input.write_all(b"quit\n").unwrap();
    drop(input);
    child.wait().unwrap();
    assert_eq!(found, ["in-use"]);
    assert_eq!(only(0, &image), [""; 0]);
}

#[test]
fn very_long_chains() {
    let dir = tempfile::tempdir().unwrap();
    let image = empty_chain(dir.path(), 10_500);
    let begin = Instant::now();
    let report = json(4, &["check", "--links-only", &image]);
    assert_eq!(report["depth"], 10_000);
    let found = codes(&report);
    for code in ["chain-too-long", "limit-libvirt", "limit-stack"] {
        assert!(found.contains(&code.into()), "{found:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(10));
    let report = json(0, &["view", "--max-layers", "20000", &image]);
    assert_eq!(report["depth"], 10_500);
}
