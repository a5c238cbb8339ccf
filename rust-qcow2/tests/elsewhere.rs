//! Guest data that are not simply in the image file: in an external data file,
//! encrypted, or both. Random operations against a plain array of bytes.

mod common;

use common::{PLAIN, TestImage, WRITABLE, read, write};
use proptest::prelude::*;
use rust_qcow2::format::header::{CompressionType, Encryption};
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::host::{Preallocation, ZeroFlags};
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::create::{CreateParams, format};
use rust_qcow2::image::{Image, OptionRequest};
use rust_qcow2::units::GuestOffset;

const SIZE: u64 = 48 << 10;

#[derive(Clone, Debug)]
enum Op {
    Write { at: u64, len: u64, byte: u8 },
    Zeroes { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Grow { sectors: u64, zero: bool },
    MakeEmpty,
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let range = (0..SIZE / 512, 1..40u64).prop_map(|(at, len)| (at * 512, len * 512));
    prop_oneof![
        6 => (range.clone(), 1..=255u8).prop_map(|((at, len), byte)| Op::Write { at, len, byte }),
        2 => (range.clone(), any::<bool>())
            .prop_map(|((at, len), unmap)| Op::Zeroes { at, len, unmap }),
        2 => range.prop_map(|(at, len)| Op::Discard { at, len }),
        1 => (1..20u64, any::<bool>()).prop_map(|(sectors, zero)| Op::Grow { sectors, zero }),
        1 => Just(Op::MakeEmpty),
        1 => Just(Op::Reopen),
    ]
}

/// The files of one image.
struct Files {
    image: MemoryFile,
    data: Option<MemoryFile>,
    backing: Option<MemoryFile>,
}

impl Files {
    fn open(&self) -> TestImage {
        let host = MemoryHost {
            file: self.image.clone(),
            data: self.data.clone(),
            backing: self.backing.clone(),
            has_key: true,
            ..Default::default()
        };
        Image::open(host, WRITABLE, &OptionRequest::default()).unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn reads_back_what_was_written(
        cluster_bits in 9..=12u32,
        external: bool,
        raw: bool,
        cipher in 0..3usize,
        with_backing: bool,
        ops in prop::collection::vec(op(), 1..40),
    ) {
        let raw = raw && external;
        let encryption = [None, Some(Encryption::Aes), Some(Encryption::Luks)][cipher];
        let below: Vec<u8> = (0..30_208u32).map(|i| (i / 700) as u8).collect();
        let with_backing = with_backing && !raw;
        let files = Files {
            image: MemoryFile::default(),
            data: external.then(MemoryFile::default),
            backing: with_backing.then(|| MemoryFile::new(below.clone())),
        };
        let below = |at: u64| {
            if with_backing { below.get(at as usize).copied().unwrap_or(0) } else { 0 }
        };
        let params = CreateParams {
            version: PLAIN.version,
            cluster_bits,
            refcount_order: RefcountOrder::BITS_16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: CompressionType::Zlib,
            data_file: external,
            data_file_raw: raw,
        };
        format(&files.image, &params, external.then_some(b"name")).unwrap();
        let image = files.open();
        if encryption.is_none() || !raw {
            image.resize(SIZE, true, Preallocation::Off, false).unwrap();
        }
        if let Some(encryption) = encryption {
            let header = (encryption == Encryption::Luks)
                .then(|| image.allocate_crypto_header(3000).unwrap());
            image.record_encryption(encryption, header).unwrap();
        }
        image.inactivate().unwrap();
        drop(image);
        let mut image = files.open();
        if image.size() == 0 {
            image.resize(SIZE, true, Preallocation::Off, true).unwrap();
        }
        prop_assert_eq!(image.encryption(), encryption);
        let mut size = SIZE;
        let mut model: Vec<u8> = (0..size).map(below).collect();
        let cluster = 1u64 << cluster_bits;

        for op in &ops {
            match *op {
                Op::Write { at, len, byte } => {
                    let len = len.min(size - at);
                    write(&image, at, &vec![byte; len as usize]).unwrap();
                    model[at as usize..(at + len) as usize].fill(byte);
                }
                Op::Zeroes { at, len, unmap } => {
                    let at = at / cluster * cluster;
                    let len = len.next_multiple_of(cluster).min(size - at);
                    let flags = ZeroFlags { may_unmap: unmap, no_fallback: false };
                    image.write_zeroes(GuestOffset(at), len, flags).unwrap();
                    model[at as usize..(at + len) as usize].fill(0);
                }
                Op::Discard { at, len } => {
                    let at = at / cluster * cluster;
                    let len = len.next_multiple_of(cluster).min(size - at);
                    image.discard(GuestOffset(at), len).unwrap();
                    model[at as usize..(at + len) as usize].fill(0);
                }
                Op::Grow { sectors, zero } => {
                    // What a cluster that the old end cuts has behind it is
                    // not defined, so it is all zeroes or whole clusters.
                    let zero = zero || size % cluster != 0 || raw;
                    let new = size + sectors * 512;
                    image.resize(new, true, Preallocation::Off, zero).unwrap();
                    model.extend((size..new).map(|at| if zero { 0 } else { below(at) }));
                    size = new;
                }
                Op::MakeEmpty if raw => {}
                Op::MakeEmpty => {
                    image.make_empty().unwrap();
                    model = (0..size).map(below).collect();
                }
                Op::Reopen => {
                    image.inactivate().unwrap();
                    drop(image);
                    image = files.open();
                }
            }
        }
        // Parts of sectors, too: layers above may have no such limit.
        prop_assert!(read(&image, 3, 1021) == model[3..1024]);
        prop_assert!(read(&image, 0, size as usize) == model);
        image.inactivate().unwrap();
        let report = image.check(Fix::default(), &mut |line| println!("{line}")).unwrap();
        prop_assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0));
        if let (true, Some(data), None) = (raw, &files.data, encryption) {
            let mut bytes = data.bytes();
            bytes.resize(size as usize, 0);
            prop_assert!(bytes == model, "the raw file is not the disk");
        }
    }
}
