//! Layers that change under others: what the top reads stays true.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{EXTENDED, PLAIN, Shape, TestImage, WRITABLE, create, read, write};
use parking_lot::Mutex;
use proptest::prelude::*;
use rust_qcow2::host::memory::MemoryHost;
use rust_qcow2::host::{Preallocation, ZeroFlags};
use rust_qcow2::image::{Image, OptionRequest};
use rust_qcow2::units::GuestOffset;

/// A chain whose layers all are in use.
struct Chain {
    layers: Vec<Arc<TestImage>>,
    /// What each layer reads as is the sum of what was done to it and those
    /// below, so each layer's own content is kept: `None` is not its own.
    own: Vec<Vec<Option<u8>>>,
    generation: Arc<AtomicU64>,
}

impl Chain {
    fn new() -> Self {
        Self {
            layers: Vec::new(),
            own: Vec::new(),
            generation: Arc::default(),
        }
    }

    /// Puts a layer on top; those with large clusters have subclusters.
    fn push(&mut self, cluster_bits: u32, size: u64) {
        let shape = Shape {
            cluster_bits,
            extended_l2: cluster_bits >= 14,
            ..PLAIN
        };
        let host = MemoryHost {
            file: create(shape, size),
            layer_below: Mutex::new(self.layers.last().cloned()),
            generation: Arc::clone(&self.generation),
            ..Default::default()
        };
        let image = Image::open(host, WRITABLE, &OptionRequest::default()).unwrap();
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.layers.push(Arc::new(image));
        self.own.push(vec![None; size as usize]);
    }

    /// What a layer reads as.
    fn content(&self, layer: usize) -> Vec<u8> {
        let mut content = Vec::new();
        for own in &self.own[..=layer] {
            content.resize(own.len(), 0);
            for (byte, own) in content.iter_mut().zip(own) {
                *byte = own.unwrap_or(*byte);
            }
        }
        content
    }

    /// Who has to be asked next, below a layer: nobody is left out that has any
    /// of the bytes.
    fn ask(&self, layer: usize, start: u64, len: u64) {
        let Some(next) = self.layers[layer]
            .next_layer(GuestOffset(start), len, None)
            .unwrap()
        else {
            return;
        };
        assert!((1..=len).contains(&next.len));
        let first = layer - 1;
        let at = first - next.skipped;
        assert!(Arc::ptr_eq(&next.layer, &self.layers[at]));
        for (left_out, own) in self.own.iter().enumerate().take(layer).skip(at + 1) {
            let from = start as usize;
            let bytes = own.get(from..from + next.len as usize);
            assert!(
                bytes.is_some_and(|bytes| bytes.iter().all(Option::is_none)),
                "layer {left_out} of {layer} at {start}"
            );
        }
    }

    /// Bytes that a layer gets itself when it is written: whole clusters or
    /// subclusters, with the content they had.
    fn take(&mut self, layer: usize, start: u64, len: u64) {
        let before = self.content(layer);
        let bits = self.layers[layer].geometry().subcluster_bits();
        let from = ((start >> bits) << bits) as usize;
        let to = ((start + len).next_multiple_of(1 << bits) as usize).min(before.len());
        let own = &mut self.own[layer][from..to];
        for (own, before) in own.iter_mut().zip(&before[from..to]) {
            *own = Some(*before);
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, u64, u64, u8),
    Zero(usize, u64, u64),
    Discard(usize, u64, u64),
    Snapshot(u32),
    Resize(usize, u64),
    Empty(usize),
    /// Takes a layer out; what it holds is not copied.
    Remove(usize),
    Read(usize, u64, u64),
}

const SIZE: u64 = 48 << 10;

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
        let mut chain = Chain::new();
        chain.push(9, SIZE);
        for step in steps {
            let count = chain.layers.len();
            match step {
                Step::Write(layer, at, len, byte) => {
                    let layer = layer % count;
                    let size = chain.layers[layer].size();
                    let at = at % size;
                    let len = len.min(size - at);
                    chain.take(layer, at, len);
                    write(&chain.layers[layer], at, &vec![byte; len as usize]).unwrap();
                    chain.own[layer][at as usize..(at + len) as usize].fill(Some(byte));
                }
                Step::Zero(layer, at, len) | Step::Discard(layer, at, len) => {
                    let layer = layer % count;
                    let image = &chain.layers[layer];
                    let size = image.size();
                    let bits = match step {
                        Step::Zero(..) => image.geometry().subcluster_bits(),
                        _ => image.geometry().cluster_bits,
                    };
                    let at = ((at % size) >> bits) << bits;
                    let end = (at + len).next_multiple_of(1 << bits).min(size);
                    let flags = ZeroFlags { may_unmap: len % 2 == 0, no_fallback: false };
                    match step {
                        Step::Zero(..) => image.write_zeroes(GuestOffset(at), end - at, flags),
                        _ => {
                            // In the lowest layer what has nothing stays so.
                            image.discard(GuestOffset(at), end - at)
                        }
                    }.unwrap();
                    chain.own[layer][at as usize..end as usize].fill(Some(0));
                }
                Step::Snapshot(bits) => {
                    if count < 12 {
                        chain.push(bits, SIZE);
                    }
                }
                Step::Resize(layer, size) => {
                    let layer = layer % count;
                    let before = chain.layers[layer].size();
                    // What is added to a layer with something below shows that.
                    // The rest of a cluster that is cut is kept out of this.
                    let bits = chain.layers[layer].geometry().cluster_bits;
                    let size = size.next_multiple_of(1 << bits);
                    let image = &chain.layers[layer];
                    image.resize(size, true, Preallocation::Off, true).unwrap();
                    chain.own[layer].resize(size as usize, Some(0));
                    if size > before {
                        chain.own[layer][before as usize..].fill(Some(0));
                    }
                }
                Step::Empty(layer) => {
                    let layer = layer % count;
                    chain.layers[layer].make_empty().unwrap();
                    chain.own[layer].fill(None);
                }
                Step::Remove(layer) => {
                    let layer = layer % count;
                    if layer + 1 < count {
                        let below = layer.checked_sub(1).map(|below| chain.layers[below].clone());
                        *chain.layers[layer + 1].host().layer_below.lock() = below;
                        chain.generation.fetch_add(1, Ordering::SeqCst);
                        chain.layers.remove(layer);
                        chain.own.remove(layer);
                    }
                }
                Step::Read(layer, at, len) => {
                    let layer = layer % count;
                    let size = chain.layers[layer].size();
                    let at = at % size;
                    let len = len.min(size - at) as usize;
                    chain.ask(layer, at, len as u64);
                    let expected = chain.content(layer);
                    let at_bytes = at as usize;
                    let got = read(&chain.layers[layer], at, len);
                    prop_assert!(got == expected[at_bytes..at_bytes + len], "layer {}", layer);
                }
            }
            let top = chain.layers.len() - 1;
            let size = chain.layers[top].size() as usize;
            prop_assert!(read(&chain.layers[top], 0, size) == chain.content(top));
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
