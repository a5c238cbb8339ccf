//! Opening an image, writing back, and leaving it.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};

use lock_api::Mutex;
use parking_lot::RwLock;

use super::crypt::encryption_of;
use super::inflight::InFlight;
use super::l1::L1Table;
use super::pending::PendingAllocations;
use super::refcounts::{Refcounts, read_refcount_table};
use super::snapshots::{SnapshotTable, read_snapshot_table};
use super::writeback::Order;
use super::{Image, OpenFlags, OptionRequest, Options, Shared, State, check};
use crate::cache::l2::L2Cache;
use crate::cache::pool::Pool;
use crate::chain::view::Links;
use crate::error::{Error, Result};
use crate::format::bitmaps::{Directory, EXTENSION as BITMAPS_LENGTH};
use crate::format::extension::{Extensions, up_to_nul};
use crate::format::geometry::{
    Geometry, MAX_BACKING_NAME, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MAX_SNAPSHOTS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
};
use crate::format::header::{
    Autoclear, Header, Incompatible, KNOWN_AUTOCLEAR, KNOWN_INCOMPATIBLE, V3_LENGTH,
};
use crate::format::snapshots::ENTRY_HEADER as SNAPSHOT_HEADER;
use crate::format::subclusters::SUBCLUSTER_COUNT_BITS;
use crate::host::{File, Host};
use crate::units::HostOffset;

impl<H: Host> Image<H> {
    /// Opens an image: reads header, extensions, L1 table and, to write to it,
    /// the refcount table, clears autoclear bits that it will not keep true, and
    /// repairs an image that was not closed.
    ///
    /// # Errors
    /// The sentences that users of QEMU know, for everything that is damaged
    /// or not supported. Nothing was written then, but for autoclear bits and what
    /// a repair did.
    pub fn open(host: H, flags: OpenFlags, request: &OptionRequest) -> Result<Self> {
        let file = host.file();
        let front =
            Front::read(&file).map_err(|error| error.context("Could not read qcow2 header"))?;
        let mut header = read_header(&front)?;
        let extensions = read_extensions(&front, &header)?;
        header.compression_type()?;
        let unknown = header.incompatible & !KNOWN_INCOMPATIBLE;
        if !unknown.is_empty() {
            return Err(Error::unsupported(format!(
                "Unsupported qcow2 feature(s): {}",
                extensions.as_ref().map_or_else(
                    |_| Extensions::default().name_incompatible(unknown.bits()),
                    |known| known.name_incompatible(unknown.bits()),
                )
            )));
        }
        if header.incompatible.contains(Incompatible::CORRUPT) && flags.writable && !flags.check {
            return Err(Error::new(
                libc::EACCES,
                "qcow2: Image is corrupt; cannot be opened read/write",
            ));
        }
        let geometry = Geometry::of(&header);
        if geometry.has_subclusters() && geometry.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            let size = geometry.cluster_size() >> SUBCLUSTER_COUNT_BITS;
            return Err(Error::invalid(format!(
                "Unsupported subcluster size: {size}"
            )));
        }
        validate_tables(&header, &geometry, flags)?;
        let l1 = read_table(&file, header.l1_table_offset, u64::from(header.l1_size))
            .map_err(|error| error.context("Could not read L1 table"))?;
        let options = Options::resolve(&header, flags, request)?;
        let table_entries = u64::from(header.refcount_table_clusters) << (header.cluster_bits - 3);
        let table_offset = HostOffset(header.refcount_table_offset);
        let refcount_table = if flags.writable {
            Some(read_refcount_table(&host, table_offset, table_entries)?)
        } else {
            None
        };
        let mut extensions = extensions?;
        let void_bitmaps = drop_void_bitmaps(&host, &header, &geometry, &mut extensions)?;
        validate_data_file_flags(&header, flags)?;
        let encrypted = encryption_of(&header, extensions.crypto_header.as_deref())?;
        host.open_encryption(encrypted, flags.no_io)?;
        if !flags.no_io {
            // Looking at an image that nobody trusts opens nothing it names.
            host.open_data_file(geometry.external_data, extensions.data_file.as_deref())?;
        }
        let backing_file = read_backing_name(&front, &header)?;
        // A check reads the table itself, as it may have to be repaired.
        let snapshots = if flags.check {
            SnapshotTable::default()
        } else {
            let (offset, count) = (header.snapshots_offset, header.nb_snapshots);
            read_snapshot_table(&file, offset, count, header.size & !511, None)?
        };

        let stale = void_bitmaps || !(header.autoclear & !KNOWN_AUTOCLEAR).is_empty();
        let clear_autoclear = flags.writable && !flags.inactive && stale;
        if clear_autoclear {
            header.autoclear &= KNOWN_AUTOCLEAR;
        }
        let dirty = header.incompatible.contains(Incompatible::DIRTY);
        let caches = options.caches;
        let own_pool = Pool::new(caches.pool);
        let image = Self {
            host,
            geometry,
            encryption: encrypted.map(|(encryption, _)| encryption),
            size: AtomicU64::new(header.size),
            l1: L1Table::new(l1),
            l2: L2Cache::new(
                caches.l2_slices,
                caches.l2_slice_size,
                Arc::clone(&own_pool),
            ),
            own_pool,
            overlap: RwLock::new(None),
            inflight: InFlight::default(),
            links: Links::default(),
            broken: AtomicBool::new(false),
            sparse: OnceLock::new(),
            shared: RwLock::new(Shared {
                header,
                extensions,
                backing_file,
                flags,
                options,
                request: request.clone(),
                snapshots,
                shows_snapshot: false,
                corruption_signaled: false,
            }),
            state: Mutex::new(State {
                refcounts: Refcounts::new(refcount_table, table_offset),
                order: Order::default(),
                allocations: PendingAllocations::default(),
                data_floor: 0,
            }),
        };
        if !flags.writable {
            image.l1.compact();
        }
        if clear_autoclear {
            image
                .update_header(&mut image.lock())
                .map_err(|error| error.context("Could not update qcow2 header"))?;
        }
        if dirty && flags.writable && !flags.inactive && !flags.check {
            image.repair_dirty()?;
        }
        Ok(image)
    }

    fn repair_dirty(&self) -> Result<()> {
        let fix = check::Fix {
            leaks: true,
            errors: true,
        };
        let report = self
            .check(fix, &mut |line| eprintln!("{line}"))
            .map_err(|error| error.context("Could not repair dirty image"))?;
        if report.check_errors > 0 {
            return Err(Error::with_errno(libc::EIO, "Could not repair dirty image"));
        }
        Ok(())
    }

    /// Writes all metadata that waits in memory, each table after what has to
    /// come before it. The file itself is not flushed at the end.
    ///
    /// # Errors
    /// Those of the file; what could not be written stays in memory.
    pub fn flush(&self) -> Result<()> {
        let mut st = self.lock();
        self.ensure_usable()?;
        self.reclaim_all(&mut st)?;
        self.write_back(&mut st)
    }

    /// Leaves the image as somebody else may open it: everything written,
    /// durable, and the dirty bit cleared. No request is in flight.
    ///
    /// # Errors
    /// Those of the file. They were reported to the user already, one for each
    /// kind of table that could not be written.
    pub fn inactivate(&self) -> Result<()> {
        if self.is_broken() {
            return Ok(());
        }
        let mut st = self.lock();
        let report = |result: Result<()>, what: &'static str| {
            result.inspect_err(|error| {
                self.host.report(&Error::with_errno(error.code(), what));
            })
        };
        let reclaimed = self.reclaim_all(&mut st);
        let slices = self
            .write_slices(&mut st)
            .and_then(|()| self.host.file().flush());
        let slices = report(slices, "Failed to flush the L2 table cache");
        let blocks = self
            .write_dirty_refcounts(&mut st)
            .and_then(|()| self.host.file().flush());
        let blocks = report(blocks, "Failed to flush the refcount block cache");
        slices.and(blocks)?;
        if reclaimed.is_err() {
            self.reclaim_all(&mut st)?;
            self.write_back_all(&mut st)?;
        }
        if self.is_writable() {
            self.mark_clean(&mut st)
        } else {
            Ok(())
        }
    }

    /// Drops what is cached. No request is in flight and none will come.
    pub fn drop_caches(&self) {
        self.l2.clear();
    }

    /// Drops clean tables from memory that were not used since the last call.
    /// Needs no coroutine and does no I/O.
    pub fn clean_caches(&self) {
        self.l2.clean();
        if let Some(index) = self.links.last_view().own_index() {
            index.clean();
        }
    }
}

/// The begin of the file, where header, extensions and the name of the backing
/// file are: one read for all of them, which counts where a chain has a
/// thousand files.
struct Front<'a, F> {
    file: &'a F,
    bytes: Vec<u8>,
}

impl<'a, F: File> Front<'a, F> {
    const LEN: usize = 4096;

    fn read(file: &'a F) -> Result<Self> {
        let mut bytes = vec![0; Self::LEN];
        file.read(0, &mut bytes)?;
        Ok(Self { file, bytes })
    }

    /// Copies from memory what is there, and reads anything else.
    fn get(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let known = usize::try_from(offset)
            .ok()
            .and_then(|from| self.bytes.get(from..)?.get(..into.len()));
        match known {
            Some(known) => into.copy_from_slice(known),
            None => self.file.read(offset, into)?,
        }
        Ok(())
    }
}

fn read_header<F: File>(front: &Front<'_, F>) -> Result<Header> {
    let mut start = [0; V3_LENGTH];
    front.get(0, &mut start)?;
    let mut header = Header::parse(&start)?;
    let known = V3_LENGTH as u32;
    if header.header_length > known {
        let mut rest = vec![0; (header.header_length - known) as usize];
        front
            .get(V3_LENGTH as u64, &mut rest)
            .map_err(|error| error.context("Could not read unknown qcow2 header fields"))?;
        header.unknown_fields = rest;
    }
    Ok(header)
}

/// Everything that the first cluster says, the name of the backing file
/// included, for whoever does not open the image.
pub(crate) fn read_first<F: File>(file: &F) -> Result<(Header, Extensions, Option<Vec<u8>>)> {
    let front = Front::read(file).map_err(|error| error.context("Could not read qcow2 header"))?;
    let header = read_header(&front)?;
    let extensions = read_extensions(&front, &header)??;
    let backing_file = read_backing_name(&front, &header)?;
    Ok((header, extensions, backing_file))
}

/// The outer error is one of I/O, the inner one of content: it is reported
/// after others that users expect first.
fn read_extensions<F: File>(front: &Front<'_, F>, header: &Header) -> Result<Result<Extensions>> {
    let start = u64::from(header.header_length);
    let end = header
        .backing_name
        .map_or(1 << header.cluster_bits, |(offset, _)| offset);
    let mut bytes = vec![0; end.saturating_sub(start) as usize];
    front.get(start, &mut bytes).map_err(|error| {
        error.context(format!(
            "qcow2_read_extension: ERROR: pread fail from offset {start}"
        ))
    })?;
    Ok(Extensions::parse(&bytes, start))
}

fn validate_tables(header: &Header, geometry: &Geometry, flags: OpenFlags) -> Result<()> {
    if header.refcount_table_clusters == 0 && !flags.check {
        return Err(Error::invalid(
            "Image does not contain a reference count table",
        ));
    }
    geometry.validate_table(
        header.refcount_table_offset,
        u64::from(header.refcount_table_clusters),
        geometry.cluster_size(),
        MAX_REFTABLE_BYTES,
        "Reference count table",
    )?;
    if !flags.check {
        geometry.validate_table(
            header.snapshots_offset,
            u64::from(header.nb_snapshots),
            SNAPSHOT_HEADER as u64,
            SNAPSHOT_HEADER as u64 * u64::from(MAX_SNAPSHOTS),
            "Snapshot table",
        )?;
    }
    geometry.validate_table(
        header.l1_table_offset,
        u64::from(header.l1_size),
        8,
        MAX_L1_BYTES,
        "Active L1 table",
    )?;
    let needed = geometry.l1_entries_for(header.size);
    if needed > i32::MAX as u64 {
        return Err(Error::new(libc::EFBIG, "Image is too big"));
    }
    if u64::from(header.l1_size) < needed {
        return Err(Error::invalid("L1 table is too small"));
    }
    Ok(())
}

pub(super) fn read_table<F: File>(file: &F, offset: u64, entries: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; (entries * 8) as usize];
    file.read(offset, &mut bytes)?;
    let mut be = [0; 8];
    let table = bytes
        .chunks_exact(8)
        .map(|word| {
            be.copy_from_slice(word);
            u64::from_be_bytes(be)
        })
        .collect();
    Ok(table)
}

fn read_backing_name<F: File>(front: &Front<'_, F>, header: &Header) -> Result<Option<Vec<u8>>> {
    let Some((offset, len)) = header.backing_name else {
        return Ok(None);
    };
    let room = (1u64 << header.cluster_bits) - offset;
    if len > MAX_BACKING_NAME || u64::from(len) > room {
        return Err(Error::invalid("Backing file name too long"));
    }
    let mut bytes = vec![0; len as usize];
    front
        .get(offset, &mut bytes)
        .map_err(|error| error.context("Could not read backing file name"))?;
    Ok(Some(up_to_nul(&bytes).to_vec()))
}

/// Forgets the bitmaps of an image that was changed by somebody who did not
/// keep them. Returns whether there were any; the others are validated.
fn drop_void_bitmaps<H: Host>(
    host: &H,
    header: &Header,
    geometry: &Geometry,
    extensions: &mut Extensions,
) -> Result<bool> {
    let Some(data) = &extensions.bitmaps else {
        return Ok(false);
    };
    if data.len() == BITMAPS_LENGTH && !header.autoclear.contains(Autoclear::BITMAPS) {
        host.warn(
            if header.version < 3 {
                "This qcow2 v2 image contains bitmaps, but they may have been modified by a \
                 program without persistent bitmap support; so now they must all be considered \
                 inconsistent"
            } else {
                "a program lacking bitmap support modified this file, so all bitmaps are now \
                 considered inconsistent"
            },
            "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.",
        );
        extensions.bitmaps = None;
        return Ok(true);
    }
    Directory::parse(data, geometry)?;
    Ok(false)
}

/// Refuses a flag that has no meaning without the file that it speaks of.
fn validate_data_file_flags(header: &Header, flags: OpenFlags) -> Result<()> {
    let external = header.incompatible.contains(Incompatible::DATA_FILE);
    if header.autoclear.contains(Autoclear::RAW_DATA_FILE) && !external && !flags.no_io {
        return Err(Error::invalid("data-file-raw requires a data file"));
    }
    Ok(())
}
