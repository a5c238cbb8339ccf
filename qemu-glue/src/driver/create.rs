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

use super::manage::{preallocation, recorded_format};
use crate::crypto;
use crate::error::{self, ErrorPtr, check};
use crate::node::{Access, Node};
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

/// Why an image could not be made.
enum Failure {
    /// The text is in `*errp` already, with all its hints; the positive error
    /// number.
    Told(c_int),
    /// This has still to be told.
    Untold(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Untold(error)
    }
}

/// What a function of QEMU returned that sets `*errp` when it fails.
fn told(ret: c_int) -> Result<(), Failure> {
    check(ret)
        .map(drop)
        .map_err(|error| Failure::Told(error.code()))
}

/// The same for pointers; `errno` is what C would return for null.
fn told_pointer<T>(errno: c_int, pointer: *mut T) -> Result<*mut T, Failure> {
    if pointer.is_null() {
        Err(Failure::Told(errno))
    } else {
        Ok(pointer)
    }
}

/// What C is told.
///
/// # Safety
/// `errp` is the one that `result` speaks of.
unsafe fn answer(errp: ErrorPtr, result: Result<(), Failure>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(Failure::Told(errno)) => -errno,
        Err(Failure::Untold(error)) => {
            // SAFETY: promised by the caller; it is not set yet.
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
        unsafe { answer(errp, create_image(&*options, errp)) }
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
        unsafe { answer(errp, create_file(driver, filename, opts, errp)) }
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
    errp: ErrorPtr,
) -> Result<(), Failure> {
    // SAFETY: promised by the caller. The file goes again if the image cannot
    // be made.
    unsafe {
        let mut creation = Creation::new(opts)?;
        let file = create_protocol(filename, opts, errp)?;
        let mut data_file = None;
        let mut fill = || {
            if let Some(name) = creation.data_file() {
                let created = create_protocol(name.as_ptr(), opts, errp)?;
                creation.set_data_file((*created.0).node_name.as_ptr());
                data_file = Some(created);
            }
            let options = creation.finish((*driver).format_name, (*file.0).node_name.as_ptr())?;
            create_image(options, errp)
        };
        let result = fill();
        if result.is_err() {
            let _lock = GraphLock::new();
            sys::bdrv_co_delete_file_noerr(file.0);
            if let Some(data_file) = &data_file {
                sys::bdrv_co_delete_file_noerr(data_file.0);
            }
        }
        result
    }
}

/// Creates and opens a file.
///
/// # Safety
/// As for [`create_file`].
unsafe fn create_protocol(
    filename: *const c_char,
    opts: *mut sys::QemuOpts,
    errp: ErrorPtr,
) -> Result<NodeRef, Failure> {
    // SAFETY: promised by the caller.
    unsafe {
        told(sys::bdrv_co_create_file(filename, opts, errp))?;
        let flags = (sys::BDRV_O_RDWR | sys::BDRV_O_RESIZE | sys::BDRV_O_PROTOCOL) as c_int;
        let file = sys::bdrv_co_open(filename, ptr::null(), ptr::null_mut(), flags, errp);
        told_pointer(libc::EIO, file).map(NodeRef)
    }
}

/// What the options ask for, as far as it is served.
///
/// # Safety
/// `options` are complete.
unsafe fn request(options: &sys::BlockdevCreateOptionsQcow2) -> Result<CreateRequest> {
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
        data_file: !options.data_file.is_null(),
        data_file_raw: options.data_file_raw,
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
unsafe fn create_image(
    options: &sys::BlockdevCreateOptions,
    errp: ErrorPtr,
) -> Result<(), Failure> {
    // SAFETY: promised by the caller; the options of both names are the same
    // type at the same place.
    unsafe {
        let name = driver_name(options.driver);
        let options = &options.u.qcow2;
        let file = sys::bdrv_co_open_blockdev_ref(options.file, errp);
        let file = NodeRef(told_pointer(libc::EIO, file)?);
        let params = create::validate(&request(options)?)?;
        let data_file = if options.data_file.is_null() {
            None
        } else {
            let node = sys::bdrv_co_open_blockdev_ref(options.data_file, errp);
            Some(NodeRef(told_pointer(libc::EIO, node)?))
        };
        let data_name = data_file.as_ref().map(|file| {
            let name = CStr::from_ptr((*file.0).filename.as_ptr());
            name.to_bytes()
        });
        create::format(&BlankFile::new(file.0, errp)?, &params, data_name)?;

        let flags = sys::BDRV_O_RESIZE | sys::BDRV_O_NO_FLUSH;
        let image = open(name, &file, data_file.as_ref(), flags, errp)?;
        resize(&image, options, errp)?;
        set_backing(&image, options)?;
        if !options.encrypt.is_null() {
            let _lock = GraphLock::new();
            let node = Node::of(sys::blk_bs(image.0)).ok_or(Error::errno(libc::EIO))?;
            node.serve(Access::Write, |image| {
                crypto::create(image, options.encrypt)
            })?;
        }
        drop(image);

        // Opened without NO_FLUSH, so that closing it flushes it.
        let flags = sys::BDRV_O_NO_BACKING | sys::BDRV_O_NO_IO;
        open(name, &file, data_file.as_ref(), flags, errp).map(drop)
    }
}

/// Opens the new image for writing, with the driver `name`.
///
/// # Safety
/// `file` and `data_file` are open nodes.
unsafe fn open(
    name: &CStr,
    file: &NodeRef,
    data_file: Option<&NodeRef>,
    flags: u32,
    errp: ErrorPtr,
) -> Result<Backend, Failure> {
    // SAFETY: promised by the caller; the dictionary is passed on.
    unsafe {
        let options = sys::qdict_new();
        sys::qdict_put_str(options, c"driver".as_ptr(), name.as_ptr());
        sys::qdict_put_str(options, c"file".as_ptr(), (*file.0).node_name.as_ptr());
        if let Some(data_file) = data_file {
            let name = (*data_file.0).node_name.as_ptr();
            sys::qdict_put_str(options, c"data-file".as_ptr(), name);
        }
        let flags = (sys::BDRV_O_RDWR | flags) as c_int;
        let backend = sys::blk_co_new_open(ptr::null(), ptr::null(), options, flags, errp);
        told_pointer(libc::EIO, backend).map(Backend)
    }
}

/// Gives the image its size.
///
/// # Safety
/// `options` are complete.
unsafe fn resize(
    image: &Backend,
    options: &sys::BlockdevCreateOptionsQcow2,
    errp: ErrorPtr,
) -> Result<(), Failure> {
    // A size that is negative then is refused with the sentence for it.
    let size = options.size as i64;
    let mode = if options.has_preallocation {
        options.preallocation
    } else {
        sys::PREALLOC_MODE_OFF
    };
    // SAFETY: the backend is ours; errp is set when the call fails.
    unsafe {
        let ret = sys::blk_co_truncate(image.0, size, false, mode, 0, errp);
        if ret < 0 {
            error::prepend(errp, c"Could not resize image: ");
        }
        told(ret)
    }
}

/// Records the backing file.
///
/// # Safety
/// `options` are complete.
unsafe fn set_backing(image: &Backend, options: &sys::BlockdevCreateOptionsQcow2) -> Result<()> {
    // SAFETY: promised by the caller; the texts live as long as the options.
    unsafe {
        let Some(file) = crate::options::name(options.backing_file) else {
            return Ok(());
        };
        let format = options
            .has_backing_fmt
            .then(|| driver_name(options.backing_fmt));
        let ret = {
            let _lock = GraphLock::new();
            sys::bdrv_co_change_backing_file(
                sys::blk_bs(image.0),
                options.backing_file,
                format.map_or(ptr::null(), |name| recorded_format(name).as_ptr()),
                false,
            )
        };
        check(ret).map(|_| ()).map_err(|error| {
            error.context(format!(
                "Could not assign backing file '{}' with format '{}'",
                file.to_string_lossy(),
                format.unwrap_or(c"(null)").to_string_lossy()
            ))
        })
    }
}
