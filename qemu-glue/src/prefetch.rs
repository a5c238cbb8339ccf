//! What a read of a layer touches in memory, fetched ahead.
//!
//! A read that goes to one of a thousand layers finds next to nothing of the
//! layer in the processor's caches: its image, its node, the link to the file,
//! the node of the file and the state of its driver. Each address is in what
//! the one before points to, so the misses come one after the other. The
//! addresses are known beforehand.

use std::mem::offset_of;
use std::ptr;
use std::sync::Arc;

use rust_qcow2::image::Image;

use crate::host::Qemu;
use crate::sys;

/// Bytes that come into the caches together.
const LINE: usize = 64;

/// Addresses in memory, of things that may be gone by now.
pub(crate) struct Places {
    /// What is touched of the image: first byte and number of lines.
    image: (usize, usize),
    /// The node's link to the file.
    link: usize,
    /// The field of the node that has it.
    field: usize,
    /// The node of the file, and the state of its driver.
    file: usize,
    state: usize,
}

/// What requests touch of the node that they are for.
const FILE_NODE: [usize; 7] = [
    offset_of!(sys::BlockDriverState, drv),
    offset_of!(sys::BlockDriverState, bl),
    offset_of!(sys::BlockDriverState, bl) + LINE,
    offset_of!(sys::BlockDriverState, children),
    offset_of!(sys::BlockDriverState, total_sectors),
    offset_of!(sys::BlockDriverState, in_flight),
    offset_of!(sys::BlockDriverState, reqs_lock),
];

impl Places {
    /// The places for an image.
    ///
    /// # Safety
    /// Called under the graph lock, with the node of the image open.
    pub(crate) unsafe fn of(image: &Arc<Image<Qemu>>) -> Self {
        let (start, len) = image.hot_memory();
        let node = image.host().node();
        // SAFETY: links and what is behind them live under the graph lock, and
        // an open node has a file.
        unsafe {
            let link = image.host().data_link().unwrap_or((*node).file);
            let file = (*link).bs;
            Self {
                image: (start, len.div_ceil(LINE)),
                link: link.addr(),
                field: (&raw const (*node).file).addr(),
                file: file.addr(),
                state: (*file).opaque.addr(),
            }
        }
    }

    /// Begins to fetch what is there, whatever it is.
    #[inline]
    pub(crate) fn prefetch(&self) {
        let (image, lines) = self.image;
        for line in 0..lines {
            fetch(image + line * LINE);
        }
        for address in [self.field, self.link, self.state] {
            fetch(address);
        }
        for offset in FILE_NODE {
            fetch(self.file + offset);
        }
    }
}

/// Begins to fetch the line at an address.
#[inline]
fn fetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction reads nothing that the program could see, and
        // does not fault, whatever the address is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr::without_provenance(address)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, ptr::null::<i8>());
}
