//! Requests of the guest. They come in coroutines, in any thread, several at
//! a time, with the graph locked for reading.

use std::ffi::c_int;
use std::ptr;

use rust_qcow2::host::ZeroFlags;
use rust_qcow2::image::{Image, StatusKind};
use rust_qcow2::units::GuestOffset;
use rust_qcow2::{Error, Result};

use super::is_ours;
use crate::error::check;
use crate::host::Qemu;
use crate::node::{Access, Node, request};
use crate::qiov::Qiov;
use crate::sys;
use crate::transfer::Transfer;

/// Offsets and lengths in requests are not negative: QEMU has checked them.
#[inline]
fn range(offset: i64, bytes: i64) -> Result<(GuestOffset, u64)> {
    match (u64::try_from(offset), u64::try_from(bytes)) {
        (Ok(offset), Ok(bytes)) => Ok((GuestOffset(offset), bytes)),
        _ => Err(Error::errno(libc::EINVAL)),
    }
}

/// Serves a request that changes the disk.
///
/// # Safety
/// As for [`request`].
#[inline]
unsafe fn change(
    bs: *mut sys::BlockDriverState,
    f: impl FnOnce(&Image<Qemu>) -> Result<()>,
) -> c_int {
    // SAFETY: promised by the caller.
    unsafe {
        match Node::of(bs).map(Node::take_back_bitmaps) {
            Some(Err(error)) => -error.code(),
            _ => request(bs, Access::Write, f),
        }
    }
}

pub(super) unsafe extern "C" fn preadv_part(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut sys::QEMUIOVector,
    qiov_offset: usize,
    _flags: sys::BdrvRequestFlags,
) -> c_int {
    // SAFETY: a callback of the driver for `bs`; QEMU keeps the vector as it
    // is until the request has ended.
    unsafe {
        request(bs, Access::Read, |image| {
            let (offset, len) = range(offset, bytes)?;
            image.read(offset, len, Qiov::new(qiov), qiov_offset)
        })
    }
}

pub(super) unsafe extern "C" fn pwritev_part(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut sys::QEMUIOVector,
    qiov_offset: usize,
    flags: sys::BdrvRequestFlags,
) -> c_int {
    // SAFETY: as for `preadv_part`.
    unsafe {
        change(bs, |image| {
            let (offset, len) = range(offset, bytes)?;
            let qiov = Qiov::new(qiov);
            if flags & sys::BDRV_REQ_WRITE_UNCHANGED != 0 {
                return image.write_unchanged(offset, len, qiov, qiov_offset);
            }
            image.write(offset, len, qiov, qiov_offset)
        })
    }
}

pub(super) unsafe extern "C" fn pwritev_compressed_part(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
    qiov: *mut sys::QEMUIOVector,
    qiov_offset: usize,
) -> c_int {
    // SAFETY: as for `preadv_part`.
    unsafe {
        change(bs, |image| {
            let (offset, len) = range(offset, bytes)?;
            image.write_compressed(offset, len, Qiov::new(qiov), qiov_offset)
        })
    }
}

pub(super) unsafe extern "C" fn pwrite_zeroes(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
    flags: sys::BdrvRequestFlags,
) -> c_int {
    let flags = ZeroFlags {
        may_unmap: flags & sys::BDRV_REQ_MAY_UNMAP != 0,
        no_fallback: flags & sys::BDRV_REQ_NO_FALLBACK != 0,
    };
    // SAFETY: a callback of the driver for `bs`.
    unsafe {
        change(bs, |image| {
            let (offset, len) = range(offset, bytes)?;
            image.write_zeroes(offset, len, flags)
        })
    }
}

pub(super) unsafe extern "C" fn pdiscard(
    bs: *mut sys::BlockDriverState,
    offset: i64,
    bytes: i64,
) -> c_int {
    // SAFETY: a callback of the driver for `bs`.
    unsafe {
        let ret = change(bs, |image| {
            let (offset, len) = range(offset, bytes)?;
            image.discard(offset, len)
        });
        // As the block layer says of a node that was lost in the middle.
        match Node::of(bs) {
            Some(node) if ret < 0 && !node.is_present() => -libc::ENOMEDIUM,
            _ => ret,
        }
    }
}

/// Copies to `dst` what this node reads as.
pub(super) unsafe extern "C" fn copy_range_from(
    bs: *mut sys::BlockDriverState,
    _src: *mut sys::BdrvChild,
    src_offset: i64,
    dst: *mut sys::BdrvChild,
    dst_offset: i64,
    bytes: i64,
    read_flags: sys::BdrvRequestFlags,
    write_flags: sys::BdrvRequestFlags,
) -> c_int {
    // SAFETY: a callback of the driver for `bs`, in a coroutine under the graph
    // lock, of which `dst` is a link.
    unsafe {
        let transfer = Transfer::new(dst, dst_offset, read_flags, write_flags);
        request(bs, Access::Read, |image| {
            let (offset, len) = range(src_offset, bytes)?;
            image.read(offset, len, Qiov::of_transfer(&transfer), 0)?;
            transfer.finish()
        })
    }
}

/// Copies from `src` what this node has to contain.
pub(super) unsafe extern "C" fn copy_range_to(
    bs: *mut sys::BlockDriverState,
    src: *mut sys::BdrvChild,
    src_offset: i64,
    _dst: *mut sys::BdrvChild,
    dst_offset: i64,
    bytes: i64,
    read_flags: sys::BdrvRequestFlags,
    write_flags: sys::BdrvRequestFlags,
) -> c_int {
    // SAFETY: as for `copy_range_from`, with `src`.
    unsafe {
        let transfer = Transfer::new(src, src_offset, read_flags, write_flags);
        change(bs, |image| {
            if image.encryption().is_some() {
                return Err(Error::errno(libc::ENOTSUP));
            }
            let (offset, len) = range(dst_offset, bytes)?;
            image.write(offset, len, Qiov::of_transfer(&transfer), 0)
        })
    }
}

pub(super) unsafe extern "C" fn flush_to_os(bs: *mut sys::BlockDriverState) -> c_int {
    // SAFETY: a callback of the driver for `bs`.
    unsafe { request(bs, Access::Write, |image| image.flush()) }
}

pub(super) unsafe extern "C" fn block_status(
    bs: *mut sys::BlockDriverState,
    _want_zero: bool,
    offset: i64,
    bytes: i64,
    pnum: *mut i64,
    map: *mut i64,
    file: *mut *mut sys::BlockDriverState,
) -> c_int {
    // SAFETY: a callback of the driver for `bs`.
    let Some(node) = (unsafe { Node::of(bs) }) else {
        return -libc::ENOMEDIUM;
    };
    let answer = node.serve(Access::Read, |image| {
        let (offset, len) = range(offset, bytes)?;
        image.block_status(offset, len)
    });
    let status = match answer {
        Ok(status) => status,
        Err(error) => return -error.code(),
    };
    // Who reads the file at that place does not see the data.
    let clear = node.image().encryption().is_none();
    let data_node = node.image().host().data_node();
    let (flags, host) = match status.kind {
        StatusKind::Unallocated { host } => (0, host),
        StatusKind::Zero { host } => (sys::BDRV_BLOCK_ZERO, host),
        StatusKind::Data(host) => (sys::BDRV_BLOCK_DATA, Some(host)),
        StatusKind::Compressed => (sys::BDRV_BLOCK_DATA | sys::BDRV_BLOCK_COMPRESSED, None),
    };
    let host = host.filter(|_| clear);
    // SAFETY: QEMU passes places for the answer, and the node has a file.
    unsafe {
        *pnum = i64::try_from(status.len).unwrap_or(bytes);
        if let Some(host) = host {
            *map = host.bytes() as i64;
            *file = data_node.unwrap_or((*(*bs).file).bs);
        }
    }
    let valid = if host.is_some() {
        sys::BDRV_BLOCK_OFFSET_VALID
    } else {
        0
    };
    // What was preallocated and never written is known to the file only.
    let recurse = if status.sparse && clear {
        sys::BDRV_BLOCK_RECURSE
    } else {
        0
    };
    (flags | valid | recurse) as c_int
}

/// Which node has to be asked for the block status of what this one does not
/// have.
pub(super) unsafe extern "C" fn skip_layers(
    bs: *mut sys::BlockDriverState,
    base: *mut sys::BlockDriverState,
    offset: i64,
    bytes: *mut i64,
    skipped: *mut c_int,
) -> *mut sys::BlockDriverState {
    // SAFETY: a callback of the driver for `bs`, under the graph lock; `base`
    // is null or an open node, and QEMU passes places for the answer.
    unsafe {
        let Some(node) = Node::of(bs) else {
            return ptr::null_mut();
        };
        let base = if base.is_null() || !is_ours((*base).drv) {
            None
        } else {
            Node::of(base)
        };
        let answer = node.serve(Access::Read, |image| {
            let (offset, len) = range(offset, *bytes)?;
            image.next_layer(offset, len, base.map(Node::image))
        });
        // Where something fails the nodes are asked one by one, and the one
        // that cannot tell says so itself.
        let Ok(Some(next)) = answer else {
            return ptr::null_mut();
        };
        *bytes = i64::try_from(next.len).unwrap_or(*bytes);
        *skipped = c_int::try_from(next.skipped).unwrap_or(c_int::MAX);
        next.layer.host().node()
    }
}

/// Without this callback the block layer would ask all nodes below, for each
/// request; the backing file is asked when it is read.
pub(super) unsafe extern "C" fn is_inserted(bs: *mut sys::BlockDriverState) -> bool {
    // SAFETY: a callback of the driver for `bs`, in a coroutine under the graph
    // lock; an open node has a file.
    unsafe {
        Node::of(bs).is_some_and(Node::is_present) && sys::bdrv_co_is_inserted((*(*bs).file).bs)
    }
}

/// Whether the file below a node that holds guest data begins as zeroes.
///
/// # Safety
/// `bs` is an open node; the graph is locked for reading.
pub(super) unsafe fn file_has_zero_init(bs: *mut sys::BlockDriverState) -> c_int {
    // SAFETY: promised by the caller.
    unsafe {
        let data = Node::of(bs).and_then(|node| node.image().host().data_node());
        check(sys::bdrv_has_zero_init(data.unwrap_or((*(*bs).file).bs))).unwrap_or(0)
    }
}
