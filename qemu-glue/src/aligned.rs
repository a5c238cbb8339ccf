//! Memory for direct I/O.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;

use rust_qcow2::{Error, Result};

use crate::sys;

/// Memory from QEMU that is aligned as a node's file wants it.
pub(crate) struct Aligned {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the value alone, as that of a `Box<[u8]>`.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Aligned {
    /// Zeroed memory of `len` bytes for I/O on the file of `bs`.
    ///
    /// # Safety
    /// `bs` is an open node with a file; the graph is locked for reading.
    pub(crate) unsafe fn new(bs: *mut sys::BlockDriverState, len: usize) -> Result<Self> {
        // SAFETY: promised by the caller.
        let start = unsafe { sys::qemu_try_blockalign0((*(*bs).file).bs, len.max(1)) };
        NonNull::new(start.cast())
            .map(|start| Self { start, len })
            .ok_or(Error::errno(libc::ENOMEM))
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is initialised, ours, and as long as said.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; the borrow is exclusive.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: the memory is from qemu_try_blockalign0().
        unsafe { sys::qemu_vfree(self.start.as_ptr().cast()) };
    }
}
