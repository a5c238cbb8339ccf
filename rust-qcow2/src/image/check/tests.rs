//! Images that are damaged on purpose.

use parking_lot::Mutex;
use proptest::prelude::*;

use super::{CheckReport, Fix};
use crate::error::Result;
use crate::format::header::{Autoclear, Header, Incompatible, field};
use crate::format::refcount::RefcountOrder;
use crate::host::File;
use crate::host::Preallocation;
use crate::host::local::SharedBuf;
use crate::host::memory::{MemoryFile, MemoryHost};
use crate::image::create::{CreateParams, PLAIN, format};
use crate::image::{Image, OpenFlags, OptionRequest};
use crate::units::GuestOffset;

const CLUSTER: u64 = 512;
const SIZE: u64 = 256 << 10;
const ALL: Fix = Fix {
    leaks: true,
    errors: true,
};
const LEAKS: Fix = Fix {
    leaks: true,
    errors: false,
};

fn try_open(file: &MemoryFile, check: bool, writable: bool) -> Result<Image<MemoryHost>> {
    let host = MemoryHost {
        file: file.clone(),
        ..Default::default()
    };
    let flags = OpenFlags {
        writable,
        check,
        ..Default::default()
    };
    Image::open(host, flags, &OptionRequest::default())
}

fn open(file: &MemoryFile) -> Image<MemoryHost> {
    try_open(file, true, true).unwrap()
}

/// An image with 40 clusters of data at the begin of the disk.
fn sample(refcount_order: u32) -> MemoryFile {
    sample_with(CLUSTER.trailing_zeros(), refcount_order)
}

fn sample_with(cluster_bits: u32, refcount_order: u32) -> MemoryFile {
    let file = MemoryFile::default();
    let params = CreateParams {
        cluster_bits,
        refcount_order: RefcountOrder::new(refcount_order).unwrap(),
        ..PLAIN
    };
    format(&file, &params, None).unwrap();
    let image = try_open(&file, false, true).unwrap();
    image.resize(SIZE, true, Preallocation::Off, false).unwrap();
    let data = Mutex::new(content());
    image
        .write(GuestOffset(0), 40 * CLUSTER, SharedBuf(&data), 0)
        .unwrap();
    image.inactivate().unwrap();
    file
}

fn content() -> Vec<u8> {
    (0..40 * CLUSTER).map(|i| (i / 100) as u8 | 1).collect()
}

fn read(file: &MemoryFile) -> Vec<u8> {
    let image = try_open(file, false, false).unwrap();
    let memory = Mutex::new(vec![0; 40 * CLUSTER as usize]);
    image
        .read(GuestOffset(0), 40 * CLUSTER, SharedBuf(&memory), 0)
        .unwrap();
    memory.into_inner()
}

fn header(file: &MemoryFile) -> Header {
    Header::parse(&file.bytes()[..112]).unwrap()
}

fn word(file: &MemoryFile, at: u64) -> u64 {
    super::references::word(&file.bytes()[at as usize..], 0)
}

fn poke(file: &MemoryFile, at: u64, value: u64) {
    file.write(at, &value.to_be_bytes()).unwrap();
}

/// Sets a 16-bit refcount in the first block.
fn poke_refcount(file: &MemoryFile, cluster: u64, count: u16) {
    let block = word(file, header(file).refcount_table_offset);
    file.write(block + cluster * 2, &count.to_be_bytes())
        .unwrap();
}

/// Where the first L2 table is, and the flags of its L1 entry.
fn first_l2(file: &MemoryFile) -> u64 {
    word(file, header(file).l1_table_offset) & !(1 << 63)
}

fn checked(image: &Image<MemoryHost>, fix: Fix) -> (Result<CheckReport>, Vec<String>) {
    let mut lines = Vec::new();
    let result = image.check(fix, &mut |line| lines.push(line.to_owned()));
    (result, lines)
}

/// Opens, checks and leaves the image.
fn check(file: &MemoryFile, fix: Fix) -> (CheckReport, Vec<String>) {
    let image = open(file);
    let (report, lines) = checked(&image, fix);
    image.inactivate().unwrap();
    (report.unwrap(), lines)
}

fn findings(report: &CheckReport) -> [u64; 5] {
    let CheckReport {
        corruptions,
        leaks,
        check_errors,
        corruptions_fixed,
        leaks_fixed,
        ..
    } = *report;
    [
        corruptions,
        leaks,
        check_errors,
        corruptions_fixed,
        leaks_fixed,
    ]
}

fn assert_sound(file: &MemoryFile) {
    let (report, lines) = check(file, Fix::NONE);
    assert_eq!(findings(&report), [0; 5], "{lines:?}");
    assert!(lines.is_empty());
    assert!(read(file) == content());
}

#[test]
fn nothing_is_found_on_a_sound_image() {
    for order in 0..=6 {
        let file = sample(order);
        let before = file.bytes();
        let (report, _) = check(&file, ALL);
        assert_eq!(findings(&report), [0; 5]);
        assert_eq!(report.total_clusters, SIZE / CLUSTER);
        assert_eq!(report.allocated_clusters, 40);
        assert_eq!(report.fragmented_clusters, 0);
        assert_eq!(report.image_end_offset, before.len() as u64);
        assert!(file.bytes() == before);
    }
}

#[test]
fn leaks_are_given_back() {
    let file = sample(4);
    let end = file.bytes().len() as u64 / CLUSTER;
    file.truncate((end + 1) * CLUSTER, true, Preallocation::Off, false)
        .unwrap();
    poke_refcount(&file, end, 1);
    poke_refcount(&file, 0, 3);
    let found = format!("Leaked cluster {end} refcount=1 reference=0");
    let (report, lines) = check(&file, Fix::NONE);
    assert_eq!(findings(&report), [0, 2, 0, 0, 0]);
    assert_eq!(lines, ["Leaked cluster 0 refcount=3 reference=1", &found]);
    assert_eq!(report.image_end_offset, (end + 1) * CLUSTER);
    let (report, lines) = check(&file, LEAKS);
    assert_eq!(findings(&report), [0, 0, 0, 0, 2]);
    assert_eq!(lines[2], "Repairing cluster 0 refcount=3 reference=1");
    assert_sound(&file);
}

#[test]
fn counts_that_are_too_low_are_mended_with_the_flags() {
    let file = sample(4);
    let l2 = first_l2(&file);
    // The second cluster shares the place of the first.
    let first = word(&file, l2);
    poke(&file, l2 + 8, first);
    let cluster = (first & !(1 << 63)) / CLUSTER;
    let (report, lines) = check(&file, LEAKS);
    assert_eq!(findings(&report), [1, 0, 0, 0, 1]);
    assert_eq!(
        lines[0],
        format!("ERROR cluster {cluster} refcount=1 reference=2")
    );
    let (report, lines) = check(&file, ALL);
    assert_eq!(findings(&report), [0, 0, 0, 3, 0]);
    assert_eq!(
        lines[1],
        format!("Repairing cluster {cluster} refcount=1 reference=2")
    );
    assert_eq!(
        lines[2],
        format!("Repairing OFLAG_COPIED data cluster: l2_entry={first:x} refcount=2")
    );
    let (report, lines) = check(&file, Fix::NONE);
    assert_eq!(findings(&report), [0; 5], "{lines:?}");
    assert_eq!(word(&file, l2), first & !(1 << 63));
}

#[test]
fn copied_flags_are_mended_with_leaks_alone() {
    let file = sample(4);
    let header = header(&file);
    let l1 = word(&file, header.l1_table_offset);
    poke(&file, header.l1_table_offset, l1 & !(1 << 63));
    let (report, lines) = check(&file, Fix::NONE);
    assert_eq!(findings(&report), [1, 0, 0, 0, 0]);
    let rest = format!(
        "OFLAG_COPIED L2 cluster: l1_index=0 l1_entry={:x} refcount=1",
        l1 << 1 >> 1
    );
    assert_eq!(lines, [format!("ERROR {rest}")]);
    let (report, lines) = check(&file, LEAKS);
    assert_eq!(findings(&report), [0, 0, 0, 1, 0]);
    assert_eq!(lines, [format!("Repairing {rest}")]);
    assert_sound(&file);
}

#[test]
fn a_structure_without_a_place_for_a_count_is_rebuilt() {
    let file = sample(4);
    poke_refcount(&file, 0, 0);
    let image = open(&file);
    let (error, lines) = checked(&image, LEAKS);
    assert_eq!(error.unwrap_err().code(), libc::EIO);
    assert_eq!(lines[1], "ERROR need to rebuild refcount structures");
    drop(image);
    let before = header(&file).refcount_table_offset;
    let (report, lines) = check(&file, ALL);
    assert_eq!(findings(&report), [0, 0, 0, 1, 0]);
    assert_eq!(
        lines[..2],
        [
            "ERROR cluster 0 refcount=0 reference=1",
            "Rebuilding refcount structure"
        ]
    );
    assert_ne!(header(&file).refcount_table_offset, before);
    assert_sound(&file);
}

#[test]
fn an_image_without_refcounts_is_repaired() {
    let file = sample(4);
    file.write(field::REFCOUNT_TABLE, &[0; 12]).unwrap();
    assert!(try_open(&file, false, true).is_err());
    let (report, _) = check(&file, ALL);
    assert_eq!(report.corruptions, 0);
    assert_sound(&file);
}

#[test]
fn blocks_beyond_the_end_get_a_longer_file() {
    let file = sample(4);
    let table = header(&file).refcount_table_offset;
    poke(&file, table + 8, 250 * CLUSTER);
    poke_refcount(&file, 250, 1);
    let (report, lines) = check(&file, Fix::NONE);
    assert_eq!(findings(&report), [1, 0, 0, 0, 0]);
    assert_eq!(lines, ["ERROR refcount block 1 is outside image"]);
    let (report, lines) = check(&file, ALL);
    assert_eq!(findings(&report), [0, 0, 0, 1, 0]);
    assert_eq!(lines, ["Repairing refcount block 1 is outside image"]);
    assert_eq!(file.bytes().len() as u64, 251 * CLUSTER);
    assert_sound(&file);
    for offset in [0x7fff_ffff_ffff_fe00, 0xffff_ffff_ffff_fe00] {
        let file = sample(4);
        poke(&file, table + 8, offset);
        let (report, lines) = check(&file, ALL);
        assert_eq!(findings(&report), [0, 0, 0, 1, 0]);
        assert_eq!(lines[1], "ERROR could not resize image: Invalid argument");
        assert_sound(&file);
    }
}

#[test]
fn a_block_at_an_odd_place_closes_the_image_until_it_is_opened_again() {
    let file = sample_with(12, 4);
    let table = header(&file).refcount_table_offset;
    poke(&file, table, 0x2a00);
    let image = open(&file);
    let (report, lines) = checked(&image, ALL);
    assert!(report.unwrap().check_errors > 0);
    assert_eq!(
        lines[..2],
        [
            "ERROR refcount block 0 is not cluster aligned; refcount table entry corrupted",
            "Can't get refcount for cluster 0: Input/output error"
        ]
    );
    assert!(lines.contains(&"Rebuilding refcount structure".to_owned()));
    assert!(image.is_broken());
    let closed = checked(&image, Fix::NONE).0.unwrap_err();
    assert_eq!(closed.code(), libc::ENOMEDIUM);
    image.inactivate().unwrap();
    let (report, _) = check(&file, ALL);
    assert_eq!(findings(&report), [0, 0, 0, 0, 1]);
    assert_eq!(header(&file).incompatible, Incompatible::empty());
    assert_sound(&file);
}

#[test]
fn the_header_is_written_whatever_claims_to_be_there() {
    let file = sample_with(12, 4);
    poke(&file, header(&file).refcount_table_offset + 20 * 8, 0x200);
    let image = try_open(&file, false, true).unwrap();
    image
        .resize(2 * SIZE, true, Preallocation::Off, false)
        .unwrap();
    image.inactivate().unwrap();
    let (report, lines) = check(&file, ALL);
    assert_eq!(findings(&report)[..3], [0, 0, 0], "{lines:?}");
    assert_sound(&file);
    assert!(read(&file) == content());
}

#[test]
fn references_beyond_the_end_stay() {
    let file = sample(4);
    let l2 = first_l2(&file);
    let entry = word(&file, l2);
    poke(&file, l2, (1 << 63) | (1 << 55));
    let (report, lines) = check(&file, ALL);
    assert_eq!(report.corruptions, 1, "{lines:?}");
    assert_eq!(
        lines[0],
        "ERROR: counting reference for region exceeding the end of the file by one cluster or \
         more: offset 0x80000000000000 size 0x200"
    );
    // The image is not marked as sound.
    assert_ne!(word(&file, l2), entry);
    let (report, _) = check(&file, Fix::NONE);
    assert_eq!(report.corruptions, 1);
}

#[test]
fn marks_are_taken_back_when_all_is_well() {
    let file = sample(4);
    poke(
        &file,
        field::INCOMPATIBLE,
        (Incompatible::DIRTY | Incompatible::CORRUPT).bits(),
    );
    assert!(try_open(&file, false, true).is_err());
    let (report, _) = check(&file, Fix::NONE);
    assert_eq!(findings(&report), [0; 5]);
    check(&file, LEAKS);
    assert_eq!(header(&file).incompatible, Incompatible::empty());
    assert_sound(&file);
}

#[test]
fn a_read_only_image_is_not_repaired() {
    let file = sample(4);
    poke_refcount(&file, 0, 7);
    let before = file.bytes();
    let image = try_open(&file, true, false).unwrap();
    assert_eq!(checked(&image, LEAKS).0.unwrap_err().code(), libc::EACCES);
    assert_eq!(checked(&image, Fix::NONE).0.unwrap().leaks, 1);
    assert!(file.bytes() == before);
}

/// An internal snapshot shares the L2 tables and the data.
#[test]
fn snapshots_are_counted() {
    let file = sample(4);
    let header = header(&file);
    let end = (file.bytes().len() as u64).next_multiple_of(CLUSTER);
    let l1_bytes = u64::from(header.l1_size) * 8;
    let at = header.l1_table_offset as usize;
    let l1: Vec<u8> = file.bytes()[at..at + l1_bytes as usize].to_vec();
    let mut entry = [0; 64];
    entry[..8].copy_from_slice(&(end + CLUSTER).to_be_bytes());
    entry[8..12].copy_from_slice(&header.l1_size.to_be_bytes());
    entry[12..16].copy_from_slice(&[0, 1, 0, 4]);
    entry[36..40].copy_from_slice(&16u32.to_be_bytes());
    entry[56..61].copy_from_slice(b"1name");
    file.write(end, &entry).unwrap();
    file.write(end + CLUSTER, &l1).unwrap();
    file.truncate(
        (end + 2 * CLUSTER).next_multiple_of(CLUSTER),
        true,
        Preallocation::Off,
        false,
    )
    .unwrap();

    let with_snapshot = |l1_offset: u64| {
        file.write(end, &l1_offset.to_be_bytes()).unwrap();
        let image = open(&file);
        {
            let mut shared = image.shared.write();
            shared.header.nb_snapshots = 1;
            shared.header.snapshots_offset = end;
        }
        image
    };
    let (report, lines) = checked(&with_snapshot(end + CLUSTER + 8), Fix::NONE);
    assert_eq!(report.unwrap().corruptions, 2);
    assert_eq!(
        lines[0],
        format!(
            "ERROR snapshot 1 (name) l1_offset={:#x}: L1 table is not cluster aligned; snapshot \
             table entry corrupted",
            end + CLUSTER + 8
        )
    );
    let image = with_snapshot(end + CLUSTER);
    let (report, lines) = checked(&image, ALL);
    let report = report.unwrap();
    assert_eq!(findings(&report)[..3], [0, 0, 0], "{lines:?}");
    let (report, lines) = checked(&image, Fix::NONE);
    assert_eq!(findings(&report.unwrap()), [0; 5], "{lines:?}");
    let data = (word(&file, first_l2(&file)) & !(1 << 63)) / CLUSTER;
    let mut st = image.lock();
    assert_eq!(
        image
            .refcount(&mut st, crate::units::ClusterIndex(data))
            .unwrap(),
        2
    );
    drop(st);
    assert!(read(&file) == content());
}

#[test]
fn bitmaps_are_counted() {
    let file = sample(4);
    let end = (file.bytes().len() as u64).next_multiple_of(CLUSTER);
    let mut directory = [0; 32];
    directory[..8].copy_from_slice(&(end + CLUSTER).to_be_bytes());
    directory[8..12].copy_from_slice(&2u32.to_be_bytes());
    directory[16..24].copy_from_slice(&[1, 16, 0, 4, 0, 0, 0, 0]);
    file.write(end, &directory).unwrap();
    poke(&file, end + CLUSTER, end + 2 * CLUSTER);
    poke(&file, end + CLUSTER + 8, 1);
    file.truncate(end + 3 * CLUSTER, true, Preallocation::Off, false)
        .unwrap();
    let image = open(&file);
    {
        let mut shared = image.shared.write();
        shared.header.autoclear = Autoclear::BITMAPS;
        let words = [1 << 32, 32, end];
        let data = words
            .iter()
            .flat_map(|word: &u64| word.to_be_bytes())
            .collect();
        shared.extensions.bitmaps = Some(data);
    }
    let (report, lines) = checked(&image, Fix::NONE);
    assert_eq!(report.unwrap().corruptions, 3, "{lines:?}");
    let (report, _) = checked(&image, ALL);
    assert_eq!(findings(&report.unwrap())[..3], [0, 0, 0]);
    let (report, lines) = checked(&image, Fix::NONE);
    assert_eq!(findings(&report.unwrap()), [0; 5], "{lines:?}");
    // A table that makes no sense ends the check.
    poke(&file, end + CLUSTER, 1 << 60);
    assert_eq!(
        checked(&image, Fix::NONE).0.unwrap_err().code(),
        libc::EINVAL
    );
}

#[test]
fn a_failing_file_ends_a_repair_with_an_error_and_can_be_repaired_again() {
    for bad in [1, 2, usize::MAX] {
        let failed = |good| {
            let file = sample(4);
            poke_refcount(&file, 0, 0);
            poke_refcount(&file, 10, 9);
            let image = open(&file);
            file.fail_some(good, bad);
            let (result, _) = checked(&image, ALL);
            file.fail_after(None);
            let failed = result.is_err();
            drop(image);
            let (report, lines) = check(&file, ALL);
            assert_eq!(findings(&report)[..3], [0, 0, 0], "{lines:?}");
            assert_sound(&file);
            failed
        };
        assert!((0..=3).all(failed));
        assert!(!(0..30).all(failed), "never done");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// However the refcounts are damaged, a repair or two (a block that cannot
    /// be used ends the first one early) make them right, and no data are lost.
    #[test]
    fn refcounts_can_always_be_repaired(
        order in 0..=6u32,
        table in prop::collection::vec((0..64u64, 0..400u64, 0..512u64), 0..3),
        counts in prop::collection::vec((0..CLUSTER, any::<u8>()), 0..8),
    ) {
        let file = sample(order);
        let offset = header(&file).refcount_table_offset;
        let block = word(&file, offset);
        for (at, value) in counts {
            file.write(block + at, &[value]).unwrap();
        }
        for (index, cluster, low) in table {
            poke(&file, offset + index * 8, (cluster * CLUSTER) | (low & (1 << (low % 9))));
        }
        for _ in 0..2 {
            let image = open(&file);
            let _ = checked(&image, ALL);
            image.inactivate().unwrap();
        }
        let (report, lines) = check(&file, Fix::NONE);
        prop_assert_eq!(findings(&report), [0; 5], "{:?}", lines);
        prop_assert!(read(&file) == content());
        prop_assert_eq!(header(&file).incompatible, Incompatible::empty());
    }
}

/// An image with subclusters, and data in the first of the second cluster.
fn extended() -> (MemoryFile, u64) {
    let file = MemoryFile::default();
    let params = CreateParams {
        cluster_bits: 14,
        extended_l2: true,
        ..PLAIN
    };
    format(&file, &params, None).unwrap();
    let image = try_open(&file, false, true).unwrap();
    image
        .resize(1 << 20, true, Preallocation::Off, false)
        .unwrap();
    let data = Mutex::new(vec![7; 512]);
    image
        .write(GuestOffset(16384), 512, SharedBuf(&data), 0)
        .unwrap();
    image.inactivate().unwrap();
    let l2 = first_l2(&file);
    assert_eq!(word(&file, l2 + 24), 1);
    (file, l2)
}

#[test]
fn contradictory_bitmaps_are_found() {
    let (file, l2) = extended();
    let at = word(&file, l2 + 16) & !(1 << 63);
    poke(&file, l2 + 8, 1 << 3);
    poke(&file, l2 + 24, (1 << 32) | 1);
    let expected = [
        "ERROR: Unallocated cluster has non-zero subcluster allocation map".to_owned(),
        format!(
            "ERROR offset={at:x}: Allocated cluster has corrupted subcluster allocation bitmap"
        ),
    ];
    let (report, lines) = check(&file, Fix::NONE);
    assert_eq!(findings(&report), [2, 0, 0, 0, 0]);
    assert_eq!(lines, expected);
    // The guest is told, too, whatever it does there.
    for cluster in 0..2 {
        let before = file.bytes();
        let image = try_open(&file, false, false).unwrap();
        let data = Mutex::new(vec![0; 512]);
        let at = GuestOffset(cluster * 16384);
        let read = image.read(at, 512, SharedBuf(&data), 0);
        assert_eq!(read.unwrap_err().code(), libc::EIO);
        assert!(file.bytes() == before);
    }
}

#[test]
fn bitmaps_of_compressed_clusters_are_found() {
    let (file, l2) = extended();
    poke(&file, l2 + 32, (1 << 62) | 0x4000);
    poke(&file, l2 + 40, 1);
    let (report, lines) = check(&file, Fix::NONE);
    assert_eq!(findings(&report), [1, 0, 0, 0, 0]);
    assert_eq!(
        lines,
        [
            "ERROR compressed cluster 2 with non-zero subcluster allocation bitmap, \
             entry=0x4000000000004000"
        ]
    );
}

#[test]
fn a_place_that_is_not_aligned_becomes_zeroes() {
    let (file, l2) = extended();
    let at = word(&file, l2 + 16);
    poke(&file, l2 + 32, at + 512);
    poke(&file, l2 + 40, 0xff << 32);
    let (report, lines) = check(&file, ALL);
    assert_eq!(report.corruptions, 0, "{lines:?}");
    assert!(lines[0].starts_with("Repairing offset="), "{lines:?}");
    assert_eq!(word(&file, l2 + 32), 0);
    assert_eq!(word(&file, l2 + 40), 0xff << 32);
    let (report, _) = check(&file, Fix::NONE);
    assert_eq!(findings(&report), [0; 5]);
}
