//! Damaged images: any number in the file may be anything. There is no panic,
//! no endless loop, and what is not written to stays as it is.

mod common;

use std::sync::Arc;

use common::{
    EXTENDED, MemoryBits, PLAIN, Shape, TestImage, WRITABLE, create, open, try_read, walk_bitmap,
    write,
};
use parking_lot::Mutex;
use proptest::prelude::*;
use rust_qcow2::format::bitmaps::{MAX_BYTES, bytes_needed};
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::local::SharedBuf;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::host::{Preallocation, ZeroFlags};
use rust_qcow2::image::bitmaps::DirtyBits;
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::snapshots::NewSnapshot;
use rust_qcow2::image::{Image, OpenFlags, OptionRequest, StatusKind};
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
            walk_bitmap(image, entry);
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
    // One bit counts to one.
    for name in ["first", "second"] {
        let new = NewSnapshot {
            name: name.into(),
            vm_state_size: 700,
            ..NewSnapshot::default()
        };
        let _ = image.create_snapshot(&new);
        write(&image, 3000, &[0x77; 9000]).unwrap();
    }
    image.inactivate().unwrap();
    file.bytes()
}

/// Does with the snapshots what there is to do.
fn use_snapshots(image: &TestImage) {
    let list = image.snapshots();
    for snapshot in list.iter().take(3) {
        if let Ok(held) = image.hold_snapshot(&snapshot.id_str) {
            let size = held.disk_size();
            let fits = size < 1 << 30
                && (size == image.size()
                    || image.resize(size, true, Preallocation::Off, false).is_ok());
            let _ = if fits {
                image.apply_snapshot(held)
            } else {
                image.release_snapshot(held)
            };
        }
    }
    let _ = image.create_snapshot(&NewSnapshot::default());
    for snapshot in list.iter().take(2) {
        let _ = image.delete_snapshot(Some(&snapshot.id_str), Some(&snapshot.name));
    }
}

/// Changes the format as far as that goes, of an image that is not used after.
fn amend(image: &TestImage, number: u64) {
    let order = RefcountOrder::new(number as u32 % 7).unwrap();
    if number % 3 == 0 {
        let _ = image.make_empty();
    }
    let _ = match number % 2 {
        0 => image.change_refcount_width(order, &mut |_, _| ()).map(drop),
        _ => image.downgrade(&mut |_, _| ()),
    };
}

/// Where to damage a file, with which number, and whether that has 32 bits.
type Damage = (usize, u64, bool);

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let place = prop_oneof![0..2000usize, 0..16_000usize];
    prop::collection::vec((place, number(), any::<bool>()), 1..6)
}

fn apply_damage(bytes: &mut [u8], extended: bool, damage: &[Damage]) {
    for &(at, value, short) in damage {
        // Large clusters have what is of interest at their begin.
        let at = if extended {
            ((at % 8) << 14) + at / 8 * 8
        } else {
            at * 8
        };
        let at = at % (bytes.len() - 8);
        if short {
            bytes[at..at + 4].copy_from_slice(&(value as u32).to_be_bytes());
        } else {
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
    }
}

/// A status goes on until there is an error, which is told where it is.
#[test]
fn a_status_ends_before_what_is_damaged() {
    let version2 = Shape {
        version: 2,
        ..PLAIN
    };
    let file = create(version2, SIZE);
    let image = open(&file, None, &OptionRequest::default());
    write(&image, 100 * 512, &[1; 512]).unwrap();
    image.inactivate().unwrap();
    let mut bytes = file.bytes();
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[40..48]);
    let l1 = u64::from_be_bytes(word) as usize;
    word.copy_from_slice(&bytes[l1 + 8..l1 + 16]);
    let l2 = (u64::from_be_bytes(word) & !(1 << 63)) as usize;
    // A flag that this version does not know, for cluster 70.
    bytes[l2 + 6 * 8 + 7] = 1;
    let image = open(&MemoryFile::new(bytes), None, &OptionRequest::default());
    let status = image.block_status(GuestOffset(0), SIZE).unwrap();
    let kind = StatusKind::Unallocated { host: None };
    assert_eq!((status.kind, status.len), (kind, 70 * 512));
    assert!(image.block_status(GuestOffset(70 * 512), 512).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn no_panic_whatever_the_file_says(
        order in 0..=6u32,
        version in 2..=3u32,
        extended: bool,
        damage in damage(),
        cut: Option<prop::sample::Index>,
        writable: bool,
        number in 0..42u64,
    ) {
        let order = if version == 2 { 4 } else { order };
        let shape = if extended {
            Shape { refcount_order: order, ..EXTENDED }
        } else {
            Shape { version, refcount_order: order, ..PLAIN }
        };
        let mut bytes = sample(shape);
        apply_damage(&mut bytes, extended, &damage);
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
                    let more = image.size().next_multiple_of(512) + 65_536;
                    let how = [Preallocation::Metadata, Preallocation::Falloc][number as usize % 2];
                    let _ = image.resize(more, true, how, number % 3 == 0);
                    let _ = image.resize(4096, true, Preallocation::Off, false);
                }
                use_snapshots(&image);
                let _ = image.inactivate();
            } else if let Some(snapshot) = image.snapshots().first() {
                let _ = image.load_snapshot(Some(&snapshot.id_str), None);
                for at in (0..size).step_by(4096) {
                    let len = 4096.min(size - at);
                    let _ = image.read(GuestOffset(at), len, SharedBuf(&memory), 0);
                }
            }
        }
        if writable {
            if let Ok(image) = Image::open(host(), flags, &OptionRequest::default()) {
                amend(&image, number);
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

    /// Through a chain a damaged layer reads as it does alone, and hides nothing
    /// of what is above it.
    #[test]
    fn a_damaged_layer_costs_what_it_maps(
        extended: bool,
        above: bool,
        damage in damage(),
        order in prop::collection::vec(0..SIZE / 512, 1..200),
    ) {
        let shape = if extended { EXTENDED } else { PLAIN };
        let mut bytes = sample(shape);
        apply_damage(&mut bytes, extended, &damage);
        let file = MemoryFile::new(bytes.clone());
        let host = |file: &MemoryFile, below| MemoryHost {
            file: file.clone(),
            layer_below: Mutex::new(below),
            ..Default::default()
        };
        let flags = OpenFlags { writable: false, ..WRITABLE };
        let open = || Image::open(host(&file, None), flags, &OptionRequest::default());
        let (Ok(alone), Ok(layer)) = (open(), open()) else {
            return Ok(());
        };
        let mut below = Arc::new(layer);
        if above {
            let empty = host(&create(PLAIN, SIZE), Some(below));
            below = Arc::new(Image::open(empty, flags, &OptionRequest::default()).unwrap());
        }
        let top = host(&create(PLAIN, SIZE), Some(below));
        let top = Image::open(top, WRITABLE, &OptionRequest::default()).unwrap();
        let own = 20..40;
        write(&top, own.start * 512, &[0x55; 20 * 512]).unwrap();
        for sector in order {
            let at = sector * 512;
            let found = try_read(&top, at, 512).ok();
            if own.contains(&sector) {
                prop_assert!(found == Some(vec![0x55; 512]));
                continue;
            }
            // A layer ends, as in QEMU, at its last whole sector.
            let len = if at + 512 <= alone.size() { 512 } else { 0 };
            let expected = try_read(&alone, at, len).ok().map(|mut bytes| {
                bytes.resize(512, 0);
                bytes
            });
            prop_assert_eq!(found, expected, "sector {}", sector);
        }
        prop_assert!(file.bytes() == bytes, "written though read-only");
    }
}
