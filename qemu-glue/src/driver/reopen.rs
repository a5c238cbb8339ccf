//! Other options and flags for an open node.

use std::ffi::{CStr, c_int};
use std::ptr;

use rust_qcow2::Result;
use rust_qcow2::image::{Image, OpenFlags, OptionRequest, Options};

use super::bitmaps;
use super::open::publish;
use crate::coroutine;
use crate::crypto::check_format;
use crate::error::{self, ErrorPtr};
use crate::node::{Access, Node, open_flags};
use crate::options::{Requested, SubDict};
use crate::panic::contain;
use crate::sys;

/// What [`prepare`] leaves for [`commit`], in a box.
struct Staged {
    flags: OpenFlags,
    request: OptionRequest,
    options: Options,
    /// The node of the file that the image was opened in, only for comparison;
    /// null where it is to be opened anew in any case.
    file: *const sys::BlockDriverState,
}

pub(super) unsafe extern "C" fn prepare(
    state: *mut sys::BDRVReopenState,
    _queue: *mut sys::BlockReopenQueue,
    errp: ErrorPtr,
) -> c_int {
    contain("reopen", -libc::EIO, || {
        // SAFETY: QEMU passes the state of a node of this driver.
        unsafe {
            match stage(state) {
                Ok(staged) => {
                    (*state).opaque = Box::into_raw(Box::new(staged)).cast();
                    0
                }
                Err(error) => {
                    error::set(errp, &error, "Could not reopen image");
                    -error.code()
                }
            }
        }
    })
}

/// Checks the new options, and writes what they may make unwritable.
///
/// # Safety
/// Called in the callback for `state`, outside of coroutines.
unsafe fn stage(state: *mut sys::BDRVReopenState) -> Result<Staged> {
    // SAFETY: promised by the caller.
    unsafe {
        let bs = (*state).bs;
        let flags = open_flags((*state).flags);
        let requested = Requested::take((*state).options)?;
        let node = Node::of(bs).ok_or(rust_qcow2::Error::errno(libc::ENOMEDIUM))?;
        let image = node.image();
        let options = image.resolve_options(flags, &requested.options)?;
        let encrypt = SubDict::take((*state).options, c"encrypt.");
        check_format(encrypt.get(c"format").as_deref(), image.encryption())?;
        let mut staged = Staged {
            flags,
            request: requested.options,
            options,
            file: (*(*bs).file).bs,
        };
        if node.is_gone() {
            // Nothing in memory counts any more. What kept the image from being
            // opened may be over.
            staged.file = ptr::null();
            return Ok(staged);
        }
        let lazy_ends = image.options().lazy_refcounts && !options.lazy_refcounts;
        if !flags.writable {
            bitmaps::reopen_ro(bs, node)?;
        }
        let written = coroutine::run(bs, || {
            node.serve(Access::Write, |image| {
                if flags.writable {
                    image.prepare_writing()?;
                }
                if !flags.writable || lazy_ends {
                    image.inactivate()
                } else {
                    image.flush()
                }
            })
        })
        .map_err(|error| {
            error.context(if lazy_ends && flags.writable {
                "Failed to disable lazy refcounts"
            } else {
                "Failed to flush the metadata caches"
            })
        });
        if let Err(error) = written {
            stay_writable(bs);
            return Err(error);
        }
        Ok(staged)
    }
}

/// Takes what [`prepare`] has left.
///
/// # Safety
/// Called in the callback for `state` after [`prepare`] succeeded.
unsafe fn take_staged(state: *mut sys::BDRVReopenState) -> Option<Box<Staged>> {
    // SAFETY: promised by the caller.
    unsafe {
        let staged = (*state).opaque.cast::<Staged>();
        (*state).opaque = ptr::null_mut();
        (!staged.is_null()).then(|| Box::from_raw(staged))
    }
}

pub(super) unsafe extern "C" fn commit(state: *mut sys::BDRVReopenState) {
    contain("reopen", (), || {
        // SAFETY: a callback of the driver; a node that is reopened is drained.
        unsafe {
            let bs = (*state).bs;
            let (Some(node), Some(staged)) = (Node::of(bs), take_staged(state)) else {
                return;
            };
            node.free_retired();
            if !ptr::eq((*(*bs).file).bs, staged.file) {
                open_other_file(bs, node, &staged);
                return;
            }
            let interval = node.image().options().clean_interval;
            let applied = coroutine::run(bs, || {
                node.serve(Access::Read, |image| {
                    image.apply_options(staged.flags, &staged.request, staged.options);
                    image.end_writing();
                    Ok(())
                })
            });
            if applied.is_ok() && interval != staged.options.clean_interval {
                node.stop_timer();
                node.start_timer(sys::bdrv_get_aio_context(bs));
            }
        }
    });
}

/// Opens the image in the file that a node got in place of the old one, or
/// could not be opened in before. What the old one held was written by
/// [`prepare`].
///
/// # Safety
/// Called in the commit callback of the node; it is drained.
unsafe fn open_other_file(bs: *mut sys::BlockDriverState, node: &Node, staged: &Staged) {
    // SAFETY: promised by the caller; `Qemu` is only used in coroutines.
    unsafe {
        let opened = coroutine::run(bs, || {
            let host = node.image().host().again();
            Image::open(host, staged.flags, &staged.request)
        });
        match opened {
            Ok(image) => {
                publish(bs, &image);
                node.replace_image(image);
                node.set_back();
                node.free_retired();
                node.stop_timer();
                node.start_timer(sys::bdrv_get_aio_context(bs));
            }
            Err(error) => {
                error::report(&error, "Could not reopen image");
                node.set_gone();
            }
        }
    }
}

pub(super) unsafe extern "C" fn abort(state: *mut sys::BDRVReopenState) {
    contain("reopen", (), || {
        // SAFETY: a callback of the driver; the node is drained.
        unsafe {
            drop(take_staged(state));
            stay_writable((*state).bs);
        }
    });
}

/// Takes back that the bitmaps have become read-only, where the node has not.
///
/// # Safety
/// Called in a callback of the driver for `bs`, outside of coroutines; the
/// node is drained.
unsafe fn stay_writable(bs: *mut sys::BlockDriverState) {
    // SAFETY: promised by the caller.
    unsafe {
        if Node::of(bs).is_some_and(|node| node.image().is_writable()) {
            make_bitmaps_writable(bs);
        }
    }
}

/// # Safety
/// As for [`stay_writable`].
unsafe fn make_bitmaps_writable(bs: *mut sys::BlockDriverState) {
    // SAFETY: promised by the caller; the name of a node is a C string.
    unsafe {
        let Some(node) = Node::of(bs).filter(|node| node.is_present()) else {
            return;
        };
        // They stay read-only, and the node takes no writes, until they are
        // removed or it is reopened once more.
        if let Err(error) = bitmaps::reopen_rw(bs, node) {
            let name = CStr::from_ptr(sys::bdrv_get_node_name(bs)).to_string_lossy();
            error::report_text(&format!(
                "{name}: Failed to make dirty bitmaps writable: {error}"
            ));
        }
    }
}

pub(super) unsafe extern "C" fn commit_post(state: *mut sys::BDRVReopenState) {
    contain("reopen", (), || {
        // SAFETY: a callback of the driver; the node is drained.
        unsafe {
            if open_flags((*state).flags).writable {
                make_bitmaps_writable((*state).bs);
            }
        }
    });
}

/// Options of the old set that a new `overlap-check` makes void.
const OVERLAP: [&CStr; 11] = [
    c"overlap-check",
    c"overlap-check.template",
    c"overlap-check.main-header",
    c"overlap-check.active-l1",
    c"overlap-check.active-l2",
    c"overlap-check.refcount-table",
    c"overlap-check.refcount-block",
    c"overlap-check.snapshot-table",
    c"overlap-check.inactive-l1",
    c"overlap-check.inactive-l2",
    c"overlap-check.bitmap-directory",
];

/// Merges old options into new ones. A new template takes the place of all old
/// overlap options, a new total of all old cache sizes; an old total goes when
/// single sizes are new.
pub(super) unsafe extern "C" fn join_options(options: *mut sys::QDict, old: *mut sys::QDict) {
    // SAFETY: QEMU passes two dictionaries of flat options.
    let has = |key: &CStr| unsafe { sys::qdict_haskey(options, key.as_ptr()) } != 0;
    // SAFETY: as above.
    let remove = |dict, key: &CStr| unsafe { sys::qdict_del(dict, key.as_ptr()) };

    if has(c"overlap-check") || has(c"overlap-check.template") {
        for key in OVERLAP {
            remove(old, key);
        }
    }
    let new_total = has(c"cache-size");
    if new_total {
        remove(old, c"l2-cache-size");
        remove(old, c"refcount-cache-size");
    }
    // SAFETY: as above.
    unsafe { sys::qdict_join(options, old, false) };

    // If all three were new, opening fails with the error that explains it.
    let any_size = has(c"cache-size") || has(c"l2-cache-size") || has(c"refcount-cache-size");
    if any_size && !new_total {
        remove(options, c"cache-size");
    }
}
