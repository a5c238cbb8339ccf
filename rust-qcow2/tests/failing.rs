//! Requests that fail on the way: what the guest reads afterwards is, sector by
//! sector, what was there before or what was to be there, and the same request
//! succeeds when the file works again.

mod common;

use common::{EXTENDED, PLAIN, Shape, TestImage, create, open, read, write, write_compressed};
use proptest::prelude::*;
use rust_qcow2::Result;
use rust_qcow2::host::ZeroFlags;
use rust_qcow2::host::memory::MemoryFile;
use rust_qcow2::image::OptionRequest;
use rust_qcow2::image::check::Fix;
use rust_qcow2::units::GuestOffset;

const SECTOR: u64 = 512;
/// Clusters of the disk.
const CLUSTERS: u64 = 4;

/// Subclusters of more than a sector.
const LARGER: Shape = Shape {
    cluster_bits: 15,
    ..EXTENDED
};

/// A request: of sectors, or of the smallest parts or the clusters that it can
/// be of.
#[derive(Clone, Copy, Debug)]
enum Op {
    Write { sector: u64, count: u64 },
    Zeroes { part: u64, count: u64, unmap: bool },
    Discard { cluster: u64, count: u64 },
    Compress { cluster: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let range = (0..128u64, 1..96u64);
    let clusters = (0..CLUSTERS, 1..=CLUSTERS);
    prop_oneof![
        3 => range.clone().prop_map(|(sector, count)| Op::Write { sector, count }),
        3 => (range, any::<bool>()).prop_map(|((part, count), unmap)| Op::Zeroes { part, count, unmap }),
        1 => clusters.prop_map(|(cluster, count)| Op::Discard { cluster, count }),
        1 => (0..CLUSTERS).prop_map(|cluster| Op::Compress { cluster }),
    ]
}

impl Op {
    /// First byte and length.
    fn range(self, shape: Shape) -> (u64, u64) {
        let cluster = 1 << shape.cluster_bits;
        let (number, count, unit) = match self {
            Self::Write { sector, count } => (sector, count, SECTOR),
            Self::Zeroes { part, count, .. } => (part, count, 1 << shape.part_bits()),
            Self::Discard {
                cluster: number,
                count,
            } => (number, count, cluster),
            Self::Compress { cluster: number } => (number, 1, cluster),
        };
        let size = CLUSTERS * cluster;
        let at = number * unit % size;
        (at, (count * unit).min(size - at))
    }

    /// What is read afterwards.
    fn byte(self, byte: u8) -> u8 {
        match self {
            Self::Write { .. } | Self::Compress { .. } => byte,
            Self::Zeroes { .. } | Self::Discard { .. } => 0,
        }
    }

    /// Whether that is no fault: compressed data do not replace others, and a part
    /// of a compressed cluster is not zeroed by itself.
    fn is_refused(self, result: &Result<()>) -> bool {
        result.as_ref().is_err_and(|error| match self {
            Self::Compress { .. } => error.code() == libc::EIO,
            Self::Zeroes { .. } => error.code() == libc::ENOTSUP,
            Self::Write { .. } | Self::Discard { .. } => false,
        })
    }

    fn submit(self, image: &TestImage, shape: Shape, byte: u8) -> Result<()> {
        let (at, len) = self.range(shape);
        match self {
            Self::Write { .. } => write(image, at, &vec![byte; len as usize]),
            Self::Compress { .. } => write_compressed(image, at, &vec![byte; len as usize]),
            Self::Discard { .. } => image.discard(GuestOffset(at), len),
            Self::Zeroes { unmap, .. } => {
                let flags = ZeroFlags {
                    may_unmap: unmap,
                    no_fallback: false,
                };
                image.write_zeroes(GuestOffset(at), len, flags)
            }
        }
    }
}

/// Where a test begins.
#[derive(Clone, Copy, Debug)]
struct Start {
    shape: Shape,
    /// The file writes zeroes fast.
    fast: bool,
    /// All of the disk has data, one cluster behind the other.
    full: bool,
    /// There are zeroes below.
    empty_below: bool,
}

/// An image may have leaks where the process ended after a failure of request
/// `steps`, nothing worse. Returns how many.
fn sound(image: &TestImage, steps: usize) -> u64 {
    let report = image
        .check(Fix::default(), &mut |line| println!("{line}"))
        .unwrap();
    let found = (report.corruptions, report.check_errors);
    assert_eq!(found, (0, 0), "request {steps}");
    report.leaks
}

/// Fails `bad` requests of `last` to the file from each one on, in a fresh image each time.
fn check(start: Start, ops: &[Op], last: Op, bad: usize) {
    let shape = start.shape;
    let size = CLUSTERS << shape.cluster_bits;
    let below = MemoryFile::new(vec![u8::from(!start.empty_below); size as usize]);
    let reopened = |bytes: Vec<u8>| {
        let file = MemoryFile::new(bytes);
        file.set_zeroes_fast(start.fast);
        let image = open(&file, Some(&below), &OptionRequest::default());
        (file, image)
    };
    let (file, image) = reopened(create(shape, size).bytes());
    if start.full {
        write(&image, 0, &vec![0xff; size as usize]).unwrap();
    }
    for (op, byte) in ops.iter().zip(2..) {
        let result = op.submit(&image, shape, byte);
        assert!(
            result.is_ok() || op.is_refused(&result),
            "{op:?}: {result:?}"
        );
    }
    image.inactivate().unwrap();
    drop(image);
    let bytes = file.bytes();
    let (at, len) = last.range(shape);
    let new = last.byte(0xfe);
    if last.is_refused(&last.submit(&reopened(bytes.clone()).1, shape, 0xfe)) {
        return;
    }
    for steps in 0.. {
        let (file, image) = reopened(bytes.clone());
        let before = read(&image, 0, size as usize);
        file.fail_some(steps, bad);
        let result = last.submit(&image, shape, 0xfe);
        file.fail_after(None);
        let look = |after: &[u8], may_be_old: bool| {
            for number in 0..size / SECTOR {
                let range = (number * SECTOR) as usize..((number + 1) * SECTOR) as usize;
                let is_old = after[range.clone()] == before[range.clone()];
                let is_new = after[range].iter().all(|byte| *byte == new);
                assert!(
                    if (at..at + len).contains(&(number * SECTOR)) {
                        is_new || may_be_old && is_old
                    } else {
                        is_old
                    },
                    "sector {number} after a failure of request {steps}: {result:?}"
                );
            }
        };
        look(&read(&image, 0, size as usize), result.is_err());
        // The process ends instead.
        let (_, left) = reopened(file.bytes());
        look(&read(&left, 0, size as usize), true);
        sound(&left, steps);
        if result.is_err() {
            last.submit(&image, shape, 0xfe).unwrap();
        }
        let after = read(&image, at, len as usize);
        assert!(
            after.iter().all(|byte| *byte == new),
            "not done, request {steps}"
        );
        // The file fails once more while the image is left, and then it does not.
        file.fail_some(0, 1);
        let _ = image.inactivate();
        file.fail_after(None);
        image.inactivate().unwrap();
        let leaks = sound(&image, steps);
        assert_eq!(leaks, 0, "leaks after a failure of request {steps}");
        if result.is_ok() {
            break;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_request_that_fails_leaves_old_or_new(
        extended: bool,
        fast: bool,
        full: bool,
        empty_below: bool,
        ops in prop::collection::vec(op(), 0..8),
        last in op(),
        bad in prop_oneof![1..4usize, Just(usize::MAX)],
    ) {
        let shape = if extended { LARGER } else { Shape { cluster_bits: 11, ..PLAIN } };
        check(Start { shape, fast, full, empty_below }, &ops, last, bad);
    }
}

/// A cluster of zeroes that has its place, and one with data right behind it,
/// are written as one piece: the zeroes that fill up the first must not go over
/// the data of the second.
#[test]
fn zeroes_do_not_go_over_data() {
    let start = |shape| Start {
        shape,
        fast: true,
        full: true,
        empty_below: true,
    };
    let zeroes = |part| Op::Zeroes {
        part,
        count: 1,
        unmap: false,
    };
    let clusters = start(Shape {
        cluster_bits: 11,
        ..PLAIN
    });
    check(
        clusters,
        &[zeroes(0)],
        Op::Write {
            sector: 2,
            count: 4,
        },
        usize::MAX,
    );
    // The same with subclusters, of two sectors each.
    check(
        start(LARGER),
        &[zeroes(4)],
        Op::Write {
            sector: 9,
            count: 3,
        },
        usize::MAX,
    );
}

/// A name that the header has no room for is not kept.
#[test]
fn a_backing_file_whose_name_does_not_fit() {
    let file = common::create(common::PLAIN, 1 << 20);
    let image = common::open(&file, None, &OptionRequest::default());
    image.change_backing(Some(b"short"), Some(b"raw")).unwrap();
    let long = [b'x'; 600];
    let error = image.change_backing(Some(&long), Some(b"raw")).unwrap_err();
    assert_eq!(error.code(), libc::ENOSPC);
    let error = image.change_backing(Some(b"other"), Some(b"copy-before-write"));
    assert_eq!(error.unwrap_err().code(), libc::EINVAL);
    assert_eq!(image.info().backing_file.as_deref(), Some(&b"short"[..]));
    image.inactivate().unwrap();
    let image = common::open(&file, None, &OptionRequest::default());
    assert_eq!(image.info().backing_file.as_deref(), Some(&b"short"[..]));
}
