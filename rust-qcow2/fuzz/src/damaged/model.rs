//! What an image without faults has to read as.

use rust_qcow2::format::header::{Header, Incompatible};
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::image::check::{CheckReport, Fix};
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};

use crate::common::{TestImage, WRITABLE, try_read};

/// The bytes of a disk, `None` where nothing is said of them.
pub type Content = Vec<Option<u8>>;

/// Nothing is compared of disks that are longer.
pub const MAX_SIZE: u64 = 1 << 20;

/// What the disk and its snapshots hold.
pub struct Model {
    /// The disk.
    pub disk: Content,
    /// The snapshots that are followed, with their identity.
    pub snapshots: Vec<(Vec<u8>, Content)>,
}

impl Model {
    /// What an image holds now, if all of that can be read.
    pub fn of(image: &TestImage, bytes: &[u8], backing: Option<&MemoryFile>) -> Option<Self> {
        let disk = content(image)?;
        let snapshots = image.snapshots().into_iter().filter_map(|snapshot| {
            let content = snapshot_content(bytes, backing, &snapshot.id_str)?;
            Some((snapshot.id_str, content))
        });
        Some(Self {
            disk,
            snapshots: snapshots.collect(),
        })
    }

    /// A range of the disk changes.
    pub fn set(&mut self, at: u64, len: u64, value: Option<u8>) {
        let end = (at + len).min(self.disk.len() as u64);
        if at < end {
            self.disk[at as usize..end as usize].fill(value);
        }
    }

    /// What a snapshot holds, if that can be read and is as long as the disk.
    pub fn snapshot(&self, id: &[u8]) -> Option<&Content> {
        let (_, content) = self.snapshots.iter().find(|(other, _)| other == id)?;
        Some(content).filter(|content| content.len() == self.disk.len())
    }

    /// Compares the disk.
    pub fn compare(&self, image: &TestImage) {
        let got = content(image).expect("an image without faults can be read");
        compare("the disk", &got, &self.disk);
    }

    /// Compares the snapshots of an image that is not in use.
    pub fn compare_snapshots(&self, bytes: &[u8], backing: Option<&MemoryFile>) {
        for (id, content) in &self.snapshots {
            if let Some(got) = snapshot_content(bytes, backing, id) {
                compare("a snapshot", &got, content);
            }
        }
    }
}

fn compare(what: &str, got: &[Option<u8>], expected: &[Option<u8>]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let mut pairs = got.iter().zip(expected);
    let wrong = pairs.position(|(got, expected)| expected.is_some() && got != expected);
    if let Some(at) = wrong {
        panic!(
            "{what} has {:?} at {at} and not {:?}",
            got[at], expected[at]
        );
    }
}

fn content(image: &TestImage) -> Option<Content> {
    if image.size() > MAX_SIZE {
        return None;
    }
    let bytes = try_read(image, 0, image.size()).ok()?;
    Some(bytes.into_iter().map(Some).collect())
}

fn snapshot_content(bytes: &[u8], backing: Option<&MemoryFile>, id: &[u8]) -> Option<Content> {
    let flags = OpenFlags {
        writable: false,
        ..WRITABLE
    };
    let image = open(&MemoryFile::new(bytes.to_vec()), backing, flags, false)?;
    let list = image.snapshots();
    let snapshot = list.iter().find(|snapshot| snapshot.id_str == id)?;
    // A snapshot that is loaded has the size of the disk.
    if snapshot.disk_size != image.size() {
        return None;
    }
    image.load_snapshot(Some(id), None).ok()?;
    content(&image)
}

/// Opens an image that may be damaged.
pub fn open(
    file: &MemoryFile,
    backing: Option<&MemoryFile>,
    flags: OpenFlags,
    small_cache: bool,
) -> Option<TestImage> {
    let host = MemoryHost {
        file: file.clone(),
        backing: backing.cloned(),
        one_thread: true,
        ..Default::default()
    };
    let request = OptionRequest {
        l2_cache_size: small_cache.then_some(1024),
        l2_cache_entry_size: small_cache.then_some(512),
        ..Default::default()
    };
    Image::open(host, flags, &request).ok()
}

/// Checks a file that is not in use and leaves it as it is. What the report
/// says of errors is also in the lines.
pub fn check(bytes: &[u8]) -> Option<(CheckReport, Vec<String>)> {
    let file = MemoryFile::new(bytes.to_vec());
    let flags = OpenFlags {
        writable: false,
        check: true,
        ..WRITABLE
    };
    let image = open(&file, None, flags, false)?;
    let mut lines = Vec::new();
    let report = image.check(Fix::default(), &mut |line| lines.push(line.to_owned()));
    assert!(
        file.bytes() == bytes,
        "a check that repairs nothing has written"
    );
    Some((report.ok()?, lines))
}

/// A file that is not in use has nothing wrong: no more than leaks, and not even
/// those where everything went smoothly. Refcounts that are said to be out of
/// date may be anything, as they are made anew before they are used.
pub fn ensure_sound(bytes: &[u8], cluster: u64, smooth: bool) {
    let header = Header::parse(bytes).expect("it has a header");
    if !smooth && header.incompatible.contains(Incompatible::DIRTY) {
        return;
    }
    let (report, lines) = check(bytes).expect("it can be checked");
    let harmless = lines
        .iter()
        .filter(|line| is_harmless(line, &lines, cluster))
        .count() as u64;
    let faults = report.corruptions + report.check_errors - harmless;
    assert!(faults == 0, "{lines:?}");
    assert!(!smooth || report.leaks + harmless == 0, "{lines:?}");
}

/// The flag of an entry is not as its cluster is counted, but no other entry has
/// that cluster: one that is not shared any more costs a copy, one that is
/// counted twice is a leak.
fn is_harmless(line: &str, lines: &[String], cluster: u64) -> bool {
    let Some((_, place)) = line
        .split_once("_entry=")
        .filter(|_| line.contains("OFLAG_COPIED"))
    else {
        return false;
    };
    let (entry, refcount) = place.split_once(" refcount=").expect("as it is written");
    let entry = u64::from_str_radix(entry, 16).expect("as it is written");
    let number = (entry & 0x00ff_ffff_ffff_fe00) / cluster;
    let leaked = format!("Leaked cluster {number} refcount={refcount} reference=1");
    refcount == "1" || lines.contains(&leaked)
}
