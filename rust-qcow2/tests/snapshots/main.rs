//! Internal snapshots and amend: random operations beside a model of the disk
//! and of all snapshots, and crashes between any two writes.

mod common;

use common::{Shape, create, open, read, write};
use proptest::prelude::*;
use rust_qcow2::Error;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::host::{File, Preallocation, ZeroFlags};
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::snapshots::NewSnapshot;
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};
use rust_qcow2::units::GuestOffset;

const SIZE: u64 = 48 << 10;
const SECTOR: u64 = 512;
const ALL: Fix = Fix {
    leaks: true,
    errors: true,
};

#[derive(Clone, Debug)]
enum Op {
    Write { sector: u64, count: u64 },
    Zeroes { sector: u64, count: u64 },
    Discard { sector: u64, count: u64 },
    State { sector: u64, count: u64 },
    Create,
    Apply(usize),
    Delete(usize),
    Resize(u64, Preallocation),
    Flush,
    Reopen,
    Empty,
    Width(u32),
    Version(u32),
}

fn resize() -> impl Strategy<Value = Op> {
    // After a loss of power a file may be shorter than what was preallocated in it:
    // `change` alone has the other ways.
    (1..SIZE / SECTOR * 2).prop_map(|sectors| Op::Resize(sectors * SECTOR, Preallocation::Off))
}

fn grow() -> impl Strategy<Value = Op> {
    let how = prop_oneof![
        Just(Preallocation::Metadata),
        Just(Preallocation::Falloc),
        Just(Preallocation::Full),
    ];
    (1..SIZE / SECTOR * 2, how).prop_map(|(sectors, how)| Op::Resize(sectors * SECTOR, how))
}

fn op() -> impl Strategy<Value = Op> {
    let range = (0..SIZE / SECTOR, 1..24u64);
    prop_oneof![
        8 => range.clone().prop_map(|(sector, count)| Op::Write { sector, count }),
        2 => range.clone().prop_map(|(sector, count)| Op::Zeroes { sector, count }),
        2 => range.clone().prop_map(|(sector, count)| Op::Discard { sector, count }),
        1 => range.prop_map(|(sector, count)| Op::State { sector, count }),
        4 => Just(Op::Create),
        2 => (0..8usize).prop_map(Op::Apply),
        3 => (0..8usize).prop_map(Op::Delete),
        1 => resize(),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => Just(Op::Empty),
        1 => (0..=6u32).prop_map(Op::Width),
        2 => (2..=3u32).prop_map(Op::Version),
    ]
}

fn shape() -> impl Strategy<Value = Shape> {
    (2..=6u32, 9..=11u32, any::<bool>(), any::<bool>()).prop_map(
        |(refcount_order, cluster_bits, lazy_refcounts, extended_l2)| Shape {
            version: 3,
            cluster_bits: if extended_l2 { 14 } else { cluster_bits },
            refcount_order,
            lazy_refcounts,
            extended_l2,
        },
    )
}

/// The disk, and what each snapshot was taken of, by identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    disk: Vec<u8>,
    snapshots: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A program that uses an image, and what the image should hold.
struct Run {
    file: MemoryFile,
    image: Image<MemoryHost>,
    options: OptionRequest,
    model: Model,
}

impl Run {
    fn do_one(&mut self, number: usize, op: &Op) {
        let cluster = self.image.geometry().cluster_size();
        let size = self.model.disk.len() as u64;
        let clip = |sector: u64, count: u64| {
            let at = (sector * SECTOR).min(size);
            (at, (count * SECTOR).min(size - at))
        };
        let whole = |sector: u64, count: u64| {
            let (at, len) = clip(sector, count);
            let start = at / cluster * cluster;
            (start, (at + len).next_multiple_of(cluster).min(size))
        };
        match *op {
            Op::Write { sector, count } => {
                let (at, len) = clip(sector, count);
                let byte = (number % 255) as u8 + 1;
                write(&self.image, at, &vec![byte; len as usize]).unwrap();
                self.model.disk[at as usize..(at + len) as usize].fill(byte);
            }
            Op::Zeroes { sector, count } => {
                let (at, end) = whole(sector, count);
                let flags = ZeroFlags {
                    may_unmap: number % 2 == 0,
                    no_fallback: false,
                };
                if self.image.info().version < 3 {
                    // Without marks for zeroes; the block layer does that.
                    write(&self.image, at, &vec![0; (end - at) as usize]).unwrap();
                } else {
                    self.image
                        .write_zeroes(GuestOffset(at), end - at, flags)
                        .unwrap();
                }
                self.model.disk[at as usize..end as usize].fill(0);
            }
            Op::Discard { sector, count } => {
                let (at, end) = whole(sector, count);
                self.image.discard(GuestOffset(at), end - at).unwrap();
                self.model.disk[at as usize..end as usize].fill(0);
            }
            Op::State { sector, count } => {
                let at = self.image.info().vm_state_offset + sector * SECTOR;
                write(&self.image, at, &vec![0xaa; (count * SECTOR) as usize]).unwrap();
            }
            Op::Create => self.create(number),
            Op::Apply(index) => {
                if let Some((id, content)) = self.pick(index) {
                    let size = self.image.snapshot_disk_size(&id).unwrap();
                    if size != self.image.size() {
                        self.image
                            .resize(size, true, Preallocation::Off, true)
                            .unwrap();
                    }
                    match self.image.apply_snapshot(&id) {
                        Ok(()) => self.model.disk = content,
                        Err(error) => {
                            self.out_of_counts(&error);
                            self.model.disk.resize(size as usize, 0);
                        }
                    }
                }
            }
            Op::Delete(index) => {
                if let Some((id, _)) = self.pick(index) {
                    self.image.delete_snapshot(Some(&id), None).unwrap();
                    self.model.snapshots.retain(|(other, _)| *other != id);
                }
            }
            // Not in version 2 with snapshots.
            Op::Resize(..) if self.image.info().version < 3 && !self.model.snapshots.is_empty() => {
            }
            Op::Resize(size, how) => {
                self.image.resize(size, true, how, true).unwrap();
                self.model.disk.resize(size as usize, 0);
            }
            Op::Flush => {
                self.image.flush().unwrap();
                self.file.flush().unwrap();
            }
            Op::Reopen => {
                self.image.inactivate().unwrap();
                self.image = open(&self.file, None, &self.options);
            }
            Op::Empty => {
                self.image.make_empty().unwrap();
                self.model.disk.fill(0);
            }
            Op::Width(order) => {
                let order = RefcountOrder::new(order).unwrap();
                match self.image.change_refcount_width(order, &mut |_, _| ()) {
                    Ok(old) => {
                        self.image = open(&self.file, None, &self.options);
                        self.image.release(old).unwrap();
                    }
                    // Not in version 2, nor where a count is larger.
                    Err(error) => assert_eq!(error.code(), libc::EINVAL),
                }
            }
            Op::Version(version) => self.change_version(version),
        }
    }

    fn change_version(&mut self, version: u32) {
        if self.image.info().version == version {
            return;
        }
        match self.attempt(&Op::Version(version)) {
            Ok(()) => self.image = open(&self.file, None, &self.options),
            // Subclusters, other widths, snapshots of other sizes.
            Err(error) => assert_eq!(error.code(), libc::ENOTSUP),
        }
    }

    fn create(&mut self, number: usize) {
        let state = number as u64 % 3 * 700;
        let at = self.image.info().vm_state_offset;
        if state > 0 {
            write(&self.image, at, &vec![number as u8; state as usize]).unwrap();
        }
        let new = NewSnapshot {
            name: format!("s{number}").into_bytes(),
            vm_state_size: state,
            ..NewSnapshot::default()
        };
        match self.image.create_snapshot(&new) {
            Ok(id) => self.model.snapshots.push((id, self.model.disk.clone())),
            Err(error) => self.out_of_counts(&error),
        }
    }

    /// Small refcounts end somewhere. The space of the attempt is lost.
    fn out_of_counts(&self, error: &Error) {
        assert_eq!(error.code(), libc::EINVAL);
        self.image.check(ALL, &mut |_| ()).unwrap();
    }

    fn pick(&self, index: usize) -> Option<(Vec<u8>, Vec<u8>)> {
        let list = &self.model.snapshots;
        (!list.is_empty()).then(|| list[index % list.len()].clone())
    }
}

/// What a check finds that an interrupted change must not leave.
fn worse_than_leaks(image: &Image<MemoryHost>) -> Vec<String> {
    let mut low = Vec::new();
    let mut keep = |line: &str| {
        // Too high is a leak, and a copied flag that is missing costs a copy.
        if !line.starts_with("Leaked cluster") && !line.contains("OFLAG_COPIED") {
            low.push(line.to_owned());
        }
    };
    image.check(Fix::default(), &mut keep).unwrap();
    low
}

/// What an image holds, all snapshots included.
fn content(file: &MemoryFile, disk: u64) -> Model {
    let host = || MemoryHost {
        file: file.clone(),
        ..Default::default()
    };
    let flags = OpenFlags::default();
    let image = Image::open(host(), flags, &OptionRequest::default()).unwrap();
    assert_eq!(image.size(), disk);
    let snapshots = image.snapshots().into_iter().map(|snapshot| {
        let shown = Image::open(host(), flags, &OptionRequest::default()).unwrap();
        shown.load_snapshot(Some(&snapshot.id_str), None).unwrap();
        let mut content = vec![0; snapshot.disk_size as usize];
        // It has the size of the disk as it is.
        let len = snapshot.disk_size.min(shown.size()) as usize;
        content[..len].copy_from_slice(&read(&shown, 0, len));
        content.truncate(len);
        (snapshot.id_str, content)
    });
    Model {
        snapshots: snapshots.collect(),
        disk: read(&image, 0, disk as usize),
    }
}

fn cut(model: &Model) -> Model {
    let mut model = model.clone();
    let len = model.disk.len();
    for (_, content) in &mut model.snapshots {
        content.truncate(len);
    }
    model
}

fn options(small: bool) -> OptionRequest {
    OptionRequest {
        l2_cache_size: small.then_some(1024),
        l2_cache_entry_size: small.then_some(512),
        overlap_check: small.then(|| "all".to_owned()),
        ..Default::default()
    }
}

fn begin(shape: Shape, small: bool) -> Run {
    let file = create(shape, SIZE);
    let options = options(small);
    let image = open(&file, None, &options);
    let model = Model {
        disk: vec![0; SIZE as usize],
        snapshots: Vec::new(),
    };
    Run {
        file,
        image,
        options,
        model,
    }
}

/// What is changed as a whole, and may fail on the way.
fn change() -> impl Strategy<Value = Op> {
    prop_oneof![
        Just(Op::Create),
        (0..8usize).prop_map(Op::Apply),
        (0..8usize).prop_map(Op::Delete),
        resize(),
        grow(),
        Just(Op::Empty),
        (0..=6u32).prop_map(Op::Width),
        (2..=3u32).prop_map(Op::Version),
    ]
}

impl Run {
    /// The same run, from a copy of its file.
    fn again(&self, bytes: &[u8]) -> Self {
        let file = MemoryFile::new(bytes.to_vec());
        Self {
            image: open(&file, None, &self.options),
            file,
            options: self.options.clone(),
            model: self.model.clone(),
        }
    }

    /// Does one operation that may fail.
    fn attempt(&self, op: &Op) -> rust_qcow2::Result<()> {
        match *op {
            Op::Create => {
                let new = NewSnapshot {
                    name: b"last".to_vec(),
                    ..NewSnapshot::default()
                };
                self.image.create_snapshot(&new).map(drop)
            }
            Op::Apply(index) => match self.pick(index) {
                Some((id, _)) => self.image.apply_snapshot(&id),
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
    fn end(self) -> Model {
        self.image.inactivate().unwrap();
        let image = open(&self.file, None, &self.options);
        let low = worse_than_leaks(&image);
        assert!(low.is_empty(), "{low:?}");
        content(&self.file, image.size())
    }
}

/// Fails `last` at `bad` requests to the file from each one on, in a fresh image each time.
fn check_failures(run: &Run, last: &Op, bad: usize) {
    let bytes = run.file.bytes();
    let before = run.again(&bytes).end();
    let good = run.again(&bytes);
    if good.attempt(last).is_err() {
        // Not for this image.
        return;
    }
    let after = good.end();
    let same = |found: &Model| {
        if let Op::Empty | Op::Resize(..) = last {
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
                    failing.out_of_counts(&error);
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn snapshots_keep_what_they_were_taken_of(
        shape in shape(),
        small: bool,
        ops in prop::collection::vec(op(), 1..50),
    ) {
        let mut run = begin(shape, small);
        for (number, op) in ops.iter().enumerate() {
            run.do_one(number, op);
        }
        let size = run.model.disk.len() as u64;
        prop_assert!(read(&run.image, 0, size as usize) == run.model.disk);
        run.image.inactivate().unwrap();
        prop_assert!(content(&run.file, size) == cut(&run.model));
        let mut lines = Vec::new();
        let image = open(&run.file, None, &run.options);
        let report = image.check(Fix::default(), &mut |line| lines.push(line.to_owned())).unwrap();
        prop_assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0), "{:?}", lines);
    }

    /// The operations are one after the other durable, but for the one that the
    /// crash interrupts; that is done or not.
    #[test]
    fn a_crash_leaves_disk_and_snapshots(
        shape in shape(),
        small: bool,
        ops in prop::collection::vec(op(), 1..24),
        part in 0.0..1.0f64,
        mut luck: u64,
    ) {
        let mut run = begin(shape, small);
        let start = run.file.bytes();
        let _ = run.file.take_events();
        let mut events = Vec::new();
        // What may be found, from which event on.
        let mut states = vec![(0, run.model.clone(), false)];
        for (number, op) in ops.iter().enumerate() {
            run.do_one(number, op);
            run.image.flush().unwrap();
            run.file.flush().unwrap();
            events.extend(run.file.take_events());
            // These are not done at one stroke.
            let loose = !matches!(op, Op::Create | Op::Delete(_) | Op::Flush | Op::Reopen);
            states.push((events.len(), run.model.clone(), loose));
        }
        let end = (events.len() as f64 * part) as usize;
        let bytes = common::crashed(&start, &events[..end], || {
            luck = luck.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            luck >> 63 == 1
        });
        let known = states.iter().rposition(|(at, ..)| *at <= end).unwrap();
        let before = &states[known].1;
        let after = states.get(known + 1);

        let survivor = MemoryFile::new(bytes);
        let host = MemoryHost { file: survivor.clone(), ..Default::default() };
        let flags = OpenFlags { writable: true, check: true, ..Default::default() };
        let image = Image::open(host, flags, &OptionRequest::default()).unwrap();
        if !image.info().dirty {
            let low = worse_than_leaks(&image);
            prop_assert!(low.is_empty(), "{:?}", low);
        }
        image.check(ALL, &mut |_| ()).unwrap();
        let size = image.size();
        let report = image.check(Fix::default(), &mut |line| println!("{line}")).unwrap();
        prop_assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0));
        image.inactivate().unwrap();

        let found = content(&survivor, size);
        let same = |model: &Model| found == {
            let mut model = model.clone();
            for (_, content) in &mut model.snapshots {
                content.truncate(size as usize);
            }
            model
        };
        let right = same(before) || match after {
            None => false,
            // The disk may be anything in between, the snapshots not.
            Some((_, after, true)) => {
                let mut disk = after.clone();
                disk.disk.clone_from(&found.disk);
                same(&disk)
            }
            Some((_, after, false)) => same(after),
        };
        prop_assert!(right, "found {} snapshots", found.snapshots.len());
    }

    #[test]
    fn a_change_that_fails_leaves_disk_and_snapshots(
        shape in shape(),
        small: bool,
        ops in prop::collection::vec(op(), 1..16),
        last in change(),
        bad in prop_oneof![1..4usize, Just(usize::MAX)],
    ) {
        let mut run = begin(shape, small);
        for (number, op) in ops.iter().enumerate() {
            run.do_one(number, op);
        }
        run.image.inactivate().unwrap();
        check_failures(&run, &last, bad);
    }
}
