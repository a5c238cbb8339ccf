//! Internal snapshots and amend: random operations beside a model of the disk
//! and of all snapshots, and crashes between any two writes.

#[path = "../common/mod.rs"]
mod common;
mod failures;
mod run;

use common::{Shape, open, read};
use failures::{change, check_failures};
use proptest::prelude::*;
use run::{Model, Op, SECTOR, SIZE, begin, content, cut, op, repaired, resize, shape};
use rust_qcow2::host::{File, Preallocation};
use rust_qcow2::image::check::Fix;

/// The smallest clusters, with refcounts of so many bits.
fn shape_of(bits: u32) -> Shape {
    Shape {
        version: 3,
        cluster_bits: 9,
        refcount_order: bits.ilog2(),
        lazy_refcounts: false,
        extended_l2: false,
    }
}

/// Two bits count to three: the disk and two snapshots.
#[test]
fn a_disk_that_cannot_go_back_to_a_smaller_one_keeps_its_end() {
    let mut run = begin(shape_of(2), false);
    let write = |sector| Op::Write { sector, count: 8 };
    let grow = Op::Resize(2 * SIZE, Preallocation::Off);
    let ops = [write(0), Op::Create, Op::Create, grow, write(SIZE / SECTOR)];
    for (number, op) in ops.iter().enumerate() {
        run.do_one(number, op);
    }
    let id = run.pick(0).unwrap().0;
    let error = run.go_back(&id).unwrap_err();
    run.out_of_counts(&error, 0);
    assert!(read(&run.image, 0, 2 * SIZE as usize) == run.model.disk);
    let model = run.model.clone();
    assert!(run.end() == model);
}

#[test]
fn a_disk_without_a_byte_has_snapshots_as_well() {
    let mut run = begin(shape_of(16), false);
    let gone = Op::Resize(0, Preallocation::Off);
    for (number, op) in [gone, Op::Create, Op::Apply(0)].iter().enumerate() {
        run.do_one(number, op);
    }
    assert!(run.file.bytes().len() < 1 << 20);
    run.do_one(3, &Op::Delete(0));
    let model = run.model.clone();
    assert!(run.end() == model);
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
        let bytes = common::crashed(&start, &events[..end], || common::coin(&mut luck));
        let known = states.iter().rposition(|(at, ..)| *at <= end).unwrap();
        let before = &states[known].1;
        let after = states.get(known + 1);

        let (survivor, size) = repaired(bytes);
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

    /// The file has its new length before anything refers to that.
    #[test]
    fn a_crash_while_the_disk_grows_leaves_no_entry_behind_the_file(
        shape in shape(),
        small: bool,
        ops in prop::collection::vec(op(), 0..6),
        grow in resize(),
        mut luck: u64,
    ) {
        let mut run = begin(shape, small);
        for (number, op) in ops.iter().enumerate() {
            run.do_one(number, op);
        }
        run.image.flush().unwrap();
        let start = run.file.bytes();
        let _ = run.file.take_events();
        run.do_one(ops.len(), &grow);
        let events = run.file.take_events();
        for end in 0..=events.len() {
            let bytes = common::crashed(&start, &events[..end], || common::coin(&mut luck));
            repaired(bytes);
        }
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
