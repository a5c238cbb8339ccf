//! How often metadata are flushed, and how much of them.

mod common;

use common::{PLAIN, Shape, create, next_random, open, read, write};
use rust_qcow2::host::ZeroFlags;
use rust_qcow2::host::memory::{Event, MemoryFile};
use rust_qcow2::image::OptionRequest;
use rust_qcow2::units::GuestOffset;

/// A cluster, and an L2 slice: all of its table.
const CLUSTER: u64 = 4096;
/// What an L2 table maps.
const SPAN: u64 = CLUSTER * CLUSTER / 8;
const TABLES: u64 = 64;

/// How often the file was flushed since its events were last taken.
fn take_flushes(file: &MemoryFile) -> usize {
    let events = file.take_events();
    let flushes = events.iter().filter(|event| **event == Event::Flush);
    flushes.count()
}

/// Each slice that makes room waits for refcounts that were not written yet.
/// They are flushed for many of them together.
#[test]
fn slices_make_room_without_a_flush_for_each() {
    let shape = Shape {
        cluster_bits: CLUSTER.trailing_zeros(),
        ..PLAIN
    };
    let file = create(shape, TABLES * SPAN);
    let options = OptionRequest {
        l2_cache_size: Some(16 * CLUSTER),
        l2_cache_entry_size: Some(CLUSTER),
        ..OptionRequest::default()
    };
    let image = open(&file, None, &options);
    let data = vec![1; CLUSTER as usize];
    for table in 0..TABLES {
        write(&image, table * SPAN, &data).unwrap();
    }
    image.flush().unwrap();
    let _ = file.take_events();

    let mut luck = 1;
    for i in 0..256 {
        let table = (next_random(&mut luck) >> 33) % TABLES;
        write(&image, table * SPAN + (1 + i) * CLUSTER, &data).unwrap();
    }
    // One for each would be 190.
    let flushes = take_flushes(&file);
    assert!(flushes < 50, "{flushes}");
}

/// A guest that flushes after each write does not write whole slices for it.
#[test]
fn of_a_slice_is_written_what_changed() {
    let cluster = 65536u64;
    let shape = Shape {
        cluster_bits: cluster.trailing_zeros(),
        ..PLAIN
    };
    let file = create(shape, 8192 * cluster);
    let options = OptionRequest {
        l2_cache_entry_size: Some(cluster),
        ..OptionRequest::default()
    };
    let image = open(&file, None, &options);
    let data = vec![1; cluster as usize];
    write(&image, 0, &data).unwrap();
    image.flush().unwrap();
    let _ = file.take_events();

    let lengths = |guest: u64| {
        write(&image, guest, &data).unwrap();
        image.flush().unwrap();
        let events = file.take_events();
        let lengths = events.iter().filter_map(|event| match event {
            Event::Write(_, bytes) => Some(bytes.len() as u64),
            _ => None,
        });
        lengths.collect::<Vec<_>>()
    };
    // Data, refcounts, and entries: of one block, and of one anywhere else.
    assert_eq!(lengths(cluster), [cluster, cluster, 4096]);
    assert_eq!(lengths(8000 * cluster), [cluster, cluster, 4096]);
    let after = open(&file, None, &options);
    for guest in [0, cluster, 8000 * cluster] {
        assert_eq!(read(&after, guest, data.len()), data);
    }
}

/// Of the tables that have no clusters of zeroes any more many are written after
/// one flush.
#[test]
fn a_downgrade_flushes_for_many_tables() {
    let shape = Shape {
        cluster_bits: CLUSTER.trailing_zeros(),
        ..PLAIN
    };
    let file = create(shape, TABLES * SPAN);
    let backing = MemoryFile::new(vec![7; (TABLES * SPAN) as usize]);
    let options = OptionRequest::default();
    let image = open(&file, Some(&backing), &options);
    for table in 0..TABLES {
        let start = GuestOffset(table * SPAN);
        image
            .write_zeroes(start, CLUSTER, ZeroFlags::default())
            .unwrap();
    }
    image.flush().unwrap();
    let _ = file.take_events();

    image.downgrade(&mut |_, _| ()).unwrap();
    // One for each table would be 64.
    let flushes = take_flushes(&file);
    assert!(flushes < 8, "{flushes}");
    let after = open(&file, Some(&backing), &options);
    for table in 0..TABLES {
        let expected = [[0; 512], [7; 512]].concat();
        assert_eq!(read(&after, table * SPAN + CLUSTER - 512, 1024), expected);
    }
}
