//! Chains of images: what the top reads, whoever has it.

mod common;

use std::sync::Arc;

use common::{EXTENDED, Shape, TestImage, WRITABLE, create, read, write};
use proptest::prelude::*;
use rust_qcow2::host::ZeroFlags;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::image::{Image, OptionRequest};
use rust_qcow2::units::GuestOffset;

const PLAIN: Shape = common::PLAIN;

fn overlay(file: &MemoryFile, below: Option<Arc<TestImage>>, raw: Option<MemoryFile>) -> TestImage {
    let host = MemoryHost {
        file: file.clone(),
        // Where there is a layer below, QEMU has a node for it as well.
        backing: raw,
        layer_below: parking_lot::Mutex::new(below),
        ..Default::default()
    };
    Image::open(host, WRITABLE, &OptionRequest::default()).unwrap()
}

#[derive(Clone, Debug)]
struct Layer {
    shape: Shape,
    sectors: u64,
    writes: Vec<(u64, u64, u8)>,
    zeroes: Vec<(u64, u64)>,
}

fn shape() -> impl Strategy<Value = Shape> {
    let standard = (9..=13u32).prop_map(|cluster_bits| Shape {
        cluster_bits,
        ..PLAIN
    });
    let extended = (14..=15u32).prop_map(|cluster_bits| Shape {
        cluster_bits,
        ..EXTENDED
    });
    prop_oneof![2 => standard, 1 => extended]
}

fn layer() -> impl Strategy<Value = Layer> {
    let range = (0..40_000u64, 1..6_000u64);
    (
        shape(),
        20..100u64,
        prop::collection::vec(
            (range.clone(), 1..=255u8).prop_map(|((a, l), b)| (a, l, b)),
            0..5,
        ),
        prop::collection::vec(range, 0..3),
    )
        .prop_map(|(shape, sectors, writes, zeroes)| Layer {
            shape,
            sectors,
            writes,
            zeroes,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Layers of any size and cluster size, on a raw file or on nothing.
    #[test]
    fn the_top_reads_what_the_layers_hold(
        layers in prop::collection::vec(layer(), 1..12),
        raw_len in prop::option::of(0..50_000usize),
    ) {
        let raw_bytes: Vec<u8> = (0..raw_len.unwrap_or(0)).map(|i| i as u8 | 1).collect();
        let raw = raw_len.map(|_| MemoryFile::new(raw_bytes.clone()));
        let mut below: Option<Arc<TestImage>> = None;
        let mut model = raw_bytes;
        for layer in &layers {
            let size = layer.sectors * 512;
            let file = create(layer.shape, size);
            let base = if below.is_none() { raw.clone() } else { None };
            let image = overlay(&file, below.take(), base);
            model.resize(size as usize, 0);
            for (at, len, byte) in &layer.writes {
                let at = (*at).min(size - 1);
                let len = (*len).min(size - at);
                write(&image, at, &vec![*byte; len as usize]).unwrap();
                model[at as usize..(at + len) as usize].fill(*byte);
            }
            for (at, len) in &layer.zeroes {
                let cluster = 1u64 << layer.shape.part_bits();
                let at = (*at).min(size - 1) / cluster * cluster;
                let end = (at + len).next_multiple_of(cluster).min(size);
                let flags = ZeroFlags { may_unmap: true, no_fallback: false };
                image.write_zeroes(GuestOffset(at), end - at, flags).unwrap();
                model[at as usize..end as usize].fill(0);
            }
            prop_assert!(read(&image, 0, size as usize) == model);
            below = Some(Arc::new(image));
        }
    }
}

/// The stack a read takes does not depend on the number of layers.
#[test]
fn deep_chains_need_no_stack() {
    let size = 64 << 10;
    let base = create(PLAIN, size);
    let mut below = overlay(&base, None, None);
    write(&below, 1000, b"from the base").unwrap();
    let empty = create(PLAIN, size).bytes();
    for _ in 0..20_000 {
        let file = MemoryFile::new(empty.clone());
        below = overlay(&file, Some(Arc::new(below)), None);
    }
    let top = below;
    let work = move || {
        assert_eq!(read(&top, 1000, 13), b"from the base");
        write(&top, 1004, b"m").unwrap();
        assert_eq!(read(&top, 1000, 13), b"frommthe base");
        assert_eq!(read(&top, 0, 8), [0; 8]);
        // Dropping a chain this long recurses, which is the test's own doing.
        std::mem::forget(top);
    };
    std::thread::Builder::new()
        .stack_size(128 << 10)
        .spawn(work)
        .unwrap()
        .join()
        .unwrap();
}
