//! Operations on an image, with a model of its disk and of its snapshots.

use proptest::prelude::*;
use rust_qcow2::Error;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::memory::{MemoryFile, MemoryHost};
use rust_qcow2::host::{File, Preallocation, ZeroFlags};
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::snapshots::NewSnapshot;
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};
use rust_qcow2::units::GuestOffset;

use crate::common::{Shape, create, open, read, write};

pub const SIZE: u64 = 48 << 10;
pub const SECTOR: u64 = 512;
pub const ALL: Fix = Fix {
    leaks: true,
    errors: true,
};

#[derive(Clone, Debug)]
pub enum Op {
    Write { sector: u64, count: u64 },
    Zeroes { sector: u64, count: u64 },
    Discard { sector: u64, count: u64 },
    State { sector: u64, count: u64 },
    Create,
    Apply(usize),
    Delete(usize),
    Resize(u64, Preallocation),
    Flush,
    Reopen,
    Empty,
    Width(u32),
    Version(u32),
}

pub fn resize() -> impl Strategy<Value = Op> {
    let how = prop_oneof![
        Just(Preallocation::Off),
        Just(Preallocation::Metadata),
        Just(Preallocation::Falloc),
        Just(Preallocation::Full),
    ];
    (1..SIZE / SECTOR * 2, how).prop_map(|(sectors, how)| Op::Resize(sectors * SECTOR, how))
}

pub fn op() -> impl Strategy<Value = Op> {
    let range = (0..SIZE / SECTOR, 1..24u64);
    prop_oneof![
        8 => range.clone().prop_map(|(sector, count)| Op::Write { sector, count }),
        2 => range.clone().prop_map(|(sector, count)| Op::Zeroes { sector, count }),
        2 => range.clone().prop_map(|(sector, count)| Op::Discard { sector, count }),
        1 => range.prop_map(|(sector, count)| Op::State { sector, count }),
        4 => Just(Op::Create),
        2 => (0..8usize).prop_map(Op::Apply),
        3 => (0..8usize).prop_map(Op::Delete),
        1 => resize(),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => Just(Op::Empty),
        1 => (0..=6u32).prop_map(Op::Width),
        2 => (2..=3u32).prop_map(Op::Version),
    ]
}

pub fn shape() -> impl Strategy<Value = Shape> {
    (2..=6u32, 9..=11u32, any::<bool>(), any::<bool>()).prop_map(
        |(refcount_order, cluster_bits, lazy_refcounts, extended_l2)| Shape {
            version: 3,
            cluster_bits: if extended_l2 { 14 } else { cluster_bits },
            refcount_order,
            lazy_refcounts,
            extended_l2,
        },
    )
}

/// The disk, and what each snapshot was taken of, by identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub disk: Vec<u8>,
    pub snapshots: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A program that uses an image, and what the image should hold.
pub struct Run {
    pub file: MemoryFile,
    pub image: Image<MemoryHost>,
    pub options: OptionRequest,
    pub model: Model,
}

impl Run {
    pub fn do_one(&mut self, number: usize, op: &Op) {
        let cluster = self.image.geometry().cluster_size();
        let size = self.model.disk.len() as u64;
        let clip = |sector: u64, count: u64| {
            let at = (sector * SECTOR).min(size);
            (at, (count * SECTOR).min(size - at))
        };
        let whole = |sector: u64, count: u64| {
            let (at, len) = clip(sector, count);
            let start = at / cluster * cluster;
            (start, (at + len).next_multiple_of(cluster).min(size))
        };
        match *op {
            Op::Write { sector, count } => {
                let (at, len) = clip(sector, count);
                let byte = (number % 255) as u8 + 1;
                write(&self.image, at, &vec![byte; len as usize]).unwrap();
                self.model.disk[at as usize..(at + len) as usize].fill(byte);
            }
            Op::Zeroes { sector, count } => {
                let (at, end) = whole(sector, count);
                let flags = ZeroFlags {
                    may_unmap: number % 2 == 0,
                    no_fallback: false,
                };
                if self.image.info().version < 3 {
                    // Without marks for zeroes; the block layer does that.
                    write(&self.image, at, &vec![0; (end - at) as usize]).unwrap();
                } else {
                    self.image
                        .write_zeroes(GuestOffset(at), end - at, flags)
                        .unwrap();
                }
                self.model.disk[at as usize..end as usize].fill(0);
            }
            Op::Discard { sector, count } => {
                let (at, end) = whole(sector, count);
                self.image.discard(GuestOffset(at), end - at).unwrap();
                self.model.disk[at as usize..end as usize].fill(0);
            }
            Op::State { sector, count } => {
                let at = self.image.info().vm_state_offset + sector * SECTOR;
                write(&self.image, at, &vec![0xaa; (count * SECTOR) as usize]).unwrap();
            }
            Op::Create => self.create(number),
            Op::Apply(index) => {
                if let Some((id, content)) = self.pick(index) {
                    match self.go_back(&id) {
                        Ok(()) => self.model.disk = content,
                        Err(error) => self.out_of_counts(&error, 0),
                    }
                }
            }
            Op::Delete(index) => {
                if let Some((id, _)) = self.pick(index) {
                    self.image.delete_snapshot(Some(&id), None).unwrap();
                    self.model.snapshots.retain(|(other, _)| *other != id);
                }
            }
            // Not in version 2 with snapshots.
            Op::Resize(..) if self.image.info().version < 3 && !self.model.snapshots.is_empty() => {
            }
            Op::Resize(size, how) => {
                let how = match self.image.size() {
                    old if size < old => Preallocation::Off,
                    _ => how,
                };
                self.image.resize(size, true, how, true).unwrap();
                self.model.disk.resize(size as usize, 0);
            }
            Op::Flush => {
                self.image.flush().unwrap();
                self.file.flush().unwrap();
            }
            Op::Reopen => {
                self.image.inactivate().unwrap();
                self.image = open(&self.file, None, &self.options);
            }
            Op::Empty => {
                self.image.make_empty().unwrap();
                self.model.disk.fill(0);
            }
            Op::Width(order) => {
                let order = RefcountOrder::new(order).unwrap();
                match self.image.change_refcount_width(order, &mut |_, _| ()) {
                    Ok(old) => {
                        self.image = open(&self.file, None, &self.options);
                        self.image.release(old).unwrap();
                    }
                    // Not in version 2, nor where a count is larger.
                    Err(error) => assert_eq!(error.code(), libc::EINVAL),
                }
            }
            Op::Version(version) => self.change_version(version),
        }
    }

    pub fn go_back(&self, id: &[u8]) -> rust_qcow2::Result<()> {
        let held = self.image.hold_snapshot(id)?;
        if held.disk_size() != self.image.size() {
            let size = held.disk_size();
            if let Err(error) = self.image.resize(size, true, Preallocation::Off, true) {
                let _ = self.image.release_snapshot(held);
                return Err(error);
            }
        }
        self.image.apply_snapshot(held)
    }

    pub fn change_version(&mut self, version: u32) {
        if self.image.info().version == version {
            return;
        }
        match self.attempt(&Op::Version(version)) {
            Ok(()) => self.image = open(&self.file, None, &self.options),
            // Subclusters, other widths, snapshots of other sizes.
            Err(error) => assert_eq!(error.code(), libc::ENOTSUP),
        }
    }

    pub fn create(&mut self, number: usize) {
        let state = number as u64 % 3 * 700;
        let at = self.image.info().vm_state_offset;
        if state > 0 {
            write(&self.image, at, &vec![number as u8; state as usize]).unwrap();
        }
        let new = NewSnapshot {
            name: format!("s{number}").into_bytes(),
            vm_state_size: state,
            ..NewSnapshot::default()
        };
        match self.image.create_snapshot(&new) {
            Ok(id) => self.model.snapshots.push((id, self.model.disk.clone())),
            Err(error) => {
                // The L1 table of the snapshot.
                let mut entries = [0; 4];
                entries.copy_from_slice(&self.file.bytes()[36..40]);
                let len = u64::from(u32::from_be_bytes(entries)) * 8;
                self.out_of_counts(&error, len.div_ceil(self.image.geometry().cluster_size()));
            }
        }
    }

    /// Small refcounts end somewhere. The attempt costs `leaks` clusters.
    pub fn out_of_counts(&self, error: &Error, leaks: u64) {
        assert_eq!(error.code(), libc::EINVAL);
        let report = self.image.check(Fix::default(), &mut |_| ()).unwrap();
        let found = (report.corruptions, report.check_errors, report.leaks);
        assert_eq!(found, (0, 0, leaks));
        self.image.check(ALL, &mut |_| ()).unwrap();
    }

    pub fn pick(&self, index: usize) -> Option<(Vec<u8>, Vec<u8>)> {
        let list = &self.model.snapshots;
        (!list.is_empty()).then(|| list[index % list.len()].clone())
    }
}

/// What a check finds that an interrupted change must not leave.
pub fn worse_than_leaks(image: &Image<MemoryHost>) -> Vec<String> {
    let mut low = Vec::new();
    let mut keep = |line: &str| {
        // Too high is a leak, and a copied flag that is missing costs a copy.
        if !line.starts_with("Leaked cluster") && !line.contains("OFLAG_COPIED") {
            low.push(line.to_owned());
        }
    };
    image.check(Fix::default(), &mut keep).unwrap();
    low
}

/// What a crash left, which has to be leaks at most or can be repaired, after
/// that; and the size of the disk.
pub fn repaired(bytes: Vec<u8>) -> (MemoryFile, u64) {
    let file = MemoryFile::new(bytes);
    let host = MemoryHost {
        file: file.clone(),
        ..Default::default()
    };
    let flags = OpenFlags {
        writable: true,
        check: true,
        ..Default::default()
    };
    let image = Image::open(host, flags, &OptionRequest::default()).unwrap();
    if !image.info().dirty {
        let low = worse_than_leaks(&image);
        assert!(low.is_empty(), "{low:?}");
    }
    image.check(ALL, &mut |_| ()).unwrap();
    let mut lines = Vec::new();
    let mut keep = |line: &str| lines.push(line.to_owned());
    let report = image.check(Fix::default(), &mut keep).unwrap();
    let found = (report.corruptions, report.check_errors, report.leaks);
    assert_eq!(found, (0, 0, 0), "{lines:?}");
    image.inactivate().unwrap();
    (file, image.size())
}

/// What an image holds, all snapshots included.
pub fn content(file: &MemoryFile, disk: u64) -> Model {
    let host = || MemoryHost {
        file: file.clone(),
        ..Default::default()
    };
    let flags = OpenFlags::default();
    let image = Image::open(host(), flags, &OptionRequest::default()).unwrap();
    assert_eq!(image.size(), disk);
    let snapshots = image.snapshots().into_iter().map(|snapshot| {
        let shown = Image::open(host(), flags, &OptionRequest::default()).unwrap();
        shown.load_snapshot(Some(&snapshot.id_str), None).unwrap();
        let mut content = vec![0; snapshot.disk_size as usize];
        // It has the size of the disk as it is.
        let len = snapshot.disk_size.min(shown.size()) as usize;
        content[..len].copy_from_slice(&read(&shown, 0, len));
        content.truncate(len);
        (snapshot.id_str, content)
    });
    Model {
        snapshots: snapshots.collect(),
        disk: read(&image, 0, disk as usize),
    }
}

pub fn cut(model: &Model) -> Model {
    let mut model = model.clone();
    let len = model.disk.len();
    for (_, content) in &mut model.snapshots {
        content.truncate(len);
    }
    model
}

pub fn options(small: bool) -> OptionRequest {
    OptionRequest {
        l2_cache_size: small.then_some(1024),
        l2_cache_entry_size: small.then_some(512),
        overlap_check: small.then(|| "all".to_owned()),
        ..Default::default()
    }
}

pub fn begin(shape: Shape, small: bool) -> Run {
    let file = create(shape, SIZE);
    let options = options(small);
    let image = open(&file, None, &options);
    let model = Model {
        disk: vec![0; SIZE as usize],
        snapshots: Vec::new(),
    };
    Run {
        file,
        image,
        options,
        model,
    }
}
