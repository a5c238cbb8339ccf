//! `qemu-img measure`: how large a new image would become.

use std::ffi::{CStr, c_int};
use std::ptr;

use rust_qcow2::format::geometry::{EXTENDED_L2_ENTRY_BITS, L2_ENTRY_BITS};
use rust_qcow2::host::Preallocation;
use rust_qcow2::image::create::{self, DEFAULT_CLUSTER_SIZE, DEFAULT_REFCOUNT_BITS};
use rust_qcow2::image::measure::Layout;
use rust_qcow2::{Error, Result};

use super::bitmaps;
use super::manage::preallocation;
use crate::crypto;
use crate::error::{self, ErrorPtr, caught, check, check_len};
use crate::options::text;
use crate::panic::contain;
use crate::sys;

pub(super) unsafe extern "C" fn measure(
    opts: *mut sys::QemuOpts,
    source: *mut sys::BlockDriverState,
    errp: ErrorPtr,
) -> *mut sys::BlockMeasureInfo {
    contain("measure", ptr::null_mut(), || {
        // SAFETY: QEMU passes options of the driver's list, and perhaps a node
        // that would be converted; errp is not set.
        unsafe {
            match sizes(opts, source) {
                Ok(sizes) => {
                    let size = size_of::<sys::BlockMeasureInfo>();
                    let info = sys::g_malloc0(size as sys::gsize).cast::<sys::BlockMeasureInfo>();
                    (*info).required = sizes.required as i64;
                    (*info).fully_allocated = sizes.fully_allocated as i64;
                    (*info).has_bitmaps = sizes.bitmaps.is_some();
                    (*info).bitmaps = sizes.bitmaps.unwrap_or_default() as i64;
                    info
                }
                Err(error) => {
                    error::set(errp, &error, "Could not measure");
                    ptr::null_mut()
                }
            }
        }
    })
}

/// Takes a text out of options.
///
/// # Safety
/// `opts` are options.
unsafe fn take_text(opts: *mut sys::QemuOpts, name: &CStr) -> Option<String> {
    // SAFETY: promised by the caller; the copy of the text is ours.
    unsafe {
        let value = sys::qemu_opt_get_del(opts, name.as_ptr());
        let result = text(value);
        sys::g_free(value.cast());
        result
    }
}

/// What a new image takes, in bytes.
struct Sizes {
    required: u64,
    /// With all guest clusters.
    fully_allocated: u64,
    /// The persistent bitmaps of the source, where both images can have some.
    bitmaps: Option<u64>,
}

/// Measures.
///
/// # Safety
/// The arguments are those of [`measure`].
unsafe fn sizes(opts: *mut sys::QemuOpts, source: *mut sys::BlockDriverState) -> Result<Sizes> {
    // SAFETY: promised by the caller.
    unsafe {
        let extended_l2 = sys::qemu_opt_get_bool_del(opts, c"extended_l2".as_ptr(), false);
        let number =
            |name: &CStr, default| sys::qemu_opt_get_size_del(opts, name.as_ptr(), default);
        let cluster_size = number(c"cluster_size", DEFAULT_CLUSTER_SIZE);
        let cluster_bits = create::cluster_bits(cluster_size, extended_l2)?;
        let version = match take_text(opts, c"compat").as_deref() {
            None | Some("1.1") => 3,
            Some("0.10") => 2,
            Some(other) => {
                return Err(Error::invalid(format!(
                    "Invalid compatibility level: '{other}'"
                )));
            }
        };
        let bits = c"refcount_bits".as_ptr();
        let bits = sys::qemu_opt_get_number_del(opts, bits, DEFAULT_REFCOUNT_BITS);
        let refcount_order = create::refcount_order(bits, version, "compat=1.1")?;
        let layout = Layout {
            cluster_bits,
            l2_entry_bits: if extended_l2 {
                EXTENDED_L2_ENTRY_BITS
            } else {
                L2_ENTRY_BITS
            },
            refcount_order,
        };
        let mode = take_preallocation(opts)?;
        let has_backing = take_text(opts, c"backing_file").is_some();
        let cluster_size = 1u64 << cluster_bits;
        let luks = match take_text(opts, c"encrypt.format").as_deref() {
            Some("luks") => crypto::header_size(opts)?.next_multiple_of(cluster_size),
            _ => 0,
        };

        let round = |size: u64| {
            size.checked_next_multiple_of(cluster_size)
                .unwrap_or(u64::MAX - (cluster_size - 1))
        };
        let mut size = round(number(c"size", 0));
        layout.check_size(size)?;
        let mut data = 0;
        if !source.is_null() {
            let length = check_len(sys::bdrv_getlength(source))
                .map_err(|error| error.context("Unable to get image virtual_size"))?;
            size = round(length);
            // How much of a backing file the images share is not known.
            data = if has_backing {
                size
            } else {
                data_clusters(source, length, cluster_size)?
            };
        }
        if matches!(mode, Preallocation::Full | Preallocation::Falloc) {
            data = size;
        }
        // The metadata of a full image is counted in any case.
        let fully_allocated = luks + layout.fully_allocated(size);
        let bitmaps =
            version >= 3 && !source.is_null() && sys::bdrv_supports_persistent_dirty_bitmap(source);
        Ok(Sizes {
            required: fully_allocated - size + data,
            fully_allocated,
            bitmaps: bitmaps.then(|| bitmaps::size_in_image(source, cluster_bits)),
        })
    }
}

/// Takes the option `preallocation`.
///
/// # Safety
/// `opts` are options.
unsafe fn take_preallocation(opts: *mut sys::QemuOpts) -> Result<Preallocation> {
    // SAFETY: promised by the caller; the copy of the text is ours.
    let mode = unsafe {
        let value = sys::qemu_opt_get_del(opts, c"preallocation".as_ptr());
        let mode = caught(|errp| {
            let names = &raw const sys::PreallocMode_lookup;
            let default = sys::PREALLOC_MODE_OFF as c_int;
            let mode = sys::qapi_enum_parse(names, value, default, errp);
            if errp.is_null() || (*errp).is_null() {
                mode
            } else {
                -libc::EINVAL
            }
        });
        sys::g_free(value.cast());
        mode?
    };
    preallocation(mode as sys::PreallocMode)
}

/// Bytes of the clusters that hold data in `source`.
///
/// # Safety
/// `source` is an open node of `length` bytes.
unsafe fn data_clusters(
    source: *mut sys::BlockDriverState,
    length: u64,
    cluster_size: u64,
) -> Result<u64> {
    const DATA: c_int = (sys::BDRV_BLOCK_DATA | sys::BDRV_BLOCK_ALLOCATED) as c_int;
    let mut required = 0;
    let mut offset = 0;
    while offset < length {
        let mut known = 0;
        // SAFETY: promised by the caller; what is not asked for may be null.
        let status = unsafe {
            sys::bdrv_block_status_above(
                source,
                ptr::null_mut(),
                offset as i64,
                (length - offset) as i64,
                &raw mut known,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        let status = check(status).map_err(|error| error.context("Unable to get block status"))?;
        let mut end = offset + check_len(known)?.max(1);
        if status & sys::BDRV_BLOCK_ZERO as c_int == 0 && status & DATA == DATA {
            // Whole clusters, each of them once.
            end = end.next_multiple_of(cluster_size);
            required += end - offset / cluster_size * cluster_size;
        }
        offset = end;
    }
    Ok(required)
}
