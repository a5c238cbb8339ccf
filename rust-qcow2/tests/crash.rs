//! Crashes: whatever part of the writes since the last flush of the file gets
//! lost, the image has no corruption, only leaks, and everything that the guest
//! flushed is there. If nothing gets lost, as when only the process ends, the
//! rest reads as before or as written.

mod common;

use std::collections::HashMap;

use common::{PLAIN, Shape, WRITABLE, create, read, write, write_compressed};
use proptest::prelude::*;
use rust_qcow2::format::header::Encryption;
use rust_qcow2::host::local::SharedBuf;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::host::{File, ZeroFlags};
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};
use rust_qcow2::units::GuestOffset;

const SIZE: u64 = 64 << 10;
const SECTOR: u64 = 512;

#[derive(Clone, Debug)]
enum Op {
    Write { sector: u64, count: u64 },
    Zeroes { sector: u64, count: u64 },
    Discard { sector: u64, count: u64 },
    Compress { sector: u64 },
    Flush,
}

fn op() -> impl Strategy<Value = Op> {
    let range = (0..SIZE / SECTOR, 1..24u64);
    prop_oneof![
        6 => range.clone().prop_map(|(sector, count)| Op::Write { sector, count }),
        2 => range.clone().prop_map(|(sector, count)| Op::Zeroes { sector, count }),
        2 => range.prop_map(|(sector, count)| Op::Discard { sector, count }),
        2 => (0..SIZE / SECTOR).prop_map(|sector| Op::Compress { sector }),
        2 => Just(Op::Flush),
    ]
}

/// What the guest may rely on after a flush, and from which event on.
struct Durable {
    event: usize,
    content: Vec<u8>,
}

/// What crashes.
#[derive(Clone, Copy)]
struct Setup {
    shape: Shape,
    /// The caches are too small.
    small: bool,
    encrypted: bool,
    /// Discarded clusters keep their places.
    keeps: bool,
    /// Only the process ends: what it wrote is there.
    killed: bool,
}

impl Setup {
    fn plain(shape: Shape) -> Self {
        Self {
            shape,
            small: false,
            encrypted: false,
            keeps: false,
            killed: false,
        }
    }

    fn open(&self, file: &MemoryFile, flags: OpenFlags) -> Image<MemoryHost> {
        let options = OptionRequest {
            l2_cache_size: self.small.then_some(1024),
            l2_cache_entry_size: self.small.then_some(512),
            discard_no_unref: Some(self.keeps),
            ..Default::default()
        };
        let host = MemoryHost {
            file: file.clone(),
            has_key: true,
            ..Default::default()
        };
        Image::open(host, flags, &options).unwrap()
    }
}

/// Does all of `ops`, crashes after the share `cut` of what they wrote, with
/// each write that is not yet flushed lost or not as `luck` has it.
fn crash(setup: Setup, ops: &[Op], cut: f64, mut luck: u64) {
    let shape = setup.shape;
    let file = create(shape, SIZE);
    if setup.encrypted {
        let image = setup.open(&file, WRITABLE);
        image.record_encryption(Encryption::Aes, None).unwrap();
        image.inactivate().unwrap();
    }
    file.set_zeroes_fast(luck % 2 == 0);
    let start = file.bytes();
    let _ = file.take_events();
    let image = setup.open(&file, WRITABLE);
    let mut events = file.take_events();
    let mut model = vec![0u8; SIZE as usize];
    let mut durable = vec![Durable {
        event: 0,
        content: model.clone(),
    }];
    // Sectors changed, with the event count at the begin of the change, and to
    // what.
    let mut touched: Vec<(usize, u64, u8)> = Vec::new();

    for (i, op) in ops.iter().enumerate() {
        let clip = |sector: u64, count: u64| {
            let at = sector * SECTOR;
            (at, (count * SECTOR).min(SIZE - at))
        };
        let mut touch = |at: u64, len: u64, byte: u8| {
            let sectors = at / SECTOR..(at + len) / SECTOR;
            touched.extend(sectors.map(|sector| (events.len(), sector, byte)));
        };
        match *op {
            Op::Write { sector, count } => {
                let (at, len) = clip(sector, count);
                let byte = (i % 255) as u8 + 1;
                touch(at, len, byte);
                write(&image, at, &vec![byte; len as usize]).unwrap();
                model[at as usize..(at + len) as usize].fill(byte);
            }
            Op::Zeroes { sector, count } => {
                let cluster = 1u64 << shape.part_bits();
                let (at, len) = clip(sector, count);
                let (at, end) = (at / cluster * cluster, (at + len).next_multiple_of(cluster));
                touch(at, end - at, 0);
                let flags = ZeroFlags {
                    may_unmap: i % 2 == 0,
                    no_fallback: false,
                };
                if image
                    .write_zeroes(GuestOffset(at), end - at, flags)
                    .is_err()
                {
                    // A part of a compressed cluster: the block layer does that.
                    write(&image, at, &vec![0; (end - at) as usize]).unwrap();
                }
                model[at as usize..end as usize].fill(0);
            }
            Op::Discard { sector, count } => {
                let cluster = 1u64 << shape.cluster_bits;
                let (at, len) = clip(sector, count);
                let (at, end) = (at / cluster * cluster, (at + len).next_multiple_of(cluster));
                touch(at, end - at, 0);
                image.discard(GuestOffset(at), end - at).unwrap();
                model[at as usize..end as usize].fill(0);
            }
            Op::Compress { sector } => {
                let len = 1u64 << shape.cluster_bits;
                let at = sector * SECTOR / len * len;
                let byte = (i % 255) as u8 + 1;
                touch(at, len, byte);
                // Refused where there are data already.
                if write_compressed(&image, at, &vec![byte; len as usize]).is_ok() {
                    model[at as usize..(at + len) as usize].fill(byte);
                }
            }
            Op::Flush => {
                image.flush().unwrap();
                file.flush().unwrap();
            }
        }
        events.extend(file.take_events());
        if matches!(op, Op::Flush) {
            durable.push(Durable {
                event: events.len(),
                content: model.clone(),
            });
        }
    }

    let end = (events.len() as f64 * cut) as usize;
    let bytes = common::crashed(&start, &events[..end], || {
        common::coin(&mut luck) || setup.killed
    });

    let survivor = MemoryFile::new(bytes);
    let flags = OpenFlags {
        writable: true,
        check: true,
        ..Default::default()
    };
    let after = setup.open(&survivor, flags);
    let dirty = after.info().dirty;
    if dirty {
        assert!(shape.lazy_refcounts);
        let fix = Fix {
            leaks: true,
            errors: true,
        };
        after.check(fix, &mut |_| ()).unwrap();
    }
    let report = after
        .check(Fix::default(), &mut |line| println!("{line}"))
        .unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0));

    let known = durable.iter().rfind(|known| known.event <= end).unwrap();
    let mut since: HashMap<u64, Vec<u8>> = HashMap::new();
    for (event, sector, byte) in touched {
        if event >= known.event && event <= end {
            since.entry(sector).or_default().push(byte);
        }
    }
    let got = read(&after, 0, SIZE as usize);
    for (sector, got) in (0..).zip(got.chunks_exact(SECTOR as usize)) {
        let old = &known.content[(sector * SECTOR) as usize..][..SECTOR as usize];
        match since.get(&sector) {
            None => assert!(got == old, "sector {sector} changed though it was flushed"),
            Some(written) if setup.killed => assert!(
                got == old || written.iter().any(|byte| got.iter().all(|got| got == byte)),
                "sector {sector} is neither as before nor as written"
            ),
            Some(_) => {}
        }
    }
}

/// More where somebody has the time.
fn cases() -> u32 {
    let asked = std::env::var("PROPTEST_CASES").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(400)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn a_crash_loses_nothing_that_was_flushed(
        order in 0..=6u32,
        cluster_bits in 9..=11u32,
        lazy: bool,
        extended: bool,
        (small, encrypted, keeps, killed) in any::<(bool, bool, bool, bool)>(),
        ops in prop::collection::vec(op(), 1..40),
        cut in 0.0..1.0f64,
        luck: u64,
    ) {
        let shape = Shape {
            version: 3,
            cluster_bits: if extended { 14 } else { cluster_bits },
            refcount_order: order,
            lazy_refcounts: lazy,
            extended_l2: extended,
        };
        crash(Setup { shape, small, encrypted, keeps, killed }, &ops, cut, luck);
    }
}

/// A hole in the place of compressed data cannot be read.
#[test]
fn a_discard_leaves_compressed_data_readable() {
    let ops = [
        Op::Compress { sector: 0 },
        Op::Flush,
        Op::Discard {
            sector: 0,
            count: 1,
        },
    ];
    for cut in 0..=40 {
        for luck in 0..32u64 {
            crash(
                Setup::plain(PLAIN),
                &ops,
                f64::from(cut) / 40.0,
                luck.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            );
        }
    }
}

/// A cluster that one L2 table let go is given to another: never before the
/// first is on disk, though no refcounts are written with lazy refcounts.
#[test]
fn freed_clusters_are_not_shared_with_lazy_refcounts() {
    let shape = Shape {
        version: 3,
        cluster_bits: 9,
        refcount_order: 0,
        lazy_refcounts: true,
        extended_l2: false,
    };
    let ops = [
        Op::Write {
            sector: 0,
            count: 1,
        },
        Op::Write {
            sector: 64,
            count: 1,
        },
        Op::Flush,
        Op::Flush,
        Op::Zeroes {
            sector: 0,
            count: 1,
        },
        Op::Write {
            sector: 65,
            count: 1,
        },
        Op::Flush,
    ];
    for cut in 0..=40 {
        for luck in 0..32u64 {
            crash(
                Setup::plain(shape),
                &ops,
                f64::from(cut) / 40.0,
                luck.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            );
        }
    }
}

/// What a stream copies is durable below: nothing may be mapped instead of it
/// before it is there, with lazy refcounts as well, whose blocks nothing waits
/// for.
#[test]
fn what_is_copied_from_below_is_not_lost() {
    const LEN: usize = 8 << 10;
    let shape = Shape {
        lazy_refcounts: true,
        ..PLAIN
    };
    let base = MemoryFile::new(vec![7; SIZE as usize]);
    let options = OptionRequest::default();
    let file = create(shape, SIZE);
    let image = common::open(&file, Some(&base), &options);
    // Sets the dirty bit, which takes a flush, and makes the table.
    write(&image, LEN as u64, &[8; 512]).unwrap();
    image.flush().unwrap();
    let start = file.bytes();
    let _ = file.take_events();

    let memory = parking_lot::Mutex::new(vec![7; LEN]);
    let buf = SharedBuf(&memory);
    image
        .write_unchanged(GuestOffset(0), LEN as u64, buf, 0)
        .unwrap();
    image.flush().unwrap();
    file.flush().unwrap();
    let events = file.take_events();

    for end in 0..=events.len() {
        for turn in 0..32u64 {
            let mut luck = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let bytes = common::crashed(&start, &events[..end], || common::coin(&mut luck));
            let after = common::open(&MemoryFile::new(bytes), Some(&base), &options);
            assert!(read(&after, 0, LEN) == [7; LEN], "{end}, {turn}");
        }
    }
}
