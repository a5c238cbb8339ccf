//! The driver as QEMU sees it: a table of callbacks.
//!
//! Each callback converts types and error numbers and calls the image; what
//! is done is done in `rust-qcow2`.

mod amend;
mod bitmaps;
mod create;
mod info;
mod io;
mod manage;
mod measure;
mod open;
mod reopen;
mod snapshots;

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use rust_qcow2::format::header::Header;

use crate::error::ErrorPtr;
use crate::node::Slot;
use crate::panic::contain;
use crate::sys;

/// The name of the driver.
pub(crate) const NAME: &CStr = c"rqcow2";
/// The name of the format in images, and of the driver in a takeover.
pub(crate) const FORMAT: &CStr = c"qcow2";
/// With the value `1` this variable makes the driver serve the name `qcow2`.
const TAKEOVER: &str = "QEMU_RQCOW2_TAKEOVER";

/// Makes the driver known to the block layer, under its own name and, where
/// the user wants it, under that of the qcow2 driver.
///
/// # Safety
/// Called once, from a constructor of QEMU's block layer, after the qcow2
/// driver was registered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rqcow2_register() {
    contain("rqcow2_register", (), || {
        // Under its own name the driver leaves probing to the qcow2 driver.
        register(NAME, None);
        if std::env::var_os(TAKEOVER).is_some_and(|value| value == "1") {
            register(FORMAT, Some(probe));
            // SAFETY: promised by the caller.
            unsafe { take_over_creation() };
        }
    });
}

/// The block layer uses the qcow2 driver by its address, too, for temporary
/// overlays. Its way to create an image opens what it has made by name, which
/// is this driver then, and goes on as if it were its own.
///
/// # Safety
/// As for [`rqcow2_register`].
unsafe fn take_over_creation() {
    let theirs = &raw mut sys::bdrv_qcow2;
    // SAFETY: nothing uses drivers while they are being registered.
    unsafe {
        (*theirs).bdrv_co_create = Some(create::co_create);
        (*theirs).bdrv_co_create_opts = Some(create::co_create_opts);
    }
}

/// Whether a node with the table `driver` is one of this driver, under either
/// of its names.
///
/// # Safety
/// `driver` is null or a table that was registered.
#[inline]
pub(crate) unsafe fn is_ours(driver: *const sys::BlockDriver) -> bool {
    // SAFETY: promised by the caller.
    let open = unsafe { driver.as_ref() }.and_then(|driver| driver.bdrv_open);
    let ours: Open = open::open;
    open.is_some_and(|open| ptr::fn_addr_eq(open, ours))
}

type Open =
    unsafe extern "C" fn(*mut sys::BlockDriverState, *mut sys::QDict, c_int, ErrorPtr) -> c_int;

type Probe = unsafe extern "C" fn(*const u8, c_int, *const c_char) -> c_int;

fn register(name: &'static CStr, probe: Option<Probe>) {
    let driver = Box::leak(Box::new(table(name, probe)));
    // SAFETY: the table lives as long as the program, and QEMU is the only one
    // to use it from now on.
    unsafe { sys::bdrv_register(driver) };
}

/// Recognises the format. The score is above that of the qcow2 driver.
unsafe extern "C" fn probe(start: *const u8, len: c_int, _filename: *const c_char) -> c_int {
    contain("probing", 0, || {
        let len = usize::try_from(len).unwrap_or(0);
        // SAFETY: QEMU passes the first `len` bytes of the file.
        let start = unsafe { std::slice::from_raw_parts(start, len) };
        if Header::probe(start) { 200 } else { 0 }
    })
}

fn table(name: &'static CStr, probe: Option<Probe>) -> sys::BlockDriver {
    sys::BlockDriver {
        format_name: name.as_ptr(),
        image_format_name: FORMAT.as_ptr(),
        instance_size: size_of::<Slot>() as c_int,
        is_format: true,
        supports_backing: true,
        create_opts: &raw mut sys::rq_create_opts,
        amend_opts: &raw mut sys::rq_amend_opts,
        mutable_opts: (&raw const sys::rq_mutable_opts).cast(),
        strong_runtime_opts: (&raw const sys::rq_strong_runtime_opts).cast(),

        bdrv_probe: probe,
        bdrv_open: Some(open::open),
        bdrv_close: Some(open::close),
        bdrv_child_perm: Some(sys::bdrv_default_perms),
        bdrv_reopen_prepare: Some(reopen::prepare),
        bdrv_reopen_commit: Some(reopen::commit),
        bdrv_reopen_commit_post: Some(reopen::commit_post),
        bdrv_reopen_abort: Some(reopen::abort),
        bdrv_join_options: Some(reopen::join_options),
        bdrv_co_invalidate_cache: Some(open::invalidate_cache),
        bdrv_inactivate: Some(open::inactivate),
        bdrv_attach_aio_context: Some(open::attach_aio_context),
        bdrv_detach_aio_context: Some(open::detach_aio_context),

        bdrv_co_preadv_part: Some(io::preadv_part),
        bdrv_co_pwritev_compressed_part: Some(io::pwritev_compressed_part),
        bdrv_co_pwritev_part: Some(io::pwritev_part),
        bdrv_co_pwrite_zeroes: Some(io::pwrite_zeroes),
        bdrv_co_pdiscard: Some(io::pdiscard),
        bdrv_co_copy_range_from: Some(io::copy_range_from),
        bdrv_co_copy_range_to: Some(io::copy_range_to),
        bdrv_co_flush_to_os: Some(io::flush_to_os),
        bdrv_co_block_status: Some(io::block_status),
        bdrv_co_skip_layers: Some(io::skip_layers),
        bdrv_co_is_inserted: Some(io::is_inserted),

        bdrv_co_create: Some(create::co_create),
        bdrv_co_create_opts: Some(create::co_create_opts),
        bdrv_measure: Some(measure::measure),
        bdrv_amend_options: Some(amend::amend_options),
        bdrv_co_amend: Some(amend::co_amend),

        bdrv_co_truncate: Some(manage::truncate),
        bdrv_co_change_backing_file: Some(manage::change_backing_file),
        bdrv_make_empty: Some(manage::make_empty),
        bdrv_co_check: Some(manage::check),

        bdrv_supports_persistent_dirty_bitmap: Some(bitmaps::supports),
        bdrv_co_can_store_new_dirty_bitmap: Some(bitmaps::can_store_new),
        bdrv_co_remove_persistent_dirty_bitmap: Some(bitmaps::remove),

        bdrv_refresh_limits: Some(info::refresh_limits),
        bdrv_has_zero_init: Some(info::has_zero_init),
        bdrv_co_get_info: Some(info::get_info),
        bdrv_get_specific_info: Some(info::get_specific_info),
        bdrv_get_specific_stats: Some(info::get_specific_stats),

        bdrv_snapshot_create: Some(snapshots::create),
        bdrv_snapshot_goto: Some(snapshots::goto),
        bdrv_snapshot_delete: Some(snapshots::delete),
        bdrv_snapshot_list: Some(snapshots::list),
        bdrv_snapshot_load_tmp: Some(snapshots::load_tmp),
        bdrv_co_save_vmstate: Some(snapshots::save_vmstate),
        bdrv_co_load_vmstate: Some(snapshots::load_vmstate),
        ..Default::default()
    }
}
