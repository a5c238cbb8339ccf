//! Files below an image: QEMU's `BdrvChild`.

use std::ptr;

use libc::ENOTSUP;
use rust_qcow2::host::{Content, File, Part, Preallocation, ZeroFlags};
use rust_qcow2::{Error, Result};

use crate::error::{caught, check, check_len};
use crate::qiov::{Gathered, Qiov};
use crate::sys;

/// A child of a node for the time of one request.
///
/// All functions are called in a coroutine that holds the graph lock for
/// reading; that keeps the child and its node alive.
#[derive(Clone, Copy)]
pub(crate) struct Child {
    child: *mut sys::BdrvChild,
    /// The node that is told of what is done (the `blkdebug` driver).
    observer: *mut sys::BlockDriverState,
    events: Events,
}

/// What an observer is told when guest data is read and written.
#[derive(Clone, Copy)]
struct Events {
    read: sys::BlkdebugEvent,
    write: sys::BlkdebugEvent,
}

// SAFETY: QEMU's I/O functions are thread-safe ("IO_CODE"), and the pointers
// are used under the graph lock only (see `Child`).
unsafe impl Send for Child {}
// SAFETY: as above.
unsafe impl Sync for Child {}

impl Child {
    /// The image file of a node.
    ///
    /// # Safety
    /// `bs` is an open node with a file child; the graph is locked for reading
    /// as long as the handle is used.
    pub(crate) unsafe fn file(bs: *mut sys::BlockDriverState) -> Self {
        // SAFETY: promised by the caller.
        let (child, observer) = unsafe { ((*bs).file, (*(*bs).file).bs) };
        let events = Events {
            read: sys::BLKDBG_READ_AIO,
            write: sys::BLKDBG_WRITE_AIO,
        };
        Self {
            child,
            observer,
            events,
        }
    }

    /// The external data file of a node.
    ///
    /// # Safety
    /// As for [`Child::file`]; `child` is a child of `bs`.
    pub(crate) unsafe fn data(bs: *mut sys::BlockDriverState, child: *mut sys::BdrvChild) -> Self {
        // SAFETY: promised by the caller.
        let file = unsafe { Self::file(bs) };
        Self { child, ..file }
    }

    /// The backing file of a node, if it has one.
    ///
    /// # Safety
    /// As for [`Child::file`].
    pub(crate) unsafe fn backing(bs: *mut sys::BlockDriverState) -> Option<Self> {
        // SAFETY: promised by the caller.
        let (child, observer) = unsafe { ((*bs).backing, (*(*bs).file).bs) };
        let events = Events {
            read: sys::BLKDBG_READ_BACKING_AIO,
            write: sys::BLKDBG_WRITE_AIO,
        };
        (!child.is_null()).then_some(Self {
            child,
            observer,
            events,
        })
    }

    /// Writes parts one by one: a copy is no part of a request with others.
    fn write_apart(&self, mut offset: u64, parts: &[Part<'_, Qiov<'_>>]) -> Result<()> {
        for part in parts {
            offset += match *part {
                Part::Bytes(data) => {
                    self.write(offset, data)?;
                    data.len() as u64
                }
                Part::Guest { buf, at, len } => {
                    self.write_guest(offset, buf, at, len)?;
                    len as u64
                }
            };
        }
        Ok(())
    }

    /// The node of the file.
    pub(crate) fn node(&self) -> *mut sys::BlockDriverState {
        // SAFETY: the child is alive (see `Child`).
        unsafe { (*self.child).bs }
    }

    /// Tells the image file, which may be one that injects errors, of an event.
    #[inline]
    pub(crate) fn tell(&self, event: sys::BlkdebugEvent) {
        // SAFETY: the observer is alive as the child is.
        unsafe { sys::bdrv_co_debug_event(self.observer, event) };
    }
}

/// Offsets and lengths are signed in QEMU.
#[inline]
fn signed(number: u64) -> Result<i64> {
    i64::try_from(number).map_err(|_| Error::errno(libc::EIO))
}

/// Number of bytes in memory.
#[inline]
fn signed_len(number: usize) -> Result<i64> {
    i64::try_from(number).map_err(|_| Error::errno(libc::EINVAL))
}

/// QEMU's name of a preallocation mode.
pub(crate) fn prealloc_mode(preallocation: Preallocation) -> sys::PreallocMode {
    match preallocation {
        Preallocation::Off => sys::PREALLOC_MODE_OFF,
        Preallocation::Metadata => sys::PREALLOC_MODE_METADATA,
        Preallocation::Falloc => sys::PREALLOC_MODE_FALLOC,
        Preallocation::Full => sys::PREALLOC_MODE_FULL,
    }
}

impl File for Child {
    type Buf<'a> = Qiov<'a>;

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (offset, len) = (signed(offset)?, signed_len(buf.len())?);
        // SAFETY: the child is alive (see `Child`), the slice as long as said.
        check(unsafe { sys::rq_co_pread(self.child, offset, len, buf.as_mut_ptr().cast()) })?;
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let (offset, len) = (signed(offset)?, signed_len(buf.len())?);
        // SAFETY: as above.
        check(unsafe { sys::rq_co_pwrite(self.child, offset, len, buf.as_ptr().cast()) })?;
        Ok(())
    }

    fn read_guest(&self, offset: u64, buf: Qiov<'_>, at: usize, len: usize) -> Result<()> {
        self.tell(self.events.read);
        if let Some(transfer) = buf.transfer() {
            // SAFETY: the child is alive (see `Child`).
            return unsafe { transfer.fetch(self.child, signed(offset)?, at, len) };
        }
        let (offset, len) = (signed(offset)?, signed_len(len)?);
        // SAFETY: the child is alive, and so is the vector (see `Qiov`); QEMU
        // checks that the range is inside.
        let ret = unsafe { sys::bdrv_co_preadv_part(self.child, offset, len, buf.as_ptr(), at, 0) };
        check(ret)?;
        Ok(())
    }

    fn write_guest(&self, offset: u64, buf: Qiov<'_>, at: usize, len: usize) -> Result<()> {
        self.tell(self.events.write);
        if let Some(transfer) = buf.transfer() {
            // SAFETY: the child is alive (see `Child`).
            return unsafe { transfer.store(self.child, signed(offset)?, at, len) };
        }
        let (offset, len) = (signed(offset)?, signed_len(len)?);
        // SAFETY: as above.
        let ret =
            unsafe { sys::bdrv_co_pwritev_part(self.child, offset, len, buf.as_ptr(), at, 0) };
        check(ret)?;
        Ok(())
    }

    fn write_parts(&self, offset: u64, parts: &[Part<'_, Qiov<'_>>]) -> Result<()> {
        let copied = |part: &Part<'_, Qiov<'_>>| match part {
            Part::Guest { buf, .. } => buf.transfer().is_some(),
            Part::Bytes(_) => false,
        };
        if parts.iter().any(copied) {
            return self.write_apart(offset, parts);
        }
        let mut gathered = Gathered::with_capacity(parts.len());
        for part in parts {
            match *part {
                Part::Bytes(data) => gathered.bytes(data),
                Part::Guest { buf, at, len } => gathered.guest(buf, at, len),
            }
        }
        self.tell(self.events.write);
        let (vector, len) = gathered.finish();
        let (offset, len) = (signed(offset)?, signed_len(len)?);
        // SAFETY: the child is alive; the vector and all that it points to
        // live until the call returns.
        check(unsafe { sys::bdrv_co_pwritev_part(self.child, offset, len, vector, 0, 0) })?;
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let mut request = 0;
        if flags.may_unmap {
            request |= sys::BDRV_REQ_MAY_UNMAP;
        }
        if flags.no_fallback {
            request |= sys::BDRV_REQ_NO_FALLBACK;
        }
        let (offset, len) = (signed(offset)?, signed(len)?);
        // SAFETY: the child is alive.
        check(unsafe { sys::bdrv_co_pwrite_zeroes(self.child, offset, len, request) })?;
        Ok(())
    }

    fn zeroes_fast(&self) -> bool {
        // SAFETY: the node is alive; the field only changes when it is opened.
        let supported = unsafe { (*self.node()).supported_zero_flags };
        supported & sys::BDRV_REQ_NO_FALLBACK != 0
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let (offset, len) = (signed(offset)?, signed(len)?);
        // SAFETY: the child is alive.
        check(unsafe { sys::bdrv_co_pdiscard(self.child, offset, len) })?;
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        // SAFETY: the node is alive.
        check(unsafe { sys::bdrv_co_flush(self.node()) })?;
        Ok(())
    }

    fn length(&self) -> Result<u64> {
        // SAFETY: the node is alive.
        check_len(unsafe { sys::bdrv_co_getlength(self.node()) })
    }

    fn allocated(&self) -> Option<u64> {
        // SAFETY: the node is alive.
        check_len(unsafe { sys::bdrv_co_get_allocated_file_size(self.node()) }).ok()
    }

    fn truncate(
        &self,
        len: u64,
        exact: bool,
        preallocation: Preallocation,
        zero: bool,
    ) -> Result<()> {
        let len = signed(len)?;
        let mode = prealloc_mode(preallocation);
        let flags = if zero { sys::BDRV_REQ_ZERO_WRITE } else { 0 };
        caught(|errp| {
            // SAFETY: the child is alive; errp is that of `caught`.
            unsafe { sys::bdrv_co_truncate(self.child, len, exact, mode, flags, errp) }
        })?;
        Ok(())
    }

    fn content(&self, offset: u64, len: u64, precise: bool) -> Result<(Content, u64)> {
        let end = self.length()?;
        if offset >= end {
            return Ok((Content::Zero, len));
        }
        let len = len.min(end - offset);
        let mut known = 0;
        // SAFETY: the node is alive; what is not asked for may be null.
        let ret = unsafe {
            sys::bdrv_co_common_block_status_above(
                self.node(),
                ptr::null_mut(),
                false,
                precise,
                signed(offset)?,
                signed(len)?,
                &raw mut known,
                ptr::null_mut(),
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        let status = check(ret)? as u32;
        match u64::try_from(known) {
            Ok(known) if known > 0 => {
                let zero = status & sys::BDRV_BLOCK_ZERO != 0;
                Ok((
                    if zero { Content::Zero } else { Content::Data },
                    known.min(len),
                ))
            }
            _ => Err(Error::errno(ENOTSUP)),
        }
    }
}
