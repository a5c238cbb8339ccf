//! One image file: what a block driver does with it.
//!
//! An [`Image`] is shared by all requests in flight. What changes sits behind
//! three kinds of protection:
//!
//! - the metadata lock (`state`): allocator, refcounts, dirty tables.
//!   It is the host's lock and is held across metadata I/O, never across the
//!   I/O of guest data;
//! - short locks inside of the L1 table and the cache of L2 slices, which are
//!   never held across a call into the host. A read whose slice is in the
//!   cache takes only these;
//! - atomics, for entries of tables and for counters.
//!
//! Room by room: [`open`](Image::open) reads the header and tables, `map`
//! finds clusters in the `l1` table and the cache of L2 slices, `pieces` for a
//! chain. `read`, `write` with `cow` and `pending` allocations, `zero`,
//! `subclusters`, `compressed`, `crypt` and `data` (files of their own) serve the
//! guest, `status` says what is where. `alloc` and `refcounts` own the space of
//! the file, `inflight` keeps what is freed from being reused too early, `space`
//! gives it back, `overlap` guards metadata from data. `writeback` owns the order
//! of metadata writes, `header_update` the header. Whole images: `create`,
//! `measure`, `resize` and `shrink`, `empty`, `amend`, `snapshots`, `bitmaps`;
//! `check` verifies and repairs.

mod alloc;
pub mod amend;
pub mod bitmaps;
pub mod check;
mod compressed;
mod cow;
pub mod create;
mod crypt;
mod data;
mod empty;
#[cfg(test)]
pub(crate) mod handover;
mod header_update;
mod inflight;
mod l1;
mod map;
pub mod measure;
pub(crate) mod open;
mod options;
mod overlap;
mod pending;
mod pieces;
mod read;
mod refcounts;
mod resize;
mod shrink;
pub mod snapshots;
mod space;
mod status;
mod subclusters;
mod write;
mod writeback;
mod zero;

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use lock_api::{Mutex, MutexGuard};
use parking_lot::RwLock;

pub use options::{CacheSizes, OpenFlags, OptionRequest, Options};
pub use status::{BlockStatus, StatusKind};

use crate::cache::l2::L2Cache;
use crate::cache::pool::Pool;
use crate::chain::view::Links;
use crate::error::{Error, Result};
use crate::format::extension::Extensions;
use crate::format::geometry::Geometry;
use crate::format::header::{CompressionType, Encryption, Header, Incompatible};
use crate::host::Host;

/// How many parts of a request are resolved before they are run.
const MAX_PIECES: usize = 64;
/// How many parts of a request run at a time.
const MAX_WORKERS: usize = 8;

use inflight::InFlight;
pub(crate) use inflight::{Held, Token};
use l1::L1Table;
pub(crate) use map::Run;
use pending::PendingAllocations;
pub(crate) use pieces::{NumberedEntry, TablePiece};

/// An open image. What a read by an image above needs of it comes first: see
/// [`Image::hot_memory`].
#[repr(C)]
pub struct Image<H: Host> {
    host: H,
    geometry: Geometry,
    /// How guest data are encrypted.
    encryption: Option<Encryption>,
    /// Requests that use host offsets they have looked up.
    inflight: InFlight,
    /// Size of the disk in bytes, as in the header.
    size: AtomicU64,
    /// The L1 table in use.
    l1: L1Table,
    /// Slices of L2 tables.
    l2: Arc<L2Cache>,
    /// The memory of the chain while this image is on top.
    own_pool: Arc<Pool>,
    /// Where metadata is; made when first needed.
    overlap: RwLock<Option<overlap::MetadataMap>>,
    /// What it knows of the images below, and those above of it.
    links: Links<H>,
    /// A fatal corruption was met: nothing may be done with the image.
    broken: AtomicBool,
    /// Whether far fewer clusters are allocated on the storage than counted:
    /// known after the first block status.
    sparse: OnceLock<bool>,
    /// What a person may ask for at any time; no lock is held across I/O.
    shared: RwLock<Shared>,
    /// The metadata lock.
    state: Mutex<H::RawMutex, State<H>>,
}

/// What is read without the metadata lock and changes rarely.
struct Shared {
    header: Header,
    extensions: Extensions,
    backing_file: Option<Vec<u8>>,
    flags: OpenFlags,
    options: Options,
    /// What the user asked for; it depends on the size of the disk what that
    /// amounts to.
    request: OptionRequest,
    /// The internal snapshots.
    snapshots: snapshots::SnapshotTable,
    /// A snapshot is shown instead of the disk.
    shows_snapshot: bool,
    /// A corruption was reported to the user already.
    corruption_signaled: bool,
}

/// What the metadata lock protects.
struct State<H: Host> {
    refcounts: refcounts::Refcounts<H>,
    order: writeback::Order,
    allocations: PendingAllocations<H>,
    /// Guest data goes to no cluster below this one, while preallocation needs
    /// space that was never used.
    data_floor: u64,
}

/// The locked [`State`].
type StateGuard<'a, H> = MutexGuard<'a, <H as Host>::RawMutex, State<H>>;

/// What `qemu-img info` and QMP tell about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Version of the format, 2 or 3 (`compat` 0.10 and 1.1).
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bytes of the smallest part of a cluster that is allocated by itself.
    pub subcluster_size: u64,
    /// Width of the refcounts in bits.
    pub refcount_bits: u32,
    /// The lazy refcounts bit of the header.
    pub lazy_refcounts: bool,
    /// The corrupt bit.
    pub corrupt: bool,
    /// The dirty bit.
    pub dirty: bool,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// Whether L2 entries know subclusters.
    pub extended_l2: bool,
    /// Name of the backing file as recorded.
    pub backing_file: Option<Vec<u8>>,
    /// Format of the backing file as recorded.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file as recorded.
    pub data_file: Option<Vec<u8>>,
    /// Whether guest data are in a file of their own.
    pub external_data: bool,
    /// Whether that file is a raw image of the disk.
    pub raw_data_file: bool,
    /// Where the area behind the guest's disk begins.
    pub vm_state_offset: u64,
}

impl<H: Host> Image<H> {
    /// What the header says now.
    pub fn info(&self) -> ImageInfo {
        use crate::format::header::{Autoclear, Compatible, Incompatible};
        let shared = self.shared.read();
        let header = &shared.header;
        ImageInfo {
            size: header.size,
            version: header.version,
            cluster_size: self.geometry.cluster_size(),
            subcluster_size: 1 << self.geometry.subcluster_bits(),
            refcount_bits: self.geometry.refcount_order.bits(),
            lazy_refcounts: header.compatible.contains(Compatible::LAZY_REFCOUNTS),
            corrupt: header.incompatible.contains(Incompatible::CORRUPT),
            dirty: header.incompatible.contains(Incompatible::DIRTY),
            compression: header.compression_type().unwrap_or_default(),
            extended_l2: header.incompatible.contains(Incompatible::EXTENDED_L2),
            backing_file: shared.backing_file.clone(),
            backing_format: shared.extensions.backing_format.clone(),
            data_file: shared.extensions.data_file.clone(),
            external_data: header.incompatible.contains(Incompatible::DATA_FILE),
            raw_data_file: header.autoclear.contains(Autoclear::RAW_DATA_FILE),
            vm_state_offset: self.vm_state_offset(),
        }
    }

    /// The surroundings that were passed to [`Image::open`].
    pub fn host(&self) -> &H {
        &self.host
    }

    /// The memory that is touched when an image above reads data of this one:
    /// address and bytes. It begins with the counts of the `Arc`.
    pub fn hot_memory(self: &Arc<Self>) -> (usize, usize) {
        let start = Arc::as_ptr(self).addr();
        let end = ptr::from_ref(self.inflight.hot_end()).addr();
        let counts = align_of::<Self>().max(2 * size_of::<usize>());
        (start - counts, end - start + counts)
    }

    /// Sizes that never change while the image is open.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Size of the guest's disk in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// What of the disk others see: whole sectors.
    pub(crate) fn visible_size(&self) -> u64 {
        self.size() & !511
    }

    /// Whether the begin of the disk has an L2 table, as preallocation leaves
    /// it behind.
    pub fn begins_with_table(&self) -> bool {
        self.l1.len() > 0 && self.l1.get(0).table().is_some()
    }

    /// Where the area behind the guest's disk begins.
    fn vm_state_offset(&self) -> u64 {
        self.geometry.l1_entries_for(self.size()) << self.geometry.l2_span_bits()
    }

    /// The options in force.
    pub fn options(&self) -> Options {
        self.shared.read().options
    }

    /// What options would be in force with `request` and `flags`, for a reopen.
    /// Changes nothing.
    ///
    /// # Errors
    /// As on open; `EACCES` for writing to an image that shows a snapshot or is
    /// marked as corrupt, `EBUSY` where its refcounts have to be repaired before,
    /// which is done when it is opened for writing.
    pub fn resolve_options(&self, flags: OpenFlags, request: &OptionRequest) -> Result<Options> {
        let shared = self.shared.read();
        if flags.writable && shared.shows_snapshot {
            return Err(Error::errno(libc::EACCES));
        }
        if flags.writable && !shared.flags.writable {
            let bits = shared.header.incompatible;
            if bits.contains(Incompatible::CORRUPT) {
                return Err(Error::new(
                    libc::EACCES,
                    "Image is corrupt; cannot be opened read/write",
                ));
            }
            if bits.contains(Incompatible::DIRTY) {
                return Err(Error::new(
                    libc::EBUSY,
                    "Image was not closed properly; repair it before it is reopened read/write, \
                     with 'qemu-img check -r all'",
                ));
            }
        }
        Options::resolve(&shared.header, flags, request)
    }

    /// Puts options and flags in force; no request is in flight. Cached tables
    /// that are dirty have been written before ([`Image::flush`]).
    pub fn apply_options(&self, flags: OpenFlags, request: &OptionRequest, options: Options) {
        {
            let mut shared = self.shared.write();
            shared.flags = flags;
            shared.options = options;
            shared.request = request.clone();
        }
        // The kinds of metadata that are looked for may be others now.
        self.forget_overlap_map();
        self.l2
            .resize(options.caches.l2_slices, options.caches.l2_slice_size);
        self.own_pool.set_limit(options.caches.pool);
        // A chain has the memory of the image on top.
        if !self.links.is_watched() {
            let pool = self.own_pool_on_top();
            pool.trim();
        }
    }

    /// Fails with `ENOMEDIUM` once the image is known to be unusable.
    fn ensure_usable(&self) -> Result<()> {
        if self.is_broken() {
            // It is like a drive without a disk.
            Err(Error::errno(libc::ENOMEDIUM))
        } else {
            Ok(())
        }
    }

    /// The links to other images.
    #[inline]
    pub(crate) fn links(&self) -> &Links<H> {
        &self.links
    }

    /// This image takes no part in the chain any more: it was exchanged for
    /// another one, or must not be read.
    pub fn leave_chain(&self) {
        self.links.changed_altogether();
        self.links.forget_view();
    }

    /// Counts a request in that is going to use host offsets it looks up.
    pub(crate) fn enter(&self) -> Token<'_> {
        self.inflight.enter()
    }

    fn lock(&self) -> StateGuard<'_, H> {
        self.state.lock()
    }
}
