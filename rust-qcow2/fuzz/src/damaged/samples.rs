//! The images that are damaged: small ones that have of everything something.

use std::sync::LazyLock;

use rust_qcow2::host::ZeroFlags;
use rust_qcow2::image::OptionRequest;
use rust_qcow2::image::snapshots::NewSnapshot;
use rust_qcow2::units::GuestOffset;

use crate::common::{EXTENDED, MemoryBits, PLAIN, Shape, create, open, write, write_compressed};
use crate::input::Damage;
use crate::model::check;

/// An image.
pub struct Sample {
    /// Bytes of a cluster.
    pub cluster: u64,
    bytes: Vec<u8>,
}

/// All of them.
static SAMPLES: LazyLock<Vec<Sample>> = LazyLock::new(|| {
    let version2 = Shape {
        version: 2,
        ..PLAIN
    };
    let narrow = Shape {
        refcount_order: 0,
        ..PLAIN
    };
    let wide = Shape {
        refcount_order: 6,
        ..PLAIN
    };
    let other = Shape {
        cluster_bits: 10,
        refcount_order: 2,
        ..PLAIN
    };
    let lazy = Shape {
        cluster_bits: 12,
        refcount_order: 3,
        lazy_refcounts: true,
        ..PLAIN
    };
    let shapes = [
        (PLAIN, 64),
        (version2, 64),
        (narrow, 64),
        (wide, 128),
        (other, 96),
        (lazy, 200),
        (EXTENDED, 256),
    ];
    shapes.map(|(shape, kib)| sample(shape, kib << 10)).into()
});

fn sample(shape: Shape, size: u64) -> Sample {
    let file = create(shape, size);
    let image = open(&file, None, &OptionRequest::default());
    let cluster = 1u64 << shape.cluster_bits;
    for number in 0..12 {
        write(&image, number * 3000, &[number as u8 + 1; 700]).unwrap();
    }
    for number in 1..4 {
        let data: Vec<u8> = (0..cluster).map(|byte| (byte / 9) as u8).collect();
        write_compressed(&image, (size / cluster - number) * cluster, &data).unwrap();
    }
    // Not where the version has no such clusters.
    let _ = image.write_zeroes(GuestOffset(cluster * 4), cluster * 2, ZeroFlags::default());
    if image.supports_bitmaps() {
        let bits = MemoryBits {
            name: b"bits".into(),
            granularity_bits: 9,
            disk_size: size,
            enabled: true,
            bits: [1, 5, 6, 70].into(),
        };
        image.store_bitmaps(&[&bits]).unwrap();
    }
    // What one bit counts cannot be shared.
    let snapshots: &[&str] = if shape.refcount_order > 0 {
        &["first", "second"]
    } else {
        &[]
    };
    for name in snapshots {
        let new = NewSnapshot {
            name: (*name).into(),
            vm_state_size: 700,
            ..NewSnapshot::default()
        };
        image.create_snapshot(&new).unwrap();
        write(&image, 3000, &[0x77; 9000]).unwrap();
    }
    image.inactivate().unwrap();
    let (report, lines) = check(&file.bytes()).unwrap();
    assert!(
        report.corruptions + report.leaks + report.check_errors == 0,
        "{lines:?}"
    );
    Sample {
        cluster,
        bytes: file.bytes(),
    }
}

impl Sample {
    /// One of the images.
    pub fn of(number: u8) -> &'static Self {
        &SAMPLES[usize::from(number) % SAMPLES.len()]
    }

    /// A copy that is damaged.
    pub fn damaged(&self, damage: &[Damage], cut: Option<u16>) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for damage in damage.iter().take(8) {
            let (at, value) = match *damage {
                Damage::Word(at, value) => (at, value),
                Damage::Half(at, value) => {
                    let rest = self.word(&bytes, at) & u64::from(u32::MAX);
                    (at, (u64::from(value) << 32) | rest)
                }
                Damage::Flip(at, bit) => (at, self.word(&bytes, at) ^ (1 << (bit % 64))),
                Damage::Copy(at, from) => (at, self.word(&bytes, from)),
                Damage::Entry(at, cluster, flags) => {
                    let high = u64::from(flags >> 6) << 62;
                    (
                        at,
                        high | (u64::from(cluster) * self.cluster) | u64::from(flags & 1),
                    )
                }
            };
            let at = self.place(at);
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        if let Some(cut) = cut {
            bytes.truncate(usize::from(cut) * 64 % bytes.len());
        }
        bytes
    }

    /// Where a word is: all first ones of the clusters come first, then all
    /// second ones, as tables have what is of interest at their begin.
    fn place(&self, number: u16) -> usize {
        let number = u64::from(number);
        let clusters = self.bytes.len() as u64 / self.cluster;
        let within = number / clusters * 8 % self.cluster;
        (number % clusters * self.cluster + within) as usize
    }

    fn word(&self, bytes: &[u8], number: u16) -> u64 {
        let at = self.place(number);
        bytes[at..at + 8]
            .iter()
            .fold(0, |word, byte| (word << 8) | u64::from(*byte))
    }
}
