//! Changing the options of an image that is there: `qemu-img amend` and
//! `x-blockdev-amend`.

use std::ffi::{CStr, c_int, c_void};
use std::ptr;

use rust_qcow2::format::header::Encryption;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::host::Host;
use rust_qcow2::image::{Image, ImageInfo};
use rust_qcow2::{Error, Result};

use super::open::publish;
use crate::coroutine;
use crate::crypto;
use crate::error::{self, ErrorPtr, caught};
use crate::host::Qemu;
use crate::node::{Access, Node};
use crate::options::name;
use crate::panic::contain;
use crate::sys;

/// The options that change keys.
const KEYS: [&CStr; 5] = [
    c"encrypt.state",
    c"encrypt.keyslot",
    c"encrypt.old-secret",
    c"encrypt.new-secret",
    c"encrypt.iter-time",
];

const OTHER_BACKING: &str = "Cannot amend the backing file";

/// Whom to tell how far it is.
type Progress = Option<unsafe extern "C" fn(*mut sys::BlockDriverState, i64, i64, *mut c_void)>;

pub(super) unsafe extern "C" fn amend_options(
    bs: *mut sys::BlockDriverState,
    opts: *mut sys::QemuOpts,
    progress: Progress,
    opaque: *mut c_void,
    force: bool,
    errp: ErrorPtr,
) -> c_int {
    contain("amend", -libc::EIO, || {
        // SAFETY: a callback of the driver for `bs`, in the main thread; the
        // options are of the driver's list.
        unsafe {
            let Some(node) = Node::of(bs) else {
                return -libc::ENOMEDIUM;
            };
            let tell = |done, total| {
                if let Some(progress) = progress {
                    progress(bs, done, total, opaque);
                }
            };
            let result = Wanted::read(opts, &node.image().info(), node.image().encryption())
                .and_then(|wanted| wanted.apply(bs, node, opts, force, &tell));
            match result {
                Ok(()) => 0,
                Err(error) => {
                    error::set(errp, &error, "Failed to amend the image");
                    if error.message() == Some(OTHER_BACKING) {
                        error::append_hint(errp, c"You can use 'qemu-img rebase' instead.");
                    }
                    -error.code()
                }
            }
        }
    })
}

/// What the user wants; `None` where he did not say.
struct Wanted {
    version: u32,
    size: Option<u64>,
    backing_file: Option<Vec<u8>>,
    backing_format: Option<Vec<u8>>,
    keys: bool,
    lazy_refcounts: Option<bool>,
    width: Option<RefcountOrder>,
    data_file: Option<Vec<u8>>,
    data_file_raw: bool,
}

impl Wanted {
    /// Checks the options against the image, and refuses what is not served.
    ///
    /// # Safety
    /// `opts` are options of the driver's list.
    unsafe fn read(
        opts: *mut sys::QemuOpts,
        info: &ImageInfo,
        encryption: Option<Encryption>,
    ) -> Result<Self> {
        // SAFETY: promised by the caller.
        unsafe {
            let given = |name: &CStr| !sys::qemu_opt_find(opts, name.as_ptr()).is_null();
            let value = |key: &CStr| {
                let value = given(key).then(|| name(sys::qemu_opt_get(opts, key.as_ptr())));
                value.flatten()
            };
            let bytes = |key| value(key).map(|value| value.to_bytes().to_vec());
            let switch = |name: &CStr, default| {
                given(name).then(|| sys::qemu_opt_get_bool(opts, name.as_ptr(), default))
            };
            let keys = KEYS.iter().any(|name| given(name));
            match encryption {
                None if keys => {
                    return Err(Error::invalid(
                        "Can't amend encryption options - encryption not present",
                    ));
                }
                Some(Encryption::Aes) if keys => {
                    return Err(Error::unsupported(
                        "Only LUKS encryption options can be amended",
                    ));
                }
                _ => {}
            }
            let version = match value(c"compat").map(CStr::to_string_lossy).as_deref() {
                None => info.version,
                Some("0.10" | "v2") => 2,
                Some("1.1" | "v3") => 3,
                Some(other) => {
                    return Err(Error::invalid(format!(
                        "Unknown compatibility level {other}"
                    )));
                }
            };
            let data_file = bytes(c"data_file");
            if data_file.is_some() && !info.external_data {
                return Err(Error::invalid(
                    "data-file can only be set for images that use an external data file",
                ));
            }
            let data_file_raw = switch(c"data_file_raw", info.raw_data_file);
            if data_file_raw == Some(true) && !info.raw_data_file {
                return Err(Error::invalid(
                    "data-file-raw cannot be set on existing images",
                ));
            }
            let old_bits = u64::from(info.refcount_bits);
            let bits = if given(c"refcount_bits") {
                sys::qemu_opt_get_number(opts, c"refcount_bits".as_ptr(), old_bits)
            } else {
                old_bits
            };
            let Some(order) = bits
                .is_power_of_two()
                .then(|| RefcountOrder::new(bits.ilog2()))
                .flatten()
            else {
                return Err(Error::invalid(
                    "Refcount width must be a power of two and may not exceed 64 bits",
                ));
            };
            let size = given(c"size").then(|| sys::qemu_opt_get_size(opts, c"size".as_ptr(), 0));
            Ok(Self {
                version,
                size: size.filter(|size| *size != 0),
                backing_file: bytes(c"backing_file"),
                backing_format: bytes(c"backing_fmt"),
                keys,
                lazy_refcounts: switch(c"lazy_refcounts", info.lazy_refcounts),
                width: (bits != old_bits).then_some(order),
                data_file,
                data_file_raw: data_file_raw.unwrap_or(info.raw_data_file),
            })
        }
    }

    /// Changes the image, in the order of the qcow2 driver: what was done
    /// stays when a later step fails.
    ///
    /// # Safety
    /// Called in a callback of the driver for `bs`, outside of coroutines.
    unsafe fn apply(
        &self,
        bs: *mut sys::BlockDriverState,
        node: &Node,
        opts: *mut sys::QemuOpts,
        force: bool,
        tell: &dyn Fn(i64, i64),
    ) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe {
            let before = node.image().info();
            let others = [
                self.version != before.version,
                self.keys,
                self.width.is_some(),
            ];
            let steps = others.iter().filter(|step| **step).count() as u64;
            let mut progress = Steps::new(steps, tell);
            if self.version > before.version {
                renew(bs, node, |image| image.upgrade(&mut progress.step()))?;
            }
            if self.keys {
                amend_keys(bs, node, opts, force)?;
            }
            if let Some(order) = self.width {
                if self.version < 3 && order != RefcountOrder::BITS_16 {
                    return Err(Error::invalid(
                        "Refcount widths other than 16 bits require compatibility level 1.1 or \
                         above (use compat=1.1 or greater)",
                    ));
                }
                let change =
                    |image: &Image<_>| image.change_refcount_width(order, &mut progress.step());
                let old = renew(bs, node, change)?;
                serve(bs, node, |image| image.release(old))?;
            }
            serve(bs, node, |image| {
                image.amend_data_file(self.data_file_raw, self.data_file.as_deref())
            })?;
            if self.backing_file.is_some() || self.backing_format.is_some() {
                let same = self.backing_file == before.backing_file
                    && self.backing_format == before.backing_format;
                if !same {
                    return Err(Error::invalid(OTHER_BACKING));
                }
            }
            let lazy = node.image().options().lazy_refcounts;
            if let Some(wanted) = self.lazy_refcounts.filter(|wanted| *wanted != lazy) {
                if wanted && self.version < 3 {
                    return Err(Error::invalid(
                        "Lazy refcounts only supported with compatibility level 1.1 and above \
                         (use compat=1.1 or greater)",
                    ));
                }
                serve(bs, node, |image| image.amend_lazy_refcounts(wanted))?;
            }
            if let Some(size) = self.size {
                truncate(bs, size)?;
            }
            if self.version < before.version {
                renew(bs, node, |image| image.downgrade(&mut progress.step()))?;
            }
            Ok(())
        }
    }
}

/// Calls `change` for the image.
///
/// # Safety
/// As for [`Wanted::apply`].
unsafe fn serve<T>(
    bs: *mut sys::BlockDriverState,
    node: &Node,
    change: impl FnOnce(&Image<Qemu>) -> Result<T>,
) -> Result<T> {
    // SAFETY: promised by the caller.
    unsafe { coroutine::run(bs, || node.serve(Access::Write, change)) }
}

/// Calls `change` for the image, and opens it anew as it is then.
///
/// # Safety
/// As for [`Wanted::apply`]. Nobody else uses the image meanwhile.
unsafe fn renew<T>(
    bs: *mut sys::BlockDriverState,
    node: &Node,
    change: impl FnOnce(&Image<Qemu>) -> Result<T>,
) -> Result<T> {
    // SAFETY: promised by the caller.
    unsafe {
        let (answer, image) = serve(bs, node, |image| {
            let answer = change(image)?;
            let (flags, request) = image.opened_with();
            Ok((answer, Image::open(image.host().again(), flags, &request)?))
        })?;
        publish(bs, &image);
        node.replace_image(image);
        Ok(answer)
    }
}

/// Tells how far several steps are, of which those to come are taken to be as
/// long as those so far.
struct Steps<'a> {
    count: u64,
    /// Steps that have begun.
    begun: u64,
    /// Work of the steps that have ended, and of the one that is under way.
    before: u64,
    current: u64,
    tell: &'a dyn Fn(i64, i64),
}

impl<'a> Steps<'a> {
    fn new(count: u64, tell: &'a dyn Fn(i64, i64)) -> Self {
        Self {
            count,
            begun: 0,
            before: 0,
            current: 0,
            tell,
        }
    }

    /// Whom the next step tells how far it is.
    fn step(&mut self) -> impl FnMut(u64, u64) + '_ {
        self.begun += 1;
        self.before += self.current;
        self.current = 0;
        |done, total| {
            self.current = total;
            let so_far = self.before + total;
            let to_come = so_far * self.count.saturating_sub(self.begun) / self.begun;
            if so_far > 0 {
                (self.tell)((self.before + done) as i64, (so_far + to_come) as i64);
            }
        }
    }
}

/// Changes the keys of a LUKS encryption.
///
/// # Safety
/// As for [`Wanted::apply`].
unsafe fn amend_keys(
    bs: *mut sys::BlockDriverState,
    node: &Node,
    opts: *mut sys::QemuOpts,
    force: bool,
) -> Result<()> {
    // SAFETY: promised by the caller; dictionaries and options are ours.
    unsafe {
        let options = crypto::luks_options(opts);
        let mut parsed = ptr::null_mut();
        caught(|errp| {
            parsed = sys::block_crypto_amend_opts_init(options.as_ptr(), errp);
            if parsed.is_null() { -libc::EINVAL } else { 0 }
        })?;
        let result = coroutine::run(bs, || write_keys(node, parsed, force));
        sys::qapi_free_QCryptoBlockAmendOptions(parsed);
        result
    }
}

/// # Safety
/// Called in a coroutine that holds the graph lock for reading; the options
/// are complete.
unsafe fn write_keys(
    node: &Node,
    options: *mut sys::QCryptoBlockAmendOptions,
    force: bool,
) -> Result<()> {
    node.serve(Access::Write, |image| {
        let cipher = image.host().cipher().ok_or(Error::errno(libc::EIO))?;
        // SAFETY: promised by the caller.
        unsafe { cipher.amend(image.host().file(), image.crypto_header(), options, force) }
    })
}

/// Resizes the image as `qemu-img resize` does.
///
/// # Safety
/// As for [`Wanted::apply`].
unsafe fn truncate(bs: *mut sys::BlockDriverState, size: u64) -> Result<()> {
    let size = i64::try_from(size).map_err(|_| Error::errno(libc::EFBIG))?;
    caught(|errp| {
        // SAFETY: promised by the caller; the backend is ours.
        unsafe {
            let rights = u64::from(sys::BLK_PERM_RESIZE);
            let backend = sys::blk_new_with_bs(bs, rights, u64::from(sys::BLK_PERM_ALL), errp);
            if backend.is_null() {
                return -libc::EPERM;
            }
            let ret = sys::blk_truncate(backend, size, true, sys::PREALLOC_MODE_OFF, 0, errp);
            sys::blk_unref(backend);
            ret
        }
    })
    .map(drop)
}

pub(super) unsafe extern "C" fn co_amend(
    bs: *mut sys::BlockDriverState,
    options: *mut sys::BlockdevAmendOptions,
    force: bool,
    errp: ErrorPtr,
) -> c_int {
    contain("amend", -libc::EIO, || {
        // SAFETY: a callback of the driver for `bs`, in a coroutine under the
        // graph lock; the options are complete, and those of qcow2.
        unsafe {
            let Some(node) = Node::of(bs) else {
                return -libc::ENOMEDIUM;
            };
            let keys = (*options).u.qcow2.encrypt;
            if keys.is_null() {
                return 0;
            }
            let refuse = |text| Err(Error::new(libc::EOPNOTSUPP, text));
            let result = match node.image().encryption() {
                None => refuse("image is not encrypted, can't amend"),
                _ if (*keys).format != sys::QCRYPTO_BLOCK_FORMAT_LUKS => {
                    refuse("Amend can't be used to change the qcow2 encryption format")
                }
                Some(Encryption::Aes) => refuse(
                    "Only LUKS encryption options can be amended for qcow2 with blockdev-amend",
                ),
                Some(Encryption::Luks) => write_keys(node, keys, force),
            };
            match result {
                Ok(()) => 0,
                Err(error) => {
                    error::set(errp, &error, "Failed to amend the image");
                    -error.code()
                }
            }
        }
    })
}
