//! Emptying an image that fails, or where power is lost: each byte reads as
//! before or as in the backing file.

mod common;

use common::{PLAIN, TestImage, WRITABLE, crashed, create, open, read, write};
use rust_qcow2::format::header::CompressionType;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::host::{File, Preallocation};
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::create::{CreateParams, format};
use rust_qcow2::image::{Image, OptionRequest};

const BELOW: u8 = 0xbb;

/// The tables are laid out anew where old ones and data were.
#[test]
fn power_is_lost() {
    const SIZE: u64 = 4 << 20;
    let below = MemoryFile::new(vec![BELOW; SIZE as usize]);
    let file = create(PLAIN, 64 << 10);
    let image = open(&file, Some(&below), &OptionRequest::default());
    write(&image, 0, &[1; 512]).unwrap();
    write(&image, 32_768, &[1; 512]).unwrap();
    // A longer L1 table, elsewhere: data go to its old place.
    image.resize(SIZE, true, Preallocation::Off, false).unwrap();
    write(&image, 32_768 + 512, &[1; 512]).unwrap();
    image.flush().unwrap();
    file.flush().unwrap();
    let before = read(&image, 0, SIZE as usize);
    let start = file.bytes();
    let _ = file.take_events();
    image.make_empty().unwrap();
    let after = read(&image, 0, SIZE as usize);
    let events = file.take_events();
    let mut luck = 12_345_u64;
    for end in 0..=events.len() {
        for _ in 0..16 {
            let bytes = crashed(&start, &events[..end], || common::coin(&mut luck));
            let image = open(
                &MemoryFile::new(bytes),
                Some(&below),
                &OptionRequest::default(),
            );
            let report = image.check(Fix::default(), &mut |_| ()).unwrap();
            assert_eq!(report.corruptions, 0, "request {end}");
            let found = read(&image, 0, image.size() as usize);
            let both = before.iter().zip(&after);
            for (at, (found, (before, after))) in found.iter().zip(both).enumerate() {
                assert!(found == before || found == after, "request {end}, {at:#x}");
            }
        }
    }
}

/// The data are in a file of their own, which does not fail.
#[test]
fn the_image_file_fails() {
    const SIZE: u64 = 64 << 10;
    for good in 0..12 {
        let below = MemoryFile::new(vec![BELOW; SIZE as usize]);
        let (file, data) = (MemoryFile::default(), MemoryFile::default());
        let params = CreateParams {
            version: 3,
            cluster_bits: 12,
            refcount_order: RefcountOrder::BITS_16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: CompressionType::Zlib,
            data_file: true,
            data_file_raw: false,
        };
        format(&file, &params, Some(b"data")).unwrap();
        let open = || -> TestImage {
            let host = MemoryHost {
                file: file.clone(),
                data: Some(data.clone()),
                backing: Some(below.clone()),
                ..Default::default()
            };
            Image::open(host, WRITABLE, &OptionRequest::default()).unwrap()
        };
        let image = open();
        image.resize(SIZE, true, Preallocation::Off, false).unwrap();
        write(&image, 0, &[0x11; 32_768]).unwrap();
        image.flush().unwrap();
        file.fail_after(Some(good));
        let _ = image.make_empty();
        file.fail_after(None);
        // The process ends there.
        for byte in read(&open(), 0, 32_768) {
            assert!(byte == 0x11 || byte == BELOW, "after {good} requests");
        }
    }
}
