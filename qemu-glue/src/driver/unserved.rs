//! What is not served yet. Without these callbacks QEMU would turn to the
//! image file instead, or try something else; the answer has to be no.

use std::ffi::{c_char, c_int};
use std::ptr;

use libc::ENOTSUP;
use rust_qcow2::Error;

use crate::error::{self, ErrorPtr};
use crate::sys;

const SNAPSHOTS: &str = "rqcow2 does not support internal snapshots yet";

/// `-ENOTSUP`, with the sentence where there is a place for it.
///
/// # Safety
/// `errp` is null or an error pointer of QEMU that is not set yet.
unsafe fn refuse(errp: ErrorPtr, sentence: &'static str) -> c_int {
    // SAFETY: promised by the caller.
    unsafe { error::set(errp, &Error::unsupported(sentence), sentence) };
    -ENOTSUP
}

pub(super) unsafe extern "C" fn snapshot_create(
    _bs: *mut sys::BlockDriverState,
    _info: *mut sys::QEMUSnapshotInfo,
) -> c_int {
    error::report_text(SNAPSHOTS);
    -ENOTSUP
}

pub(super) unsafe extern "C" fn snapshot_goto(
    _bs: *mut sys::BlockDriverState,
    _id: *const c_char,
) -> c_int {
    error::report_text(SNAPSHOTS);
    -ENOTSUP
}

pub(super) unsafe extern "C" fn snapshot_delete(
    _bs: *mut sys::BlockDriverState,
    _id: *const c_char,
    _name: *const c_char,
    errp: ErrorPtr,
) -> c_int {
    // SAFETY: errp comes from QEMU.
    unsafe { refuse(errp, SNAPSHOTS) }
}

pub(super) unsafe extern "C" fn snapshot_load_tmp(
    _bs: *mut sys::BlockDriverState,
    _id: *const c_char,
    _name: *const c_char,
    errp: ErrorPtr,
) -> c_int {
    // SAFETY: errp comes from QEMU.
    unsafe { refuse(errp, SNAPSHOTS) }
}

/// None: an image that has any is not opened.
pub(super) unsafe extern "C" fn snapshot_list(
    _bs: *mut sys::BlockDriverState,
    list: *mut *mut sys::QEMUSnapshotInfo,
) -> c_int {
    // SAFETY: QEMU passes a place for the list.
    unsafe { *list = ptr::null_mut() };
    0
}

pub(super) unsafe extern "C" fn save_vmstate(
    _bs: *mut sys::BlockDriverState,
    _qiov: *mut sys::QEMUIOVector,
    _at: i64,
) -> c_int {
    -ENOTSUP
}

pub(super) unsafe extern "C" fn load_vmstate(
    _bs: *mut sys::BlockDriverState,
    _qiov: *mut sys::QEMUIOVector,
    _at: i64,
) -> c_int {
    -ENOTSUP
}
