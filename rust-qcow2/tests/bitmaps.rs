//! Persistent bitmaps: what is stored is read again, whatever fails on the way
//! loses no more than the bitmaps, and none is taken for valid that is not.

mod common;

use std::collections::BTreeSet;

use common::{MemoryBits, Shape, WRITABLE, create, open, read_bits, write};
use proptest::prelude::*;
use rust_qcow2::host::memory::{Event, MemoryFile, MemoryHost};
use rust_qcow2::image::bitmaps::DirtyBits;
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};

/// Several clusters of bits of 512 bytes each, at the finest granularity.
const SIZE: u64 = 5 << 20;

fn bits() -> impl Strategy<Value = MemoryBits> {
    let ranges = prop::collection::vec((0..SIZE, 1..SIZE / 8), 0..6);
    ("[a-d]{1,30}", 9..=14u32, any::<bool>(), ranges).prop_map(
        |(name, granularity_bits, enabled, ranges)| {
            let mut bits = BTreeSet::new();
            for (from, len) in ranges {
                let end = (from + len).min(SIZE);
                bits.extend(from >> granularity_bits..end.div_ceil(1 << granularity_bits));
            }
            MemoryBits {
                name: name.into_bytes(),
                granularity_bits,
                disk_size: SIZE,
                enabled,
                bits,
            }
        },
    )
}

/// Bitmaps of different names.
fn several() -> impl Strategy<Value = Vec<MemoryBits>> {
    prop::collection::vec(bits(), 0..5).prop_map(|mut list| {
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list.dedup_by(|a, b| a.name == b.name);
        list
    })
}

fn shape(cluster_bits: u32, refcount_order: u32) -> Shape {
    Shape {
        version: 3,
        cluster_bits,
        refcount_order,
        lazy_refcounts: false,
        extended_l2: false,
    }
}

fn reopen(file: &MemoryFile, flags: OpenFlags) -> (Image<MemoryHost>, Vec<String>) {
    let host = MemoryHost {
        file: file.clone(),
        ..Default::default()
    };
    let warnings = host.warnings.clone();
    let image = Image::open(host, flags, &OptionRequest::default()).unwrap();
    let warnings = warnings.lock().clone();
    (image, warnings)
}

fn store(image: &Image<MemoryHost>, list: &[MemoryBits]) -> rust_qcow2::Result<()> {
    let list: Vec<&dyn DirtyBits> = list.iter().map(|bits| bits as _).collect();
    image.store_bitmaps(&list)
}

/// All bitmaps that are not in use, by name.
fn valid(image: &Image<MemoryHost>) -> Vec<MemoryBits> {
    let mut list: Vec<_> = image
        .bitmaps()
        .unwrap()
        .iter()
        .filter(|entry| !entry.in_use())
        .map(|entry| read_bits(image, entry).unwrap())
        .collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

/// Corruptions and leaks.
fn check(file: &MemoryFile) -> (u64, u64) {
    let flags = OpenFlags {
        writable: false,
        ..WRITABLE
    };
    let (image, _) = reopen(file, flags);
    let report = image
        .check(Fix::default(), &mut |line| println!("{line}"))
        .unwrap();
    (report.corruptions + report.check_errors, report.leaks)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn stored_and_read_again(
        cluster_bits in 9..=12u32,
        order in 0..=6u32,
        first in several(),
        second in several(),
        remove: prop::sample::Index,
    ) {
        let file = create(shape(cluster_bits, order), SIZE);
        let image = open(&file, None, &OptionRequest::default());
        write(&image, 70_000, &[1; 5000]).unwrap();
        store(&image, &first).unwrap();
        image.inactivate().unwrap();
        drop(image);
        prop_assert_eq!(check(&file), (0, 0));

        let image = open(&file, None, &OptionRequest::default());
        prop_assert_eq!(&valid(&image), &first);
        // What was not said to be in use is not written over.
        if let Some(bits) = first.first() {
            prop_assert!(store(&image, std::slice::from_ref(bits)).is_err());
        }
        image.mark_bitmaps_in_use().unwrap();
        prop_assert_eq!(valid(&image).len(), 0);
        store(&image, &second).unwrap();
        prop_assert_eq!(&valid(&image), &second);
        image.mark_bitmaps_in_use().unwrap();
        image.mark_bitmaps_in_use().unwrap();
        store(&image, &second).unwrap();
        let names: BTreeSet<_> = first.iter().chain(&second).map(|bits| bits.name.clone()).collect();
        prop_assert_eq!(image.bitmaps().unwrap().len(), names.len());
        let mut left = second.clone();
        if !left.is_empty() {
            let removed = left.remove(remove.index(left.len()));
            image.remove_bitmap(&removed.name).unwrap();
        }
        image.remove_bitmap(b"no such").unwrap();
        image.inactivate().unwrap();
        prop_assert_eq!(check(&file), (0, 0));
        let image = open(&file, None, &OptionRequest::default());
        prop_assert_eq!(valid(&image), left);
        for name in names {
            image.remove_bitmap(&name).unwrap();
        }
        prop_assert!(!image.has_bitmaps());
        image.inactivate().unwrap();
        prop_assert_eq!(check(&file), (0, 0));
    }

    #[test]
    fn an_error_loses_no_more_than_bitmaps(
        order in 2..=4u32,
        first in several(),
        second in several(),
        fail_after in 0..120usize,
        bad in prop_oneof![1..4usize, Just(usize::MAX)],
        again: bool,
    ) {
        let file = create(shape(9, order), SIZE);
        let image = open(&file, None, &OptionRequest::default());
        store(&image, &first).unwrap();
        image.inactivate().unwrap();
        let image = open(&file, None, &OptionRequest::default());
        file.fail_some(fail_after, bad);
        let marked = image.mark_bitmaps_in_use().is_ok();
        let stored = marked && store(&image, &second).is_ok();
        file.fail_after(None);
        // The process ends there.
        let left = MemoryFile::new(file.bytes());
        prop_assert_eq!(check(&left).0, 0);
        let got = valid(&reopen(&left, WRITABLE).0);
        prop_assert!(got.is_empty() || got == first || got == second);
        let again = !stored && again && image.mark_bitmaps_in_use().is_ok();
        let stored = stored || again && store(&image, &second).is_ok();
        let _ = image.inactivate();
        drop(image);
        prop_assert_eq!(check(&file).0, 0);
        let (image, _) = reopen(&file, WRITABLE);
        let got = valid(&image);
        if stored {
            prop_assert_eq!(&got, &second);
        } else {
            prop_assert!(got.is_empty() || got == first || got == second);
        }
        // Whatever it was, it goes on.
        image.mark_bitmaps_in_use().unwrap();
        store(&image, &second).unwrap();
        image.inactivate().unwrap();
        prop_assert_eq!(check(&file).0, 0);
        let (image, _) = reopen(&file, WRITABLE);
        prop_assert_eq!(valid(&image), second);
    }

    #[test]
    fn after_a_crash_no_old_bitmap_is_valid(
        order in 3..=4u32,
        first in several(),
        second in several(),
        cut in 0.0..=1.0f64,
        mut luck: u64,
    ) {
        let file = create(shape(9, order), SIZE);
        let image = open(&file, None, &OptionRequest::default());
        store(&image, &first).unwrap();
        image.inactivate().unwrap();
        let start = file.bytes();
        let _ = file.take_events();

        let image = open(&file, None, &OptionRequest::default());
        image.mark_bitmaps_in_use().unwrap();
        let mut events = file.take_events();
        let marked = events.len();
        for i in 0..20 {
            write(&image, i * 200_000, &[i as u8; 3000]).unwrap();
        }
        events.extend(file.take_events());
        let written = events.len();
        store(&image, &second).unwrap();
        image.inactivate().unwrap();
        events.extend(file.take_events());

        let end = (events.len() as f64 * cut) as usize;
        let bytes = common::crashed(&start, &events[..end], || common::coin(&mut luck));
        let survivor = MemoryFile::new(bytes);
        prop_assert_eq!(check(&survivor).0, 0);
        let (image, _) = reopen(&survivor, WRITABLE);
        let got = valid(&image);
        let old = got == first && end <= marked;
        let new = got == second && end > written;
        prop_assert!(got.is_empty() || old || new, "cut at {end} of {}: {got:?}", events.len());
    }
}

#[test]
fn events_are_flushed_before_the_header() {
    let file = create(shape(12, 4), SIZE);
    let image = open(&file, None, &OptionRequest::default());
    let bits = MemoryBits {
        name: b"b".to_vec(),
        granularity_bits: 9,
        disk_size: SIZE,
        enabled: true,
        bits: BTreeSet::from([1, 9000]),
    };
    let _ = file.take_events();
    store(&image, &[bits]).unwrap();
    let events = file.take_events();
    let header = events
        .iter()
        .position(|event| matches!(event, Event::Write(0, _)))
        .unwrap();
    assert_eq!(events[header - 1], Event::Flush);
    assert_eq!(events[header + 1], Event::Flush);
}

#[test]
fn bitmaps_of_somebody_who_did_not_keep_them_are_void() {
    let file = create(shape(12, 4), SIZE);
    let image = open(&file, None, &OptionRequest::default());
    let bits = MemoryBits {
        name: b"b".to_vec(),
        granularity_bits: 9,
        disk_size: SIZE,
        enabled: true,
        bits: BTreeSet::from([1, 9000]),
    };
    store(&image, &[bits]).unwrap();
    image.inactivate().unwrap();
    let mut bytes = file.bytes();
    assert_eq!(bytes[95], 1);
    bytes[95] = 0;
    for writable in [false, true] {
        let file = MemoryFile::new(bytes.clone());
        let (image, warnings) = reopen(
            &file,
            OpenFlags {
                writable,
                ..WRITABLE
            },
        );
        assert_eq!(warnings.len(), 1);
        assert!(!image.has_bitmaps() && image.bitmaps().unwrap().is_empty());
        drop(image);
        // The next one is not told again, and a repair frees the space.
        let (image, warnings) = reopen(&file, WRITABLE);
        assert_eq!(warnings.len(), usize::from(!writable));
        let fix = Fix {
            leaks: true,
            errors: false,
        };
        let report = image.check(fix, &mut |_| ()).unwrap();
        assert_eq!((report.leaks, report.leaks_fixed), (0, 3));
        image.inactivate().unwrap();
        assert_eq!(check(&file), (0, 0));
    }
}

#[test]
fn a_write_to_the_directory_is_refused() {
    let file = create(shape(12, 4), SIZE);
    let image = open(&file, None, &OptionRequest::default());
    let bits = MemoryBits {
        name: b"b".to_vec(),
        granularity_bits: 9,
        disk_size: SIZE,
        enabled: true,
        bits: BTreeSet::new(),
    };
    store(&image, &[bits]).unwrap();
    image.inactivate().unwrap();
    drop(image);
    // The refcounts say that the directory is free: it will be given out.
    let bytes = file.bytes();
    let at = bytes
        .windows(4)
        .position(|word| word == 0x2385_2875u32.to_be_bytes())
        .unwrap()
        + 8;
    let offset = u64::from_be_bytes(bytes[at + 16..at + 24].try_into().unwrap());
    let mut bytes = bytes;
    let block = 2 * 4096;
    let count = block + (offset as usize >> 12) * 2;
    assert_eq!(bytes[count..count + 2], [0, 1]);
    bytes[count + 1] = 0;
    let file = MemoryFile::new(bytes);
    let host = MemoryHost {
        file,
        ..Default::default()
    };
    let reports = host.reports.clone();
    let image = Image::open(host, WRITABLE, &OptionRequest::default()).unwrap();
    let failed = (0..40).any(|i| write(&image, i * 4096, &[1; 4096]).is_err());
    assert!(failed);
    assert_eq!(
        reports.lock()[0].message,
        "Preventing invalid write on metadata (overlaps with bitmap directory)"
    );
}
