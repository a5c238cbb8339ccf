//! What QEMU is to an image: [`rust_qcow2::host::Host`] over a block node.

use std::ffi::{CStr, c_int, c_ulong};
use std::io::Write as _;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};

use rust_qcow2::format::header::Encryption;
use rust_qcow2::host::{Corruption, Crypt, CryptoHeader, Event, Host, ReadPiece, ServedFrom, Task};
use rust_qcow2::image::Image;
use rust_qcow2::{Error, Result};

use crate::aligned::Aligned;
use crate::child::Child;
use crate::crypto::{Cipher, check_format};
use crate::error::{self, c_text};
use crate::lock::{CoMutex, Queue};
use crate::node::Node;
use crate::options::SubDict;
use crate::prefetch::Places;
use crate::{parallel, sys};

/// The node of an image.
pub(crate) struct Qemu {
    bs: *mut sys::BlockDriverState,
    /// The options that the node is being opened with, null afterwards.
    options: AtomicPtr<sys::QDict>,
    /// The link to the external data file, null without one. It goes with the
    /// node.
    data_file: AtomicPtr<sys::BdrvChild>,
    /// The cipher of an encrypted image.
    cipher: OnceLock<Arc<Cipher>>,
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
        Self {
            bs,
            options: AtomicPtr::default(),
            data_file: AtomicPtr::default(),
            cipher: OnceLock::new(),
        }
    }

    /// The same for a node that is being opened, with `options`.
    ///
    /// # Safety
    /// As for [`Qemu::new`]; the image is opened in the main thread, and the
    /// options live until [`Qemu::end_opening`].
    pub(crate) unsafe fn opening(bs: *mut sys::BlockDriverState, options: *mut sys::QDict) -> Self {
        // SAFETY: promised by the caller.
        let host = unsafe { Self::new(bs) };
        host.options.store(options, Ordering::Release);
        host
    }

    /// The options will be gone.
    pub(crate) fn end_opening(&self) {
        self.options.store(ptr::null_mut(), Ordering::Release);
    }

    /// The same surroundings, for an image that takes the place of the one
    /// there.
    pub(crate) fn again(&self) -> Self {
        Self {
            bs: self.bs,
            options: AtomicPtr::default(),
            data_file: AtomicPtr::new(self.data_file.load(Ordering::Acquire)),
            cipher: self.cipher.clone(),
        }
    }

    /// The cipher, of an image that is encrypted.
    pub(crate) fn cipher(&self) -> Option<&Cipher> {
        self.cipher.get().map(|cipher| &**cipher)
    }

    /// The link to the external data file.
    pub(crate) fn data_link(&self) -> Option<*mut sys::BdrvChild> {
        let child = self.data_file.load(Ordering::Acquire);
        (!child.is_null()).then_some(child)
    }

    /// The node of the external data file.
    pub(crate) fn data_node(&self) -> Option<*mut sys::BlockDriverState> {
        // SAFETY: the link lives as long as the node is open.
        self.data_link().map(|child| unsafe { (*child).bs })
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
    type Places = Places;

    fn places(image: &Arc<Image<Self>>) -> Places {
        // SAFETY: called in a request, and the image is that of an open node
        // (see `new`).
        unsafe { Places::of(image) }
    }

    #[inline]
    fn prefetch(places: &Places) {
        places.prefetch();
    }

    #[inline]
    fn file(&self) -> Child {
        // SAFETY: the node is open and the graph locked (see `new`).
        unsafe { Child::file(self.bs) }
    }

    #[inline]
    fn data_file(&self) -> Option<Child> {
        let child = self.data_file.load(Ordering::Acquire);
        // SAFETY: as above; the link goes with the node.
        (!child.is_null()).then(|| unsafe { Child::data(self.bs, child) })
    }

    fn open_data_file(&self, external: bool, name: Option<&[u8]>) -> Result<()> {
        let options = self.options.load(Ordering::Acquire);
        let known = self.data_file.load(Ordering::Acquire);
        if options.is_null() {
            // The image was read anew; its files are what they were.
            return match (external, known.is_null()) {
                (true, true) => Err(required()),
                (false, false) => Err(unwanted()),
                _ => Ok(()),
            };
        }
        // SAFETY: the node is being opened, with these options (see
        // `opening`).
        unsafe {
            let mut child = open_child(self.bs, options, None)?;
            if child.is_null() && external && name.is_some() {
                child = open_child(self.bs, options, name)?;
            }
            self.data_file.store(child, Ordering::Release);
            match (external, child.is_null()) {
                (true, true) => return Err(required()),
                (false, false) => return Err(unwanted()),
                (false, true) => return Ok(()),
                (true, false) => {}
            }
            // There are no data in the image file; giving up rights cannot
            // fail.
            let file = (*self.bs).file;
            (*file).role &= !sys::BDRV_CHILD_DATA;
            sys::bdrv_child_refresh_perms(self.bs, file, &raw mut sys::error_abort);
        }
        Ok(())
    }

    fn open_encryption(
        &self,
        encrypted: Option<(Encryption, Option<CryptoHeader>)>,
        no_io: bool,
    ) -> Result<()> {
        let options = self.options.load(Ordering::Acquire);
        if options.is_null() {
            // The image was read anew; the key is what it was.
            return if encrypted.is_some() && self.cipher().is_none() {
                Err(Error::invalid("The image has become encrypted"))
            } else {
                Ok(())
            };
        }
        // SAFETY: the node is being opened, with these options (see
        // `opening`).
        let options = unsafe { SubDict::take(options, c"encrypt.") };
        let named = options.get(c"format");
        check_format(
            named.as_deref(),
            encrypted.map(|(encryption, _)| encryption),
        )?;
        if let Some((encryption, header)) = encrypted {
            // SAFETY: as above.
            let cipher = unsafe { Cipher::open(&options, encryption, header, self.file(), no_io)? };
            let _ = self.cipher.set(Arc::new(cipher));
        }
        Ok(())
    }

    fn crypt(&self, how: Crypt, offset: u64, bytes: &mut [u8]) -> Result<()> {
        match self.cipher() {
            Some(cipher) => cipher.crypt(how, offset, bytes),
            None => Err(Error::errno(libc::EIO)),
        }
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
        let generation: c_ulong = unsafe { sys::bdrv_graph_generation() };
        generation as u64 // A pointer's width.
    }

    fn aligned(&self, len: usize) -> Result<Aligned> {
        // SAFETY: as above.
        unsafe { Aligned::new(self.bs, len) }
    }

    fn scratch(&self, len: usize) -> Result<Aligned> {
        // SAFETY: as above.
        unsafe { Aligned::scratch(self.bs, len) }
    }

    fn parallel(&self, workers: usize, tasks: Vec<Task<'_>>) -> Result<()> {
        parallel::run(workers, tasks)
    }

    fn offload<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        parallel::offload(work)
    }

    #[inline]
    fn event(&self, event: Event) {
        self.file().tell(blkdebug_event(event));
    }

    #[inline]
    fn traces_reads(&self) -> bool {
        // SAFETY: reads a flag.
        unsafe { sys::rq_traces_reads() }
    }

    fn trace_read(&self, piece: &ReadPiece<'_, Self>) {
        let (what, depth, file, offset) = match piece.what {
            ServedFrom::Image {
                host,
                depth,
                offset,
                compressed,
            } => {
                let what = if compressed { c"compressed" } else { c"data" };
                let child = host.data_file().unwrap_or_else(|| host.file());
                (what, depth, child.node(), offset.0)
            }
            ServedFrom::Zeroes => (c"zeroes", None, ptr::null_mut(), 0),
            ServedFrom::Below { depth } => (c"below", Some(depth), ptr::null_mut(), piece.guest.0),
        };
        let depth = depth.and_then(|depth| c_int::try_from(depth).ok());
        // SAFETY: the nodes are open: a request on them is in flight, and the
        // layer is held by it.
        unsafe {
            sys::rq_trace_read(
                self.bs,
                piece.guest.0,
                piece.len,
                what.as_ptr(),
                depth.unwrap_or(-1),
                file,
                offset,
            );
        }
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

        let message = c_text(text.as_bytes());
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

fn required() -> Error {
    Error::invalid("'data-file' is required for this image")
}

fn unwanted() -> Error {
    Error::invalid("'data-file' can only be set for images with an external data file")
}

/// Opens the data file that the options tell, or else the one of that name;
/// null where there is neither.
///
/// # Safety
/// `bs` is being opened with `options`, in the main thread, in a coroutine that
/// holds the graph lock for reading.
unsafe fn open_child(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::QDict,
    name: Option<&[u8]>,
) -> Result<*mut sys::BdrvChild> {
    let name = name.map(c_text);
    let mut child = ptr::null_mut();
    error::caught(|errp| {
        // SAFETY: promised by the caller; the graph changes without the lock.
        unsafe {
            sys::bdrv_graph_co_rdunlock();
            child = sys::bdrv_co_open_child(
                name.as_ref().map_or(ptr::null(), |name| name.as_ptr()),
                options,
                c"data-file".as_ptr(),
                bs,
                &raw const sys::child_of_bds,
                sys::BDRV_CHILD_DATA,
                name.is_none(),
                errp,
            );
            sys::bdrv_graph_co_rdlock();
            if errp.is_null() || (*errp).is_null() {
                0
            } else {
                -libc::EINVAL
            }
        }
    })?;
    Ok(child)
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
        Event::L2UpdateCompressed => sys::BLKDBG_L2_UPDATE_COMPRESSED,
        Event::ReadCompressed => sys::BLKDBG_READ_COMPRESSED,
        Event::WriteCompressed => sys::BLKDBG_WRITE_COMPRESSED,
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
        Event::ClusterAllocBytes => sys::BLKDBG_CLUSTER_ALLOC_BYTES,
        Event::ClusterAllocSpace => sys::BLKDBG_CLUSTER_ALLOC_SPACE,
        Event::ClusterFree => sys::BLKDBG_CLUSTER_FREE,
        Event::VmstateSave => sys::BLKDBG_VMSTATE_SAVE,
        Event::VmstateLoad => sys::BLKDBG_VMSTATE_LOAD,
        Event::EmptyImagePrepare => sys::BLKDBG_EMPTY_IMAGE_PREPARE,
    }
}
