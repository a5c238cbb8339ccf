//! Internal snapshots and the state of a virtual machine.
//!
//! The callbacks that change something come from the main loop, with the node
//! drained.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use rust_qcow2::format::snapshots::Snapshot;
use rust_qcow2::host::{Event, Host};
use rust_qcow2::image::Image;
use rust_qcow2::image::snapshots::NewSnapshot;
use rust_qcow2::units::GuestOffset;
use rust_qcow2::{Error, Result};

use crate::coroutine;
use crate::error::{self, ErrorPtr, check, code};
use crate::host::Qemu;
use crate::node::{Access, Node, request};
use crate::options::name;
use crate::panic::contain;
use crate::qiov::Qiov;
use crate::sys;

/// Does `f` with the image of `bs`, in a coroutine.
///
/// # Safety
/// Called in a callback of the driver for `bs`, in the main loop.
unsafe fn serve<T>(
    bs: *mut sys::BlockDriverState,
    access: Access,
    f: impl FnOnce(&Image<Qemu>) -> Result<T>,
) -> Result<T> {
    // SAFETY: promised by the caller.
    unsafe {
        let node = Node::of(bs).ok_or_else(|| Error::errno(libc::ENOMEDIUM))?;
        coroutine::run(bs, || node.serve(access, f))
    }
}

/// The bytes of a text that QEMU passes, if it does.
///
/// # Safety
/// `text` is null or a C string that lives as long as the result.
unsafe fn bytes<'a>(text: *const c_char) -> Option<&'a [u8]> {
    // SAFETY: promised by the caller.
    unsafe { name(text) }.map(CStr::to_bytes)
}

/// Copies a text to where C has room for it, cut if need be.
fn put_text(place: &mut [c_char], text: &[u8]) {
    let len = text.len().min(place.len() - 1);
    for (to, from) in place.iter_mut().zip(&text[..len]) {
        *to = *from as c_char;
    }
    place[len] = 0;
}

/// A failure as the callback returns it.
fn fail(error: &Error) -> c_int {
    -error.code()
}

pub(super) unsafe extern "C" fn create(
    bs: *mut sys::BlockDriverState,
    info: *mut sys::QEMUSnapshotInfo,
) -> c_int {
    contain("snapshot_create", -libc::EIO, || {
        // SAFETY: a callback of the driver for `bs`; QEMU passes a description
        // with a C string in it, and wants the identity in it.
        unsafe {
            let new = NewSnapshot {
                name: CStr::from_ptr((&raw const (*info).name).cast())
                    .to_bytes()
                    .to_vec(),
                date_sec: (*info).date_sec,
                date_nsec: (*info).date_nsec,
                vm_clock_nsec: (*info).vm_clock_nsec,
                vm_state_size: (*info).vm_state_size,
                icount: (*info).icount,
            };
            match serve(bs, Access::Write, |image| image.create_snapshot(&new)) {
                Ok(id) => {
                    put_text(&mut (*info).id_str, &id);
                    0
                }
                Err(error) => fail(&error),
            }
        }
    })
}

pub(super) unsafe extern "C" fn goto(
    bs: *mut sys::BlockDriverState,
    id_or_name: *const c_char,
) -> c_int {
    contain("snapshot_goto", -libc::EIO, || {
        // SAFETY: a callback of the driver for `bs`; QEMU passes a C string.
        let result = unsafe {
            let text = bytes(id_or_name).unwrap_or_default();
            serve(bs, Access::Write, |image| image.hold_snapshot(text)).and_then(|held| {
                let resized = resize(bs, held.disk_size());
                serve(bs, Access::Write, |image| match resized {
                    Ok(()) => image.apply_snapshot(held),
                    Err(error) => {
                        // What cannot be taken back costs space, until it is repaired.
                        let _ = image.release_snapshot(held);
                        Err(error)
                    }
                })
            })
        };
        if let Err(error) = &result {
            if error.message().is_some() {
                error::report_text(&error.to_string());
            }
        }
        code(result)
    })
}

/// Gives the disk the size of a snapshot, so that all who use it know.
///
/// # Safety
/// Called in a callback of the driver for `bs`, in the main loop.
unsafe fn resize(bs: *mut sys::BlockDriverState, size: u64) -> Result<()> {
    // SAFETY: promised by the caller; the backend is ours, and errors that are
    // set go to `caught`.
    unsafe {
        if size == ((*bs).total_sectors as u64).saturating_mul(u64::from(sys::BDRV_SECTOR_SIZE)) {
            return Ok(());
        }
        let size = i64::try_from(size).map_err(|_| Error::errno(libc::EFBIG))?;
        let mut blk = ptr::null_mut();
        error::caught(|errp| {
            blk = sys::blk_new_with_bs(
                bs,
                sys::BLK_PERM_RESIZE.into(),
                sys::BLK_PERM_ALL.into(),
                errp,
            );
            if blk.is_null() { -libc::ENOTSUP } else { 0 }
        })?;
        let result = error::caught(|errp| {
            sys::blk_truncate(blk, size, true, sys::PREALLOC_MODE_OFF, 0, errp)
        });
        sys::blk_unref(blk);
        result.map(|_| ())
    }
}

pub(super) unsafe extern "C" fn delete(
    bs: *mut sys::BlockDriverState,
    id: *const c_char,
    name: *const c_char,
    errp: ErrorPtr,
) -> c_int {
    contain("snapshot_delete", -libc::EIO, || {
        // SAFETY: a callback of the driver for `bs`; QEMU passes C strings or
        // null, and an error pointer that is not set.
        unsafe {
            let (id, name) = (bytes(id), bytes(name));
            let result = serve(bs, Access::Write, |image| image.delete_snapshot(id, name));
            result.map_or_else(
                |error| {
                    error::set(errp, &error, "Failed to delete the snapshot");
                    fail(&error)
                },
                |()| 0,
            )
        }
    })
}

pub(super) unsafe extern "C" fn load_tmp(
    bs: *mut sys::BlockDriverState,
    id: *const c_char,
    name: *const c_char,
    errp: ErrorPtr,
) -> c_int {
    contain("snapshot_load_tmp", -libc::EIO, || {
        // SAFETY: as for `delete`.
        unsafe {
            let (id, name) = (bytes(id), bytes(name));
            let result = serve(bs, Access::Read, |image| image.load_snapshot(id, name));
            result.map_or_else(
                |error| {
                    error::set(errp, &error, "Failed to load the snapshot");
                    fail(&error)
                },
                |()| 0,
            )
        }
    })
}

pub(super) unsafe extern "C" fn list(
    bs: *mut sys::BlockDriverState,
    list: *mut *mut sys::QEMUSnapshotInfo,
) -> c_int {
    contain("snapshot_list", -libc::EIO, || {
        // SAFETY: a callback of the driver for `bs`; QEMU passes a place for
        // the list, which it frees.
        unsafe {
            *list = ptr::null_mut();
            let Some(node) = Node::of(bs) else {
                return -libc::ENOMEDIUM;
            };
            if node.image().has_data_file() {
                return -libc::ENOTSUP;
            }
            let snapshots = node.image().snapshots();
            if snapshots.is_empty() {
                return 0;
            }
            let size = size_of::<sys::QEMUSnapshotInfo>() * snapshots.len();
            let table = sys::g_malloc0(size as sys::gsize).cast::<sys::QEMUSnapshotInfo>();
            for (index, snapshot) in snapshots.iter().enumerate() {
                describe(&mut *table.add(index), snapshot);
            }
            *list = table;
            c_int::try_from(snapshots.len()).unwrap_or(c_int::MAX)
        }
    })
}

fn describe(info: &mut sys::QEMUSnapshotInfo, snapshot: &Snapshot) {
    put_text(&mut info.id_str, &snapshot.id_str);
    put_text(&mut info.name, &snapshot.name);
    info.vm_state_size = snapshot.vm_state_size;
    info.date_sec = snapshot.date_sec;
    info.date_nsec = snapshot.date_nsec;
    info.vm_clock_nsec = snapshot.vm_clock_nsec;
    info.icount = snapshot.icount;
}

/// Where a part of the state of a machine is, as the disk goes on.
///
/// # Safety
/// `qiov` is a valid vector.
unsafe fn state_place(
    image: &Image<Qemu>,
    qiov: *mut sys::QEMUIOVector,
    at: i64,
) -> Result<(GuestOffset, u64)> {
    let start = i64::try_from(image.info().vm_state_offset).unwrap_or(i64::MAX);
    let place = at.checked_add(start);
    let place = place.ok_or_else(|| Error::errno(libc::EIO))?;
    // SAFETY: the vector is valid; the check does not change it. The size is
    // part of the union in all its forms.
    let len = unsafe {
        let len = (*qiov).__bindgen_anon_1.__bindgen_anon_2.size;
        check(sys::bdrv_check_qiov_request(
            place,
            len as i64,
            qiov,
            0,
            ptr::null_mut(),
        ))?;
        len as u64
    };
    Ok((GuestOffset(place as u64), len))
}

pub(super) unsafe extern "C" fn save_vmstate(
    bs: *mut sys::BlockDriverState,
    qiov: *mut sys::QEMUIOVector,
    at: i64,
) -> c_int {
    // SAFETY: a callback of the driver for `bs`, in a coroutine; QEMU keeps the
    // vector as it is until the request has ended.
    unsafe {
        request(bs, Access::Write, |image| {
            let (place, len) = state_place(image, qiov, at)?;
            image.host().event(Event::VmstateSave);
            image.write(place, len, Qiov::new(qiov), 0)
        })
    }
}

pub(super) unsafe extern "C" fn load_vmstate(
    bs: *mut sys::BlockDriverState,
    qiov: *mut sys::QEMUIOVector,
    at: i64,
) -> c_int {
    // SAFETY: as for `save_vmstate`.
    unsafe {
        request(bs, Access::Read, |image| {
            let (place, len) = state_place(image, qiov, at)?;
            image.host().event(Event::VmstateLoad);
            image.read(place, len, Qiov::new(qiov), 0)
        })
    }
}
