//! Layers of a chain that change, come and go: what an image on top knows of
//! them, and what memory that takes.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{PLAIN, Shape, TestImage, WRITABLE, create, read, write};
use parking_lot::Mutex;
use rust_qcow2::host::Preallocation;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::image::snapshots::NewSnapshot;
use rust_qcow2::image::{Image, OptionRequest};
use rust_qcow2::units::GuestOffset;

type Layer = Arc<TestImage>;

const KIB4: Shape = Shape {
    cluster_bits: 12,
    ..PLAIN
};

/// The links of one graph.
#[derive(Default)]
struct Graph(Arc<AtomicU64>);

impl Graph {
    fn changes(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn open(&self, file: MemoryFile, below: Option<Layer>, budget: Option<u64>) -> Layer {
        let host = MemoryHost {
            file,
            layer_below: Mutex::new(below),
            generation: Arc::clone(&self.0),
            ..Default::default()
        };
        let options = OptionRequest {
            l2_cache_size: budget,
            ..Default::default()
        };
        Arc::new(Image::open(host, WRITABLE, &options).unwrap())
    }

    fn on(&self, below: &Layer, size: u64, budget: Option<u64>) -> Layer {
        self.open(create(KIB4, size), Some(Arc::clone(below)), budget)
    }

    fn chain(&self, depth: usize, size: u64) -> Layer {
        let empty = create(KIB4, size).bytes();
        let layers = (0..depth).fold(None, |below, _| {
            Some(self.open(MemoryFile::new(empty.clone()), below, None))
        });
        layers.unwrap()
    }
}

/// Layers drop the one below from within: not a thousand on one stack.
fn forget(layers: impl IntoIterator<Item = Layer>) {
    layers.into_iter().for_each(std::mem::forget);
}

/// Does something again and again beside `f`.
fn beside(again: impl Fn() + Sync, f: impl FnOnce()) {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&ended);
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                again();
            }
        });
        f();
    });
}

/// The size of the layer below is looked at while it changes.
#[test]
fn a_layer_grows_beside_a_new_view() {
    let (graph, most) = (Graph::default(), 2 << 20);
    let last = graph.on(&graph.chain(200, 4096), 4096, None);
    let top = graph.on(&last, most, None);
    let grow = |size: u64| last.resize(size, true, Preallocation::Off, false).unwrap();
    beside(
        || drop(read(&top, 0, 512)),
        || {
            for round in 1..most / 8192 {
                grow(round * 8192);
                let start = Instant::now();
                while start.elapsed() < Duration::from_micros(round * 7 % 200) {
                    std::hint::spin_loop();
                }
                let at = round * 8192;
                grow(at + 4096);
                write(&last, at, &[0x77; 512]).unwrap();
                assert_eq!(read(&top, at, 512)[0], 0x77, "round {round}");
            }
        },
    );
    forget([top, last]);
}

/// An index that is filled meanwhile does not stay with the old tables.
#[test]
fn a_layer_goes_back_to_a_snapshot() {
    let (graph, size) = (Graph::default(), 1 << 20);
    let base = graph.chain(1, size);
    write(&base, 8192, &[9; 512]).unwrap();
    let middle = graph.on(&base, size, None);
    let top = graph.on(&middle, size, None);
    let ids = [1, 2].map(|byte: u8| {
        write(&middle, 0, &[byte; 4096]).unwrap();
        let new = NewSnapshot {
            name: vec![b'a' + byte],
            ..NewSnapshot::default()
        };
        middle.create_snapshot(&new).unwrap()
    });
    beside(
        || assert_eq!(read(&top, 8192, 512)[0], 9),
        || {
            for round in 0..4000 {
                // Not while the other thread reads there.
                let Ok(held) = middle.hold_snapshot(&ids[round % 2]) else {
                    continue;
                };
                if middle.apply_snapshot(held).is_ok() {
                    assert_eq!(read(&top, 0, 512), read(&middle, 0, 512), "round {round}");
                }
            }
        },
    );
}

/// With so many layers there is no index, and the view has to know nevertheless.
#[test]
fn a_layer_grows_that_is_too_deep_for_an_index() {
    let graph = Graph::default();
    let last = graph.chain(65_535, 512);
    let top = graph.on(&last, 4096, None);
    assert_eq!(read(&top, 512, 512)[0], 0);
    last.resize(4096, true, Preallocation::Off, false).unwrap();
    write(&last, 512, &[0x77; 512]).unwrap();
    assert_eq!(read(&top, 512, 512)[0], 0x77);
    forget([top, last]);
}

/// Nor is there one for a disk that would need gigabytes for its table alone.
#[test]
fn a_disk_too_large_for_an_index() {
    let graph = Graph::default();
    let base = graph.open(create(PLAIN, 1 << 20), None, None);
    write(&base, 4096, &[7; 512]).unwrap();
    let large = Shape {
        cluster_bits: 21,
        ..PLAIN
    };
    let middle = graph.open(create(large, 1 << 60), Some(base), None);
    let top = graph.open(create(large, 1 << 60), Some(Arc::clone(&middle)), None);
    assert_eq!(read(&top, 4096, 512)[0], 7);
    assert_eq!(read(&top, 1 << 59, 512)[0], 0);
    write(&middle, 1 << 59, &[8; 512]).unwrap();
    assert_eq!(read(&top, 1 << 59, 512)[0], 8);
    assert!(top.chain_statistics().index_bytes < 1 << 20);
}

/// What had to be asked for once is known afterwards, also that nobody has it.
#[test]
fn holes_are_not_asked_for_twice() {
    let (graph, size) = (Graph::default(), 1 << 20);
    let below = graph.chain(3, size);
    write(&below, 512 << 10, &[1; 512]).unwrap();
    let extended = Shape {
        cluster_bits: 16,
        extended_l2: true,
        ..PLAIN
    };
    let middle = graph.open(create(extended, size), Some(below), None);
    let top = graph.on(&middle, size, None);
    read(&top, 8192, 512);
    // The other subclusters have to be asked for.
    write(&middle, 0, &[2; 512]).unwrap();
    assert_eq!(read(&top, 8192, 512)[0], 0);
    let asked = middle.chain_statistics().hits + middle.chain_statistics().misses;
    let before = top.chain_statistics();
    for _ in 0..10 {
        read(&top, 8192, 512);
    }
    let after = top.chain_statistics();
    assert_eq!(after.hits - before.hits, 10);
    assert_eq!(
        asked,
        middle.chain_statistics().hits + middle.chain_statistics().misses
    );
    // Found out without a walk: the reads are counted as ones that nobody has.
    assert_eq!(after.below_reads - before.below_reads, 10);
}

/// Jobs ask the top, which is read, and in turn the layer below it, which tells
/// who has the data: they have one index, and each table is read once.
#[test]
fn a_layer_has_the_index_of_the_one_above() {
    const TABLES: u64 = 32;
    let (graph, table, depth) = (Graph::default(), 2 << 20, 20);
    let size = TABLES * table;
    let mut layers = Vec::new();
    for number in 0..depth {
        let below = layers.last().cloned();
        let layer = graph.open(create(KIB4, size), below, None);
        for at in (0..TABLES).map(|i| i * table + number * 4096) {
            write(&layer, at, &[number as u8 + 1; 512]).unwrap();
        }
        layers.push(layer);
    }
    let last = &layers[layers.len() - 1];
    let top = graph.on(last, size, None);
    for at in (0..size).step_by(64 << 10) {
        let next = last
            .next_layer(GuestOffset(at), 4096, None)
            .unwrap()
            .unwrap();
        let number = at % table / 4096;
        if number < depth - 1 {
            assert_eq!(next.skipped as u64, depth - 2 - number);
        }
        let byte = if number < depth { number as u8 + 1 } else { 0 };
        assert_eq!(read(&top, at, 512)[0], byte);
    }
    let reads = |image: &Layer| image.chain_statistics().table_reads;
    let one_index = depth * TABLES..(depth + 1) * TABLES;
    assert!(one_index.contains(&reads(&top)), "{}", reads(&top));
    assert_eq!(reads(last), reads(&top));
    // The same reads as the layer has them.
    for number in 0..depth {
        assert_eq!(read(last, number * 4096, 1), [number as u8 + 1]);
    }
    // A snapshot: the index moves on, and the layer gets one of its own.
    let newer = graph.on(&top, size, None);
    graph.changes();
    read(&newer, 0, 512);
    last.next_layer(GuestOffset(4096), 4096, None).unwrap();
    assert!(one_index.contains(&reads(&newer)), "{}", reads(&newer));
    assert!(
        (1..depth * TABLES).contains(&reads(last)),
        "{}",
        reads(last)
    );
}

/// The index of an image that is not on top any more goes, fitting or not.
#[test]
fn old_indexes_go() {
    const LIMIT: u64 = 256 << 10;
    let graph = Graph::default();
    let mut size = 1 << 30;
    let mut tops = vec![graph.open(create(KIB4, size), None, Some(LIMIT))];
    for _ in 0..6 {
        let top = graph.on(&tops[tops.len() - 1], size, Some(LIMIT));
        graph.changes();
        tops.push(Arc::clone(&top));
        for at in (0..size).step_by(1 << 20) {
            read(&top, at, 512);
        }
        let all = tops
            .iter()
            .map(|image| image.chain_statistics().index_bytes);
        let all: u64 = all.sum();
        // What an index is made of counts besides.
        assert!(all <= LIMIT + (32 << 10), "{all} bytes of indexes");
        size += 1 << 20;
        top.resize(size, true, Preallocation::Off, false).unwrap();
    }
}

/// Whoever is on top again has what its own options say.
#[test]
fn the_limit_is_that_of_the_image_on_top() {
    let (graph, size) = (Graph::default(), 1 << 30);
    let base = graph.open(create(KIB4, size), None, Some(1 << 20));
    let middle = graph.on(&base, size, Some(1 << 20));
    let top = graph.on(&middle, size, Some(64 << 20));
    read(&top, 0, 512);
    assert_eq!(middle.chain_statistics().cache_limit, 64 << 20);
    drop(top);
    graph.changes();
    read(&middle, 0, 512);
    assert_eq!(middle.chain_statistics().cache_limit, 1 << 20);
    assert_eq!(base.chain_statistics().cache_limit, 1 << 20);
}

/// Bytes behind the last whole sector of a layer are nobody's.
#[test]
fn layers_end_at_whole_sectors() {
    let graph = Graph::default();
    let base = graph.chain(1, 64 << 10);
    write(&base, 0, &[1; 64 << 10]).unwrap();
    let file = create(KIB4, 64 << 10);
    let mut bytes = file.bytes();
    bytes[24..32].copy_from_slice(&(0x8000_u64 + 300).to_be_bytes());
    let middle = graph.open(MemoryFile::new(bytes), Some(base), None);
    let top = graph.on(&middle, 64 << 10, None);
    let found = read(&top, 0x8000 - 512, 1024);
    assert!(found[..512] == [1; 512] && found[512..] == [0; 512]);
}
