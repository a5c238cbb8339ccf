//! Options of an open image: from a `QDict` to an [`OptionRequest`].

use std::ffi::{CStr, c_char};
use std::ptr;

use rust_qcow2::Result;
use rust_qcow2::format::entry::MetadataKind;
use rust_qcow2::image::OptionRequest;

use crate::error::caught;
use crate::sys;

/// The switches behind `overlap-check`.
const SWITCHES: [(&CStr, MetadataKind); 9] = [
    (c"overlap-check.main-header", MetadataKind::MAIN_HEADER),
    (c"overlap-check.active-l1", MetadataKind::ACTIVE_L1),
    (c"overlap-check.active-l2", MetadataKind::ACTIVE_L2),
    (
        c"overlap-check.refcount-table",
        MetadataKind::REFCOUNT_TABLE,
    ),
    (
        c"overlap-check.refcount-block",
        MetadataKind::REFCOUNT_BLOCK,
    ),
    (
        c"overlap-check.snapshot-table",
        MetadataKind::SNAPSHOT_TABLE,
    ),
    (c"overlap-check.inactive-l1", MetadataKind::INACTIVE_L1),
    (c"overlap-check.inactive-l2", MetadataKind::INACTIVE_L2),
    (
        c"overlap-check.bitmap-directory",
        MetadataKind::BITMAP_DIRECTORY,
    ),
];

/// What the user asked for when opening an image.
pub(crate) struct Requested {
    /// For the image.
    pub(crate) options: OptionRequest,
}

impl Requested {
    /// Takes the driver's options out of `dict`.
    ///
    /// # Errors
    /// Where a value is not of the type of its option.
    ///
    /// # Safety
    /// `dict` is a dictionary of flat options.
    pub(crate) unsafe fn take(dict: *mut sys::QDict) -> Result<Self> {
        let opts = Opts::new();
        caught(|errp| {
            // SAFETY: both are valid; errp is that of `caught`.
            let fine = unsafe { sys::qemu_opts_absorb_qdict(opts.0, dict, errp) };
            if fine { 0 } else { -libc::EINVAL }
        })?;
        Ok(Self {
            options: opts.request()?,
        })
    }

    /// Takes the reference to a data file out of `dict`, which is not going to
    /// be opened.
    ///
    /// # Safety
    /// `dict` is a dictionary of flat options.
    pub(crate) unsafe fn drop_data_file(dict: *mut sys::QDict) {
        // SAFETY: promised by the caller.
        unsafe {
            drop(SubDict::take(dict, c"data-file."));
            sys::qdict_del(dict, c"data-file".as_ptr());
        }
    }
}

/// The options with a common prefix, taken out of a dictionary.
pub(crate) struct SubDict(*mut sys::QDict);

impl SubDict {
    /// # Safety
    /// `dict` is a dictionary of flat options.
    pub(crate) unsafe fn take(dict: *mut sys::QDict, prefix: &CStr) -> Self {
        let mut taken = ptr::null_mut();
        // SAFETY: promised by the caller.
        unsafe { sys::qdict_extract_subqdict(dict, &raw mut taken, prefix.as_ptr()) };
        Self(taken)
    }

    /// The text of an option.
    pub(crate) fn get(&self, key: &CStr) -> Option<String> {
        // SAFETY: the dictionary is ours, and so is its text until it goes.
        unsafe { text(sys::qdict_get_try_str(self.0, key.as_ptr())) }
    }

    /// Sets an option.
    pub(crate) fn put(&self, key: &CStr, value: &CStr) {
        // SAFETY: the dictionary is ours; it copies the text.
        unsafe { sys::qdict_put_str(self.0, key.as_ptr(), value.as_ptr()) };
    }

    /// For calls into QEMU.
    pub(crate) fn as_ptr(&self) -> *mut sys::QDict {
        self.0
    }
}

impl Drop for SubDict {
    fn drop(&mut self) {
        // SAFETY: the dictionary is ours.
        unsafe { sys::rq_qdict_unref(self.0) };
    }
}

/// A C string, if there is one, for what only knows words.
///
/// # Safety
/// `c` is null or a C string.
pub(crate) unsafe fn text(c: *const c_char) -> Option<String> {
    // SAFETY: promised by the caller.
    unsafe { name(c) }.map(|c| c.to_string_lossy().into_owned())
}

/// A C string, if there is one, byte for byte: names of files need not be UTF-8.
///
/// # Safety
/// `c` is null or a C string that lives as long as the result.
pub(crate) unsafe fn name<'a>(c: *const c_char) -> Option<&'a CStr> {
    // SAFETY: promised by the caller.
    (!c.is_null()).then(|| unsafe { CStr::from_ptr(c) })
}

/// A set of `rq_runtime_opts`.
struct Opts(*mut sys::QemuOpts);

impl Opts {
    fn new() -> Self {
        // SAFETY: the list is that of shim.c and only used under the BQL.
        Self(unsafe {
            sys::qemu_opts_create(
                &raw mut sys::rq_runtime_opts,
                ptr::null(),
                0,
                &raw mut sys::error_abort,
            )
        })
    }

    fn text(&self, name: &CStr) -> Option<String> {
        // SAFETY: the options are ours; the text lives as long.
        unsafe { text(sys::qemu_opt_get(self.0, name.as_ptr())) }
    }

    /// Whether an option was given.
    fn given(&self, name: &CStr) -> bool {
        // SAFETY: the options are ours.
        !unsafe { sys::qemu_opt_get(self.0, name.as_ptr()) }.is_null()
    }

    fn switch(&self, name: &CStr) -> Option<bool> {
        // SAFETY: the options are ours, and this one is a switch.
        let read = || unsafe { sys::qemu_opt_get_bool(self.0, name.as_ptr(), false) };
        self.given(name).then(read)
    }

    fn size(&self, name: &CStr) -> Option<u64> {
        // SAFETY: the options are ours, and this one is a size.
        let read = || unsafe { sys::qemu_opt_get_size(self.0, name.as_ptr(), 0) };
        self.given(name).then(read)
    }

    fn number(&self, name: &CStr) -> Option<u64> {
        // SAFETY: the options are ours, and this one is a number.
        let read = || unsafe { sys::qemu_opt_get_number(self.0, name.as_ptr(), 0) };
        self.given(name).then(read)
    }

    fn request(&self) -> Result<OptionRequest> {
        Ok(OptionRequest {
            lazy_refcounts: self.switch(c"lazy-refcounts"),
            discard_request: self.switch(c"pass-discard-request"),
            discard_snapshot: self.switch(c"pass-discard-snapshot"),
            discard_other: self.switch(c"pass-discard-other"),
            discard_no_unref: self.switch(c"discard-no-unref"),
            overlap_check: self.text(c"overlap-check"),
            overlap_template: self.text(c"overlap-check.template"),
            overlap_switches: SWITCHES
                .iter()
                .filter_map(|(name, kind)| Some((*kind, self.switch(name)?)))
                .collect(),
            cache_size: self.size(c"cache-size"),
            l2_cache_size: self.size(c"l2-cache-size"),
            l2_cache_entry_size: self.size(c"l2-cache-entry-size"),
            refcount_cache_size: self.size(c"refcount-cache-size"),
            cache_clean_interval: self.number(c"cache-clean-interval"),
        })
    }
}

impl Drop for Opts {
    fn drop(&mut self) {
        // SAFETY: the options are ours.
        unsafe { sys::qemu_opts_del(self.0) };
    }
}
