//! What the tests share: images in memory.
#![allow(dead_code)]

use parking_lot::Mutex;
use rust_qcow2::format::header::CompressionType;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::Preallocation;
use rust_qcow2::host::local::SharedBuf;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
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
}

pub const PLAIN: Shape = Shape {
    version: 3,
    cluster_bits: 9,
    refcount_order: 4,
    lazy_refcounts: false,
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
    };
    format(&file, &params).unwrap();
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
    let memory = Mutex::new(vec![0xee; len]);
    image
        .read(GuestOffset(at), len as u64, SharedBuf(&memory), 0)
        .unwrap();
    memory.into_inner()
}

/// Writes a range.
pub fn write(image: &TestImage, at: u64, data: &[u8]) -> rust_qcow2::Result<()> {
    let memory = Mutex::new(data.to_vec());
    image.write(GuestOffset(at), data.len() as u64, SharedBuf(&memory), 0)
}
