//! Copies from file to file that the system makes, as `copy_file_range(2)`
//! does: the data do not come here.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rust_qcow2::{Error, Result};

use crate::error::{check, check_len};
use crate::sys;

/// The other end of a copy. It stands for the guest memory of a request: what
/// would be read into memory goes there, what would be written comes from
/// there.
pub(crate) struct Transfer {
    child: *mut sys::BdrvChild,
    /// The place there of the first byte of the "memory".
    start: i64,
    read_flags: sys::BdrvRequestFlags,
    write_flags: sys::BdrvRequestFlags,
    /// Parts that have to become zeroes: first byte and length.
    zeroes: Mutex<Vec<(usize, usize)>>,
    /// A part is in memory only, decompressed or decrypted.
    refused: AtomicBool,
}

// SAFETY: QEMU's I/O functions are thread-safe ("IO_CODE"), and the link is used
// under the graph lock only (see `new`).
unsafe impl Send for Transfer {}
// SAFETY: as above.
unsafe impl Sync for Transfer {}

impl Transfer {
    /// The end at `child`, from the byte `start` on.
    ///
    /// # Safety
    /// Called in a coroutine that holds the graph lock for reading as long as
    /// the value lives; `child` is a link of the graph.
    pub(crate) unsafe fn new(
        child: *mut sys::BdrvChild,
        start: i64,
        read_flags: sys::BdrvRequestFlags,
        write_flags: sys::BdrvRequestFlags,
    ) -> Self {
        Self {
            child,
            start,
            read_flags,
            write_flags,
            zeroes: Mutex::default(),
            refused: AtomicBool::new(false),
        }
    }

    /// The place there of a byte.
    fn place(&self, at: usize) -> Result<i64> {
        let at = i64::try_from(at).ok();
        at.and_then(|at| self.start.checked_add(at))
            .ok_or(Error::errno(libc::EINVAL))
    }

    /// Copies `len` bytes from a file to the other end. What is beyond the end
    /// of the file is zeroes.
    ///
    /// # Safety
    /// `from` is a link of the graph, as for [`Transfer::new`].
    pub(crate) unsafe fn fetch(
        &self,
        from: *mut sys::BdrvChild,
        offset: i64,
        at: usize,
        len: usize,
    ) -> Result<()> {
        // SAFETY: promised by the caller.
        let end = check_len(unsafe { sys::bdrv_co_getlength((*from).bs) })?;
        let there = end.saturating_sub(offset.unsigned_abs());
        let there = usize::try_from(there).map_or(len, |there| there.min(len));
        self.zero(at + there, len - there);
        if there == 0 {
            return Ok(());
        }
        // SAFETY: as above, and promised in `new`.
        check(unsafe {
            sys::bdrv_co_copy_range_from(
                from,
                offset,
                self.child,
                self.place(at)?,
                there as i64,
                self.read_flags,
                self.write_flags,
            )
        })?;
        Ok(())
    }

    /// Copies `len` bytes from the other end to a file.
    ///
    /// # Safety
    /// As for [`Transfer::fetch`].
    pub(crate) unsafe fn store(
        &self,
        to: *mut sys::BdrvChild,
        offset: i64,
        at: usize,
        len: usize,
    ) -> Result<()> {
        // SAFETY: promised by the caller and in `new`.
        check(unsafe {
            sys::bdrv_co_copy_range_to(
                self.child,
                self.place(at)?,
                to,
                offset,
                len as i64,
                self.read_flags,
                self.write_flags,
            )
        })?;
        Ok(())
    }

    /// A part has to become zeroes.
    pub(crate) fn zero(&self, at: usize, len: usize) {
        if len > 0 {
            self.zeroes.lock().push((at, len));
        }
    }

    /// A part is not in any file as it is.
    pub(crate) fn refuse(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Ends a copy to the other end.
    ///
    /// # Errors
    /// `ENOTSUP` where not all of it could be copied: the caller has to read
    /// and write.
    pub(crate) fn finish(self) -> Result<()> {
        if self.refused.load(Ordering::Relaxed) {
            return Err(Error::errno(libc::ENOTSUP));
        }
        for (at, len) in std::mem::take(&mut *self.zeroes.lock()) {
            let place = self.place(at)?;
            // SAFETY: promised in `new`.
            check(unsafe {
                sys::bdrv_co_pwrite_zeroes(self.child, place, len as i64, self.write_flags)
            })?;
        }
        Ok(())
    }
}
