//! The directory that a chain goes into, and the file for what is expected.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::cleanup::Unfinished;
use crate::cli::Build;

/// Where things go.
pub struct Place {
    /// All that was made so far, which goes if the chain is not finished.
    pub made: Unfinished,
    /// For what the guest is to see.
    pub expected: Option<Output>,
    /// Holds the lock on the directory.
    _dir: File,
}

/// A file that is written at the end.
pub struct Output {
    pub path: PathBuf,
    pub file: File,
}

impl Place {
    /// Makes the directory and empties it of a chain that is to be replaced.
    pub fn take(args: &Build) -> Result<Self> {
        let (dir, made) = (&args.dir, Unfinished::new());
        let new: Vec<_> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let lock = lock(dir)?;
        for dir in new.iter().rev().filter(|dir| !dir.as_os_str().is_empty()) {
            made.dir(dir);
        }
        let old = layers(dir)?;
        ensure!(
            args.force || old.is_empty(),
            "{} has a chain already: --force replaces it",
            dir.display()
        );
        let expected = args.expected.as_deref();
        let expected = expected.map(|path| Output::open(path, dir, &old, &made));
        let expected = expected.transpose()?;
        for path in old {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(Self {
            made,
            expected,
            _dir: lock,
        })
    }
}

/// Two at once in one directory would make one chain of both.
fn lock(dir: &Path) -> Result<File> {
    let name = dir.display();
    let file = File::open(dir).with_context(|| format!("cannot open {name}"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => bail!(
            "another qcow2-chain builds a chain in {name}: wait for it or name another directory"
        ),
        // Some file systems know no locks.
        _ => Ok(file),
    }
}

/// Whether a layer may have this name.
fn is_layer(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let number = name.and_then(|name| {
        let rest = name.strip_prefix('l')?;
        rest.strip_suffix(".qcow2").or(rest.strip_suffix(".raw"))
    });
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The chain that is there.
fn layers(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut layers = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if is_layer(&path) {
            layers.push(path);
        }
    }
    Ok(layers)
}

impl Output {
    /// What is in the file stays until it is written.
    fn open(path: &Path, dir: &Path, layers: &[PathBuf], made: &Unfinished) -> Result<Self> {
        let cannot = || format!("cannot write {}", path.display());
        let special = path.metadata().is_ok_and(|data| !data.is_file());
        ensure!(!special, "{} is not a regular file", path.display());
        let file = match made.file(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // A symbolic link may lead to where nothing is yet.
                let mut options = OpenOptions::new();
                options.write(true).create(true).truncate(false).open(path)
            }
            result => result,
        };
        let file = file.with_context(cannot)?;
        let real = path.canonicalize().with_context(cannot)?;
        let id = |data: fs::Metadata| (data.dev(), data.ino());
        let this = id(file.metadata().with_context(cannot)?);
        let same = |layer: &PathBuf| layer.metadata().is_ok_and(|data| id(data) == this);
        let dir = dir.canonicalize().with_context(cannot)?;
        let taken = real.parent() == Some(&dir) && is_layer(&real);
        ensure!(
            !taken && !layers.iter().any(same),
            "--expected {}: that is a layer of the chain; name another file",
            path.display()
        );
        let path = path.to_owned();
        Ok(Self { path, file })
    }
}
