//! What the tests share: images in memory.
#![allow(dead_code)]

pub mod chain;

use std::collections::BTreeSet;

use parking_lot::Mutex;
use rust_qcow2::format::header::CompressionType;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::Preallocation;
use rust_qcow2::host::local::SharedBuf;
use rust_qcow2::host::memory::{Event, MemoryFile, MemoryHost};
use rust_qcow2::image::bitmaps::{Bits, DirtyBits};
use rust_qcow2::image::create::{CreateParams, format};
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};
use rust_qcow2::units::GuestOffset;

/// An image in memory.
pub type TestImage = Image<MemoryHost>;

/// The parameters of a new image.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_order: u32,
    pub lazy_refcounts: bool,
    pub extended_l2: bool,
}

impl Shape {
    /// Logarithm of the smallest part that is allocated by itself.
    pub fn part_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 5 } else { 0 }
    }
}

pub const PLAIN: Shape = Shape {
    version: 3,
    cluster_bits: 9,
    refcount_order: 4,
    lazy_refcounts: false,
    extended_l2: false,
};

pub const EXTENDED: Shape = Shape {
    cluster_bits: 14,
    extended_l2: true,
    ..PLAIN
};

pub const WRITABLE: OpenFlags = OpenFlags {
    writable: true,
    inactive: false,
    check: false,
    no_io: false,
    unmap: true,
};

/// Writes an empty image of `size` bytes into a new file.
pub fn create(shape: Shape, size: u64) -> MemoryFile {
    let file = MemoryFile::default();
    let params = CreateParams {
        version: shape.version,
        cluster_bits: shape.cluster_bits,
        refcount_order: RefcountOrder::new(shape.refcount_order).unwrap(),
        lazy_refcounts: shape.lazy_refcounts,
        compression: CompressionType::Zlib,
        data_file: false,
        data_file_raw: false,
        extended_l2: shape.extended_l2,
    };
    format(&file, &params, None).unwrap();
    let image = open(&file, None, &OptionRequest::default());
    image.resize(size, true, Preallocation::Off, false).unwrap();
    image.inactivate().unwrap();
    file
}

/// Opens an image for writing.
pub fn open(file: &MemoryFile, backing: Option<&MemoryFile>, options: &OptionRequest) -> TestImage {
    let host = MemoryHost {
        file: file.clone(),
        backing: backing.cloned(),
        ..Default::default()
    };
    Image::open(host, WRITABLE, options).unwrap()
}

/// Reads a range.
pub fn read(image: &TestImage, at: u64, len: usize) -> Vec<u8> {
    try_read(image, at, len as u64).unwrap()
}

/// Reads a range that may be damaged.
pub fn try_read(image: &TestImage, at: u64, len: u64) -> rust_qcow2::Result<Vec<u8>> {
    let memory = Mutex::new(vec![0xee; len as usize]);
    image.read(GuestOffset(at), len, SharedBuf(&memory), 0)?;
    Ok(memory.into_inner())
}

/// Writes a range.
pub fn write(image: &TestImage, at: u64, data: &[u8]) -> rust_qcow2::Result<()> {
    let memory = Mutex::new(data.to_vec());
    image.write(GuestOffset(at), data.len() as u64, SharedBuf(&memory), 0)
}

/// Writes clusters compressed.
pub fn write_compressed(image: &TestImage, at: u64, data: &[u8]) -> rust_qcow2::Result<()> {
    let memory = Mutex::new(data.to_vec());
    image.write_compressed(GuestOffset(at), data.len() as u64, SharedBuf(&memory), 0)
}

/// A bitmap in memory: the numbers of the bits that are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBits {
    pub name: Vec<u8>,
    pub granularity_bits: u32,
    pub disk_size: u64,
    pub enabled: bool,
    pub bits: BTreeSet<u64>,
}

impl DirtyBits for MemoryBits {
    fn name(&self) -> &[u8] {
        &self.name
    }

    fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    fn disk_size(&self) -> u64 {
        self.disk_size
    }

    fn is_enabled(&self) -> bool {
        self.enabled
    }

    fn next_dirty(&self, from: u64) -> Option<u64> {
        let first = from >> self.granularity_bits;
        let next = *self.bits.range(first..).next()?;
        Some((next << self.granularity_bits).max(from))
    }

    fn serialize(&self, from: u64, len: u64, bytes: &mut [u8]) {
        let first = from >> self.granularity_bits;
        let count = len.div_ceil(1 << self.granularity_bits);
        assert!(first % 64 == 0 && count.div_ceil(64) * 8 <= bytes.len() as u64);
        for bit in self.bits.range(first..first + count) {
            let at = bit - first;
            bytes[(at / 8) as usize] |= 1 << (at % 8);
        }
    }
}

/// Reads a bitmap of an image that is not in use.
pub fn read_bits(
    image: &TestImage,
    entry: &rust_qcow2::format::bitmaps::Bitmap,
) -> rust_qcow2::Result<MemoryBits> {
    let mut bits = BTreeSet::new();
    image.read_bitmap(entry, &mut |from, len, piece| {
        let first = from >> entry.granularity_bits;
        let count = len.div_ceil(1 << entry.granularity_bits);
        match piece {
            Bits::Ones => bits.extend(first..first + count),
            Bits::Bytes(bytes) => {
                for (index, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
                    let here = (0..8).filter(|bit| byte & (1 << bit) != 0);
                    bits.extend(here.map(|bit| first + index as u64 * 8 + bit));
                }
            }
        }
    })?;
    Ok(MemoryBits {
        name: entry.name.clone(),
        granularity_bits: entry.granularity_bits,
        disk_size: image.size() & !511,
        enabled: entry
            .flags
            .contains(rust_qcow2::format::bitmaps::BitmapFlags::AUTO),
        bits,
    })
}

/// Reads a bitmap that may be damaged, for the order of what comes alone.
pub fn walk_bitmap(image: &TestImage, entry: &rust_qcow2::format::bitmaps::Bitmap) {
    let mut end = 0;
    let _ = image.read_bitmap(entry, &mut |from, len, _| {
        assert!(from >= end && len > 0);
        end = from + len;
        assert!(end <= image.size());
    });
}

/// The next of numbers that look random, best in their high bits.
pub fn next_random(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *state
}

/// Heads or tails.
pub fn coin(luck: &mut u64) -> bool {
    next_random(luck) >> 63 == 1
}

/// The file after a crash: all up to the last flush before `end`, then each
/// write or not as `kept` says.
pub fn crashed(start: &[u8], events: &[Event], mut kept: impl FnMut() -> bool) -> Vec<u8> {
    let settled = events
        .iter()
        .rposition(|event| *event == Event::Flush)
        .unwrap_or(0);
    let mut bytes = start.to_vec();
    for (i, event) in events.iter().enumerate() {
        match event {
            Event::Write(offset, data) => {
                let end = *offset as usize + data.len();
                // The length of the file is metadata of its file system: it
                // may be known before the data are there.
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                if i < settled || kept() {
                    bytes[*offset as usize..end].copy_from_slice(data);
                }
            }
            Event::Truncate(len) if i < settled || kept() => bytes.resize(*len as usize, 0),
            _ => {}
        }
    }
    bytes
}
