//! A dirty bitmap of QEMU.

use std::ffi::CStr;

use rust_qcow2::image::bitmaps::{Bits, DirtyBits};

use crate::sys;

/// A bitmap of QEMU, alive.
pub(super) struct Memory {
    pub(super) bitmap: *mut sys::BdrvDirtyBitmap,
}

impl Memory {
    /// All bitmaps of a node, named or not.
    ///
    /// # Safety
    /// `bs` is a node. The values are not used once a bitmap was released.
    pub(super) unsafe fn all(bs: *mut sys::BlockDriverState) -> Vec<Self> {
        let mut list = Vec::new();
        // SAFETY: promised by the caller.
        unsafe {
            let mut bitmap = sys::bdrv_dirty_bitmap_first(bs);
            while !bitmap.is_null() {
                list.push(Self { bitmap });
                bitmap = sys::bdrv_dirty_bitmap_next(bitmap);
            }
        }
        list
    }

    /// The bitmap of that name.
    ///
    /// # Safety
    /// As for [`Memory::all`].
    pub(super) unsafe fn find(bs: *mut sys::BlockDriverState, name: &CStr) -> Option<Self> {
        // SAFETY: promised by the caller.
        let bitmap = unsafe { sys::bdrv_find_dirty_bitmap(bs, name.as_ptr()) };
        (!bitmap.is_null()).then_some(Self { bitmap })
    }

    /// The name; empty for those that jobs make.
    fn c_name(&self) -> &CStr {
        // SAFETY: the bitmap is alive, and so is its name.
        unsafe {
            let name = sys::bdrv_dirty_bitmap_name(self.bitmap);
            if name.is_null() {
                c""
            } else {
                CStr::from_ptr(name)
            }
        }
    }

    pub(super) fn is_persistent(&self) -> bool {
        // SAFETY: the bitmap is alive.
        unsafe { sys::bdrv_dirty_bitmap_get_persistence(self.bitmap) }
    }

    pub(super) fn is_inconsistent(&self) -> bool {
        // SAFETY: the bitmap is alive.
        unsafe { sys::bdrv_dirty_bitmap_inconsistent(self.bitmap) }
    }

    pub(super) fn is_readonly(&self) -> bool {
        // SAFETY: the bitmap is alive.
        unsafe { sys::bdrv_dirty_bitmap_readonly(self.bitmap) }
    }

    pub(super) fn set_readonly(&self, yes: bool) {
        // SAFETY: the bitmap is alive.
        unsafe { sys::bdrv_dirty_bitmap_set_readonly(self.bitmap, yes) };
    }

    pub(super) fn release(self) {
        // SAFETY: the bitmap is alive, and nobody has it any more.
        unsafe { sys::bdrv_release_dirty_bitmap(self.bitmap) };
    }

    /// Puts bits that were read into the bitmap.
    pub(super) fn put(&self, from: u64, len: u64, bits: Bits<'_>) {
        // SAFETY: the bitmap is alive. Memory is as long as what is read of
        // it, and is not written to.
        unsafe {
            match bits {
                Bits::Ones => {
                    sys::bdrv_dirty_bitmap_deserialize_ones(self.bitmap, from, len, false);
                }
                Bits::Bytes(bytes) => {
                    let size = sys::bdrv_dirty_bitmap_serialization_size(self.bitmap, from, len);
                    assert!(
                        size <= bytes.len() as u64,
                        "a piece of a bitmap is too short"
                    );
                    let bytes = bytes.as_ptr().cast_mut();
                    sys::bdrv_dirty_bitmap_deserialize_part(self.bitmap, bytes, from, len, false);
                }
            }
        }
    }
}

impl DirtyBits for Memory {
    fn name(&self) -> &[u8] {
        self.c_name().to_bytes()
    }

    fn granularity_bits(&self) -> u32 {
        // SAFETY: the bitmap is alive.
        unsafe { sys::bdrv_dirty_bitmap_granularity(self.bitmap) }.trailing_zeros()
    }

    fn disk_size(&self) -> u64 {
        // SAFETY: the bitmap is alive.
        unsafe { sys::bdrv_dirty_bitmap_size(self.bitmap) }.unsigned_abs()
    }

    fn is_enabled(&self) -> bool {
        // SAFETY: the bitmap is alive.
        unsafe { sys::bdrv_dirty_bitmap_enabled(self.bitmap) }
    }

    fn next_dirty(&self, from: u64) -> Option<u64> {
        if from >= self.disk_size() {
            return None;
        }
        // SAFETY: the bitmap is alive.
        let next = unsafe { sys::bdrv_dirty_bitmap_next_dirty(self.bitmap, from as i64, i64::MAX) };
        u64::try_from(next).ok()
    }

    fn serialize(&self, from: u64, len: u64, bytes: &mut [u8]) {
        // SAFETY: the bitmap is alive, and the memory is as long as what is
        // put there.
        unsafe {
            let size = sys::bdrv_dirty_bitmap_serialization_size(self.bitmap, from, len);
            assert!(
                size <= bytes.len() as u64,
                "a piece of a bitmap is too long"
            );
            sys::bdrv_dirty_bitmap_serialize_part(self.bitmap, bytes.as_mut_ptr(), from, len);
        }
    }
}

/// Bitmaps that were made, and go again if not all of them can be.
pub(super) struct Made(pub(super) Vec<Memory>);

impl Drop for Made {
    fn drop(&mut self) {
        for bitmap in self.0.drain(..) {
            bitmap.release();
        }
    }
}
