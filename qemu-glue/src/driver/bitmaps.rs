//! Persistent dirty bitmaps: between the image and QEMU's bitmaps in memory.
//!
//! QEMU's bitmaps belong to the node. A thread that changes the list of them
//! holds the big lock, as all callbacks here do that make or release one.

mod memory;

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;

use rust_qcow2::format::bitmaps::{Bitmap, BitmapFlags, MAX_NAME, bytes_needed};
use rust_qcow2::image::Image;
use rust_qcow2::image::bitmaps::DirtyBits;
use rust_qcow2::{Error, Result};

use memory::{Made, Memory};

use crate::coroutine;
use crate::error::{self, ErrorPtr, caught};
use crate::host::Qemu;
use crate::node::{Access, Node};
use crate::panic::contain;
use crate::sys;

/// How much memory the bitmaps of one image may take: the file says it, and
/// needs few bytes to do so.
const MAX_MEMORY: u64 = 8 << 30;

/// Brings the bitmaps of an image into memory. From then on the file says that
/// they are in use, where it can be written; where not they are read-only.
///
/// # Safety
/// Called in the driver's callback that opens or activates `bs`, whose size
/// is known. `image` is in that node.
pub(super) unsafe fn load(bs: *mut sys::BlockDriverState, image: &Image<Qemu>) -> Result<()> {
    if !image.has_bitmaps() {
        return Ok(());
    }
    // SAFETY: promised by the caller.
    unsafe { coroutine::run(bs, || load_all(bs, image)) }
}

/// # Safety
/// As for [`load`], in a coroutine.
unsafe fn load_all(bs: *mut sys::BlockDriverState, image: &Image<Qemu>) -> Result<()> {
    let mut made = Made(Vec::new());
    let list = image.bitmaps()?;
    let memory =
        |entry: &Bitmap| bytes_needed(image.size(), entry.granularity_in_memory(image.size()));
    if list.iter().map(memory).sum::<u64>() > MAX_MEMORY {
        return Err(Error::new(
            libc::ENOMEM,
            "The persistent bitmaps take more than 8 GiB of memory",
        ));
    }
    for entry in list {
        let name = CString::new(entry.name.as_slice()).unwrap_or_default();
        // Of a bitmap that came by migration the image has an old state.
        // SAFETY: promised by the caller.
        if entry.in_use() && unsafe { Memory::find(bs, &name) }.is_some() {
            continue;
        }
        let granularity_bits = entry.granularity_in_memory(image.size());
        // SAFETY: promised by the caller.
        let bitmap = unsafe { make(bs, &name, granularity_bits)? };
        made.0.push(bitmap);
        if let Some(bitmap) = made.0.last() {
            fill(image, &entry, bitmap)?;
        }
    }
    if image.is_writable() {
        image
            .mark_bitmaps_in_use()
            .map_err(|error| error.context("Can't update bitmap directory"))?;
    } else {
        for bitmap in &made.0 {
            bitmap.set_readonly(true);
        }
    }
    made.0.clear();
    Ok(())
}

/// Makes an empty bitmap in memory.
///
/// # Safety
/// As for [`load`].
unsafe fn make(
    bs: *mut sys::BlockDriverState,
    name: &CStr,
    granularity_bits: u32,
) -> Result<Memory> {
    let mut bitmap = ptr::null_mut();
    caught(|errp| {
        // SAFETY: promised by the caller; the name is copied.
        bitmap = unsafe {
            sys::bdrv_create_dirty_bitmap(bs, 1 << granularity_bits, name.as_ptr(), errp)
        };
        if bitmap.is_null() { -libc::EINVAL } else { 0 }
    })?;
    Ok(Memory { bitmap })
}

/// Makes a new bitmap in memory what the one in the file is.
fn fill(image: &Image<Qemu>, entry: &Bitmap, bitmap: &Memory) -> Result<()> {
    if !entry.in_use() {
        if bitmap.disk_size() != image.size() & !511 {
            return Err(Error::invalid("The size of the image changes"));
        }
        image.read_bitmap(entry, &mut |from, len, bits| bitmap.put(from, len, bits))?;
    }
    // SAFETY: the bitmap is alive.
    unsafe {
        if entry.in_use() {
            sys::bdrv_dirty_bitmap_set_persistence(bitmap.bitmap, true);
            sys::bdrv_dirty_bitmap_set_inconsistent(bitmap.bitmap);
        } else {
            sys::bdrv_dirty_bitmap_deserialize_finish(bitmap.bitmap);
            sys::bdrv_dirty_bitmap_set_persistence(bitmap.bitmap, true);
        }
        if !entry.flags.contains(BitmapFlags::AUTO) {
            sys::bdrv_disable_dirty_bitmap(bitmap.bitmap);
        }
    }
    Ok(())
}

/// Stores the persistent bitmaps of a node. With `release` those that are in
/// the image then are released: it is given up to somebody else.
///
/// # Safety
/// Called in a callback of the driver for `bs`, outside of coroutines; the
/// node is drained.
unsafe fn store(bs: *mut sys::BlockDriverState, node: &Node, release: bool) -> Result<()> {
    // SAFETY: promised by the caller; no bitmap goes before `release` below.
    let bitmaps = unsafe { Memory::all(bs) };
    let (mut known, mut stored) = (Vec::new(), Vec::new());
    for bitmap in bitmaps {
        if !bitmap.is_persistent() || bitmap.is_inconsistent() {
            continue;
        }
        if bitmap.is_readonly() {
            known.push(bitmap);
        } else {
            stored.push(bitmap);
        }
    }
    if known.is_empty() && stored.is_empty() {
        return Ok(());
    }
    let write: Vec<&dyn DirtyBits> = stored.iter().map(|bitmap| bitmap as _).collect();
    // SAFETY: promised by the caller.
    let list = unsafe {
        coroutine::run(bs, || {
            node.serve(Access::Write, |image| {
                let list = image.bitmaps()?;
                image.store_bitmaps(&write)?;
                Ok(list)
            })
        })?
    };
    if release {
        // A read-only bitmap is in the image as it is in memory.
        known.retain(|bitmap| list.iter().any(|entry| entry.name == bitmap.name()));
        for bitmap in known.into_iter().chain(stored) {
            bitmap.release();
        }
    }
    Ok(())
}

/// Stores the bitmaps of a node that is given up, and releases them. A failure
/// is reported.
///
/// # Safety
/// As for [`store`].
pub(super) unsafe fn leave(bs: *mut sys::BlockDriverState, node: &Node) -> Result<()> {
    // SAFETY: promised by the caller; the name of a node is a C string.
    unsafe {
        store(bs, node, true).map_err(|error| {
            let name = CStr::from_ptr(sys::bdrv_get_device_or_node_name(bs)).to_string_lossy();
            error::report_text(&format!(
                "Lost persistent bitmaps during inactivation of node '{name}': {error}"
            ));
            Error::errno(libc::EINVAL)
        })
    }
}

/// Stores the bitmaps of a node that becomes read-only, and makes them
/// read-only, too.
///
/// # Safety
/// As for [`store`].
pub(super) unsafe fn reopen_ro(bs: *mut sys::BlockDriverState, node: &Node) -> Result<()> {
    // SAFETY: promised by the caller.
    unsafe {
        store(bs, node, false)?;
        for bitmap in Memory::all(bs) {
            if bitmap.is_persistent() {
                bitmap.set_readonly(true);
            }
        }
    }
    Ok(())
}

/// Makes the bitmaps of a node writable that can be written from now on.
///
/// # Safety
/// As for [`store`].
pub(super) unsafe fn reopen_rw(bs: *mut sys::BlockDriverState, node: &Node) -> Result<()> {
    let image = node.image();
    if !image.has_bitmaps() {
        return Ok(());
    }
    // SAFETY: promised by the caller.
    let list = unsafe { coroutine::run(bs, || node.serve(Access::Read, Image::bitmaps))? };
    let mut readonly = Vec::new();
    for entry in &list {
        // SAFETY: promised by the caller.
        readonly.extend(unsafe { readonly_bitmap(bs, entry)? });
    }
    if !list.iter().all(Bitmap::in_use) {
        // SAFETY: the node has a file.
        let may_write = unsafe {
            let file = &*(*bs).file;
            !sys::bdrv_is_read_only(file.bs)
                && (*file.bs).open_flags as u32 & sys::BDRV_O_INACTIVE == 0
                && file.perm & u64::from(sys::BLK_PERM_WRITE) != 0
        };
        if !may_write {
            return Err(Error::invalid(
                "Failed to reopen bitmaps rw: no write access the protocol file",
            ));
        }
        // SAFETY: promised by the caller.
        unsafe {
            coroutine::run(bs, || node.serve(Access::Write, Image::mark_bitmaps_in_use))
                .map_err(|error| error.context("Cannot update bitmap directory"))?;
        }
    }
    for bitmap in readonly {
        bitmap.set_readonly(false);
    }
    Ok(())
}

/// The bitmap in memory for one in the image, if it is read-only.
///
/// # Errors
/// The sentences that users of QEMU know, where the two contradict each other.
///
/// # Safety
/// As for [`store`].
unsafe fn readonly_bitmap(
    bs: *mut sys::BlockDriverState,
    entry: &Bitmap,
) -> Result<Option<Memory>> {
    let name = CString::new(entry.name.as_slice()).unwrap_or_default();
    let shown = entry.display_name();
    // SAFETY: promised by the caller; the file name of a node is a C string.
    let (bitmap, path) = unsafe {
        (
            Memory::find(bs, &name),
            CStr::from_ptr((*bs).filename.as_ptr()).to_string_lossy(),
        )
    };
    let refuse = |text: String| Err(Error::invalid(text));
    let Some(bitmap) = bitmap else {
        return refuse(format!("Unexpected bitmap '{shown}' in image '{path}'"));
    };
    let (readonly, inconsistent) = (bitmap.is_readonly(), bitmap.is_inconsistent());
    match (entry.in_use(), readonly, inconsistent) {
        (false, false, _) => refuse(format!(
            "Corruption: bitmap '{shown}' is not marked IN_USE in the image '{path}' and not \
             marked readonly in RAM"
        )),
        (false, true, true) => refuse(format!(
            "Corruption: bitmap '{shown}' is inconsistent but is not marked IN_USE in the image \
             '{path}'"
        )),
        (true, true, false) => refuse(format!(
            "Corruption: bitmap '{shown}' is marked IN_USE in the image '{path}' but it is \
             readonly and consistent in RAM"
        )),
        _ => Ok(readonly.then_some(bitmap)),
    }
}

/// Checks that the bitmaps do not stand against a resize: all of them have to
/// be in memory, where QEMU resizes them. Returns zero, or a negative error
/// number with `errp` set.
///
/// # Safety
/// Called in a callback of the driver for `bs`, in a coroutine; `errp` is null
/// or not set.
pub(super) unsafe fn check_resize(
    bs: *mut sys::BlockDriverState,
    node: &Node,
    errp: ErrorPtr,
) -> c_int {
    // SAFETY: promised by the caller.
    let refuse = |error: &Error| unsafe {
        error::set(errp, error, "Cannot resize the bitmaps");
        -libc::ENOTSUP
    };
    let list = match node.serve(Access::Read, Image::bitmaps) {
        Ok(list) => list,
        Err(error) => return refuse(&error),
    };
    for entry in list {
        let name = CString::new(entry.name).unwrap_or_default();
        // SAFETY: promised by the caller.
        let Some(bitmap) = (unsafe { Memory::find(bs, &name) }) else {
            return refuse(&Error::unsupported(
                "Cannot resize qcow2 with persistent bitmaps that were not loaded into memory",
            ));
        };
        let flags = sys::BDRV_BITMAP_BUSY | sys::BDRV_BITMAP_RO | sys::BDRV_BITMAP_INCONSISTENT;
        // SAFETY: the bitmap is alive. What is said comes with advice, so that
        // it goes to the caller as it is.
        if unsafe { sys::bdrv_dirty_bitmap_check(bitmap.bitmap, flags, errp) } != 0 {
            return -libc::ENOTSUP;
        }
    }
    0
}

/// Bytes that the persistent bitmaps of a node take in an image.
///
/// # Safety
/// `bs` is a node, and the caller in the main loop.
pub(super) unsafe fn size_in_image(bs: *mut sys::BlockDriverState, cluster_bits: u32) -> u64 {
    // SAFETY: promised by the caller.
    let bitmaps = unsafe { Memory::all(bs) };
    rust_qcow2::image::measure::bitmaps_size(
        cluster_bits,
        bitmaps
            .iter()
            .filter(|bitmap| bitmap.is_persistent())
            .map(|bitmap| {
                (
                    bitmap.name().len(),
                    bytes_needed(bitmap.disk_size(), bitmap.granularity_bits()),
                )
            }),
    )
}

pub(super) unsafe extern "C" fn supports(bs: *mut sys::BlockDriverState) -> bool {
    contain("supports_persistent_dirty_bitmap", false, || {
        // SAFETY: a callback of the driver for `bs`.
        unsafe { Node::of(bs) }.is_some_and(|node| node.image().supports_bitmaps())
    })
}

pub(super) unsafe extern "C" fn can_store_new(
    bs: *mut sys::BlockDriverState,
    name: *const c_char,
    granularity: u32,
    errp: ErrorPtr,
) -> bool {
    contain("can_store_new_dirty_bitmap", false, || {
        // SAFETY: a callback of the driver for `bs`; the name is a C string,
        // and errp is not set.
        unsafe {
            let Some(node) = Node::of(bs) else {
                return false;
            };
            let name = CStr::from_ptr(name);
            match check_new(bs, node.image(), name, granularity) {
                Ok(()) => true,
                Err(error) => {
                    error::set(errp, &error, "Cannot store the bitmap");
                    false
                }
            }
        }
    })
}

/// # Safety
/// As for [`can_store_new`].
unsafe fn check_new(
    bs: *mut sys::BlockDriverState,
    image: &Image<Qemu>,
    name: &CStr,
    granularity: u32,
) -> Result<()> {
    let shown = name.to_string_lossy();
    // SAFETY: promised by the caller; the name of a node is a C string.
    let (known, bitmaps, node) = unsafe {
        (
            Memory::find(bs, name).is_some(),
            Memory::all(bs),
            CStr::from_ptr(sys::bdrv_get_device_or_node_name(bs)).to_string_lossy(),
        )
    };
    if known {
        return Err(Error::invalid(format!("Bitmap already exists: {shown}")));
    }
    let others = bitmaps
        .iter()
        .filter(|bitmap| bitmap.is_persistent())
        .map(|bitmap| bitmap.name().len().min(MAX_NAME));
    image
        .check_new_bitmap(name.to_bytes(), granularity.trailing_zeros(), others)
        .map_err(|error| {
            Error::invalid(format!(
                "Can't make bitmap '{shown}' persistent in '{node}': {error}"
            ))
        })
}

pub(super) unsafe extern "C" fn remove(
    bs: *mut sys::BlockDriverState,
    name: *const c_char,
    errp: ErrorPtr,
) -> c_int {
    // SAFETY: a callback of the driver for `bs`, in a coroutine; the name is a
    // C string, and errp is not set.
    unsafe {
        let Some(node) = Node::of(bs) else {
            return -libc::ENOMEDIUM;
        };
        let name = CStr::from_ptr(name).to_bytes();
        match node.serve(Access::Write, |image| image.remove_bitmap(name)) {
            Ok(()) => 0,
            Err(error) => {
                error::set(errp, &error, "Failed to remove the bitmap");
                -error.code()
            }
        }
    }
}
