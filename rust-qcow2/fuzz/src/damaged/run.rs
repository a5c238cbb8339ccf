//! One run: an image is damaged, opened and used.

use std::ops::ControlFlow;

use rust_qcow2::error::Error;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::memory::MemoryFile;
use rust_qcow2::host::{Preallocation, ZeroFlags};
use rust_qcow2::image::OpenFlags;
use rust_qcow2::image::check::Fix;
use rust_qcow2::image::snapshots::NewSnapshot;
use rust_qcow2::inspect::Inspection;
use rust_qcow2::units::GuestOffset;

use crate::common::{MemoryBits, TestImage, WRITABLE, walk_bitmap, write, write_compressed};
use crate::input::{Input, Step};
use crate::model::{MAX_SIZE, Model, check, ensure_sound, open};
use crate::samples::Sample;

/// An image in use.
struct Run<'a> {
    input: &'a Input,
    file: MemoryFile,
    backing: Option<MemoryFile>,
    cluster: u64,
    image: TestImage,
    /// Of an image without faults.
    model: Option<Model>,
    /// Writes to the file may have failed.
    failing: bool,
    /// Nothing was refused that may leave clusters that nobody refers to.
    smooth: bool,
}

/// Does what the input says.
pub fn run(input: &Input) {
    let sample = Sample::of(input.sample);
    let bytes = sample.damaged(&input.damage, input.cut);
    inspect(&bytes);
    let before = check(&bytes);
    let file = MemoryFile::new(bytes.clone());
    file.set_zeroes_fast(input.zeroes_fast);
    let backing = input.backing.then(|| {
        let bytes = (0..40_000u32).map(|at| if at / 3000 % 2 == 0 { 0 } else { at as u8 | 1 });
        MemoryFile::new(bytes.collect())
    });
    let Some(image) = open(&file, backing.as_ref(), WRITABLE, input.small_cache) else {
        return;
    };
    let faultless = before
        .as_ref()
        .is_some_and(|(report, _)| report.corruptions == 0 && report.check_errors == 0);
    let model = faultless
        .then(|| Model::of(&image, &bytes, backing.as_ref()))
        .flatten();
    let mut run = Run {
        input,
        file,
        backing,
        cluster: sample.cluster,
        image,
        model,
        failing: false,
        // Refcounts for what is behind the end of the file count only when that
        // gets longer.
        smooth: input.damage.is_empty() && input.cut.is_none(),
    };
    for step in input.steps.iter().take(24) {
        if run.step(*step).is_break() {
            return;
        }
        // After some failures nothing goes on before it is opened again.
        if run.image.is_broken() {
            run.close();
            if run.open().is_break() {
                return;
            }
        }
    }
    run.finish();
}

/// Looks at an image as qcow2-chain does.
fn inspect(bytes: &[u8]) {
    if let Ok(inspection) = Inspection::open(MemoryFile::new(bytes.to_vec())) {
        let _ = inspection.refcount_blocks();
        let mut extents = 0u64;
        let _ = inspection.walk(&mut |_| extents += 1);
        assert!(extents < 1 << 24);
    }
}

impl Run<'_> {
    /// Closes the image; the file works again then.
    fn close(&mut self) {
        let closed = self.image.inactivate().is_ok();
        self.smooth &= closed;
        if let (Some(model), false) = (&mut self.model, closed) {
            model.disk.fill(None);
        }
        self.file.fail_some(0, 0);
        if self.model.is_some() {
            ensure_sound(&self.file.bytes(), self.cluster, false);
        }
    }

    /// Opens the image after it was closed.
    fn open(&mut self) -> ControlFlow<()> {
        let again = open(
            &self.file,
            self.backing.as_ref(),
            WRITABLE,
            self.input.small_cache,
        );
        let Some(image) = again else {
            assert!(
                self.model.is_none(),
                "an image without faults cannot be opened any more"
            );
            return ControlFlow::Break(());
        };
        self.image = image;
        ControlFlow::Continue(())
    }

    /// What has become of a range: a value, what it was before where the
    /// request was refused with `refusal`, or anything.
    fn changed(&mut self, at: u64, len: u64, value: u8, result: Result<(), Error>, refusal: i32) {
        let value = match result {
            Ok(()) => Some(value),
            Err(error) if error.code() == refusal && !self.failing => return,
            Err(_) => {
                self.smooth = false;
                None
            }
        };
        if let Some(model) = &mut self.model {
            model.set(at, len, value);
        }
    }

    fn write(&mut self, at: u64, len: u16, byte: u8) {
        let size = self.image.size();
        if size > 0 {
            let at = at % size.min(MAX_SIZE);
            let len = (u64::from(len) % 20_000 + 1).min(size - at);
            let result = write(&self.image, at, &vec![byte; len as usize]);
            self.changed(at, len, byte, result, 0);
        }
    }

    /// A range of whole clusters, or up to the end of the disk.
    fn clusters(&self, first: u8, count: u8) -> Option<(u64, u64)> {
        let size = self.image.size();
        let at = (u64::from(first) * self.cluster).checked_rem(size)?;
        let at = at / self.cluster * self.cluster;
        Some((
            at,
            (u64::from(count % 32 + 1) * self.cluster).min(size - at),
        ))
    }

    fn snapshot(&self, number: u8) -> Option<Vec<u8>> {
        let list = self.image.snapshots();
        let index = usize::from(number).checked_rem(list.len())?;
        Some(list[index].id_str.clone())
    }

    fn step(&mut self, step: Step) -> ControlFlow<()> {
        let size = self.image.size();
        match step {
            Step::Write(sector, len, byte) => self.write(u64::from(sector) * 512, len, byte),
            Step::WriteAt(at, len, byte) => self.write(at.into(), len, byte),
            Step::WriteCompressed(cluster, byte) => {
                if let Some((at, len)) = self.clusters(cluster, 0) {
                    let result = write_compressed(&self.image, at, &vec![byte; len as usize]);
                    // Data are not replaced by compressed ones.
                    self.changed(at, len, byte, result, libc::EIO);
                }
            }
            Step::WriteZeroes(cluster, count, may_unmap) => {
                if let Some((at, len)) = self.clusters(cluster, count) {
                    let flags = ZeroFlags {
                        may_unmap,
                        no_fallback: false,
                    };
                    let result = self.image.write_zeroes(GuestOffset(at), len, flags);
                    self.changed(at, len, 0, result, libc::ENOTSUP);
                }
            }
            Step::Discard(cluster, count) => {
                if let Some((at, len)) = self.clusters(cluster, count) {
                    let result = self.image.discard(GuestOffset(at), len);
                    self.changed(at, len, 0, result, libc::ENOTSUP);
                }
            }
            Step::Status(sector, len) => {
                if size > 0 {
                    let at = u64::from(sector) * 512 % size;
                    let len = (u64::from(len) + 1).min(size - at);
                    if let Ok(status) = self.image.block_status(GuestOffset(at), len) {
                        assert!((1..=len).contains(&status.len));
                    }
                }
            }
            Step::Flush => self.smooth &= self.image.flush().is_ok(),
            Step::CleanCaches => self.image.clean_caches(),
            Step::FailWrites(good, bad) => {
                self.file.fail_some(good.into(), usize::from(bad % 8));
                self.failing = true;
                self.smooth = false;
            }
            Step::Reopen => {
                self.close();
                return self.open();
            }
            Step::Resize(..) | Step::MakeEmpty => self.change_disk(step),
            Step::CreateSnapshot(..) | Step::ApplySnapshot(..) | Step::DeleteSnapshot(..) => {
                self.change_snapshots(step);
            }
            Step::MarkBitmaps
            | Step::StoreBitmap(..)
            | Step::ReadBitmaps
            | Step::RemoveBitmap(..) => self.use_bitmaps(step),
            Step::ChangeWidth(..) | Step::Downgrade | Step::Check(..) => {
                return self.change_file(step);
            }
        }
        ControlFlow::Continue(())
    }

    fn change_disk(&mut self, step: Step) {
        let size = self.image.size();
        match step {
            Step::Resize(number, how, zero) => {
                let new = (u64::from(number) + 1) * 2048;
                let how = match how % 4 {
                    0 => Preallocation::Off,
                    _ if new < size || size > MAX_SIZE => Preallocation::Off,
                    1 => Preallocation::Metadata,
                    2 => Preallocation::Falloc,
                    _ => Preallocation::Full,
                };
                self.smooth &= self.image.resize(new, true, how, zero).is_ok();
                if let Some(model) = &mut self.model {
                    // What is cut off may be gone or may come back.
                    model.disk.truncate(new as usize);
                    model.disk.resize(self.image.size() as usize, None);
                }
            }
            _ => {
                self.smooth &= self.image.make_empty().is_ok();
                if let Some(model) = &mut self.model {
                    model.disk.fill(None);
                }
            }
        }
    }

    fn change_snapshots(&mut self, step: Step) {
        match step {
            Step::CreateSnapshot(vm_state_size) => {
                let new = NewSnapshot {
                    name: b"new".into(),
                    vm_state_size: vm_state_size.into(),
                    ..NewSnapshot::default()
                };
                match (self.image.create_snapshot(&new), &mut self.model) {
                    (Ok(id), Some(model)) => model.snapshots.push((id, model.disk.clone())),
                    (Ok(_), None) => {}
                    (Err(_), _) => self.smooth = false,
                }
            }
            Step::ApplySnapshot(number) => {
                let Some(id) = self.snapshot(number) else {
                    return;
                };
                let Ok(held) = self.image.hold_snapshot(&id) else {
                    self.smooth = false;
                    return;
                };
                if held.disk_size() != self.image.size() {
                    self.smooth &= self.image.release_snapshot(held).is_ok();
                    return;
                }
                let applied = self.image.apply_snapshot(held).is_ok();
                self.smooth &= applied;
                // A check does not say whether compressed data can be read.
                self.model = self.model.take().and_then(|mut model| {
                    model.disk = model.snapshot(&id)?.clone();
                    if !applied {
                        model.disk.fill(None);
                    }
                    Some(model)
                });
            }
            Step::DeleteSnapshot(number) => {
                let Some(id) = self.snapshot(number) else {
                    return;
                };
                self.smooth &= self.image.delete_snapshot(Some(&id), None).is_ok();
                if let Some(model) = &mut self.model {
                    let list = self.image.snapshots();
                    let is_there = |id: &[u8]| list.iter().any(|snapshot| snapshot.id_str == id);
                    model.snapshots.retain(|(id, _)| is_there(id));
                }
            }
            _ => {}
        }
    }

    fn use_bitmaps(&mut self, step: Step) {
        let image = &self.image;
        match step {
            Step::MarkBitmaps => self.smooth &= image.mark_bitmaps_in_use().is_ok(),
            Step::StoreBitmap(number, distance) if image.supports_bitmaps() => {
                let new = MemoryBits {
                    name: vec![b'a' + number % 3],
                    granularity_bits: 9 + u32::from(distance % 12),
                    disk_size: image.size() & !511,
                    enabled: number % 2 == 0,
                    bits: (0..u64::from(number))
                        .map(|bit| bit * u64::from(distance))
                        .collect(),
                };
                self.smooth &= image.store_bitmaps(&[&new]).is_ok();
            }
            Step::ReadBitmaps => {
                for entry in image.bitmaps().unwrap_or_default() {
                    walk_bitmap(image, &entry);
                }
            }
            Step::RemoveBitmap(number) => {
                let names: [&[u8]; 4] = [b"a", b"b", b"c", b"bits"];
                let _ = image.remove_bitmap(names[usize::from(number % 4)]);
            }
            _ => {}
        }
    }

    fn change_file(&mut self, step: Step) -> ControlFlow<()> {
        match step {
            Step::ChangeWidth(order) => {
                let order = RefcountOrder::new(u32::from(order) % 7).expect("up to 6");
                let superseded = self.image.change_refcount_width(order, &mut |_, _| ());
                self.close();
                self.open()?;
                self.smooth &= superseded.is_ok_and(|old| self.image.release(old).is_ok());
            }
            Step::Check(what) => {
                self.close();
                let flags = OpenFlags {
                    check: true,
                    ..WRITABLE
                };
                if let Some(image) = open(&self.file, self.backing.as_ref(), flags, false) {
                    let fix = Fix {
                        leaks: what & 1 != 0,
                        errors: what & 2 != 0,
                    };
                    let _ = image.check(fix, &mut |_| ());
                    let _ = image.inactivate();
                }
                return self.open();
            }
            _ => {
                let _ = self.image.downgrade(&mut |_, _| ());
                self.close();
                return self.open();
            }
        }
        ControlFlow::Continue(())
    }

    /// Looks at what has become of the image.
    fn finish(self) {
        let Some(model) = &self.model else {
            let _ = self.image.inactivate();
            // What can be mended is, without more than an error.
            let flags = OpenFlags {
                check: true,
                ..WRITABLE
            };
            if let Some(image) = open(&self.file, self.backing.as_ref(), flags, false) {
                let _ = image.check(
                    Fix {
                        leaks: true,
                        errors: true,
                    },
                    &mut |_| (),
                );
            }
            return;
        };
        self.file.fail_some(0, 0);
        model.compare(&self.image);
        self.image.inactivate().expect("everything can be written");
        let bytes = self.file.bytes();
        ensure_sound(&bytes, self.cluster, self.smooth);
        let again = open(&self.file, self.backing.as_ref(), WRITABLE, false);
        model.compare(&again.expect("it can be opened"));
        model.compare_snapshots(&bytes, self.backing.as_ref());
    }
}
