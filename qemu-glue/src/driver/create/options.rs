//! From the options of `qemu-img create` to those of `blockdev-create`.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use rust_qcow2::Result;

use crate::error::caught;
use crate::options::{name, text};
use crate::sys;

/// Names that differ between the two; ends with nulls.
fn renames() -> [sys::QDictRenames; 11] {
    let rename = |from: &'static CStr, to: &'static CStr| sys::QDictRenames {
        from: from.as_ptr(),
        to: to.as_ptr(),
    };
    [
        rename(c"backing_file", c"backing-file"),
        rename(c"backing_fmt", c"backing-fmt"),
        rename(c"cluster_size", c"cluster-size"),
        rename(c"lazy_refcounts", c"lazy-refcounts"),
        rename(c"extended_l2", c"extended-l2"),
        rename(c"refcount_bits", c"refcount-bits"),
        rename(c"encryption", c"encrypt.format"),
        rename(c"compat", c"version"),
        rename(c"data_file_raw", c"data-file-raw"),
        rename(c"compression_type", c"compression-type"),
        sys::QDictRenames {
            from: ptr::null(),
            to: ptr::null(),
        },
    ]
}

/// The way from one set of options to the other.
pub(super) struct Creation {
    dict: *mut sys::QDict,
    /// What it leads to; null before [`Creation::finish`].
    options: *mut sys::BlockdevCreateOptions,
}

impl Creation {
    /// Takes the driver's own options, and refuses what is not served before
    /// anything is created.
    ///
    /// # Errors
    /// For options that are not served.
    ///
    /// # Safety
    /// `opts` are options of the driver's list, and those of the protocol.
    pub(super) unsafe fn new(opts: *mut sys::QemuOpts) -> Result<Self> {
        // SAFETY: promised by the caller; the dictionary is ours.
        let dict = unsafe {
            let list = &raw mut sys::rq_create_opts;
            sys::qemu_opts_to_qdict_filtered(opts, ptr::null_mut(), list, true)
        };
        let creation = Self {
            dict,
            options: ptr::null_mut(),
        };
        match creation.get(c"encryption").as_deref() {
            Some("on") => creation.put(c"encryption", c"qcow".as_ptr()),
            // SAFETY: the dictionary is ours.
            Some("off") => unsafe { sys::qdict_del(dict, c"encryption".as_ptr()) },
            _ => {}
        }
        if creation.get(c"encrypt.format").as_deref() == Some("aes") {
            creation.put(c"encrypt.format", c"qcow".as_ptr());
        }
        match creation.get(c"compat").as_deref() {
            Some("0.10") => creation.put(c"compat", c"v2".as_ptr()),
            Some("1.1") => creation.put(c"compat", c"v3".as_ptr()),
            _ => {}
        }
        let renames = renames();
        caught(|errp| {
            // SAFETY: the dictionary is ours; the names are static.
            let fine = unsafe { sys::qdict_rename_keys(dict, renames.as_ptr(), errp) };
            if fine { 0 } else { -libc::EINVAL }
        })?;
        Ok(creation)
    }

    /// The name of the external data file, if there is to be one.
    pub(super) fn data_file(&self) -> Option<CString> {
        // SAFETY: the dictionary is ours, and so is its text until it goes.
        unsafe { name(sys::qdict_get_try_str(self.dict, c"data_file".as_ptr())) }
            .map(ToOwned::to_owned)
    }

    /// Sets the node of the data file that was created meanwhile.
    pub(super) fn set_data_file(&self, node: *const c_char) {
        // SAFETY: the dictionary is ours.
        unsafe { sys::qdict_del(self.dict, c"data_file".as_ptr()) };
        self.put(c"data-file", node);
    }

    fn get(&self, key: &CStr) -> Option<String> {
        // SAFETY: the dictionary is ours, and so is its text until it goes.
        unsafe { text(sys::qdict_get_try_str(self.dict, key.as_ptr())) }
    }

    fn put(&self, key: &CStr, value: *const c_char) {
        // SAFETY: the dictionary is ours; it copies the text.
        unsafe { sys::qdict_put_str(self.dict, key.as_ptr(), value) };
    }

    /// The options for the image in the file `node`, for the driver `driver`.
    ///
    /// # Errors
    /// Where an option does not have the type it should have.
    ///
    /// # Safety
    /// Both are C strings.
    pub(super) unsafe fn finish(
        &mut self,
        driver: *const c_char,
        node: *const c_char,
    ) -> Result<&sys::BlockdevCreateOptions> {
        self.put(c"driver", driver);
        self.put(c"file", node);
        // SAFETY: the dictionary is ours; what the visitor makes is ours too.
        unsafe {
            let mut visitor = ptr::null_mut();
            caught(|errp| {
                visitor = sys::qobject_input_visitor_new_flat_confused(self.dict, errp);
                if visitor.is_null() { -libc::EINVAL } else { 0 }
            })?;
            let visited = caught(|errp| {
                let options = &raw mut self.options;
                sys::visit_type_BlockdevCreateOptions(visitor, ptr::null(), options, errp);
                if self.options.is_null() {
                    -libc::EINVAL
                } else {
                    0
                }
            });
            sys::visit_free(visitor);
            visited?;
            let options = &mut *self.options;
            // Sizes are rounded up to sectors without a word.
            let size = &mut options.u.qcow2.size;
            *size = size.next_multiple_of(u64::from(sys::BDRV_SECTOR_SIZE));
            Ok(options)
        }
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        // SAFETY: both are ours; the options may be null.
        unsafe {
            sys::qapi_free_BlockdevCreateOptions(self.options);
            sys::rq_qdict_unref(self.dict);
        }
    }
}
