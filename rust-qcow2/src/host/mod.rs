//! What the surroundings provide.
//!
//! The crate is sequential code over these traits. Under QEMU every call that
//! does I/O, takes a lock or waits may switch the coroutine away and resume it
//! in another thread; in tools and tests it blocks the thread. So no guard of
//! a `parking_lot` or `std` lock, no `RefCell` borrow and nothing
//! thread-local may be held across a call into these traits that may suspend.
//! The one lock that may be held across I/O is [`Host::RawMutex`].

pub mod local;
pub mod memory;

use std::ops::DerefMut;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::header::Encryption;
use crate::image::Image;
use crate::units::{GuestOffset, HostOffset};
use lock_api::MutexGuard;

/// The guest memory of one request on the files of `H`.
pub type GuestBuf<'a, H> = <<H as Host>::File as File>::Buf<'a>;

/// The surroundings of one image.
pub trait Host: Send + Sync + Sized + 'static {
    /// A lock that suspends the caller (coroutine or thread) and may be held
    /// across I/O.
    type RawMutex: lock_api::RawMutex + Send + Sync;
    /// A queue of callers that wait for each other under that lock.
    type WaitQueue: WaitQueue<Self::RawMutex>;
    /// A handle on an open file. It is fetched anew for each request, so that
    /// the surroundings may exchange the file between requests.
    type File: File;
    /// Memory that is aligned well enough for direct I/O.
    type Aligned: DerefMut<Target = [u8]> + Send + Sync;
    /// Where in memory that is which a read of an image touches: see
    /// [`Host::prefetch`].
    type Places: Send + Sync;

    /// The image file itself.
    fn file(&self) -> Self::File;

    /// The external data file, where the image has one that was opened.
    fn data_file(&self) -> Option<Self::File> {
        None
    }

    /// Opens the external data file, if the image is `external`, by the user's
    /// choice or by the `name` that the image records. Called while the image
    /// is opened, before anything is written.
    ///
    /// # Errors
    /// Where there is none, or one that the image does not want.
    fn open_data_file(&self, external: bool, name: Option<&[u8]>) -> Result<()> {
        let _ = name;
        if external && self.data_file().is_none() {
            return Err(Error::invalid("'data-file' is required for this image"));
        }
        Ok(())
    }

    /// Prepares the cipher of an image that is `encrypted`, with the keys that
    /// the user gave; without them if nothing is going to be read. Called while
    /// the image is opened, before anything is written.
    ///
    /// # Errors
    /// Where the keys do not fit, or the user expects another encryption.
    fn open_encryption(
        &self,
        encrypted: Option<(Encryption, Option<CryptoHeader>)>,
        _no_io: bool,
    ) -> Result<()> {
        if encrypted.is_some() {
            return Err(Error::unsupported("there is no encryption here"));
        }
        Ok(())
    }

    /// Encrypts or decrypts whole sectors that begin at `offset`.
    ///
    /// # Errors
    /// `EIO`.
    fn crypt(&self, _how: Crypt, _offset: u64, _bytes: &mut [u8]) -> Result<()> {
        Err(Error::errno(libc::EIO))
    }

    /// The backing file, where there is one.
    fn backing(&self) -> Option<Self::File>;

    /// The image in the backing file, where that is one of the same kind which
    /// may be read without asking what is in between (no filter, no
    /// copy-on-read). Its files are read directly then. Never suspends the
    /// caller.
    fn layer_below(&self) -> Option<Arc<Image<Self>>>;

    /// A number that changes whenever what [`Host::layer_below`] answers may
    /// have changed, for this image or any other. While a request is in
    /// flight the answers for the image and those below it do not change.
    /// Never suspends the caller.
    fn generation(&self) -> u64;

    /// The places for reads of `image` by images above it. They are good for
    /// [`Host::prefetch`] only, even when they are out of date. Never suspends
    /// the caller.
    fn places(image: &Arc<Image<Self>>) -> Self::Places;

    /// Has the processor fetch what is in these places, while the caller goes
    /// on. What belongs to the layers of a long chain is more than its caches
    /// hold: one after the other the misses take a quarter of a read that the
    /// page cache answers.
    fn prefetch(_places: &Self::Places) {}

    /// Zeroed memory for a bounce buffer or a metadata table.
    ///
    /// # Errors
    /// `ENOMEM` where there is not enough.
    fn aligned(&self, len: usize) -> Result<Self::Aligned>;

    /// The same with anything in it: for what is overwritten as a whole before
    /// it is read, on ways where zeroing costs more than the rest.
    ///
    /// # Errors
    /// `ENOMEM` where there is not enough.
    fn scratch(&self, len: usize) -> Result<Self::Aligned>;

    /// Runs all tasks, up to `workers` of them at a time, and returns when the
    /// last one has ended. Once a task has failed no further one is started.
    ///
    /// # Errors
    /// That of the task that failed first.
    fn parallel(&self, workers: usize, tasks: Vec<Task<'_>>) -> Result<()>;

    /// Runs work that takes the CPU for long where it holds nobody up, and
    /// waits for it.
    fn offload<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        work()
    }

    /// Tells that metadata is about to be read or written, for those who
    /// inject errors there. Costs nothing where nobody listens.
    fn event(&self, _event: Event) {}

    /// Whether [`Host::trace_read`] is of use to anybody. Asked for each request.
    fn traces_reads(&self) -> bool {
        false
    }

    /// Tells, on the host of the image that is read, where a piece of a guest's
    /// read is served from. Never suspends the caller.
    fn trace_read(&self, _piece: &ReadPiece<'_, Self>) {}

    /// Tells the user of a failure that ends an operation only later, or not.
    fn report(&self, error: &Error);

    /// Warns the user: a sentence, and what to do about it.
    fn warn(&self, sentence: &str, advice: &str);

    /// Tells the user that the image is corrupt (event, log). Called after the
    /// corrupt bit was written where that is possible.
    fn report_corruption(&self, event: &Corruption);
}

/// Where the header of an encryption is in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeader {
    /// First byte.
    pub offset: HostOffset,
    /// Bytes.
    pub len: u64,
}

/// A piece of a read, and what serves it: see [`Host::trace_read`].
pub struct ReadPiece<'a, H> {
    /// First byte.
    pub guest: GuestOffset,
    /// Bytes.
    pub len: u64,
    /// What is there.
    pub what: ServedFrom<'a, H>,
}

/// What serves a piece of a read.
pub enum ServedFrom<'a, H> {
    /// A file of an image, this one or one below.
    Image {
        /// The surroundings of that image.
        host: &'a H,
        /// Images above it; `None` where the chain has changed since.
        depth: Option<usize>,
        /// Where in its file, or in its external data file.
        offset: HostOffset,
        /// Whether the cluster is compressed.
        compressed: bool,
    },
    /// Nothing: they are zeroes.
    Zeroes,
    /// What is below the last image of this kind.
    Below {
        /// Images above it.
        depth: usize,
    },
}

/// What [`Host::crypt`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crypt {
    /// From plain to encrypted bytes.
    Encrypt,
    /// The other way round.
    Decrypt,
}

/// One of the tasks of [`Host::parallel`].
pub type Task<'a> = Box<dyn FnOnce() -> Result<()> + Send + 'a>;

/// Places where errors can be injected: the events of QEMU's `blkdebug` driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of blkdebug")]
pub enum Event {
    L1Update,
    L1GrowAllocTable,
    L1GrowWriteTable,
    L1GrowActivateTable,
    L2Load,
    L2Update,
    L2UpdateCompressed,
    ReadCompressed,
    WriteCompressed,
    L2AllocCowRead,
    L2AllocWrite,
    CowRead,
    CowWrite,
    ReftableLoad,
    ReftableUpdate,
    RefblockLoad,
    RefblockUpdate,
    RefblockAlloc,
    RefblockAllocHookup,
    RefblockAllocWrite,
    RefblockAllocWriteBlocks,
    RefblockAllocWriteTable,
    RefblockAllocSwitchTable,
    ClusterAlloc,
    ClusterAllocBytes,
    ClusterAllocSpace,
    ClusterFree,
    EmptyImagePrepare,
    VmstateSave,
    VmstateLoad,
}

/// What [`Host::report_corruption`] has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// Whether the image cannot be used any further.
    pub fatal: bool,
    /// Where in the file the access was, in bytes, where that is known.
    pub offset: Option<u64>,
    /// Size of the access that met the corruption, in bytes.
    pub size: Option<u64>,
    /// What was found, without a leading "Marking image as corrupt: ".
    pub message: String,
}

/// Callers that wait for an event, under a lock that they give up meanwhile.
pub trait WaitQueue<R: lock_api::RawMutex>: Default + Send + Sync {
    /// Releases the lock of `guard`, waits for [`WaitQueue::wake_all`], and
    /// takes the lock again. May return spuriously.
    fn wait<T>(&self, guard: &mut MutexGuard<'_, R, T>);

    /// Wakes all that wait. Called with the lock held.
    fn wake_all(&self);
}

/// Guest memory, scattered as the guest likes it.
///
/// A copy of the handle denotes the same memory. Two tasks of one request use
/// parts that do not overlap.
pub trait Buf: Copy + Send + Sync {
    /// Fills `len` bytes from `at` with zeroes.
    fn zero(&self, at: usize, len: usize);
    /// Copies `data` into the memory from `at` on.
    fn put(&self, at: usize, data: &[u8]);
    /// Copies memory from `at` on into `data`.
    fn get(&self, at: usize, data: &mut [u8]);
}

/// A piece of a gathered write: see [`File::write_parts`].
#[derive(Clone, Copy)]
pub enum Part<'a, B> {
    /// Driver memory.
    Bytes(&'a [u8]),
    /// `len` bytes of guest memory from `at`.
    Guest {
        /// The memory.
        buf: B,
        /// First byte in it.
        at: usize,
        /// Number of bytes.
        len: usize,
    },
}

/// What a range of a file holds below, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Reads as zeroes.
    Zero,
    /// Anything.
    Data,
}

/// How a file that grows is prepared. QEMU's `PreallocMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// No preallocation.
    #[default]
    Off,
    /// Tables only.
    Metadata,
    /// Reserve space without writing to it.
    Falloc,
    /// Write zeroes to all of it.
    Full,
}

/// Flags of [`File::write_zeroes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The range may be deallocated.
    pub may_unmap: bool,
    /// Fail with `ENOTSUP` rather than write zeroes the slow way.
    pub no_fallback: bool,
}

/// An open file (or any other node) below an image.
pub trait File: Clone + Send + Sync {
    /// The guest memory of one request.
    type Buf<'a>: Buf;

    /// Reads exactly `buf.len()` bytes at `offset`. What lies beyond the end
    /// of the file reads as zeroes.
    ///
    /// # Errors
    /// That of the file.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes all of `buf` at `offset`; the file grows where needed.
    ///
    /// # Errors
    /// That of the file.
    fn write(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Reads `len` bytes at `offset` into guest memory from `at` on. What lies
    /// beyond the end of the file reads as zeroes.
    ///
    /// # Errors
    /// That of the file.
    fn read_guest(&self, offset: u64, buf: Self::Buf<'_>, at: usize, len: usize) -> Result<()>;

    /// Writes `len` bytes of guest memory from `at` on to `offset`.
    ///
    /// # Errors
    /// That of the file.
    fn write_guest(&self, offset: u64, buf: Self::Buf<'_>, at: usize, len: usize) -> Result<()>;

    /// Writes the parts one behind the other from `offset` on, as one request.
    ///
    /// # Errors
    /// That of the file.
    fn write_parts(&self, offset: u64, parts: &[Part<'_, Self::Buf<'_>>]) -> Result<()>;

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// `ENOTSUP` where `flags.no_fallback` is set and there is no fast way.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()>;

    /// Whether [`File::write_zeroes`] with `no_fallback` may succeed.
    fn zeroes_fast(&self) -> bool;

    /// Gives a range back. Its content is undefined afterwards.
    ///
    /// # Errors
    /// That of the file; callers treat them as advice.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// That of the file.
    fn flush(&self) -> Result<()>;

    /// The length of the file in bytes, rounded as the surroundings count it.
    ///
    /// # Errors
    /// That of the file.
    fn length(&self) -> Result<u64>;

    /// How much of the file is allocated on its storage, in bytes, if known.
    fn allocated(&self) -> Option<u64>;

    /// Sets the length. Without `exact` a longer file (a block device) is fine.
    /// With `zero` what is added has to read as zeroes.
    ///
    /// # Errors
    /// That of the file, with its sentence; `ENOTSUP` where `zero` cannot be
    /// promised.
    fn truncate(
        &self,
        len: u64,
        exact: bool,
        preallocation: Preallocation,
        zero: bool,
    ) -> Result<()>;

    /// What `len` bytes at `offset` hold, seen through all that is below, as
    /// far as it can be told: with `precise` the storage may be asked, without
    /// only what is in memory counts. Beyond the end of the file: zeroes. The
    /// returned length is at least 1 and at most `len`, for `len` > 0.
    ///
    /// # Errors
    /// That of the file.
    fn content(&self, offset: u64, len: u64, precise: bool) -> Result<(Content, u64)>;
}
