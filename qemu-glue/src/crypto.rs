//! QEMU's own encryption of disks: `QCryptoBlock`.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::slice;

use rust_qcow2::format::header::Encryption;
use rust_qcow2::host::{Crypt, CryptoHeader, File, Host};
use rust_qcow2::image::Image;
use rust_qcow2::{Error, Result};

use crate::child::Child;
use crate::error::{self, ErrorPtr, caught, check};
use crate::host::Qemu;
use crate::options::SubDict;
use crate::panic::contain;
use crate::sys;

/// The cipher of an open image.
pub(crate) struct Cipher(*mut sys::QCryptoBlock);

// SAFETY: QEMU's drivers use one `QCryptoBlock` in several threads at a time;
// it locks what has to be locked.
unsafe impl Send for Cipher {}
// SAFETY: as above.
unsafe impl Sync for Cipher {}

impl Drop for Cipher {
    fn drop(&mut self) {
        // SAFETY: the block is ours, and nobody uses it any more.
        unsafe { sys::qcrypto_block_free(self.0) };
    }
}

/// Refuses options that speak of another encryption than the image has.
pub(crate) fn check_format(named: Option<&str>, encryption: Option<Encryption>) -> Result<()> {
    let (Some(named), known) = (named, encryption.map(format_name)) else {
        return Ok(());
    };
    match known {
        None => Err(Error::invalid(format!(
            "No encryption in image header, but options specified format '{named}'"
        ))),
        Some(known) if known != named => Err(Error::invalid(format!(
            "Header reported '{known}' encryption format but options specify '{named}'"
        ))),
        Some(_) => Ok(()),
    }
}

/// How users call it.
fn format_name(encryption: Encryption) -> &'static str {
    match encryption {
        Encryption::Aes => "aes",
        Encryption::Luks => "luks",
    }
}

/// What the callbacks need to find the header.
struct Place<'a> {
    file: Child,
    header: Option<CryptoHeader>,
    /// The image, where the header has still to be made.
    image: Option<&'a Image<Qemu>>,
}

/// The place of `len` bytes at `offset` of a header.
fn place(header: Option<CryptoHeader>, offset: usize, len: usize) -> Result<u64> {
    let end = offset.checked_add(len);
    match (header, end) {
        (Some(header), Some(end)) if end as u64 <= header.len => {
            Ok(header.offset.bytes().saturating_add(offset as u64))
        }
        _ => Err(Error::invalid(
            "Request for data outside of extension header",
        )),
    }
}

/// What a callback returns.
///
/// # Safety
/// `errp` comes from QEMU and is not set.
unsafe fn answer(result: Result<()>, errp: ErrorPtr) -> c_int {
    match result {
        Ok(()) => 0,
        Err(error) => {
            // SAFETY: promised by the caller.
            unsafe { error::set(errp, &error, "Could not access encryption header") };
            -1
        }
    }
}

unsafe extern "C" fn read_header(
    _block: *mut sys::QCryptoBlock,
    offset: usize,
    buf: *mut u8,
    len: usize,
    opaque: *mut c_void,
    errp: ErrorPtr,
) -> c_int {
    contain("reading the encryption header", -1, || {
        // SAFETY: the pointer is that of the function that waits for this, the
        // memory as long as said, and we are in a coroutine under the graph
        // lock.
        unsafe {
            let access = &*opaque.cast_const().cast::<Place<'_>>();
            let bytes = slice::from_raw_parts_mut(buf, len);
            let result = place(access.header, offset, len).and_then(|at| {
                let read = access.file.read(at, bytes);
                read.map_err(|error| error.context("Could not read encryption header"))
            });
            answer(result, errp)
        }
    })
}

/// One piece of work for a thread.
struct Work {
    block: *mut sys::QCryptoBlock,
    how: Crypt,
    offset: u64,
    bytes: *mut u8,
    len: usize,
}

unsafe extern "C" fn work(opaque: *mut c_void) -> c_int {
    // SAFETY: the pointer is that of `Cipher::crypt`, which waits for the end
    // of this; nobody else uses the memory meanwhile.
    unsafe {
        let work = &*opaque.cast_const().cast::<Work>();
        let function = match work.how {
            Crypt::Encrypt => sys::qcrypto_block_encrypt,
            Crypt::Decrypt => sys::qcrypto_block_decrypt,
        };
        function(
            work.block,
            work.offset,
            work.bytes,
            work.len,
            ptr::null_mut(),
        )
    }
}

impl Cipher {
    /// The cipher of the image in `file`, with the keys that `options` name.
    ///
    /// # Errors
    /// Those of QEMU, in its words.
    ///
    /// # Safety
    /// Called in a coroutine that holds the graph lock for reading, in the main
    /// thread.
    pub(crate) unsafe fn open(
        options: &SubDict,
        encryption: Encryption,
        header: Option<CryptoHeader>,
        file: Child,
        no_io: bool,
    ) -> Result<Self> {
        // SAFETY: asks for a setting.
        if encryption == Encryption::Aes && unsafe { sys::bdrv_uses_whitelist() } {
            return Err(Error::new(
                libc::ENOSYS,
                "Use of AES-CBC encrypted qcow2 images is no longer supported in system emulators",
            ));
        }
        options.put(
            c"format",
            match encryption {
                Encryption::Aes => c"qcow",
                Encryption::Luks => c"luks",
            },
        );
        let mut parsed = ptr::null_mut();
        caught(|errp| {
            // SAFETY: the dictionary lives as long as the call.
            parsed = unsafe { sys::block_crypto_open_opts_init(options.as_ptr(), errp) };
            if parsed.is_null() { -libc::EINVAL } else { 0 }
        })?;
        let mut access = Place {
            file,
            header,
            image: None,
        };
        let flags = if no_io {
            sys::QCRYPTO_BLOCK_OPEN_NO_IO
        } else {
            0
        };
        let mut block = ptr::null_mut();
        let opened = caught(|errp| {
            // SAFETY: the options are ours; what the callback is passed lives
            // as long as the call.
            block = unsafe {
                sys::qcrypto_block_open(
                    parsed,
                    c"encrypt.".as_ptr(),
                    Some(read_header),
                    (&raw mut access).cast(),
                    flags,
                    errp,
                )
            };
            if block.is_null() { -libc::EINVAL } else { 0 }
        });
        // SAFETY: the options are ours.
        unsafe { sys::qapi_free_QCryptoBlockOpenOptions(parsed) };
        opened?;
        Ok(Self(block))
    }

    /// Encrypts or decrypts, in a thread of QEMU's pool. Called in a coroutine.
    pub(crate) fn crypt(&self, how: Crypt, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut task = Work {
            block: self.0,
            how,
            offset,
            bytes: bytes.as_mut_ptr(),
            len: bytes.len(),
        };
        // SAFETY: in a coroutine; `task` lives until the thread is done.
        let ret = unsafe { sys::thread_pool_submit_co(Some(work), (&raw mut task).cast()) };
        check(ret).map(drop).map_err(|_| Error::errno(libc::EIO))
    }

    /// Changes the keys in the header.
    ///
    /// # Errors
    /// Those of QEMU, in its words.
    ///
    /// # Safety
    /// Called in a coroutine that holds the graph lock for reading; `options`
    /// are complete.
    pub(crate) unsafe fn amend(
        &self,
        file: Child,
        header: Option<CryptoHeader>,
        options: *mut sys::QCryptoBlockAmendOptions,
        force: bool,
    ) -> Result<()> {
        let mut access = Place {
            file,
            header,
            image: None,
        };
        caught(|errp| {
            // SAFETY: promised by the caller; what the callbacks are passed
            // lives as long as the call.
            let ret = unsafe {
                sys::qcrypto_block_amend_options(
                    self.0,
                    Some(read_header),
                    Some(write_header),
                    (&raw mut access).cast(),
                    options,
                    force,
                    errp,
                )
            };
            if ret < 0 { -libc::EPERM } else { 0 }
        })
        .map(drop)
    }

    /// What is to be told of it; the caller frees it.
    pub(crate) fn info(&self, errp: ErrorPtr) -> *mut sys::QCryptoBlockInfo {
        // SAFETY: the block is alive; errp comes from QEMU.
        unsafe { sys::qcrypto_block_get_info(self.0, errp) }
    }
}

/// Bytes of the header of a LUKS encryption as the options of a new image want
/// it.
///
/// # Errors
/// Those of QEMU, in its words.
///
/// # Safety
/// `opts` are options.
pub(crate) unsafe fn header_size(opts: *mut sys::QemuOpts) -> Result<u64> {
    // SAFETY: promised by the caller; the dictionaries are ours.
    unsafe {
        let options = luks_options(opts);
        let mut parsed = ptr::null_mut();
        caught(|errp| {
            parsed = sys::block_crypto_create_opts_init(options.as_ptr(), errp);
            if parsed.is_null() { -libc::EINVAL } else { 0 }
        })?;
        let mut len = 0;
        let result = caught(|errp| {
            let prefix = c"encrypt.".as_ptr();
            let fine =
                sys::qcrypto_block_calculate_payload_offset(parsed, prefix, &raw mut len, errp);
            if fine { 0 } else { -libc::EINVAL }
        });
        sys::qapi_free_QCryptoBlockCreateOptions(parsed);
        result?;
        Ok(len as u64)
    }
}

/// The options of a LUKS encryption among those of an image, as QEMU's crypto
/// has them.
///
/// # Safety
/// `opts` are options.
pub(crate) unsafe fn luks_options(opts: *mut sys::QemuOpts) -> SubDict {
    // SAFETY: promised by the caller; the dictionaries are ours.
    unsafe {
        let all = sys::qemu_opts_to_qdict(opts, ptr::null_mut());
        let options = SubDict::take(all, c"encrypt.");
        sys::rq_qdict_unref(all);
        options.put(c"format", c"luks");
        options
    }
}

unsafe extern "C" fn init_header(
    _block: *mut sys::QCryptoBlock,
    len: usize,
    opaque: *mut c_void,
    errp: ErrorPtr,
) -> c_int {
    contain("making the encryption header", -1, || {
        // SAFETY: the pointer is that of `create`, which waits for this.
        unsafe {
            let access = &mut *opaque.cast::<Place<'_>>();
            let made = match access.image {
                Some(image) => image.allocate_crypto_header(len as u64),
                None => Err(Error::errno(libc::EINVAL)),
            };
            let result = made.map(|header| access.header = Some(header));
            answer(
                result.map_err(|error| {
                    error.context(format!(
                        "Cannot allocate cluster for LUKS header size {len}"
                    ))
                }),
                errp,
            )
        }
    })
}

unsafe extern "C" fn write_header(
    _block: *mut sys::QCryptoBlock,
    offset: usize,
    buf: *const u8,
    len: usize,
    opaque: *mut c_void,
    errp: ErrorPtr,
) -> c_int {
    contain("writing the encryption header", -1, || {
        // SAFETY: as for `init_header`; the memory is as long as said.
        unsafe {
            let access = &*opaque.cast_const().cast::<Place<'_>>();
            let bytes = slice::from_raw_parts(buf, len);
            let result = place(access.header, offset, len).and_then(|at| {
                let written = access.file.write(at, bytes);
                written.map_err(|error| error.context("Could not read encryption header"))
            });
            answer(result, errp)
        }
    })
}

/// Encrypts an image that is empty as yet. It has to be opened anew afterwards.
///
/// # Errors
/// Those of QEMU, in its words, and those of the file.
///
/// # Safety
/// Called in a coroutine that holds the graph lock for reading; `options` are
/// complete.
pub(crate) unsafe fn create(
    image: &Image<Qemu>,
    options: *mut sys::QCryptoBlockCreateOptions,
) -> Result<()> {
    // SAFETY: promised by the caller.
    let encryption = match unsafe { (*options).format } {
        sys::QCRYPTO_BLOCK_FORMAT_LUKS => Encryption::Luks,
        sys::QCRYPTO_BLOCK_FORMAT_QCOW => Encryption::Aes,
        _ => return Err(Error::invalid("Crypto format not supported in qcow2")),
    };
    let mut access = Place {
        file: image.host().file(),
        header: None,
        image: Some(image),
    };
    caught(|errp| {
        // SAFETY: what the callbacks are passed lives as long as the call.
        unsafe {
            let block = sys::qcrypto_block_create(
                options,
                c"encrypt.".as_ptr(),
                Some(init_header),
                Some(write_header),
                (&raw mut access).cast(),
                0,
                errp,
            );
            if block.is_null() {
                return -libc::EINVAL;
            }
            sys::qcrypto_block_free(block);
        }
        0
    })?;
    image
        .record_encryption(encryption, access.header)
        .map_err(|error| error.context("Could not write encryption header"))
}
