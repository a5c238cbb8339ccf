//! Changes of an image as a whole that fail at each of their requests.

use proptest::prelude::*;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::memory::MemoryFile;
use rust_qcow2::image::snapshots::NewSnapshot;

use crate::common::{open, read, write};
use crate::run::{ALL, Model, Op, Run, SECTOR, content, resize, worse_than_leaks};

/// What is changed as a whole, and may fail on the way.
pub fn change() -> impl Strategy<Value = Op> {
    prop_oneof![
        Just(Op::Create),
        (0..8usize).prop_map(Op::Apply),
        (0..8usize).prop_map(Op::Delete),
        resize(),
        Just(Op::Empty),
        (0..=6u32).prop_map(Op::Width),
        (2..=3u32).prop_map(Op::Version),
    ]
}

impl Run {
    /// The same run, from a copy of its file.
    pub fn again(&self, bytes: &[u8]) -> Self {
        let file = MemoryFile::new(bytes.to_vec());
        Self {
            image: open(&file, None, &self.options),
            file,
            options: self.options.clone(),
            model: self.model.clone(),
        }
    }

    /// Does one operation that may fail.
    pub fn attempt(&self, op: &Op) -> rust_qcow2::Result<()> {
        match *op {
            Op::Create => {
                let new = NewSnapshot {
                    name: b"last".to_vec(),
                    ..NewSnapshot::default()
                };
                self.image.create_snapshot(&new).map(drop)
            }
            Op::Apply(index) => match self.pick(index) {
                Some((id, _)) => self.go_back(&id),
                None => Ok(()),
            },
            Op::Delete(index) => match self.pick(index) {
                Some((id, _)) => self.image.delete_snapshot(Some(&id), None),
                None => Ok(()),
            },
            Op::Resize(size, how) => self.image.resize(size, true, how, true),
            Op::Empty => self.image.make_empty(),
            Op::Width(order) => {
                let order = RefcountOrder::new(order).unwrap();
                self.image
                    .change_refcount_width(order, &mut |_, _| ())
                    .map(drop)
            }
            Op::Version(version) => match (self.image.info().version, version) {
                (3, 2) => self.image.downgrade(&mut |_, _| ()),
                (2, 3) => self.image.upgrade(&mut |_, _| ()),
                _ => Ok(()),
            },
            _ => unreachable!("not a change of the whole"),
        }
    }

    /// Ends the use of the image, and returns what it holds; leaks are repaired.
    pub fn end(self) -> Model {
        self.image.inactivate().unwrap();
        let image = open(&self.file, None, &self.options);
        let low = worse_than_leaks(&image);
        assert!(low.is_empty(), "{low:?}");
        content(&self.file, image.size())
    }
}

/// Fails `last` at `bad` requests to the file from each one on, in a fresh image each time.
pub fn check_failures(run: &Run, last: &Op, bad: usize) {
    let bytes = run.file.bytes();
    let before = run.again(&bytes).end();
    let good = run.again(&bytes);
    if good.attempt(last).is_err() {
        // Not for this image.
        return;
    }
    let after = good.end();
    let same = |found: &Model| {
        if matches!(last, Op::Empty | Op::Resize(..)) || before.disk.len() != after.disk.len() {
            // Not done at one stroke; what snapshots show ends where the disk does.
            let size = found.disk.len();
            let both = before.disk.iter().zip(&after.disk);
            for (found, (before, after)) in found.disk.iter().zip(both) {
                assert!(found == before || found == after);
            }
            let seen = |model: &Model| {
                let mut contents: Vec<_> = model.snapshots.clone();
                contents
                    .iter_mut()
                    .for_each(|(_, content)| content.truncate(size));
                contents
            };
            (size == before.disk.len() || size == after.disk.len())
                && (seen(found) == seen(&before) || seen(found) == seen(&after))
        } else {
            *found == before || *found == after
        }
    };
    for steps in 0.. {
        let failing = run.again(&bytes);
        failing.file.fail_some(steps, bad);
        let result = failing.attempt(last);
        failing.file.fail_after(None);
        if result.is_ok() {
            break;
        }
        // The process ends instead.
        let left = failing.again(&failing.file.bytes()).end();
        assert!(same(&left), "request {steps}: lost when the process ended");
        if steps % 3 == 0 && !failing.image.is_broken() {
            // It goes on for a while, which takes clusters, and ends then.
            let size = failing.image.size().min(16 * SECTOR);
            write(&failing.image, 0, &vec![0x99; size as usize]).unwrap();
            let left = failing.again(&failing.file.bytes()).end();
            // As if that had not been written.
            let without = |model: &Model| {
                let mut left = left.clone();
                let old = model.disk.chunks(SECTOR as usize);
                for (sector, old) in left.disk.chunks_mut(SECTOR as usize).zip(old) {
                    if sector.len() == old.len() && sector.iter().all(|byte| *byte == 0x99) {
                        sector.copy_from_slice(old);
                    }
                }
                left
            };
            assert!(
                same(&without(&before)) || same(&without(&after)),
                "request {steps}: lost when the process went on and ended"
            );
            continue;
        }
        if failing.image.is_broken() {
            // Repaired when it is opened.
            let found = failing.end();
            assert!(same(&found), "request {steps}: lost when opened again");
        } else if steps % 2 == 1 {
            match failing.attempt(last) {
                Ok(()) => {}
                // What failed was to give back the space of a snapshot that is gone.
                Err(error) if error.code() == libc::ENOENT => {
                    assert!(matches!(last, Op::Delete(_)));
                }
                // Counts that could not be taken back. They may be too small to do
                // again what was done but for them.
                Err(error) => {
                    assert_eq!(error.code(), libc::EINVAL);
                    failing.image.check(ALL, &mut |_| ()).unwrap();
                    let _ = failing.attempt(last);
                }
            }
            let found = failing.end();
            assert!(
                found == after,
                "request {steps}: tried again, not as it should be"
            );
        } else {
            let size = failing.image.size();
            let disk = read(&failing.image, 0, size as usize);
            let found = failing.end();
            // The new size may be in the header although that was not flushed.
            let len = disk.len().min(found.disk.len());
            assert!(
                disk[..len] == found.disk[..len]
                    && (disk.len() == found.disk.len() || matches!(last, Op::Resize(..))),
                "request {steps}: another disk when opened again"
            );
            assert!(
                same(&found),
                "request {steps}: neither as before nor as after"
            );
        }
    }
}
