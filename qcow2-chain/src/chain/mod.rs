//! A chain of files: found from its top, link by link, without trusting any.

mod file;
mod format;
mod names;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rust_qcow2::format::header::{Autoclear, CompressionType, Incompatible};
use rust_qcow2::host::local::LocalFile;
use rust_qcow2::inspect::Inspection;

pub use file::{FileFacts, open_read_only};
pub use format::Looks;
pub use names::{Name, Policy, Refusal, for_qemu, link};

/// Bytes that disks are a multiple of.
const SECTOR: u64 = 512;

/// One file of a chain.
pub struct Layer {
    /// As named by the user or by the layer above.
    pub name: String,
    /// The name as it is resolved by whoever opens the layer above.
    pub path: PathBuf,
    /// The file itself, free of links.
    pub real: PathBuf,
    /// What the file system says.
    pub file: FileFacts,
    /// What is in the file.
    pub kind: Kind,
}

/// What a layer is.
pub enum Kind {
    /// A qcow2 image.
    Qcow2(Box<Qcow2>),
    /// A raw image: the disk as it is.
    Raw,
    /// Another format, which is not looked into.
    Other(String),
}

/// What the header of a layer says.
pub struct Qcow2 {
    /// Bytes of the guest's disk.
    pub size: u64,
    /// Version of the format.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bytes of a cluster or subcluster.
    pub unit: u64,
    /// Bytes of the L1 table.
    pub l1_bytes: u64,
    /// Bytes of the refcount table.
    pub refcount_table_bytes: u64,
    /// L2 entries know subclusters.
    pub extended_l2: bool,
    /// Feature bits.
    pub incompatible: Incompatible,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// The encryption method, 0 for none.
    pub crypt_method: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// It has persistent bitmaps.
    pub bitmaps: bool,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
}

/// Why a chain ends where it ends.
#[derive(Clone, Debug)]
pub enum End {
    /// The last layer has no backing file.
    Complete,
    /// The backing file is not there.
    Missing(PathBuf),
    /// The backing file is a layer further up, which is given by its depth.
    Loop(PathBuf, usize),
    /// The backing file was not opened, as nobody allowed it.
    Refused(Refusal),
    /// The backing file cannot be read or makes no sense.
    Unreadable(PathBuf, String),
    /// There are more layers than allowed.
    TooLong(usize),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Complete => return f.write_str("complete"),
            Self::Missing(path) => write!(f, "{} is missing", path.display())?,
            Self::Loop(path, depth) => write!(
                f,
                "the backing file of the last layer, {}, is the layer at depth {depth}: a loop",
                path.display()
            )?,
            Self::Refused(refusal) => refusal.fmt(f)?,
            Self::Unreadable(path, why) => write!(f, "{}: {why}", path.display())?,
            Self::TooLong(limit) => {
                return write!(f, "there are more than {limit} layers (--max-layers)");
            }
        }
        f.write_str("; `qcow2-chain check` says what to do")
    }
}

/// The layers from the top down, depth 0 being the top.
pub struct Chain {
    /// At least one.
    pub layers: Vec<Layer>,
    /// What comes below the last of them.
    pub end: End,
}

/// Why a file is no layer.
struct Unusable(String);

impl Layer {
    /// The guest's disk in bytes; `None` where the format is not known.
    pub fn disk_size(&self) -> Option<u64> {
        match &self.kind {
            Kind::Qcow2(image) => Some(image.size),
            // In sectors, as QEMU has it.
            Kind::Raw => Some(self.file.length.next_multiple_of(SECTOR)),
            Kind::Other(_) => None,
        }
    }

    /// The header, for a qcow2 image.
    pub fn qcow2(&self) -> Option<&Qcow2> {
        match &self.kind {
            Kind::Qcow2(image) => Some(image),
            _ => None,
        }
    }

    /// Name of the format.
    pub fn format(&self) -> &str {
        match &self.kind {
            Kind::Qcow2(_) => "qcow2",
            Kind::Raw => "raw",
            Kind::Other(name) => name,
        }
    }

    /// Opens the file once more, for reading, as long as it is still the same.
    pub fn reopen(&self) -> Result<LocalFile> {
        let (file, facts) = open_read_only(&self.real)
            .with_context(|| format!("cannot open {}", self.real.display()))?;
        anyhow::ensure!(
            facts.id == self.file.id,
            "{} is another file now",
            self.real.display()
        );
        Ok(LocalFile::new(file))
    }

    /// The mapping tables.
    pub fn inspect(&self) -> Result<Inspection<LocalFile>> {
        Inspection::open(self.reopen()?).with_context(|| self.real.display().to_string())
    }
}

impl Chain {
    /// Follows the links from `top` down. Where a link cannot be followed the
    /// chain ends, and says why; only the top has to be usable.
    pub fn open(top: &Path, policy: &Policy) -> Result<Self> {
        let real = top
            .canonicalize()
            .with_context(|| format!("cannot open {}", top.display()))?;
        let policy = policy.with_home(top, &real);
        let mut layers = Vec::new();
        let mut seen = HashMap::new();
        let name = top.display().to_string();
        let top = load(name, top.to_owned(), real, None)
            .map_err(|Unusable(why)| anyhow::anyhow!("{}: {why}", top.display()))?;
        seen.insert(top.file.id, 0);
        layers.push(top);
        let end = loop {
            let last: &Layer = &layers[layers.len() - 1];
            let Some((name, format)) = last.qcow2().and_then(|image| {
                let name = image.backing_file.clone()?;
                Some((name, image.backing_format.clone()))
            }) else {
                break End::Complete;
            };
            if layers.len() >= policy.max_layers {
                break End::TooLong(policy.max_layers);
            }
            let (path, real) = match names::resolve(&name, &last.path, &policy) {
                Ok(found) => found,
                Err(end) => break end,
            };
            let layer = match load(name, path.clone(), real, format.as_deref()) {
                Ok(layer) => layer,
                Err(Unusable(why)) => break End::Unreadable(path, why),
            };
            if let Some(depth) = seen.insert(layer.file.id, layers.len()) {
                break End::Loop(path, depth);
            }
            layers.push(layer);
        };
        Ok(Self { layers, end })
    }

    /// Size of the disk that the guest sees.
    pub fn disk_size(&self) -> u64 {
        self.layers[0].disk_size().unwrap_or(0)
    }

    /// The finest unit of mapping in the chain, in bytes.
    pub fn unit(&self) -> u64 {
        let units = self.layers.iter().filter_map(Layer::qcow2);
        units.map(|image| image.unit).min().unwrap_or(65536)
    }
}

/// Reads what a layer is. `format` is what the layer above says.
fn load(
    name: String,
    path: PathBuf,
    real: PathBuf,
    format: Option<&str>,
) -> Result<Layer, Unusable> {
    let (file, facts) = open_read_only(&real).map_err(|error| Unusable(error.to_string()))?;
    let kind = match format {
        Some("qcow2") => qcow2(file)?,
        Some("raw") => Kind::Raw,
        Some(other) => Kind::Other(other.to_owned()),
        None => match facts.looks {
            Looks::Qcow2 => qcow2(file)?,
            Looks::CutQcow2 => return Err(Unusable("qcow2 header too short".into())),
            Looks::Other(name) => Kind::Other(name.to_owned()),
            Looks::Unknown => Kind::Raw,
        },
    };
    Ok(Layer {
        name,
        path,
        real,
        file: facts,
        kind,
    })
}

fn qcow2(file: std::fs::File) -> Result<Kind, Unusable> {
    let image = Inspection::open(LocalFile::new(file)).map_err(|e| Unusable(e.to_string()))?;
    let header = image.header();
    let text = |name: Option<&[u8]>, what: &str| {
        let name = name.map(|name| String::from_utf8(name.to_vec()));
        name.transpose().map_err(|_| {
            Unusable(format!(
                "{what} is not valid UTF-8: this program cannot follow it"
            ))
        })
    };
    // The rest of the header may be megabytes long and is not kept.
    Ok(Kind::Qcow2(Box::new(Qcow2 {
        size: header.size,
        version: header.version,
        cluster_size: image.geometry().cluster_size(),
        unit: image.unit(),
        l1_bytes: u64::from(header.l1_size) * 8,
        refcount_table_bytes: u64::from(header.refcount_table_clusters)
            .saturating_mul(image.geometry().cluster_size()),
        extended_l2: header.incompatible.contains(Incompatible::EXTENDED_L2),
        incompatible: header.incompatible,
        compression: header.compression_type().unwrap_or_default(),
        crypt_method: header.crypt_method,
        snapshots: header.nb_snapshots,
        bitmaps: header.autoclear.contains(Autoclear::BITMAPS),
        backing_file: text(image.backing_file(), "Backing file name")?,
        backing_format: text(image.backing_format(), "Backing format")?,
        data_file: text(image.data_file(), "Data file name")?,
    })))
}
