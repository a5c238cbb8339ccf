//! Running the tool, and images to run it on.
#![allow(dead_code, reason = "not every test uses everything")]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

use rust_qcow2::format::extension::Extensions;
use rust_qcow2::format::header::{Autoclear, Compatible, Header, Incompatible};
use rust_qcow2::format::refcount::RefcountOrder;
use serde_json::{Value, json as value};

/// Runs the tool.
pub fn tool(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qcow2-chain"))
        .args(args)
        .output()
        .unwrap()
}

/// Runs the tool, whose exit code is `code` and which does not panic.
pub fn expect(code: i32, args: &[&str]) -> String {
    let output = tool(args);
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(!err.contains("panicked"), "{args:?}: {err}");
    assert_eq!(output.status.code(), Some(code), "{args:?}\n{out}\n{err}");
    if code == 1 {
        err.into_owned()
    } else {
        out.into_owned()
    }
}

/// Runs the tool with JSON output.
pub fn json(code: i32, args: &[&str]) -> Value {
    let mut all = args.to_vec();
    all.extend(["--output", "json"]);
    serde_json::from_str(&expect(code, &all)).unwrap()
}

/// The codes of what `check` finds, in order and each once.
pub fn codes(report: &Value) -> Vec<String> {
    let findings = report["findings"].as_array().unwrap();
    let codes: BTreeSet<_> = findings
        .iter()
        .map(|f| f["code"].as_str().unwrap().to_owned())
        .collect();
    codes.into_iter().collect()
}

/// Where the unpatched program is; `None` where it was not built.
pub fn qemu(name: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("QCOW2_CHAIN_QEMU").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/stock/bin"),
        PathBuf::from,
    );
    let path = dir.join(name);
    if path.exists() {
        return Some(path);
    }
    assert!(
        std::env::var_os("QCOW2_CHAIN_QEMU").is_none(),
        "no {}",
        path.display()
    );
    eprintln!("skipped: no {}", path.display());
    None
}

/// Runs one of QEMU's programs.
pub fn run(program: &Path, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// An image without data.
pub struct Empty<'a> {
    pub size: u64,
    pub backing: Option<&'a str>,
    pub format: Option<&'a str>,
}

impl Default for Empty<'_> {
    fn default() -> Self {
        Self {
            size: 1 << 30,
            backing: None,
            format: Some("qcow2"),
        }
    }
}

impl Empty<'_> {
    /// The header that is written.
    pub fn header(&self) -> Header {
        Header {
            version: 3,
            cluster_bits: 16,
            size: self.size,
            backing_name: None,
            crypt_method: 0,
            l1_size: self.size.div_ceil(1 << 29) as u32,
            l1_table_offset: 0x30000,
            refcount_table_offset: 0x10000,
            refcount_table_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: RefcountOrder::BITS_16,
            header_length: 112,
            compression: 0,
            unknown_fields: Vec::new(),
        }
    }

    /// Writes it: header, refcount table, refcount block, L1 table.
    pub fn write(&self, path: &Path) {
        let extensions = Extensions {
            backing_format: self
                .format
                .filter(|_| self.backing.is_some())
                .map(Into::into),
            ..Extensions::default()
        };
        let first = extensions
            .encode(&mut self.header(), self.backing.map(str::as_bytes))
            .unwrap();
        let file = File::create(path).unwrap();
        // The rest of the cluster is a hole.
        let used = first.iter().rposition(|b| *b != 0).unwrap() + 1;
        file.write_all_at(&first[..used], 0).unwrap();
        file.write_all_at(&0x20000u64.to_be_bytes(), 0x10000)
            .unwrap();
        file.write_all_at(&[0, 1, 0, 1, 0, 1, 0, 1], 0x20000)
            .unwrap();
        file.set_len(0x40000).unwrap();
    }
}

/// A chain of empty layers, `0` the base and the last one the top, which is
/// returned.
pub fn empty_chain(dir: &Path, layers: usize) -> String {
    for number in 0..layers {
        let below = number.checked_sub(1).map(|below| below.to_string());
        Empty {
            backing: below.as_deref(),
            ..Empty::default()
        }
        .write(&dir.join(number.to_string()));
    }
    name(&dir.join((layers - 1).to_string()))
}

/// Makes layers with data, each on the one before by the name that is given,
/// and a file with what the last one shows.
pub fn layers(dir: &Path, names: &[(&str, String)]) -> Option<String> {
    let (img, io) = (qemu("qemu-img")?, qemu("qemu-io")?);
    for (at, (file, backing)) in names.iter().enumerate() {
        let path = dir.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let path = name(&path);
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if at > 0 {
            args.extend(["-u", "-b", backing, "-F", "qcow2"]);
        }
        run(&img, &[&args[..], &[&path, "8M"]].concat());
        let write = format!("write -P {} {}k 192k", at + 1, at * 128);
        let image = format!("driver=qcow2,backing=,file.filename={path}");
        run(&io, &["--image-opts", "-c", &write, &image]);
    }
    Some(name(&dir.join("raw")))
}

/// What the image records.
pub fn backing_name(image: &str) -> Value {
    let info = ["info", "-f", "qcow2", "--output", "json", image];
    let info = run(&qemu("qemu-img").unwrap(), &info);
    let mut info: Value = serde_json::from_str(&info).unwrap();
    info["backing-filename"].take()
}

/// A storage daemon; killed with the test.
pub struct Daemon {
    pub child: Child,
    /// Where its monitor is.
    pub socket: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    /// Starts the program in `dir`, with these arguments and a monitor.
    pub fn new(program: &Path, dir: &Path, args: &[String]) -> Self {
        let socket = name(&dir.join("qmp"));
        let child = Command::new(program)
            .args(args)
            .arg("--chardev")
            .arg(format!("socket,path={socket},server=on,wait=off,id=qmp"))
            .args(["--monitor", "chardev=qmp"])
            .current_dir(dir)
            .spawn()
            .unwrap();
        for _ in 0..200 {
            if Path::new(&socket).exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { child, socket }
    }
}

/// A path as an argument.
pub fn name(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// All keys of a value with their types, one a line: what programs rely on.
pub fn shape(value: &Value) -> String {
    let mut lines = BTreeSet::new();
    let mut todo = vec![(String::new(), value)];
    while let Some((path, value)) = todo.pop() {
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(items) => {
                todo.extend(items.iter().map(|item| (format!("{path}[]"), item)));
                "array"
            }
            Value::Object(map) => {
                todo.extend(
                    map.iter()
                        .map(|(key, item)| (format!("{path}.{key}"), item)),
                );
                "object"
            }
        };
        lines.insert(format!("{path} {kind}\n"));
    }
    lines.into_iter().collect()
}

/// Compares the shape with the one that was promised. `QCOW2_CHAIN_BLESS=1`
/// writes it anew.
pub fn same_shape(value: &Value, file: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/shapes")
        .join(file);
    let found = shape(value);
    if std::env::var_os("QCOW2_CHAIN_BLESS").is_some() {
        std::fs::write(&path, &found).unwrap();
    }
    let promised = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, promised, "{}", path.display());
}

/// Numbers that look random and are the same every time.
pub struct Random(pub u64);

impl Random {
    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// Builds a chain of 1000 layers of a disk of 16 GiB; what `build` says.
pub fn thousand_layers(dir: &Path) -> Value {
    let chain = name(&dir.join("c"));
    let words = [
        "build",
        "--layers",
        "1000",
        "--disk",
        "16G",
        "--data-per-layer",
        "256K",
        &chain,
    ];
    json(0, &words)
}

/// A calibration whose constants are easy to calculate with.
pub fn calibration(dir: &Path) -> String {
    let model = |figure: &str, terms: &[(&str, f64)]| {
        let names: Vec<_> = terms.iter().map(|(name, _)| *name).collect();
        let constants: Vec<_> = terms.iter().map(|(_, value)| *value).collect();
        value!({
            "figure": figure, "terms": names, "residuals": [],
            "fit": {
                "constants": constants, "relative_error": 0.1, "points": 9,
                "inverse": vec![0.0; names.len() * names.len()],
            },
        })
    };
    let driver = |driver: &str, crashes: Value, models: Vec<Value>| {
        value!({
            "driver": driver, "qemu": "10.0.13", "aio": "threads", "measured_at": 0, "points": [],
            "deepest_read": {"works": 20, "crashes": crashes}, "models": models,
        })
    };
    let open = [
        ("s: a chain", 1.0),
        ("s/layer", 0.5),
        ("s/pair of layers", 0.25),
        ("s/MiB of L1 and refcount tables", 0.0),
    ];
    let read = [
        ("us: a request", 10.0),
        ("us/level", 1.0),
        ("us/lookup in a table", 0.0),
        ("us/visit of a node", 0.125),
        ("us/visit among a thousand nodes", 0.0),
    ];
    let memory = [("B: the program", 8e6), ("B/layer", 1e5)];
    let indexed = [("us: a request", 1.5), ("us: many files", 0.0)];
    let all = value!({
        "version": 1,
        "machine": {"cpu": "none", "cpus": 1, "kernel": "0", "name": "elsewhere"},
        "drivers": [
            driver("qcow2", value!(25), vec![
                model("open", &open), model("memory_warm", &memory), model("read_hole", &read),
                model("read_data", &read),
            ]),
            driver("rqcow2", Value::Null, vec![
                model("memory_warm", &memory), model("read_hole", &indexed),
            ]),
        ],
    });
    let path = dir.join("calibration.json");
    std::fs::write(&path, all.to_string()).unwrap();
    name(&path)
}
