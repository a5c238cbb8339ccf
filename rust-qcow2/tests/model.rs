//! Random operations against a plain array of bytes.

mod common;

use common::{EXTENDED, Shape, create, open, read, write};
use proptest::prelude::*;
use rust_qcow2::host::memory::MemoryFile;
use rust_qcow2::host::{Preallocation, ZeroFlags};
use rust_qcow2::image::OptionRequest;
use rust_qcow2::image::check::Fix;
use rust_qcow2::units::GuestOffset;

#[derive(Clone, Debug)]
enum Op {
    Write {
        at: u64,
        len: u64,
        byte: u8,
    },
    Zeroes {
        at: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        at: u64,
        len: u64,
    },
    Resize {
        size: u64,
        preallocation: Preallocation,
        zero: bool,
    },
    Flush,
    Reopen,
    MakeEmpty,
}

const MAX: u64 = 96 << 10;

fn op() -> impl Strategy<Value = Op> {
    let range = (0..MAX / 512, 1..64u64).prop_map(|(at, len)| (at * 512, len * 512));
    let odd = (0..MAX, 1..20_000u64);
    prop_oneof![
        6 => (prop_oneof![range.clone(), odd], 1..=255u8)
            .prop_map(|((at, len), byte)| Op::Write { at, len, byte }),
        2 => (range.clone(), any::<bool>())
            .prop_map(|((at, len), unmap)| Op::Zeroes { at, len, unmap }),
        2 => range.prop_map(|(at, len)| Op::Discard { at, len }),
        1 => (1..MAX / 512, 0..4usize, any::<bool>()).prop_map(|(size, mode, zero)| Op::Resize {
            size: size * 512,
            preallocation: [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc,
                Preallocation::Full][mode],
            zero,
        }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => Just(Op::MakeEmpty),
    ]
}

fn shape() -> impl Strategy<Value = Shape> {
    let standard = (2..=3u32, 9..=12u32, 0..=6u32, any::<bool>()).prop_map(
        |(version, cluster_bits, order, lazy)| Shape {
            version,
            cluster_bits,
            refcount_order: if version == 2 { 4 } else { order },
            lazy_refcounts: lazy && version == 3,
            extended_l2: false,
        },
    );
    let extended = (14..=15u32, 0..=6u32, any::<bool>()).prop_map(
        |(cluster_bits, refcount_order, lazy_refcounts)| Shape {
            cluster_bits,
            refcount_order,
            lazy_refcounts,
            ..EXTENDED
        },
    );
    prop_oneof![2 => standard, 1 => extended]
}

fn small_caches(small: bool) -> OptionRequest {
    if small {
        OptionRequest {
            l2_cache_size: Some(1024),
            l2_cache_entry_size: Some(512),
            ..Default::default()
        }
    } else {
        OptionRequest::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn reads_back_what_was_written(
        shape in shape(),
        ops in prop::collection::vec(op(), 1..40),
        with_backing: bool,
        small: bool,
        fast: bool,
    ) {
        let backing_bytes: Vec<u8> =
            (0..40_000u32).map(|i| if i / 3000 % 2 == 0 { 0 } else { i as u8 | 1 }).collect();
        let backing = with_backing.then(|| MemoryFile::new(backing_bytes.clone()));
        let below = |at: u64| {
            if with_backing { backing_bytes.get(at as usize).copied().unwrap_or(0) } else { 0 }
        };
        let options = small_caches(small);
        let mut size = 64 << 10;
        let file = create(shape, size);
        file.set_zeroes_fast(fast);
        let mut image = open(&file, backing.as_ref(), &options);
        let mut model: Vec<u8> = (0..size).map(below).collect();

        for op in &ops {
            match *op {
                Op::Write { at, len, byte } => {
                    let at = at.min(size - 1);
                    let len = len.min(size - at);
                    write(&image, at, &vec![byte; len as usize]).unwrap();
                    model[at as usize..(at + len) as usize].fill(byte);
                }
                Op::Zeroes { at, len, unmap } => {
                    let at = at.min(size - 512);
                    let len = len.min(size - at);
                    let flags = ZeroFlags { may_unmap: unmap, no_fallback: false };
                    let cluster = 1u64 << shape.part_bits();
                    // As the block layer does: unaligned parts within a cluster.
                    let mut from = at;
                    while from < at + len {
                        let head = from % cluster;
                        let step = if head != 0 || at + len - from < cluster {
                            (cluster - head).min(at + len - from)
                        } else {
                            (at + len - from) / cluster * cluster
                        };
                        match image.write_zeroes(GuestOffset(from), step, flags) {
                            Ok(()) => {}
                            Err(error) => {
                                prop_assert_eq!(error.code(), libc::ENOTSUP);
                                write(&image, from, &vec![0; step as usize]).unwrap();
                            }
                        }
                        from += step;
                    }
                    model[at as usize..(at + len) as usize].fill(0);
                }
                Op::Discard { at, len } => {
                    let cluster = 1u64 << shape.cluster_bits;
                    let start = at.min(size).div_ceil(cluster) * cluster;
                    let end = (at + len).min(size) / cluster * cluster;
                    if start < end {
                        match image.discard(GuestOffset(start), end - start) {
                            Ok(()) => model[start as usize..end as usize].fill(0),
                            Err(error) => prop_assert_eq!(error.code(), libc::ENOTSUP),
                        }
                    }
                }
                Op::Resize { size: new, preallocation, zero } => {
                    let preallocation =
                        if new < size { Preallocation::Off } else { preallocation };
                    // Without the zero flag the preallocated area of a chain is
                    // not the backing file any more, as in QEMU: not modelled.
                    // With subclusters it is.
                    let hides = preallocation != Preallocation::Off && !shape.extended_l2;
                    if with_backing && hides {
                        continue;
                    }
                    if zero && shape.version == 2 && with_backing {
                        continue;
                    }
                    image.resize(new, true, preallocation, zero).unwrap();
                    if new < size {
                        // Old data of the last cluster may come back: write it.
                        let cluster = 1u64 << shape.cluster_bits;
                        model.truncate(new as usize);
                        let kept = new.next_multiple_of(cluster).min(size);
                        if new != kept {
                            let last = new / cluster * cluster;
                            let tail = model[last as usize..].to_vec();
                            image.discard(GuestOffset(last), new - last).ok();
                            write(&image, last, &tail).unwrap();
                        }
                    } else {
                        model.extend((size..new).map(|at| if zero { 0 } else { below(at) }));
                        let cluster = 1u64 << shape.cluster_bits;
                        let cut = size.next_multiple_of(cluster).min(new);
                        if !zero && cut > size {
                            // What a cut cluster holds behind the old end is undefined.
                            let got = read(&image, size, (cut - size) as usize);
                            model[size as usize..cut as usize].copy_from_slice(&got);
                        }
                    }
                    size = new;
                }
                Op::Flush => image.flush().unwrap(),
                Op::Reopen => {
                    image.inactivate().unwrap();
                    drop(image);
                    image = open(&file, backing.as_ref(), &options);
                }
                Op::MakeEmpty => {
                    image.make_empty().unwrap();
                    model = (0..size).map(below).collect();
                }
            }
            prop_assert_eq!(image.size(), size);
        }
        let got = read(&image, 0, size as usize);
        let wrong = got.iter().zip(&model).position(|(a, b)| a != b);
        prop_assert_eq!(wrong, None);
        image.inactivate().unwrap();
        let report = image.check(Fix::default(), &mut |line| println!("{line}")).unwrap();
        prop_assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0));
        let again = open(&file, backing.as_ref(), &options);
        prop_assert!(read(&again, 0, size as usize) == model);
    }
}

/// The last entries of slices and tables are kept like the first ones.
#[test]
fn all_of_an_extended_table_is_written() {
    let cluster = 1u64 << EXTENDED.cluster_bits;
    for small in [false, true] {
        let size = 2100 * cluster;
        let file = create(EXTENDED, size);
        let options = small_caches(small);
        let image = open(&file, None, &options);
        for number in (0..2100).step_by(7) {
            write(&image, number * cluster + 700, &[number as u8 | 1; 100]).unwrap();
        }
        image.inactivate().unwrap();
        let again = open(&file, None, &options);
        for number in (0..2100).step_by(7) {
            let at = number * cluster + 700;
            assert_eq!(read(&again, at, 100), [number as u8 | 1; 100]);
        }
        let report = again
            .check(Fix::default(), &mut |line| println!("{line}"))
            .unwrap();
        assert_eq!(
            (report.corruptions, report.leaks, report.check_errors),
            (0, 0, 0)
        );
    }
}
