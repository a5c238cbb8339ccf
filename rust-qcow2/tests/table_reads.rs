//! How often L2 tables are read, and how much of them.

mod common;

use common::{PLAIN, Shape, WRITABLE, create, open, read, write};
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::image::snapshots::NewSnapshot;
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};

/// A cluster, and an L2 table.
const CLUSTER: u64 = 65536;
/// What an L2 table maps.
const SPAN: u64 = CLUSTER * CLUSTER / 8;
/// What a small slice of it maps.
const SLICE_SPAN: u64 = CLUSTER * 4096 / 8;
const TABLES: u64 = 8;

/// An image with a cluster in each table.
fn scattered() -> MemoryFile {
    let shape = Shape {
        cluster_bits: CLUSTER.trailing_zeros(),
        ..PLAIN
    };
    let file = create(shape, TABLES * SPAN);
    let image = open(&file, None, &OptionRequest::default());
    for table in 0..TABLES {
        write(&image, table * SPAN, &[1; 512]).unwrap();
    }
    image.inactivate().unwrap();
    file
}

fn open_to_read(file: &MemoryFile) -> common::TestImage {
    let host = MemoryHost {
        file: file.clone(),
        ..MemoryHost::default()
    };
    let flags = OpenFlags {
        writable: false,
        ..WRITABLE
    };
    Image::open(host, flags, &OptionRequest::default()).unwrap()
}

/// The slices of an image that is only read are small. A scan does not read each
/// of them by itself.
#[test]
fn a_scan_reads_whole_tables() {
    let image = open_to_read(&scattered());
    let file = image.host().file.clone();
    let _ = file.take_reads();
    let holes = (0..TABLES * SPAN / SLICE_SPAN).map(|slice| (slice + 1) * SLICE_SPAN - 512);
    for hole in holes {
        assert_eq!(read(&image, hole, 512), [0; 512]);
    }
    let reads = file.take_reads();
    // The first slice, the rest of its table, the other tables.
    assert_eq!(reads.count, TABLES + 1);
    assert_eq!(reads.bytes, TABLES * CLUSTER);
}

/// What is read here and there is read in small pieces.
#[test]
fn a_single_lookup_reads_a_single_slice() {
    let image = open_to_read(&scattered());
    let file = image.host().file.clone();
    let _ = file.take_reads();
    for table in (0..TABLES).rev() {
        assert_eq!(read(&image, table * SPAN + SLICE_SPAN, 512), [0; 512]);
    }
    assert_eq!(file.take_reads().bytes, TABLES * 4096);
}

/// Operations on snapshots go through the tables several times, and read them
/// once.
#[test]
fn snapshots_read_tables_once() {
    let file = scattered();
    let most = (TABLES + 4) * CLUSTER;
    let bytes_of = |operation: &dyn Fn(&common::TestImage)| {
        let image = open(&file, None, &OptionRequest::default());
        let _ = file.take_reads();
        operation(&image);
        let reads = file.take_reads();
        image.inactivate().unwrap();
        reads.bytes
    };
    let created = bytes_of(&|image| {
        image
            .create_snapshot(&NewSnapshot {
                name: b"one".to_vec(),
                ..NewSnapshot::default()
            })
            .unwrap();
    });
    assert!(created < most, "{created}");
    let applied = bytes_of(&|image| {
        let held = image.hold_snapshot(b"one").unwrap();
        image.apply_snapshot(held).unwrap();
    });
    assert!(applied < most, "{applied}");
    let deleted = bytes_of(&|image| image.delete_snapshot(None, Some(b"one")).unwrap());
    assert!(deleted < most, "{deleted}");
}
