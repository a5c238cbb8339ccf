//! Damaged images: any number in the file may be anything. There is no panic,
//! no endless loop, and what is not written to stays as it is.

mod common;

use common::{EXTENDED, MemoryBits, PLAIN, Shape, TestImage, WRITABLE, create, open, write};
use parking_lot::Mutex;
use proptest::prelude::*;
use rust_qcow2::format::bitmaps::{MAX_BYTES, bytes_needed};
use rust_qcow2::host::local::SharedBuf;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::host::{Preallocation, ZeroFlags};
use rust_qcow2::image::bitmaps::DirtyBits;
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};
use rust_qcow2::units::GuestOffset;

const SIZE: u64 = 64 << 10;

/// Numbers that are more likely to hurt than random ones.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..400u64).prop_map(|cluster| cluster * 512),
        (0..400u64).prop_map(|cluster| (cluster * 512) | (1 << 63)),
        (0..400u64).prop_map(|cluster| (cluster * 512) | (1 << 63) | 1),
        Just(0),
        Just(u64::MAX),
        Just(i64::MAX as u64 & !511),
        Just(0x00ff_ffff_ffff_fe00),
    ]
}

fn some_bits(number: u64) -> MemoryBits {
    MemoryBits {
        name: format!("bitmap {number}").into_bytes(),
        granularity_bits: 9 + number as u32,
        disk_size: SIZE,
        enabled: number == 1,
        bits: (0..number * 5).collect(),
    }
}

/// Does with the bitmaps what there is to do.
fn use_bitmaps(image: &TestImage, writable: bool) {
    if let Ok(list) = image.bitmaps() {
        for entry in &list {
            let granularity = entry.granularity_in_memory(image.size());
            assert!(!entry.in_use() || bytes_needed(image.size(), granularity) <= MAX_BYTES);
            let mut end = 0;
            let _ = image.read_bitmap(entry, &mut |from, len, _| {
                assert!(from >= end && len > 0);
                end = from + len;
                assert!(end <= image.size());
            });
        }
    }
    if writable && image.mark_bitmaps_in_use().is_ok() {
        let new = MemoryBits {
            disk_size: image.size() & !511,
            ..some_bits(2)
        };
        let other = MemoryBits {
            disk_size: image.size() & !511,
            ..some_bits(7)
        };
        let _ = image.store_bitmaps(&[&new, &other]);
        let _ = image.remove_bitmap(b"bitmap 1");
    }
}

fn sample(shape: Shape) -> Vec<u8> {
    let version3 = shape.version >= 3;
    let file = create(shape, SIZE);
    let image = open(&file, None, &OptionRequest::default());
    for i in 0..20 {
        write(&image, i * 3000, &[i as u8 + 1; 700]).unwrap();
    }
    image
        .write_zeroes(GuestOffset(8192), 4096, ZeroFlags::default())
        .ok();
    if version3 {
        let bits: Vec<_> = (0..3).map(some_bits).collect();
        let bits: Vec<&dyn DirtyBits> = bits.iter().map(|bits| bits as _).collect();
        image.store_bitmaps(&bits).unwrap();
    }
    image.inactivate().unwrap();
    file.bytes()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn no_panic_whatever_the_file_says(
        order in 0..=6u32,
        version in 2..=3u32,
        extended: bool,
        damage in prop::collection::vec((0..2000usize, number(), any::<bool>()), 1..6),
        cut: Option<prop::sample::Index>,
        writable: bool,
    ) {
        let order = if version == 2 { 4 } else { order };
        let shape = if extended {
            Shape { refcount_order: order, ..EXTENDED }
        } else {
            Shape { version, refcount_order: order, ..PLAIN }
        };
        let mut bytes = sample(shape);
        for (at, value, short) in damage {
            // Large clusters have what is of interest at their begin.
            let at = if extended { ((at % 8) << 14) + at / 8 * 8 } else { at * 8 };
            let at = at % (bytes.len() - 8);
            if short {
                bytes[at..at + 4].copy_from_slice(&(value as u32).to_be_bytes());
            } else {
                bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
            }
        }
        if let Some(cut) = cut {
            let len = cut.index(bytes.len());
            bytes.truncate(len);
        }
        let file = MemoryFile::new(bytes.clone());
        let flags = OpenFlags { writable, ..WRITABLE };
        let host = || MemoryHost { file: file.clone(), ..Default::default() };
        if let Ok(image) = Image::open(host(), flags, &OptionRequest::default()) {
            let size = image.size().min(1 << 20);
            let memory = Mutex::new(vec![1; 4096]);
            for at in (0..size).step_by(4096) {
                let len = 4096.min(size - at);
                let _ = image.read(GuestOffset(at), len, SharedBuf(&memory), 0);
                let _ = image.block_status(GuestOffset(at), len);
            }
            use_bitmaps(&image, writable);
            if writable {
                for at in [0, 5000, 30_000] {
                    if at + 4096 <= size {
                        let _ = image.write(GuestOffset(at), 4096, SharedBuf(&memory), 0);
                    }
                }
                if size >= 8192 {
                    let _ = image.write_zeroes(GuestOffset(0), 4096, ZeroFlags::default());
                    let _ = image.discard(GuestOffset(4096), 4096);
                }
                let _ = image.flush();
                if image.size() < 1 << 30 {
                    let _ = image.resize(image.size() + (1 << 20), true, Preallocation::Off, false);
                    let _ = image.resize(4096, true, Preallocation::Off, false);
                }
                let _ = image.inactivate();
            }
        }
        if !writable {
            prop_assert!(file.bytes() == bytes, "written though read-only");
        }
        // A check opens more than a guest does, and repairs what it can.
        let flags = OpenFlags { check: true, ..flags };
        if let Ok(image) = Image::open(host(), flags, &OptionRequest::default()) {
            let fix = Fix { leaks: writable, errors: writable };
            let _ = image.check(fix, &mut |_| ());
        }
        if !writable {
            prop_assert!(file.bytes() == bytes, "written though read-only");
        }
    }
}
