//! Guest memory: QEMU's `QEMUIOVector`, or what stands for it.

use std::marker::PhantomData;
use std::ptr;

use rust_qcow2::host::Buf;

use crate::sys;
use crate::transfer::Transfer;

/// The scattered memory of one request.
///
/// It is only ever accessed through QEMU's functions, never through Rust
/// references: the guest may write to it at any time.
#[derive(Clone, Copy)]
pub(crate) struct Qiov<'a> {
    /// Null where something else stands for the memory.
    qiov: *mut sys::QEMUIOVector,
    transfer: Option<&'a Transfer>,
    request: PhantomData<&'a sys::QEMUIOVector>,
}

// SAFETY: the vector is not changed while handles on it exist, the memory it
// points to is accessed by C functions that may run in any thread, and tasks
// of one request use parts that do not overlap (contract of `Buf`).
unsafe impl Send for Qiov<'_> {}
// SAFETY: as above.
unsafe impl Sync for Qiov<'_> {}

impl Qiov<'_> {
    /// A handle on the memory of the request in hand.
    ///
    /// # Safety
    /// `qiov` is valid and not changed while the handle and its copies live.
    /// It may be null only if no byte of it is accessed.
    pub(crate) unsafe fn new(qiov: *mut sys::QEMUIOVector) -> Self {
        Self {
            qiov,
            transfer: None,
            request: PhantomData,
        }
    }

    /// For calls into QEMU, where nothing else stands for the memory.
    pub(crate) fn as_ptr(self) -> *mut sys::QEMUIOVector {
        self.qiov
    }
}

impl<'a> Qiov<'a> {
    /// What stands for the memory of a copy.
    pub(crate) fn of_transfer(transfer: &'a Transfer) -> Self {
        Self {
            qiov: ptr::null_mut(),
            transfer: Some(transfer),
            request: PhantomData,
        }
    }

    /// What stands for the memory, if something does.
    #[inline]
    pub(crate) fn transfer(self) -> Option<&'a Transfer> {
        self.transfer
    }
}

impl Buf for Qiov<'_> {
    fn zero(&self, at: usize, len: usize) {
        if let Some(transfer) = self.transfer {
            return transfer.zero(at, len);
        }
        // SAFETY: the vector is valid (see `new`); the function stays inside.
        unsafe { sys::qemu_iovec_memset(self.qiov, at, 0, len) };
    }

    fn put(&self, at: usize, data: &[u8]) {
        if let Some(transfer) = self.transfer {
            return transfer.refuse();
        }
        // SAFETY: as above; the slice is as long as said.
        unsafe { sys::qemu_iovec_from_buf(self.qiov, at, data.as_ptr().cast(), data.len()) };
    }

    fn get(&self, at: usize, data: &mut [u8]) {
        // That would be to compress or to encrypt it: copies refuse both first.
        assert!(self.transfer.is_none(), "there is no memory in a copy");
        // SAFETY: as above.
        unsafe { sys::qemu_iovec_to_buf(self.qiov, at, data.as_mut_ptr().cast(), data.len()) };
    }
}

/// A vector that is put together here for a gathered write.
pub(crate) struct Gathered {
    qiov: sys::QEMUIOVector,
}

impl Gathered {
    /// An empty vector with room for `parts` pieces.
    pub(crate) fn with_capacity(parts: usize) -> Self {
        let mut qiov = sys::QEMUIOVector::default();
        let room = i32::try_from(parts).unwrap_or(0);
        // SAFETY: the vector is ours; it allocates its own array, so that it
        // may be moved.
        unsafe { sys::qemu_iovec_init(&raw mut qiov, room) };
        Self { qiov }
    }

    /// Appends driver memory, which outlives the use of the vector.
    pub(crate) fn bytes(&mut self, data: &[u8]) {
        // The block layer does not expect elements without bytes.
        if data.is_empty() {
            return;
        }
        // SAFETY: the vector is ours. The memory is only read through it.
        unsafe {
            let base = data.as_ptr().cast_mut().cast();
            sys::qemu_iovec_add(&raw mut self.qiov, base, data.len());
        }
    }

    /// Appends guest memory.
    pub(crate) fn guest(&mut self, buf: Qiov<'_>, at: usize, len: usize) {
        // SAFETY: both vectors are valid; the other one is not changed.
        unsafe { sys::qemu_iovec_concat(&raw mut self.qiov, buf.as_ptr(), at, len) };
    }

    /// For a call that reads the memory; also tells how much there is.
    pub(crate) fn finish(&mut self) -> (*mut sys::QEMUIOVector, usize) {
        // SAFETY: the vector is ours; the size is that of its memory, as it
        // was not made from a single buffer.
        let size = unsafe { self.qiov.__bindgen_anon_1.__bindgen_anon_2.size };
        (&raw mut self.qiov, size)
    }
}

impl Drop for Gathered {
    fn drop(&mut self) {
        // SAFETY: the vector was set up by `with_capacity`.
        unsafe { sys::qemu_iovec_destroy(&raw mut self.qiov) };
    }
}
