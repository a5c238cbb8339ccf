//! Memory for direct I/O.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;

use parking_lot::Mutex;
use rust_qcow2::{Error, Result};

use crate::sys;

/// Memory from QEMU that is aligned as a node's file wants it.
pub(crate) struct Aligned {
    start: NonNull<u8>,
    len: usize,
    /// What there is, of which `len` is used.
    capacity: usize,
    /// Goes to those that may be used again.
    again: bool,
}

/// Memory that was used before: all of it is initialised, but with anything.
/// For the whole process, as thousands of nodes may want some.
static USED: Mutex<Vec<Aligned>> = Mutex::new(Vec::new());
/// How many are kept; no request has more on its way than a few.
const MAX_USED: usize = 32;
/// Bytes of the largest that is kept. The allocator gives larger ones from the
/// kernel, where zeroing is the least of it.
const MAX_KEPT: usize = 128 << 10;

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
            .map(|start| Self {
                start,
                len,
                capacity: len,
                again: false,
            })
            .ok_or(Error::errno(libc::ENOMEM))
    }

    /// The same with anything in it, and without the zeroing where some can be
    /// used again.
    ///
    /// # Safety
    /// As for [`Aligned::new`].
    pub(crate) unsafe fn scratch(bs: *mut sys::BlockDriverState, len: usize) -> Result<Self> {
        let capacity = len.next_power_of_two();
        if capacity > MAX_KEPT {
            // SAFETY: promised by the caller.
            return unsafe { Self::new(bs, len) };
        }
        // SAFETY: promised by the caller.
        let alignment = unsafe { sys::bdrv_opt_mem_align((*(*bs).file).bs) };
        let fits = |memory: &Self| {
            memory.capacity >= len && memory.start.as_ptr().align_offset(alignment) == 0
        };
        let mut used = USED.lock();
        // What came last is most likely in the processor's caches.
        let found = used.iter().rposition(fits);
        let found = found.map(|at| used.swap_remove(at));
        drop(used);
        let mut memory = match found {
            Some(memory) => memory,
            // SAFETY: promised by the caller.
            None => unsafe { Self::new(bs, capacity)? },
        };
        memory.len = len;
        memory.again = true;
        Ok(memory)
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
        if self.again {
            let mut used = USED.lock();
            if used.len() < MAX_USED {
                used.push(Self {
                    start: self.start,
                    len: 0,
                    capacity: self.capacity,
                    again: false,
                });
                return;
            }
        }
        // SAFETY: the memory is from qemu_try_blockalign0(), and nobody else has
        // it: it did not go to those that are used again.
        unsafe { sys::qemu_vfree(self.start.as_ptr().cast()) };
    }
}
