//! The life of a node: open, close, inactive and active again.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use rust_qcow2::image::{Image, OpenFlags};
use rust_qcow2::{Error, Result};

use super::bitmaps;
use crate::coroutine;
use crate::error::{self, ErrorPtr, check, code};
use crate::host::Qemu;
use crate::lineage::Lineage;
use crate::node::{Access, Node, open_flags};
use crate::options::Requested;
use crate::panic::{catch, contain};
use crate::sys;

const COULD_NOT_OPEN: &str = "Could not open image";

pub(super) unsafe extern "C" fn open(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    flags: c_int,
    errp: ErrorPtr,
) -> c_int {
    contain("open", -libc::EIO, || {
        // SAFETY: QEMU passes a node that is being opened, and its options.
        let ret =
            unsafe { sys::bdrv_open_file_child(ptr::null(), options, c"file".as_ptr(), bs, errp) };
        if let Err(error) = check(ret) {
            // QEMU has set the text.
            return -error.code();
        }
        // SAFETY: as above; errp is not set.
        unsafe {
            sys::rq_trace_open(bs);
            match open_node(bs, options, open_flags(flags)) {
                Ok(()) => 0,
                Err(error) => {
                    unlink_data_file(bs);
                    error::set(errp, &error, COULD_NOT_OPEN);
                    -error.code()
                }
            }
        }
    })
}

/// Gives up the link to a data file, of a node that could not be opened.
///
/// # Safety
/// Called in the driver's open callback for `bs`, outside of coroutines.
unsafe fn unlink_data_file(bs: *mut sys::BlockDriverState) {
    // SAFETY: promised by the caller: nobody uses the node yet.
    unsafe {
        let mut child = (*bs).children.lh_first;
        while !child.is_null() {
            let next = (*child).next.le_next;
            if CStr::from_ptr((*child).name) == c"data-file" {
                sys::bdrv_graph_wrlock();
                sys::bdrv_unref_child(bs, child);
                sys::bdrv_graph_wrunlock();
            }
            child = next;
        }
    }
}

/// Opens the image in a node that has its file.
///
/// # Safety
/// Called in the driver's open callback for `bs`.
unsafe fn open_node(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    flags: OpenFlags,
) -> Result<()> {
    // SAFETY: promised by the caller; `Qemu` is only used in coroutines.
    unsafe {
        let lineage = Lineage::of(bs)?;
        let requested = Requested::take(options)?;
        if flags.no_io {
            Requested::drop_data_file(options);
        }
        let host = Qemu::opening(bs, options);
        let image = coroutine::run(bs, || Image::open(host, flags, &requested.options))?;
        image.host().end_opening();
        publish(bs, &image);
        if !flags.inactive {
            bitmaps::load(bs, &image)?;
        }
        Node::install(bs, lineage, image);
        if let Some(node) = Node::of(bs) {
            node.start_timer(sys::bdrv_get_aio_context(bs));
        }
    }
    Ok(())
}

/// Tells the block layer what an image that was just opened is like.
///
/// # Safety
/// `bs` is the node of the image; nobody else uses these fields yet.
pub(super) unsafe fn publish(bs: *mut sys::BlockDriverState, image: &Image<Qemu>) {
    let info = image.info();
    // SAFETY: promised by the caller; the places are as long as their types.
    unsafe {
        (*bs).total_sectors = sectors(info.size);
        (*bs).encrypted = image.encryption().is_some();
        (*bs).supported_zero_flags = if info.version >= 3 {
            sys::BDRV_REQ_MAY_UNMAP | sys::BDRV_REQ_NO_FALLBACK
        } else {
            0
        };
        // What copy-on-read and block-stream write.
        (*bs).supported_write_flags = sys::BDRV_REQ_WRITE_UNCHANGED;
        (*bs).supported_truncate_flags = sys::BDRV_REQ_ZERO_WRITE;
        let name = info.backing_file.as_deref().unwrap_or_default();
        // Where nothing has changed the block layer knows better than the
        // image by what name it has opened the backing file.
        if CStr::from_ptr((*bs).backing_file.as_ptr()).to_bytes() != name {
            copy_text(&mut (*bs).backing_file, name);
            copy_text(&mut (*bs).auto_backing_file, name);
        }
        let format = info.backing_format.as_deref().unwrap_or_default();
        copy_text(&mut (*bs).backing_format, format);
    }
}

/// A size in the units of the block layer.
pub(super) fn sectors(size: u64) -> i64 {
    (size / u64::from(sys::BDRV_SECTOR_SIZE)) as i64
}

/// Tells the block layer what the image records of its backing file from now
/// on.
///
/// # Safety
/// As for [`publish`].
pub(super) unsafe fn set_backing(
    bs: *mut sys::BlockDriverState,
    file: Option<&[u8]>,
    format: Option<&[u8]>,
) {
    // SAFETY: promised by the caller; references to the arrays end with each
    // call.
    unsafe {
        copy_text(&mut (*bs).auto_backing_file, file.unwrap_or_default());
        copy_text(&mut (*bs).backing_file, file.unwrap_or_default());
        copy_text(&mut (*bs).backing_format, format.unwrap_or_default());
    }
}

/// Copies a text into an array, cut to its length, with a NUL behind it.
fn copy_text(array: &mut [c_char], text: &[u8]) {
    let len = text.len().min(array.len() - 1);
    for (to, from) in array.iter_mut().zip(&text[..len]) {
        *to = *from as c_char;
    }
    array[len] = 0;
}

/// Writes all that is in memory, before someone else may use the file.
///
/// # Safety
/// Called in a callback of the driver for `bs`, outside of coroutines.
unsafe fn write_back(bs: *mut sys::BlockDriverState, node: &Node) -> Result<()> {
    // SAFETY: promised by the caller.
    unsafe {
        let bitmaps = bitmaps::leave(bs, node);
        node.leave_bitmaps();
        let tables = coroutine::run(bs, || node.serve(Access::Write, Image::inactivate));
        tables.and(bitmaps)
    }
}

pub(super) unsafe extern "C" fn close(bs: *mut sys::BlockDriverState) {
    contain("close", (), || {
        // SAFETY: the close callback; the node is drained.
        unsafe {
            let Some(node) = Node::remove(bs) else {
                return;
            };
            let active = (*bs).open_flags as u32 & sys::BDRV_O_INACTIVE == 0;
            if active && node.is_sound() {
                // What could not be written was reported.
                let _ = write_back(bs, &node);
            }
        }
    });
}

pub(super) unsafe extern "C" fn inactivate(bs: *mut sys::BlockDriverState) -> c_int {
    contain("inactivate", -libc::EIO, || {
        // SAFETY: a callback of the driver for `bs`.
        unsafe { Node::of(bs).map_or(0, |node| code(write_back(bs, node))) }
    })
}

/// The node is used again after a migration: nothing that was read before is
/// true any more.
pub(super) unsafe extern "C" fn invalidate_cache(bs: *mut sys::BlockDriverState, errp: ErrorPtr) {
    // SAFETY: a callback of the driver for `bs`.
    let Some(node) = (unsafe { Node::of(bs) }) else {
        return;
    };
    // SAFETY: as above, in a coroutine.
    let reopened = catch(|| unsafe {
        let image = open_again(bs)?;
        // No request uses these fields while the node is activated.
        publish(bs, &image);
        bitmaps::load(bs, &image)?;
        Ok(image)
    });
    let error = match reopened {
        Ok(Ok(image)) => {
            node.replace_image(image);
            return;
        }
        Ok(Err(error)) => error,
        Err(_payload) => Error::errno(libc::EIO),
    };
    node.set_gone();
    // SAFETY: errp comes from QEMU and is not set.
    unsafe {
        error::set(errp, &error, COULD_NOT_OPEN);
        error::prepend(errp, c"Could not reopen qcow2 layer: ");
    }
}

/// Opens the image of a node once more, with the same options.
///
/// # Safety
/// Called in a coroutine, in a callback of the driver for `bs`.
unsafe fn open_again(bs: *mut sys::BlockDriverState) -> Result<Image<Qemu>> {
    // SAFETY: promised by the caller; the copy of the options is ours.
    unsafe {
        let options = sys::qdict_clone_shallow((*bs).options);
        let requested = Requested::take(options);
        sys::rq_qdict_unref(options);
        let mut flags = open_flags((*bs).open_flags);
        flags.inactive = false;
        let node = Node::of(bs).ok_or(Error::errno(libc::ENOMEDIUM))?;
        let host = node.image().host().again();
        Image::open(host, flags, &requested?.options)
    }
}

pub(super) unsafe extern "C" fn attach_aio_context(
    bs: *mut sys::BlockDriverState,
    context: *mut sys::AioContext,
) {
    contain("attach_aio_context", (), || {
        // SAFETY: a callback of the driver for `bs`.
        unsafe {
            if let Some(node) = Node::of(bs) {
                node.start_timer(context);
            }
        }
    });
}

pub(super) unsafe extern "C" fn detach_aio_context(bs: *mut sys::BlockDriverState) {
    contain("detach_aio_context", (), || {
        // SAFETY: a callback of the driver for `bs`; the node is drained.
        unsafe {
            if let Some(node) = Node::of(bs) {
                node.stop_timer();
            }
        }
    });
}
