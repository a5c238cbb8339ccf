//! What changes an image as a whole, or looks at all of it.

use std::ffi::{CStr, c_char, c_int};
use std::io::Write as _;

use rust_qcow2::format::extension::MAX_FORMAT_NAME;
use rust_qcow2::host::Preallocation;
use rust_qcow2::image::check::{CheckReport, Fix};
use rust_qcow2::{Error, Result};

use super::bitmaps;
use super::open::{sectors, set_backing};
use super::{FORMAT, NAME};
use crate::coroutine;
use crate::error::{self, ErrorPtr, code};
use crate::node::{Access, Node, request};
use crate::options::name;
use crate::panic::contain;
use crate::sys;

pub(super) unsafe extern "C" fn truncate(
    bs: *mut sys::BlockDriverState,
    size: i64,
    exact: bool,
    mode: sys::PreallocMode,
    flags: sys::BdrvRequestFlags,
    errp: ErrorPtr,
) -> c_int {
    let zero_new = flags & sys::BDRV_REQ_ZERO_WRITE != 0;
    // SAFETY: a callback of the driver for `bs`, in a coroutine.
    let Some(node) = (unsafe { Node::of(bs) }) else {
        return -libc::ENOMEDIUM;
    };
    // SAFETY: as above; errp comes from QEMU and is not set.
    let refused = unsafe { bitmaps::check_resize(bs, node, errp) };
    if refused < 0 {
        return refused;
    }
    let result = node.serve(Access::Write, |image| {
        let size = u64::try_from(size).map_err(|_| Error::errno(libc::EINVAL))?;
        image.resize(size, exact, preallocation(mode)?, zero_new)?;
        Ok(size)
    });
    match result {
        Ok(size) => {
            // SAFETY: the block layer lets no other request in meanwhile.
            unsafe { (*bs).total_sectors = sectors(size) };
            0
        }
        Err(error) => {
            // SAFETY: errp comes from QEMU and is not set.
            unsafe { error::set(errp, &error, "Could not resize image") };
            -error.code()
        }
    }
}

/// A preallocation mode of QEMU.
pub(super) fn preallocation(mode: sys::PreallocMode) -> Result<Preallocation> {
    match mode {
        sys::PREALLOC_MODE_OFF => Ok(Preallocation::Off),
        sys::PREALLOC_MODE_METADATA => Ok(Preallocation::Metadata),
        sys::PREALLOC_MODE_FALLOC => Ok(Preallocation::Falloc),
        sys::PREALLOC_MODE_FULL => Ok(Preallocation::Full),
        other => Err(Error::unsupported(format!(
            "Unsupported preallocation mode {other}"
        ))),
    }
}

/// The name of a format as it is recorded: images do not know the name of this
/// driver.
pub(super) fn recorded_format(name: &CStr) -> &CStr {
    if name == NAME { FORMAT } else { name }
}

pub(super) unsafe extern "C" fn change_backing_file(
    bs: *mut sys::BlockDriverState,
    file: *const c_char,
    format: *const c_char,
) -> c_int {
    // SAFETY: a callback of the driver for `bs`, in a coroutine; the texts live
    // as long.
    unsafe {
        request(bs, Access::Write, |image| {
            let file = name(file).map(CStr::to_bytes);
            let format = name(format).map(|name| recorded_format(name).to_bytes());
            // The names of some filters are longer than what there is room for.
            let format = format.map(|name| &name[..name.len().min(MAX_FORMAT_NAME)]);
            image.change_backing(file, format)?;
            set_backing(bs, file, format);
            Ok(())
        })
    }
}

pub(super) unsafe extern "C" fn make_empty(bs: *mut sys::BlockDriverState) -> c_int {
    contain("make_empty", -libc::EIO, || {
        // SAFETY: a callback of the driver for `bs`.
        unsafe {
            let Some(node) = Node::of(bs) else {
                return -libc::ENOMEDIUM;
            };
            code(coroutine::run(bs, || {
                node.serve(Access::Write, |image| image.make_empty())
            }))
        }
    })
}

pub(super) unsafe extern "C" fn check(
    bs: *mut sys::BlockDriverState,
    result: *mut sys::BdrvCheckResult,
    fix: sys::BdrvCheckMode,
) -> c_int {
    let fix = Fix {
        leaks: fix & sys::BDRV_FIX_LEAKS != 0,
        errors: fix & sys::BDRV_FIX_ERRORS != 0,
    };
    let access = if fix.leaks || fix.errors {
        Access::Write
    } else {
        Access::Read
    };
    // SAFETY: a callback of the driver for `bs`, in a coroutine; QEMU passes a
    // place for the result.
    unsafe {
        *result = sys::BdrvCheckResult::default();
        let Some(node) = Node::of(bs) else {
            return -libc::ENOMEDIUM;
        };
        match node.serve(access, |image| image.check(fix, &mut say)) {
            Ok(report) => {
                *result = check_result(&report);
                0
            }
            Err(_) if !node.is_present() => -libc::ENOMEDIUM,
            Err(error) => -error.code(),
        }
    }
}

/// Tells the user what a check found.
fn say(line: &str) {
    // Nothing can be done about a closed standard error.
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn check_result(report: &CheckReport) -> sys::BdrvCheckResult {
    let count = |number: u64| c_int::try_from(number).unwrap_or(c_int::MAX);
    sys::BdrvCheckResult {
        corruptions: count(report.corruptions),
        leaks: count(report.leaks),
        check_errors: count(report.check_errors),
        corruptions_fixed: count(report.corruptions_fixed),
        leaks_fixed: count(report.leaks_fixed),
        image_end_offset: report.image_end_offset as i64,
        bfi: sys::BlockFragInfo {
            allocated_clusters: report.allocated_clusters,
            total_clusters: report.total_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
        },
    }
}
