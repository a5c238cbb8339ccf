//! The file of an image that is not there yet.

use rust_qcow2::host::{Content, File, Part, Preallocation, ZeroFlags};
use rust_qcow2::{Error, Result};

use super::{Backend, Failure, told_pointer};
use crate::error::{ErrorPtr, check, check_len};
use crate::qiov::Qiov;
use crate::sys;

/// A file that is written through a block backend, as it is no node's child
/// yet. It does what making a new image takes.
pub(super) struct BlankFile(std::sync::Arc<Backend>);

// SAFETY: a block backend may be used from any thread. The file is only used
// by the coroutine that creates the image.
unsafe impl Send for BlankFile {}
// SAFETY: as above.
unsafe impl Sync for BlankFile {}

impl BlankFile {
    /// # Safety
    /// `bs` is an open node, and errp is not set; called in a coroutine without
    /// the graph lock.
    pub(super) unsafe fn new(
        bs: *mut sys::BlockDriverState,
        errp: ErrorPtr,
    ) -> Result<Self, Failure> {
        let rights = u64::from(sys::BLK_PERM_WRITE | sys::BLK_PERM_RESIZE);
        let shared = u64::from(sys::BLK_PERM_ALL);
        // SAFETY: promised by the caller.
        let backend = unsafe { sys::blk_co_new_with_bs(bs, rights, shared, errp) };
        let backend = told_pointer(libc::EPERM, backend)?;
        // SAFETY: the backend is ours.
        unsafe { sys::blk_set_allow_write_beyond_eof(backend, true) };
        #[allow(
            clippy::arc_with_non_send_sync,
            reason = "see the comment at `BlankFile`"
        )]
        Ok(Self(std::sync::Arc::new(Backend(backend))))
    }

    fn backend(&self) -> *mut sys::BlockBackend {
        self.0.0
    }
}

impl Clone for BlankFile {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

fn signed(number: u64) -> Result<i64> {
    i64::try_from(number).map_err(|_| Error::errno(libc::EINVAL))
}

/// What a new image does not need.
fn unsupported<T>() -> Result<T> {
    Err(Error::errno(libc::ENOTSUP))
}

impl File for BlankFile {
    type Buf<'a> = Qiov<'a>;

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (offset, len) = (signed(offset)?, signed(buf.len() as u64)?);
        let start = buf.as_mut_ptr().cast();
        // SAFETY: the backend is ours, the slice as long as said.
        check(unsafe { sys::blk_co_pread(self.backend(), offset, len, start, 0) })?;
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let (offset, len) = (signed(offset)?, signed(buf.len() as u64)?);
        let start = buf.as_ptr().cast();
        // SAFETY: as above.
        check(unsafe { sys::blk_co_pwrite(self.backend(), offset, len, start, 0) })?;
        Ok(())
    }

    fn read_guest(&self, _offset: u64, _buf: Qiov<'_>, _at: usize, _len: usize) -> Result<()> {
        unsupported()
    }

    fn write_guest(&self, _offset: u64, _buf: Qiov<'_>, _at: usize, _len: usize) -> Result<()> {
        unsupported()
    }

    fn write_parts(&self, _offset: u64, _parts: &[Part<'_, Qiov<'_>>]) -> Result<()> {
        unsupported()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> Result<()> {
        unsupported()
    }

    fn zeroes_fast(&self) -> bool {
        false
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        unsupported()
    }

    fn flush(&self) -> Result<()> {
        // SAFETY: the backend is ours.
        check(unsafe { sys::blk_co_flush(self.backend()) })?;
        Ok(())
    }

    fn length(&self) -> Result<u64> {
        // SAFETY: the backend is ours.
        check_len(unsafe { sys::blk_co_getlength(self.backend()) })
    }

    fn allocated(&self) -> Option<u64> {
        None
    }

    fn truncate(
        &self,
        _len: u64,
        _exact: bool,
        _preallocation: Preallocation,
        _zero: bool,
    ) -> Result<()> {
        unsupported()
    }

    fn content(&self, _offset: u64, _len: u64, _precise: bool) -> Result<(Content, u64)> {
        unsupported()
    }
}
