//! What is not to stay behind when the work is not finished: temporary
//! directories, half-made chains, and QEMU's programs. A signal ends the
//! program at any time, so that all of it is registered here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// Whoever holds this makes or removes files that are registered. A signal
/// takes it and never gives it back, so that nothing more is made.
static REGISTERED: Mutex<BTreeMap<u64, Vec<Item>>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// How often removal is tried: other threads go on writing what they have open.
const TRIES: usize = 50;
const PAUSE: Duration = Duration::from_millis(20);

enum Item {
    File(PathBuf),
    /// Goes if there is nothing of others in it.
    Dir(PathBuf),
    /// Goes with everything in it.
    Tree(PathBuf),
}

impl Item {
    /// Whether it is gone, as far as it is to go.
    fn remove(&self) -> bool {
        let result = match self {
            Self::File(path) => fs::remove_file(path),
            Self::Dir(path) => {
                let _ = fs::remove_dir(path);
                return true;
            }
            Self::Tree(path) => fs::remove_dir_all(path),
        };
        result.is_ok() || matches!(self.exists(), Ok(false))
    }

    fn exists(&self) -> io::Result<bool> {
        let (Self::File(path) | Self::Dir(path) | Self::Tree(path)) = self;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            result => result.map(|_| true),
        }
    }
}

fn registered() -> MutexGuard<'static, BTreeMap<u64, Vec<Item>>> {
    REGISTERED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Files and directories that are removed with this, unless they are kept.
pub struct Unfinished(u64);

impl Unfinished {
    /// Nothing as yet.
    pub fn new() -> Self {
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Makes a file that is not there.
    pub fn file(&self, path: &Path) -> io::Result<File> {
        self.register(Item::File(path.to_owned()), || File::create_new(path))
    }

    /// Makes a directory that is not there, for its owner alone; all that
    /// comes into it is removed with it.
    pub fn tree(&self, path: &Path) -> io::Result<()> {
        self.register(Item::Tree(path.to_owned()), || {
            fs::DirBuilder::new().mode(0o700).create(path)
        })
    }

    /// A directory that was made, and goes if it is empty.
    pub fn dir(&self, path: &Path) {
        let _ = self.register(Item::Dir(path.to_owned()), || Ok(()));
    }

    fn register<T>(&self, item: Item, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let mut all = registered();
        let made = make()?;
        all.entry(self.0).or_default().push(item);
        Ok(made)
    }

    /// It is finished: all of it stays.
    pub fn keep(self) {
        registered().remove(&self.0);
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let mut all = registered();
        // Under the lock: a signal waits until they are gone.
        for item in all.remove(&self.0).unwrap_or_default().iter().rev() {
            item.remove();
        }
    }
}

/// Does something that a signal does not interrupt.
pub fn uninterrupted<T>(work: impl FnOnce() -> T) -> T {
    let _held = registered();
    work()
}

/// The work is done, and its result is what counts: a signal that comes now
/// ends nothing any more, one that came before ends the program here.
pub fn done() {
    std::mem::forget(registered());
}

/// From now on SIGINT, SIGTERM and SIGHUP remove what is unfinished before they
/// end the program.
pub fn on_signals() -> Result<()> {
    let ignored = ignored();
    let mut wanted = vec![SIGHUP, SIGINT, SIGTERM];
    // What `nohup` and a shell's `&` have set stays so.
    wanted.retain(|signal| ignored & (1 << (signal - 1)) == 0);
    let mut signals = Signals::new(wanted).context("cannot watch signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                end(signal);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn end(signal: i32) {
    let mut all = registered();
    for _ in 0..TRIES {
        let running = kill_children();
        for items in all.values_mut() {
            while items.last().is_some_and(Item::remove) {
                items.pop();
            }
        }
        all.retain(|_, items| !items.is_empty());
        if all.is_empty() && running == 0 {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    // The shell that started this is to know that it was a signal. The first
    // process of a container cannot be ended by one.
    if std::process::id() != 1 {
        let _ = emulate_default_handler(signal);
    }
    std::process::exit(128 + signal);
}

/// Signals that are ignored, as bits; none where the kernel does not tell.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let mask = lines.find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// Ends the children that are running; how many there were.
fn kill_children() -> usize {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten();
    let lists = threads.flatten().filter_map(|thread| {
        let path = thread.path().join("children");
        fs::read_to_string(path).ok()
    });
    let children: Vec<i32> = lists
        .flat_map(|list| {
            let words = list.split_whitespace();
            words
                .filter_map(|word| word.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect();
    let running = children.into_iter().filter(|child| !is_dead(*child));
    running
        .filter_map(Pid::from_raw)
        .filter(|child| kill_process(*child, Signal::KILL).is_ok())
        .count()
}

/// Dead, and only not yet waited for.
fn is_dead(process: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap_or_default();
    state.trim_start().starts_with(['Z', 'X'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_and_finished() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, file) = (dir.path().join("tree"), dir.path().join("file"));
        let unfinished = Unfinished::new();
        unfinished.tree(&tree).unwrap();
        fs::write(tree.join("other"), "").unwrap();
        unfinished.file(&file).unwrap();
        assert!(Unfinished::new().file(&file).is_err());
        assert!(file.exists() && tree.exists());
        drop(unfinished);
        assert!(!file.exists() && !tree.exists());
        let unfinished = Unfinished::new();
        unfinished.file(&file).unwrap();
        unfinished.keep();
        assert!(file.exists());
        // What others have put there stays.
        let unfinished = Unfinished::new();
        unfinished.dir(dir.path());
        drop(unfinished);
        assert!(file.exists());
    }
}
