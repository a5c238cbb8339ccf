//! New images: `blockdev-create` and `qemu-img create`.
//!
//! All functions here are called in a coroutine, in the main thread, without
//! the graph lock.

mod blank;
mod options;

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use rust_qcow2::format::header::CompressionType;
use rust_qcow2::image::create::{self, CreateRequest};
use rust_qcow2::{Error, Result};

use super::manage::{optional_text, preallocation, recorded_format};
use crate::error::{self, ErrorPtr, c_text, caught, check};
use crate::panic::contain;
use crate::sys;

use blank::BlankFile;
use options::Creation;

/// A reference to a node.
struct NodeRef(*mut sys::BlockDriverState);

impl Drop for NodeRef {
    fn drop(&mut self) {
        // SAFETY: the reference is ours; called in a coroutine.
        unsafe { sys::bdrv_co_unref(self.0) };
    }
}

/// A block backend of our own.
struct Backend(*mut sys::BlockBackend);

impl Drop for Backend {
    fn drop(&mut self) {
        // SAFETY: the reference is ours; called in a coroutine.
        unsafe { sys::blk_co_unref(self.0) };
    }
}

/// The graph, locked for reading.
struct GraphLock(());

impl GraphLock {
    fn new() -> Self {
        // SAFETY: called in a coroutine that does not hold the lock.
        unsafe { sys::bdrv_graph_co_rdlock() };
        Self(())
    }
}

impl Drop for GraphLock {
    fn drop(&mut self) {
        // SAFETY: taken in `new`, in the same coroutine.
        unsafe { sys::bdrv_graph_co_rdunlock() };
    }
}

/// Calls a function of QEMU that returns null after it has set an error;
/// `errno` is what C would return then.
fn pointer<T>(errno: c_int, f: impl FnOnce(ErrorPtr) -> *mut T) -> Result<*mut T> {
    let mut result = ptr::null_mut();
    caught(|errp| {
        result = f(errp);
        if result.is_null() { -errno } else { 0 }
    })?;
    Ok(result)
}

/// What a function that failed returns, with the text in `*errp`.
///
/// # Safety
/// `errp` is null or an error pointer of QEMU that is not set yet.
unsafe fn answer(errp: ErrorPtr, result: Result<()>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(error) => {
            // SAFETY: promised by the caller.
            unsafe { error::set(errp, &error, "Could not create image") };
            -error.code()
        }
    }
}

pub(super) unsafe extern "C" fn co_create(
    options: *mut sys::BlockdevCreateOptions,
    errp: ErrorPtr,
) -> c_int {
    contain("create", -libc::EIO, || {
        // SAFETY: QEMU passes the options of an image of this driver.
        unsafe { answer(errp, create_image(&*options)) }
    })
}

pub(super) unsafe extern "C" fn co_create_opts(
    driver: *mut sys::BlockDriver,
    filename: *const c_char,
    opts: *mut sys::QemuOpts,
    errp: ErrorPtr,
) -> c_int {
    contain("create", -libc::EIO, || {
        // SAFETY: QEMU passes the table of this driver, a file name, and
        // options of its list.
        unsafe { answer(errp, create_file(driver, filename, opts)) }
    })
}

/// Creates the file, and the image in it.
///
/// # Safety
/// The arguments are those of `co_create_opts`.
unsafe fn create_file(
    driver: *mut sys::BlockDriver,
    filename: *const c_char,
    opts: *mut sys::QemuOpts,
) -> Result<()> {
    // SAFETY: promised by the caller. The file goes again if the image cannot
    // be made.
    unsafe {
        let mut creation = Creation::new(opts)?;
        caught(|errp| sys::bdrv_co_create_file(filename, opts, errp))?;
        let file = NodeRef(pointer(libc::EIO, |errp| {
            let flags = sys::BDRV_O_RDWR | sys::BDRV_O_RESIZE | sys::BDRV_O_PROTOCOL;
            let (reference, options) = (ptr::null(), ptr::null_mut());
            sys::bdrv_co_open(filename, reference, options, flags as c_int, errp)
        })?);
        let result = creation
            .finish((*driver).format_name, (*file.0).node_name.as_ptr())
            .and_then(|options| create_image(options));
        if result.is_err() {
            let _lock = GraphLock::new();
            sys::bdrv_co_delete_file_noerr(file.0);
        }
        result
    }
}

/// What the options ask for, as far as it is served.
///
/// # Safety
/// `options` are complete.
unsafe fn request(options: &sys::BlockdevCreateOptionsQcow2) -> Result<CreateRequest> {
    if !options.encrypt.is_null() {
        return Err(Error::unsupported("rqcow2 does not support encryption yet"));
    }
    if !options.data_file.is_null() || options.data_file_raw {
        return Err(Error::unsupported(
            "rqcow2 does not support external data files yet",
        ));
    }
    let given = |has: bool, value: i64| {
        // A negative number becomes one that is refused.
        has.then(|| u64::try_from(value).unwrap_or(0))
    };
    Ok(CreateRequest {
        size: options.size,
        version: options.has_version.then_some(match options.version {
            sys::BLOCKDEV_QCOW2_VERSION_V2 => 2,
            _ => 3,
        }),
        cluster_size: options.has_cluster_size.then_some(options.cluster_size),
        refcount_bits: given(options.has_refcount_bits, options.refcount_bits),
        lazy_refcounts: options.has_lazy_refcounts && options.lazy_refcounts,
        compression: match options.compression_type {
            sys::QCOW2_COMPRESSION_TYPE_ZSTD if options.has_compression_type => {
                CompressionType::Zstd
            }
            _ => CompressionType::Zlib,
        },
        extended_l2: options.has_extended_l2 && options.extended_l2,
        backing_file: !options.backing_file.is_null(),
        backing_format: options.has_backing_fmt,
        preallocation: if options.has_preallocation {
            preallocation(options.preallocation)?
        } else {
            Default::default()
        },
    })
}

/// The name of a driver.
///
/// # Safety
/// `driver` is one of QEMU's.
unsafe fn driver_name(driver: sys::BlockdevDriver) -> &'static CStr {
    // SAFETY: promised by the caller; the table has static strings.
    unsafe {
        let name = sys::qapi_enum_lookup(&raw const sys::BlockdevDriver_lookup, driver as c_int);
        CStr::from_ptr(name)
    }
}

/// Creates the image in a file that exists.
///
/// # Safety
/// `options` are complete and for this driver, under either of its names.
unsafe fn create_image(options: &sys::BlockdevCreateOptions) -> Result<()> {
    // SAFETY: promised by the caller; the options of both names are the same
    // type at the same place.
    unsafe {
        let name = driver_name(options.driver);
        let options = &options.u.qcow2;
        let file = NodeRef(pointer(libc::EIO, |errp| {
            sys::bdrv_co_open_blockdev_ref(options.file, errp)
        })?);
        let params = create::validate(&request(options)?)?;
        create::format(&BlankFile::new(file.0)?, &params)?;

        let image = open(name, &file, sys::BDRV_O_RESIZE | sys::BDRV_O_NO_FLUSH)?;
        resize(&image, options)?;
        set_backing(&image, options)?;
        drop(image);

        // Opened without NO_FLUSH, so that closing it flushes it.
        open(name, &file, sys::BDRV_O_NO_BACKING | sys::BDRV_O_NO_IO).map(drop)
    }
}

/// Opens the new image for writing, with the driver `name`.
///
/// # Safety
/// `file` is an open node.
unsafe fn open(name: &CStr, file: &NodeRef, flags: u32) -> Result<Backend> {
    // SAFETY: promised by the caller; the dictionary is passed on.
    unsafe {
        let options = sys::qdict_new();
        sys::qdict_put_str(options, c"driver".as_ptr(), name.as_ptr());
        sys::qdict_put_str(options, c"file".as_ptr(), (*file.0).node_name.as_ptr());
        let flags = (sys::BDRV_O_RDWR | flags) as c_int;
        pointer(libc::EIO, |errp| {
            sys::blk_co_new_open(ptr::null(), ptr::null(), options, flags, errp)
        })
        .map(Backend)
    }
}

/// Gives the image its size.
///
/// # Safety
/// `options` are complete.
unsafe fn resize(image: &Backend, options: &sys::BlockdevCreateOptionsQcow2) -> Result<()> {
    let size = i64::try_from(options.size).map_err(|_| Error::errno(libc::EFBIG));
    let mode = if options.has_preallocation {
        options.preallocation
    } else {
        sys::PREALLOC_MODE_OFF
    };
    let resized = size.and_then(|size| {
        caught(|errp| {
            // SAFETY: the backend is ours.
            unsafe { sys::blk_co_truncate(image.0, size, false, mode, 0, errp) }
        })
    });
    resized
        .map(|_| ())
        .map_err(|error| Error::new(error.code(), format!("Could not resize image: {error}")))
}

/// Records the backing file.
///
/// # Safety
/// `options` are complete.
unsafe fn set_backing(image: &Backend, options: &sys::BlockdevCreateOptionsQcow2) -> Result<()> {
    // SAFETY: promised by the caller; the texts live as long as the options.
    unsafe {
        let Some(file) = optional_text(options.backing_file)? else {
            return Ok(());
        };
        let format = if options.has_backing_fmt {
            optional_text(driver_name(options.backing_fmt).as_ptr())?
        } else {
            None
        };
        let recorded = format.map(|name| c_text(recorded_format(name)));
        let ret = {
            let _lock = GraphLock::new();
            sys::bdrv_co_change_backing_file(
                sys::blk_bs(image.0),
                options.backing_file,
                recorded.as_ref().map_or(ptr::null(), |name| name.as_ptr()),
                false,
            )
        };
        check(ret).map(|_| ()).map_err(|error| {
            let format = format.unwrap_or("(null)");
            error.context(format!(
                "Could not assign backing file '{file}' with format '{format}'"
            ))
        })
    }
}
