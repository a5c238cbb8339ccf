//! From version 3 to version 2, which knows no clusters that read as zeroes
//! and no feature bits.

use super::super::refcounts::{Change, Reason};
use super::super::{Image, StateGuard};
use super::{NOT_CLEAN, NOT_UPDATED, Progress};
use crate::error::{Error, Result};
use crate::format::entry::{L2Entry, Mapping, MetadataKind};
use crate::format::header::{Autoclear, Compatible, Incompatible, V2_LENGTH};
use crate::format::refcount::RefcountOrder;
use crate::format::snapshots::Snapshot;
use crate::host::{File, Host, ZeroFlags};
use crate::units::{GuestOffset, HostOffset};

/// Bytes of L2 tables that are written together, so that there is no flush for
/// each of them.
const BATCH: usize = 1 << 20;

impl<H: Host> Image<H> {
    /// Makes an image of version 3 one of version 2. The file is complete
    /// afterwards; this value is not to be used any more, but for another one
    /// that is opened in its place.
    ///
    /// # Errors
    /// `ENOTSUP` where the image has what version 2 does not know; those of the
    /// file. The image is of version 3 then, with clusters of zeroes in place of
    /// some of those that were marked as such.
    pub fn downgrade(&self, tell: Progress<'_>) -> Result<()> {
        self.ensure_downgrade()?;
        self.inactivate()
            .map_err(|error| Error::with_errno(error.code(), NOT_CLEAN))?;
        let others = self.shared.read().header.incompatible & !Incompatible::COMPRESSION;
        if !others.is_empty() {
            return Err(Error::unsupported(format!(
                "Cannot downgrade an image with incompatible features {:#x} set",
                others.bits()
            )));
        }
        let mut st = self.lock();
        self.begin_change_of_snapshots(&mut st)?;
        self.need_refcounts(&mut st)?;
        let expanded = self.expand_zeroes(&mut st, tell);
        let written = self.write_back_all(&mut st);
        let packed = expanded
            .and_then(|packed| written.map(|()| packed))
            .map_err(|error| {
                Error::with_errno(error.code(), "Failed to turn zero into data clusters")
            })?;
        let other_method = {
            let header = &self.shared.read().header;
            header.incompatible.contains(Incompatible::COMPRESSION)
        };
        if packed && other_method {
            return Err(Error::unsupported(
                "Cannot downgrade an image with zstd compression type and existing compressed \
                 clusters",
            ));
        }
        let old = {
            let mut shared = self.shared.write();
            let old = shared.header.clone();
            let header = &mut shared.header;
            header.version = 2;
            header.header_length = V2_LENGTH as u32;
            header.incompatible = Incompatible::empty();
            header.compatible = Compatible::empty();
            header.autoclear = Autoclear::empty();
            header.compression = 0;
            header.unknown_fields.clear();
            old
        };
        self.update_header(&mut st).map_err(|error| {
            self.shared.write().header = old;
            Error::with_errno(error.code(), NOT_UPDATED)
        })
    }

    fn ensure_downgrade(&self) -> Result<()> {
        if self.geometry.refcount_order != RefcountOrder::BITS_16 {
            return Err(Error::unsupported("compat=0.10 requires refcount_bits=16"));
        }
        if self.has_data_file() {
            return Err(Error::unsupported(
                "Cannot downgrade an image with a data file",
            ));
        }
        if self.shared.read().extensions.bitmaps.is_some() {
            return Err(
                Error::unsupported("Cannot downgrade an image with persistent bitmaps")
                    .with_hint("You can remove them with 'qemu-img bitmap --remove'."),
            );
        }
        let size = self.size();
        let fits = |state: u64, disk: u64| state <= u64::from(u32::MAX) && disk == size;
        let snapshots = self.snapshots();
        if !snapshots
            .iter()
            .all(|snapshot| fits(snapshot.vm_state_size, snapshot.disk_size))
        {
            return Err(Error::unsupported(
                "Internal snapshots prevent downgrade of image",
            ));
        }
        Ok(())
    }

    /// Turns what reads as zeroes into data, or into nothing where nothing is
    /// below, for the disk and its snapshots. Returns whether the image has
    /// compressed clusters. Nothing waits in memory when it begins.
    fn expand_zeroes(&self, st: &mut StateGuard<'_, H>, tell: Progress<'_>) -> Result<bool> {
        let snapshots = self.snapshots();
        let active = self.l1.to_vec();
        let backed = self.host.backing().is_some() || self.shared.read().backing_file.is_some();
        let mut expansion = Expansion {
            backed,
            packed: false,
            tables: Vec::new(),
            unused: Vec::new(),
        };
        let expanded = self.expand_tables(st, &active, &snapshots, &mut expansion, tell);
        // What was allocated is needed as far as the tables can be written.
        let written = self.write_expanded(st, &mut expansion);
        self.links().changed_altogether();
        expanded.and(written)?;
        Ok(expansion.packed)
    }

    /// [`Image::expand_zeroes`] for each table; the last ones are not written.
    fn expand_tables(
        &self,
        st: &mut StateGuard<'_, H>,
        active: &[u64],
        snapshots: &[Snapshot],
        expansion: &mut Expansion<H>,
        tell: Progress<'_>,
    ) -> Result<()> {
        let of_snapshots = snapshots.iter().map(|snapshot| u64::from(snapshot.l1_size));
        let total = active.len() as u64 + of_snapshots.sum::<u64>();
        let mut done = 0;
        for number in 0..=snapshots.len() {
            let l1 = match number.checked_sub(1).map(|number| &snapshots[number]) {
                None => active.to_vec(),
                Some(snapshot) => {
                    self.validate_snapshot(snapshot)
                        .inspect_err(|error| self.host.report(error))?;
                    self.read_snapshot_l1(snapshot)?
                }
            };
            for index in 0..l1.len() {
                if let Some(table) = self.table_of(st, &l1, index)? {
                    let first = GuestOffset((index as u64) << self.geometry.l2_span_bits());
                    if expansion.waits(table) {
                        self.write_expanded(st, expansion)?;
                    }
                    self.expand_table(st, table, first, expansion)?;
                    if expansion.is_full() {
                        self.write_expanded(st, expansion)?;
                    }
                }
                done += 1;
                tell(done, total);
            }
        }
        Ok(())
    }

    /// Writes the tables that wait for that.
    fn write_expanded(
        &self,
        st: &mut StateGuard<'_, H>,
        expansion: &mut Expansion<H>,
    ) -> Result<()> {
        if expansion.tables.is_empty() {
            return Ok(());
        }
        // Zeroes and counts are durable before the entries that need them, and
        // the entries before the counts that they do not need any more.
        self.write_back_all(st)?;
        for (table, bytes) in std::mem::take(&mut expansion.tables) {
            self.write_l2(st, table, &bytes)?;
        }
        let unused = std::mem::take(&mut expansion.unused);
        if !unused.is_empty() {
            self.host.file().flush()?;
            let size = self.geometry.cluster_size();
            for (host, owners) in unused {
                self.change_refcount(st, host, size, Change::Sub(owners), Reason::Other)?;
            }
        }
        Ok(())
    }

    /// [`Image::expand_zeroes`] for one table, whose first entry is that of the
    /// cluster at `first`.
    fn expand_table(
        &self,
        st: &mut StateGuard<'_, H>,
        table: HostOffset,
        first: GuestOffset,
        expansion: &mut Expansion<H>,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let owners = self.refcount(st, self.geometry.cluster_of(table))?.max(1);
        let mut bytes = self.host.aligned(size as usize)?;
        self.read_l2(table, &mut bytes)?;
        let mut changed = false;
        let mut unused = Vec::new();
        for index in 0..self.geometry.l2_entries() as usize {
            let place = match self.geometry.mapping(self.raw_entry(&bytes, index)) {
                Mapping::ZeroPlain => None,
                Mapping::ZeroAllocated(host) => Some(host),
                other => {
                    expansion.packed |= matches!(other, Mapping::Compressed);
                    continue;
                }
            };
            if let Some(host) = place {
                if !host.is_aligned(self.geometry.cluster_bits) {
                    return Err(self.unaligned_cluster(st, host, table, index));
                }
            }
            // A cluster that another table has as well may be its data.
            let own = match place {
                Some(host) => {
                    let count = self.refcount(st, self.geometry.cluster_of(host))?;
                    if count != owners {
                        unused.push((host, owners));
                    }
                    (count == owners).then_some(host)
                }
                None => None,
            };
            let entry = match own {
                None if !expansion.backed => L2Entry::UNALLOCATED,
                _ => {
                    let guest = first.add((index as u64) << self.geometry.cluster_bits);
                    let host = self.zero_cluster(st, own, owners, guest)?;
                    L2Entry::normal(host).with_copied(owners == 1)
                }
            };
            let at = index << self.geometry.l2_entry_bits;
            bytes[at..at + 8].copy_from_slice(&entry.0.to_be_bytes());
            changed = true;
        }
        if changed {
            expansion.tables.push((table, bytes));
            expansion.unused.append(&mut unused);
        }
        Ok(())
    }

    /// Fills a cluster with zeroes: that at `place`, or a new one for as many
    /// `owners`.
    fn zero_cluster(
        &self,
        st: &mut StateGuard<'_, H>,
        place: Option<HostOffset>,
        owners: u64,
        guest: GuestOffset,
    ) -> Result<HostOffset> {
        let size = self.geometry.cluster_size();
        let host = match place {
            Some(host) => host,
            None => self.allocate(st, size)?,
        };
        let result = (|| {
            if place.is_none() && owners > 1 {
                let more = Change::Add(owners - 1);
                self.change_refcount(st, host, size, more, Reason::Never)?;
            }
            self.ensure_no_overlap(st, MetadataKind::empty(), host.0, size)?;
            if self.encryption().is_some() {
                return self.write_data(guest, host, &vec![0; size as usize]);
            }
            let flags = ZeroFlags::default();
            self.host.file().write_zeroes(host.0, size, flags)
        })();
        match result {
            Ok(()) => Ok(host),
            Err(error) => {
                if place.is_none() {
                    self.free(st, host, size, Reason::Always);
                }
                Err(error)
            }
        }
    }
}

/// What [`Image::expand_zeroes`] has to know and learns.
struct Expansion<H: Host> {
    /// Whether something is below the image.
    backed: bool,
    /// Whether there are compressed clusters.
    packed: bool,
    /// Tables that are to be written, with their place.
    tables: Vec<(HostOffset, H::Aligned)>,
    /// Clusters that they do not need any more, with the number of references
    /// that go.
    unused: Vec<(HostOffset, u64)>,
}

impl<H: Host> Expansion<H> {
    /// Whether a table is yet to be written.
    fn waits(&self, table: HostOffset) -> bool {
        self.tables.iter().any(|(other, _)| *other == table)
    }

    /// Whether the tables are to be written now: there are many, or what comes
    /// next may be counted less often then.
    fn is_full(&self) -> bool {
        let bytes: usize = self.tables.iter().map(|(_, bytes)| bytes.len()).sum();
        bytes >= BATCH || !self.unused.is_empty()
    }
}
