//! What QEMU is to an image: [`rust_qcow2::host::Host`] over a block node.

use std::ffi::CStr;
use std::io::Write as _;
use std::ptr;
use std::sync::Arc;

use rust_qcow2::host::{Corruption, Event, Host, Task};
use rust_qcow2::image::Image;
use rust_qcow2::{Error, Result};

use crate::aligned::Aligned;
use crate::child::Child;
use crate::error::{self, c_text};
use crate::lock::{CoMutex, Queue};
use crate::node::Node;
use crate::{parallel, sys};

/// The node of an image.
pub(crate) struct Qemu {
    bs: *mut sys::BlockDriverState,
}

// SAFETY: the node is used through QEMU's thread-safe functions, and its links
// to other nodes are read under the graph lock (see `new`).
unsafe impl Send for Qemu {}
// SAFETY: as above.
unsafe impl Sync for Qemu {}

impl Qemu {
    /// The surroundings of the image in `bs`.
    ///
    /// # Safety
    /// The node outlives the value. All functions of the image that do I/O are
    /// called in coroutines that hold the graph lock for reading.
    pub(crate) unsafe fn new(bs: *mut sys::BlockDriverState) -> Self {
        Self { bs }
    }

    /// The node.
    pub(crate) fn node(&self) -> *mut sys::BlockDriverState {
        self.bs
    }
}

impl Host for Qemu {
    type RawMutex = CoMutex;
    type WaitQueue = Queue;
    type File = Child;
    type Aligned = Aligned;

    #[inline]
    fn file(&self) -> Child {
        // SAFETY: the node is open and the graph locked (see `new`).
        unsafe { Child::file(self.bs) }
    }

    #[inline]
    fn backing(&self) -> Option<Child> {
        // SAFETY: as above.
        unsafe { Child::backing(self.bs) }
    }

    fn layer_below(&self) -> Option<Arc<Image<Self>>> {
        // SAFETY: as above. A node is only closed, and an image that was
        // exchanged only freed, while the node is drained, which waits for the
        // requests of its parents.
        let below = unsafe { Node::below(self.bs) };
        below
            .filter(|node| node.is_present())
            .map(Node::shared_image)
    }

    #[inline]
    fn generation(&self) -> u64 {
        // SAFETY: reads a counter.
        unsafe { sys::bdrv_graph_generation() }
    }

    fn aligned(&self, len: usize) -> Result<Aligned> {
        // SAFETY: as above.
        unsafe { Aligned::new(self.bs, len) }
    }

    fn parallel(&self, workers: usize, tasks: Vec<Task<'_>>) -> Result<()> {
        parallel::run(workers, tasks)
    }

    #[inline]
    fn event(&self, event: Event) {
        self.file().tell(blkdebug_event(event));
    }

    fn report(&self, error: &Error) {
        error::report_text(&error.to_string());
    }

    fn warn(&self, sentence: &str, advice: &str) {
        error::warn(sentence, advice);
    }

    fn report_corruption(&self, event: &Corruption) {
        let text = &event.message;
        let line = if event.fatal {
            format!(
                "qcow2: Marking image as corrupt: {text}; further corruption events will be \
                 suppressed\n"
            )
        } else {
            format!(
                "qcow2: Image is corrupt: {text}; further non-fatal corruption events will be \
                 suppressed\n"
            )
        };
        // Nothing can be done about a closed standard error.
        let _ = std::io::stderr().write_all(line.as_bytes());

        let message = c_text(text);
        let offset = event.offset.and_then(|offset| i64::try_from(offset).ok());
        let size = event.size.and_then(|size| i64::try_from(size).ok());
        // SAFETY: the node is open, its names are C strings that live as long,
        // and the event copies all that it is given.
        unsafe {
            let name = sys::bdrv_get_node_name(self.bs);
            let unnamed = CStr::from_ptr(name).is_empty();
            sys::qapi_event_send_block_image_corrupted(
                sys::bdrv_get_device_name(self.bs),
                if unnamed { ptr::null() } else { name },
                message.as_ptr(),
                offset.is_some(),
                offset.unwrap_or(0),
                size.is_some(),
                size.unwrap_or(0),
                event.fatal,
            );
        }
    }
}

/// QEMU's name of an event.
fn blkdebug_event(event: Event) -> sys::BlkdebugEvent {
    match event {
        Event::L1Update => sys::BLKDBG_L1_UPDATE,
        Event::L1GrowAllocTable => sys::BLKDBG_L1_GROW_ALLOC_TABLE,
        Event::L1GrowWriteTable => sys::BLKDBG_L1_GROW_WRITE_TABLE,
        Event::L1GrowActivateTable => sys::BLKDBG_L1_GROW_ACTIVATE_TABLE,
        Event::L2Load => sys::BLKDBG_L2_LOAD,
        Event::L2Update => sys::BLKDBG_L2_UPDATE,
        Event::L2AllocCowRead => sys::BLKDBG_L2_ALLOC_COW_READ,
        Event::L2AllocWrite => sys::BLKDBG_L2_ALLOC_WRITE,
        Event::CowRead => sys::BLKDBG_COW_READ,
        Event::CowWrite => sys::BLKDBG_COW_WRITE,
        Event::ReftableLoad => sys::BLKDBG_REFTABLE_LOAD,
        Event::ReftableUpdate => sys::BLKDBG_REFTABLE_UPDATE,
        Event::RefblockLoad => sys::BLKDBG_REFBLOCK_LOAD,
        Event::RefblockUpdate => sys::BLKDBG_REFBLOCK_UPDATE_PART,
        Event::RefblockAlloc => sys::BLKDBG_REFBLOCK_ALLOC,
        Event::RefblockAllocHookup => sys::BLKDBG_REFBLOCK_ALLOC_HOOKUP,
        Event::RefblockAllocWrite => sys::BLKDBG_REFBLOCK_ALLOC_WRITE,
        Event::RefblockAllocWriteBlocks => sys::BLKDBG_REFBLOCK_ALLOC_WRITE_BLOCKS,
        Event::RefblockAllocWriteTable => sys::BLKDBG_REFBLOCK_ALLOC_WRITE_TABLE,
        Event::RefblockAllocSwitchTable => sys::BLKDBG_REFBLOCK_ALLOC_SWITCH_TABLE,
        Event::ClusterAlloc => sys::BLKDBG_CLUSTER_ALLOC,
        Event::ClusterAllocSpace => sys::BLKDBG_CLUSTER_ALLOC_SPACE,
        Event::ClusterFree => sys::BLKDBG_CLUSTER_FREE,
        Event::EmptyImagePrepare => sys::BLKDBG_EMPTY_IMAGE_PREPARE,
    }
}
