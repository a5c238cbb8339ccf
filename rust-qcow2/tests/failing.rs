//! Writes that fail on the way: what the guest reads afterwards is, sector by
//! sector, what was there before or what was to be written.

mod common;

use common::{EXTENDED, PLAIN, Shape, create, open, read, write};
use proptest::prelude::*;
use rust_qcow2::host::ZeroFlags;
use rust_qcow2::host::memory::MemoryFile;
use rust_qcow2::image::OptionRequest;
use rust_qcow2::units::GuestOffset;

const SECTOR: u64 = 512;
/// Clusters of the disk.
const CLUSTERS: u64 = 4;

/// Subclusters of more than a sector.
const LARGER: Shape = Shape {
    cluster_bits: 15,
    ..EXTENDED
};

/// What is done before, to whole parts or sectors.
#[derive(Clone, Copy, Debug)]
enum Op {
    Write { sector: u64, count: u64 },
    Zeroes { part: u64, count: u64, unmap: bool },
}

fn op() -> impl Strategy<Value = Op> {
    let range = (0..128u64, 1..64u64);
    prop_oneof![
        range
            .clone()
            .prop_map(|(sector, count)| Op::Write { sector, count }),
        (range, any::<bool>()).prop_map(|((part, count), unmap)| Op::Zeroes { part, count, unmap }),
    ]
}

/// Fails every request of a write from each one on, in a fresh image each time.
/// Zeroes are written `fast` or not; all of the disk has data at first, or none.
fn check(shape: Shape, [fast, full]: [bool; 2], ops: &[Op], sector: u64, count: u64) {
    let cluster = 1u64 << shape.cluster_bits;
    let part = 1u64 << shape.part_bits();
    let size = CLUSTERS * cluster;
    let clip = |number: u64, count: u64, unit: u64| {
        let at = number * unit % size;
        (at, (count * unit).min(size - at))
    };
    let below = MemoryFile::new(vec![0; size as usize]);
    let file = create(shape, size);
    file.set_zeroes_fast(fast);
    let image = open(&file, Some(&below), &OptionRequest::default());
    if full {
        // One cluster behind the other.
        write(&image, 0, &vec![0xff; size as usize]).unwrap();
    }
    for (op, byte) in ops.iter().zip(1..) {
        match *op {
            Op::Write { sector, count } => {
                let (at, len) = clip(sector, count, SECTOR);
                write(&image, at, &vec![byte; len as usize]).unwrap();
            }
            Op::Zeroes {
                part: number,
                count,
                unmap,
            } => {
                let (at, len) = clip(number, count, part);
                let flags = ZeroFlags {
                    may_unmap: unmap,
                    no_fallback: false,
                };
                image.write_zeroes(GuestOffset(at), len, flags).unwrap();
            }
        }
    }
    image.inactivate().unwrap();
    drop(image);
    let bytes = file.bytes();
    let (at, len) = clip(sector, count, SECTOR);
    for steps in 0.. {
        let file = MemoryFile::new(bytes.clone());
        file.set_zeroes_fast(fast);
        let image = open(&file, Some(&below), &OptionRequest::default());
        let before = read(&image, 0, size as usize);
        file.fail_after(Some(steps));
        let result = write(&image, at, &vec![0xfe; len as usize]);
        file.fail_after(None);
        let after = read(&image, 0, size as usize);
        for number in 0..size / SECTOR {
            let range = (number * SECTOR) as usize..((number + 1) * SECTOR) as usize;
            let is_old = after[range.clone()] == before[range.clone()];
            let is_new = after[range].iter().all(|byte| *byte == 0xfe);
            let written = (at..at + len).contains(&(number * SECTOR));
            assert!(
                if written {
                    is_new || result.is_err() && is_old
                } else {
                    is_old
                },
                "sector {number} after a failure of request {steps}: {result:?}"
            );
        }
        if result.is_ok() {
            break;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_write_that_fails_leaves_old_or_new(
        extended: bool,
        fast: bool,
        full: bool,
        ops in prop::collection::vec(op(), 0..8),
        sector in 0..128u64,
        count in 1..96u64,
    ) {
        let shape = if extended { LARGER } else { Shape { cluster_bits: 11, ..PLAIN } };
        check(shape, [fast, full], &ops, sector, count);
    }
}

/// A cluster of zeroes that has its place, and one with data right behind it,
/// are written as one piece: the zeroes that fill up the first must not go over
/// the data of the second.
#[test]
fn zeroes_do_not_go_over_data() {
    let shape = Shape {
        cluster_bits: 11,
        ..PLAIN
    };
    let per_cluster = 4;
    let before = [
        Op::Write {
            sector: 0,
            count: 2 * per_cluster,
        },
        Op::Zeroes {
            part: 0,
            count: 1,
            unmap: false,
        },
    ];
    check(shape, [true, false], &before, 2, per_cluster);
    // The same with subclusters, of two sectors each.
    let before = [
        Op::Write {
            sector: 0,
            count: 64,
        },
        Op::Zeroes {
            part: 4,
            count: 1,
            unmap: false,
        },
    ];
    check(LARGER, [true, false], &before, 9, 3);
}
