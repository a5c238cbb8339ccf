//! Chains of images: what the top reads, whoever has it.

mod common;

use std::sync::Arc;

use common::{EXTENDED, Shape, TestImage, WRITABLE, create, read, write};
use parking_lot::Mutex;
use proptest::prelude::*;
use rust_qcow2::host::ZeroFlags;
use rust_qcow2::host::local::SharedBuf;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::image::{Image, OptionRequest, StatusKind};
use rust_qcow2::units::GuestOffset;

const PLAIN: Shape = common::PLAIN;

fn overlay(file: &MemoryFile, below: Option<Arc<TestImage>>, raw: Option<MemoryFile>) -> TestImage {
    let host = MemoryHost {
        file: file.clone(),
        // Where there is a layer below, QEMU has a node for it as well.
        backing: raw,
        layer_below: Mutex::new(below),
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

/// A layer that cannot be read takes away what it maps and what is below, as
/// long as it cannot be read, and nothing above.
#[test]
fn an_unreadable_layer_hides_nothing_above() {
    let cluster = 1 << PLAIN.cluster_bits;
    let size = 8 * cluster;
    let files: Vec<_> = (1..=5u8)
        .map(|byte| {
            let file = create(PLAIN, size);
            let image = overlay(&file, None, None);
            let data = vec![byte; cluster as usize];
            write(&image, u64::from(byte) * cluster, &data).unwrap();
            image.inactivate().unwrap();
            file
        })
        .collect();
    for (broken, file) in (1..5u8).zip(&files) {
        let layer = |below, file| Some(Arc::new(overlay(file, below, None)));
        let top = files.iter().fold(None, layer).unwrap();
        let is_readable = |byte: u8| {
            let memory = Mutex::new(vec![0; cluster as usize]);
            let at = GuestOffset(u64::from(byte) * cluster);
            let result = top.read(at, cluster, SharedBuf(&memory), 0);
            assert!(result.is_err() || memory.into_inner().iter().all(|found| *found == byte));
            result.is_ok()
        };
        file.set_unreadable(true);
        for byte in (1..=5).rev().chain(1..=5) {
            assert_eq!(is_readable(byte), byte > broken, "{byte} without {broken}");
        }
        file.set_unreadable(false);
        assert!((1..=5).all(is_readable));
    }
}

/// What is not in the top is told for some clusters at once, though each comes
/// from another layer, and not for all of the disk each time.
#[test]
fn what_several_layers_have_is_told_at_once() {
    let cluster = 1 << PLAIN.cluster_bits;
    let size = 32 * cluster;
    let layer = |below, number| {
        let image = overlay(&create(PLAIN, size), below, None);
        write(&image, number * cluster, &[1]).unwrap();
        Some(Arc::new(image))
    };
    let below = (0..32).fold(None, layer);
    let top = overlay(&create(PLAIN, size), below, None);
    // The index learns of all.
    read(&top, 0, size as usize);
    for start in [0, 3 * cluster, 3 * cluster + 512] {
        let status = top.block_status(GuestOffset(start), size - start).unwrap();
        assert_eq!(status.kind, StatusKind::Unallocated { host: None });
        let end = start + status.len;
        assert_eq!(end % cluster, 0);
        assert!(
            (8..=9).contains(&status.len.div_ceil(cluster)),
            "{status:?}"
        );
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
