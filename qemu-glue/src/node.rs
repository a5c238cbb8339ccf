//! A block node of this driver, and the image in it.

use std::ffi::{CStr, c_int};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};

use parking_lot::Mutex;
use rust_qcow2::image::{Image, OpenFlags};
use rust_qcow2::{Error, Result};

use crate::cleaner::Cleaner;
use crate::driver;
use crate::error::{code, report_text};
use crate::host::Qemu;
use crate::lineage::Lineage;
use crate::panic::catch;
use crate::sys;

/// What the driver has in `bs->opaque`, which QEMU allocates full of zeroes:
/// null until the image is open, then a [`Node`] from a box.
pub(crate) type Slot = *mut Node;

/// One open node. Requests in several threads share it.
pub(crate) struct Node {
    bs: *mut sys::BlockDriverState,
    lineage: Lineage,
    /// The image, from an `Arc`. It is exchanged when the node is reactivated.
    image: AtomicPtr<Image<Qemu>>,
    /// Images that were exchanged. A request may still hold a reference, so
    /// they stay until the node is known to have none in flight.
    retired: Mutex<Vec<Arc<Image<Qemu>>>>,
    /// A panic was caught, or the image could not be opened again: nothing is
    /// written any more.
    failed: AtomicBool,
    /// The image could not be opened again: the node is as good as closed.
    gone: AtomicBool,
    /// The bitmaps were stored and released, and the file says that they are
    /// valid: they are not once something is written.
    left_bitmaps: AtomicBool,
    /// The user was told once why a request failed.
    told: AtomicBool,
    cleaner: Cleaner,
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Leaves the image as it is.
    Read,
    /// May change the image.
    Write,
}

impl Node {
    /// Puts a node for `image` into `bs->opaque`.
    ///
    /// # Safety
    /// Called at the end of the driver's open callback for `bs`.
    pub(crate) unsafe fn install(
        bs: *mut sys::BlockDriverState,
        lineage: Lineage,
        image: Image<Qemu>,
    ) {
        let node = Box::new(Self {
            bs,
            lineage,
            image: AtomicPtr::new(Arc::into_raw(Arc::new(image)).cast_mut()),
            retired: Mutex::new(Vec::new()),
            failed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            left_bitmaps: AtomicBool::new(false),
            told: AtomicBool::new(false),
            cleaner: Cleaner::default(),
        });
        // SAFETY: QEMU allocated `instance_size` bytes, and no request comes
        // before open has returned.
        unsafe { *(*bs).opaque.cast::<Slot>() = Box::into_raw(node) };
    }

    /// Takes the node out of `bs->opaque`.
    ///
    /// # Safety
    /// Called in the driver's close callback for `bs`: no request is in flight
    /// and none will come.
    pub(crate) unsafe fn remove(bs: *mut sys::BlockDriverState) -> Option<Box<Self>> {
        // SAFETY: the slot is null or from `install`, and nobody uses the node
        // any more.
        unsafe {
            let slot = (*bs).opaque.cast::<Slot>();
            let node = slot.replace(ptr::null_mut());
            (!node.is_null()).then(|| Box::from_raw(node))
        }
    }

    /// The node in `bs`, where its image was opened.
    ///
    /// # Safety
    /// Called in a callback of the driver for `bs`. The reference is not used
    /// after the callback has returned: QEMU closes a node only when none of
    /// its callbacks runs, which is what keeps the node alive meanwhile.
    #[inline]
    pub(crate) unsafe fn of<'a>(bs: *mut sys::BlockDriverState) -> Option<&'a Self> {
        // SAFETY: the slot is null or from `install`; shared references only
        // are made from it.
        unsafe { (*(*bs).opaque.cast::<Slot>()).as_ref() }
    }

    /// The node that backs `bs`, where it is one of this driver and nothing has
    /// to be done when it is read, so that its image may be read directly.
    ///
    /// # Safety
    /// Called in a request to `bs`, under the graph lock. The reference is not
    /// used after the request.
    #[inline]
    pub(crate) unsafe fn below<'a>(bs: *mut sys::BlockDriverState) -> Option<&'a Self> {
        // SAFETY: links of the graph do not change under its lock, and nodes
        // that are linked live. `drv` is null for a node that was given up.
        unsafe {
            let link = (*bs).backing;
            if link.is_null() {
                return None;
            }
            let below = (*link).bs;
            let copies = AtomicI32::from_ptr(&raw mut (*below).copy_on_read);
            if copies.load(Ordering::Relaxed) != 0 || !driver::is_ours((*below).drv) {
                return None;
            }
            Self::of(below)
        }
    }

    /// Whether `bs` is a layer of a node of this driver above it.
    ///
    /// # Safety
    /// Called in a callback of the driver for `bs`, under the graph lock.
    pub(crate) unsafe fn is_layer(bs: *mut sys::BlockDriverState) -> bool {
        // SAFETY: links of the graph do not change under its lock; what is
        // behind a link from another node is that node, which lives.
        unsafe {
            let mut link = (*bs).parents.lh_first;
            while !link.is_null() {
                if ptr::eq((*link).klass, &raw const sys::child_of_bds) {
                    let above = (*link).opaque.cast::<sys::BlockDriverState>();
                    if ptr::eq((*above).backing, link)
                        && driver::is_ours((*above).drv)
                        && Self::below(above).is_some()
                    {
                        return true;
                    }
                }
                link = (*link).next_parent.le_next;
            }
        }
        false
    }

    /// Where it was opened.
    pub(crate) fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// The image.
    #[inline]
    pub(crate) fn image(&self) -> &Image<Qemu> {
        // SAFETY: the pointer is from an Arc that goes with the node, or later
        // than any request that may have got it here (see `retired`).
        unsafe { &*self.image.load(Ordering::Acquire) }
    }

    /// The image, for the images above that look things up in it.
    pub(crate) fn shared_image(&self) -> Arc<Image<Qemu>> {
        let image = self.image.load(Ordering::Acquire);
        // SAFETY: as above; the count is that of the Arc which the node has.
        unsafe {
            Arc::increment_strong_count(image);
            Arc::from_raw(image)
        }
    }

    /// Exchanges the image for one that was opened anew.
    pub(crate) fn replace_image(&self, image: Image<Qemu>) {
        let new = Arc::into_raw(Arc::new(image)).cast_mut();
        let old = self.image.swap(new, Ordering::AcqRel);
        self.left_bitmaps.store(false, Ordering::Relaxed);
        // SAFETY: the pointer was made from an Arc, whose count comes along.
        let old = unsafe { Arc::from_raw(old) };
        old.leave_chain();
        // A table goes if it was not used between two cleanings.
        old.clean_caches();
        old.clean_caches();
        self.retired.lock().push(old);
    }

    /// The bitmaps are with the image only, as nobody is going to write.
    pub(crate) fn leave_bitmaps(&self) {
        self.left_bitmaps.store(true, Ordering::Relaxed);
    }

    /// Somebody is going to write: where the node was to become inactive, and
    /// then did not, its bitmaps record nothing, and the file must not say
    /// that they are valid.
    #[inline]
    pub(crate) fn take_back_bitmaps(&self) -> Result<()> {
        if self.left_bitmaps.load(Ordering::Relaxed) {
            self.serve(Access::Write, Image::mark_bitmaps_in_use)?;
            self.left_bitmaps.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Frees images that were exchanged.
    ///
    /// # Safety
    /// The node is drained: no request is in flight.
    pub(crate) unsafe fn free_retired(&self) {
        self.retired.lock().clear();
    }

    /// The request's image.
    ///
    /// # Errors
    /// `EIO` where the node does not do this any more.
    #[inline]
    fn usable(&self, access: Access) -> Result<&Image<Qemu>> {
        if access == Access::Write && self.failed.load(Ordering::Relaxed) {
            return Err(Error::errno(libc::EIO));
        }
        Ok(self.image())
    }

    /// Whether requests may come at all. A node with a broken image is like a
    /// drive without a disk, as with the qcow2 driver.
    pub(crate) fn is_present(&self) -> bool {
        !self.gone.load(Ordering::Relaxed) && !self.image().is_broken()
    }

    /// Whether the image still takes what is in memory.
    pub(crate) fn is_sound(&self) -> bool {
        self.is_present() && !self.failed.load(Ordering::Relaxed)
    }

    /// The image could not be opened again, after a migration or in another
    /// file.
    pub(crate) fn set_gone(&self) {
        self.failed.store(true, Ordering::Relaxed);
        self.gone.store(true, Ordering::Relaxed);
        self.image().leave_chain();
    }

    /// Whether it could not be opened again so far.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// An image that was gone was opened after all, and has taken the place of
    /// the old one.
    pub(crate) fn set_back(&self) {
        if self.gone.swap(false, Ordering::Relaxed) {
            self.failed.store(false, Ordering::Relaxed);
        }
    }

    /// A panic was caught in a request.
    #[cold]
    pub(crate) fn set_failed(&self) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            // SAFETY: the node is open; its name is a C string.
            let name = unsafe { CStr::from_ptr(sys::bdrv_get_node_name(self.bs)) };
            report_text(&format!(
                "rqcow2: internal error in node '{}': it does not write any more",
                name.to_string_lossy()
            ));
        }
    }

    /// Tells the user why a request failed, where there is more to say than the
    /// number that the request returns. Once, as the guest may try for ever.
    #[cold]
    fn explain(&self, error: &Error) {
        if error.message().is_some() && !self.told.swap(true, Ordering::Relaxed) {
            report_text(&error.to_string());
        }
    }

    /// Does `f` with the image; a panic fails the node and the request.
    #[inline]
    pub(crate) fn serve<T>(
        &self,
        access: Access,
        f: impl FnOnce(&Image<Qemu>) -> Result<T>,
    ) -> Result<T> {
        let image = self.usable(access)?;
        catch(|| f(image)).unwrap_or_else(|_payload| {
            self.set_failed();
            Err(Error::errno(libc::EIO))
        })
    }

    /// Starts the timer that cleans the caches, where the options want one.
    ///
    /// # Safety
    /// Called in a callback of the driver, with the `AioContext` of the node.
    pub(crate) unsafe fn start_timer(&self, context: *mut sys::AioContext) {
        let seconds = self.image().options().clean_interval;
        // SAFETY: promised by the caller; `drop` stops it at the latest.
        unsafe { self.cleaner.start(self, context, seconds) };
    }

    /// Stops that timer.
    pub(crate) fn stop_timer(&self) {
        self.cleaner.stop();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop_timer();
        // SAFETY: the pointer is from an Arc, whose count comes along. Images
        // above may have the image in a list still, but do not use it: the link
        // to this node is gone.
        let image = unsafe { Arc::from_raw(*self.image.get_mut()) };
        image.leave_chain();
        image.drop_caches();
    }
}

/// Serves a request to the node in `bs`: zero, or a negative error number.
///
/// # Safety
/// Called in a callback of the driver for `bs`; see [`Node::of`].
#[inline]
pub(crate) unsafe fn request(
    bs: *mut sys::BlockDriverState,
    access: Access,
    f: impl FnOnce(&Image<Qemu>) -> Result<()>,
) -> c_int {
    // SAFETY: promised by the caller.
    match unsafe { Node::of(bs) } {
        Some(node) => {
            let result = node.serve(access, f);
            if let Err(error) = &result {
                node.explain(error);
            }
            code(result)
        }
        None => -libc::ENOMEDIUM,
    }
}

/// How a node is opened with the `BDRV_O_*` flags.
pub(crate) fn open_flags(flags: c_int) -> OpenFlags {
    let flags = flags as u32;
    OpenFlags {
        writable: flags & sys::BDRV_O_RDWR != 0,
        inactive: flags & sys::BDRV_O_INACTIVE != 0,
        check: flags & sys::BDRV_O_CHECK != 0,
        no_io: flags & sys::BDRV_O_NO_IO != 0,
        unmap: flags & sys::BDRV_O_UNMAP != 0,
    }
}
