//! Layers that change under others: what the top reads stays true.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::chain::{Chain, SIZE, Step};
use common::{EXTENDED, PLAIN, Shape, TestImage, WRITABLE, create, read, write};
use parking_lot::Mutex;
use proptest::prelude::*;
use rust_qcow2::host::ZeroFlags;
use rust_qcow2::host::memory::MemoryHost;
use rust_qcow2::image::{Image, OptionRequest};
use rust_qcow2::units::GuestOffset;

fn step() -> impl Strategy<Value = Step> {
    let layer = 0..12usize;
    let at = 0..SIZE;
    let len = 1..9000u64;
    prop_oneof![
        5 => (layer.clone(), at.clone(), len.clone(), 1..=255u8)
            .prop_map(|(l, a, n, b)| Step::Write(l, a, n, b)),
        2 => (layer.clone(), at.clone(), len.clone()).prop_map(|(l, a, n)| Step::Zero(l, a, n)),
        2 => (layer.clone(), at.clone(), len.clone()).prop_map(|(l, a, n)| Step::Discard(l, a, n)),
        2 => prop_oneof![9..=12u32, Just(14)].prop_map(Step::Snapshot),
        1 => (layer.clone(), 1..SIZE / 512).prop_map(|(l, n)| Step::Resize(l, n * 512)),
        1 => layer.clone().prop_map(Step::Empty),
        1 => layer.clone().prop_map(Step::Remove),
        4 => (layer, at, len).prop_map(|(l, a, n)| Step::Read(l, a, n)),
    ]
}

/// Fewer where each of them takes long.
fn cases() -> u32 {
    let asked = std::env::var("PROPTEST_CASES").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn no_layer_reads_what_was_before(steps in prop::collection::vec(step(), 1..60)) {
        let mut chain = Chain::new(false);
        for step in steps {
            chain.step(step);
        }
    }
}

/// Readers of the top meet no byte that is not theirs while a layer below gets
/// new clusters, gives them back, and gets them for other data.
#[test]
fn reads_go_on_while_a_layer_moves_its_clusters() {
    read_while_writing(Shape {
        cluster_bits: 12,
        ..PLAIN
    });
}

/// The same with subclusters, whose entries are two words.
#[test]
fn reads_go_on_while_subclusters_come_and_go() {
    read_while_writing(EXTENDED);
}

fn read_while_writing(shape: Shape) {
    const CLUSTERS: u64 = 64;
    let unit = 1u64 << shape.part_bits();
    let cluster_size = 1u64 << shape.cluster_bits;
    let size = unit * CLUSTERS;
    let generation = Arc::new(AtomicU64::new(0));
    let layer = |below: Option<Arc<TestImage>>| {
        let host = MemoryHost {
            file: create(shape, size),
            layer_below: Mutex::new(below),
            generation: Arc::clone(&generation),
            ..Default::default()
        };
        Arc::new(Image::open(host, WRITABLE, &OptionRequest::default()).unwrap())
    };
    let base = layer(None);
    let middle = layer(Some(Arc::clone(&base)));
    let top = layer(Some(Arc::clone(&middle)));
    // Every cluster is filled with its own number, or reads as zeroes.
    let fill = |image: &TestImage, cluster: u64| {
        let bytes = vec![cluster as u8 + 1; unit as usize];
        write(image, cluster * unit, &bytes).unwrap();
    };
    for cluster in 0..CLUSTERS {
        fill(&base, cluster);
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in 1..4u64 {
            let (top, stop) = (&top, &stop);
            scope.spawn(move || {
                let mut random = seed;
                while !stop.load(Ordering::Relaxed) {
                    common::next_random(&mut random);
                    let cluster = (random >> 33) % CLUSTERS;
                    let bytes = read(top, cluster * unit, unit as usize);
                    let own = cluster as u8 + 1;
                    let good = bytes.iter().all(|byte| *byte == own)
                        || bytes.iter().all(|byte| *byte == 0);
                    if !good {
                        stop.store(true, Ordering::Relaxed);
                        panic!("cluster {cluster} reads as {:?}", &bytes[..8]);
                    }
                }
            });
        }
        let mut random = 99u64;
        for _ in 0..4000 {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            common::next_random(&mut random);
            let cluster = (random >> 33) % CLUSTERS;
            let image = if (random >> 20) & 1 == 0 {
                &middle
            } else {
                &base
            };
            match (random >> 24) & 3 {
                0 => {
                    let at = GuestOffset(cluster * unit / cluster_size * cluster_size);
                    image.discard(at, cluster_size).unwrap();
                }
                1 => {
                    let flags = ZeroFlags {
                        may_unmap: true,
                        no_fallback: false,
                    };
                    image
                        .write_zeroes(GuestOffset(cluster * unit), unit, flags)
                        .unwrap();
                }
                _ => fill(image, cluster),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}
