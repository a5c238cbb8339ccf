//! Counting what the tables refer to.

use super::{Check, Fix, strerror};
use crate::error::Result;
use crate::format::entry::{L1Entry, L2Entry, Mapping, MetadataKind, OFFSET_MASK};
use crate::format::geometry::{Geometry, MAX_L1_BYTES};
use crate::format::snapshots::Snapshot;
use crate::format::subclusters::{ClusterEntry, Subclusters};
use crate::host::{File, Host};
use crate::units::HostOffset;

/// Whose L1 table is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// The disk as it is now.
    Active,
    /// An internal snapshot.
    Snapshot,
}

/// An L2 table that is looked at.
struct Table<'a> {
    offset: HostOffset,
    bytes: &'a mut [u8],
    owner: Owner,
    /// Where a cluster would be that follows the one before.
    next: Option<u64>,
}

impl<H: Host> Check<'_, '_, H> {
    /// Counts everything that the image refers to, and reports tables that are
    /// wrong in themselves.
    pub(super) fn count_references(&mut self, fix: Fix) -> Result<()> {
        let (l1_offset, l1_size, table_offset, table_clusters) = {
            let shared = self.image.shared.read();
            let header = &shared.header;
            (
                header.l1_table_offset,
                u64::from(header.l1_size),
                header.refcount_table_offset,
                u64::from(header.refcount_table_clusters),
            )
        };
        let cluster_bits = self.image.geometry.cluster_bits;
        self.count(0, 1 << cluster_bits)?;
        self.count_l1(l1_offset, l1_size, Owner::Active, fix)?;
        let snapshots = self.image.snapshots();
        if self.image.has_data_file() && !snapshots.is_empty() {
            let count = snapshots.len();
            self.say(format_args!(
                "ERROR {count} snapshots in image with data file"
            ));
            self.report.corruptions += 1;
        }
        for snapshot in snapshots {
            self.count_snapshot(&snapshot, fix)?;
        }
        self.count_snapshot_table()?;
        self.count(table_offset, table_clusters << cluster_bits)?;
        self.count_crypto_header()?;
        self.count_bitmaps()?;
        self.count_blocks(fix)
    }

    /// Counts a reference to each cluster that `len` bytes at `offset` touch.
    #[inline]
    pub(super) fn count(&mut self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let geometry = self.image.geometry;
        let end = offset.saturating_add(len);
        // The last cluster of a file may be there in part only.
        if end >= self.file_len.saturating_add(geometry.cluster_size()) {
            self.say(format_args!(
                "ERROR: counting reference for region exceeding the end of the file by one \
                 cluster or more: offset {offset:#x} size {len:#x}"
            ));
            self.report.corruptions += 1;
            return Ok(());
        }
        let last = (end - 1) >> geometry.cluster_bits;
        self.grow_counts(last + 1)?;
        for cluster in offset >> geometry.cluster_bits..=last {
            let fits = self
                .counts
                .add(cluster)
                .inspect_err(|_| self.report.check_errors += 1)?;
            if !fits {
                let at = cluster << geometry.cluster_bits;
                self.say(format_args!("ERROR: overflow cluster offset={at:#x}"));
                self.say(format_args!(
                    "Use qemu-img amend to increase the refcount entry width or qemu-img convert \
                     to create a clean copy if the image cannot be opened for writing"
                ));
                self.report.corruptions += 1;
            }
        }
        Ok(())
    }

    fn count_snapshot(&mut self, snapshot: &Snapshot, fix: Fix) -> Result<()> {
        let (l1_offset, l1_size) = (snapshot.l1_table_offset, snapshot.l1_size);
        let (id, name) = (snapshot.id_text(), snapshot.name_text());
        if !HostOffset(l1_offset).is_aligned(self.image.geometry.cluster_bits) {
            self.say(format_args!(
                "ERROR snapshot {id} ({name}) l1_offset={l1_offset:#x}: L1 table is not cluster \
                 aligned; snapshot table entry corrupted"
            ));
            self.report.corruptions += 1;
            return Ok(());
        }
        if u64::from(l1_size) > MAX_L1_BYTES / 8 {
            self.say(format_args!(
                "ERROR snapshot {id} ({name}) l1_size={l1_size:#x}: L1 table is too large; snapshot \
                 table entry corrupted"
            ));
            self.report.corruptions += 1;
            return Ok(());
        }
        self.count_l1(l1_offset, u64::from(l1_size), Owner::Snapshot, fix)
    }

    fn count_l1(&mut self, offset: u64, entries: u64, owner: Owner, fix: Fix) -> Result<()> {
        if entries == 0 {
            return Ok(());
        }
        self.count(offset, entries * 8)?;
        let mut l1 = vec![0; entries as usize * 8];
        if let Err(error) = self.image.host.file().read(offset, &mut l1) {
            self.say(format_args!("ERROR: I/O error in check_refcounts_l1"));
            self.report.check_errors += 1;
            return Err(error);
        }
        let size = self.image.geometry.cluster_size();
        let mut bytes = self.image.host.aligned(size as usize)?;
        for index in 0..entries as usize {
            let entry = L1Entry(word(&l1, index));
            if entry.0 == 0 {
                continue;
            }
            if entry.reserved() != 0 {
                self.say(format_args!(
                    "ERROR found L1 entry with reserved bits set: {:x}",
                    entry.0
                ));
                self.report.corruptions += 1;
            }
            let table = HostOffset(entry.0 & OFFSET_MASK);
            self.count(table.0, size)?;
            if !table.is_aligned(self.image.geometry.cluster_bits) {
                self.say(format_args!(
                    "ERROR l2_offset={:x}: Table is not cluster aligned; L1 entry corrupted",
                    table.0
                ));
                self.report.corruptions += 1;
            }
            if let Err(error) = self.image.host.file().read(table.0, &mut bytes) {
                self.say(format_args!("ERROR: I/O error in check_refcounts_l2"));
                self.report.check_errors += 1;
                return Err(error);
            }
            let table = Table {
                offset: table,
                bytes: &mut bytes,
                owner,
                next: None,
            };
            self.count_l2(table, fix)?;
        }
        Ok(())
    }

    fn count_l2(&mut self, mut table: Table<'_>, fix: Fix) -> Result<()> {
        let extended = self.image.geometry.has_subclusters();
        for index in 0..self.image.geometry.l2_entries() as usize {
            let full = entry_of(&self.image.geometry, table.bytes, index);
            if full == ClusterEntry::UNALLOCATED {
                continue;
            }
            let entry = full.entry;
            if entry.reserved() != 0 {
                self.say(format_args!(
                    "ERROR found l2 entry with reserved bits set: {:x}",
                    entry.0
                ));
                self.report.corruptions += 1;
            }
            let mapping = self.image.geometry.mapping(entry);
            match mapping {
                Mapping::Unallocated | Mapping::ZeroPlain => {
                    if full.contradicts_itself(mapping) {
                        self.say(format_args!(
                            "ERROR: Unallocated cluster has non-zero subcluster allocation map"
                        ));
                        self.report.corruptions += 1;
                    }
                }
                Mapping::Compressed => self.count_compressed(full, index, table.owner)?,
                Mapping::Normal(at) => {
                    if full.contradicts_itself(mapping) {
                        self.say(format_args!(
                            "ERROR offset={at:x}: Allocated cluster has corrupted subcluster \
                             allocation bitmap"
                        ));
                        self.report.corruptions += 1;
                    }
                    let zero = extended && full.subclusters.data() == 0;
                    self.count_cluster(&mut table, index, at, zero, fix)?;
                }
                Mapping::ZeroAllocated(at) => {
                    self.count_cluster(&mut table, index, at, true, fix)?;
                }
            }
        }
        Ok(())
    }

    fn count_compressed(&mut self, full: ClusterEntry, index: usize, owner: Owner) -> Result<()> {
        let mut entry = full.entry;
        let cluster_bits = self.image.geometry.cluster_bits;
        // All bits of the offset, those included that no file can have.
        let offset = entry.0 & ((1 << (70 - cluster_bits)) - 1);
        if entry.copied() {
            self.say(format_args!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
            self.report.corruptions += 1;
            entry = entry.with_copied(false);
        }
        if self.image.has_data_file() {
            self.say(format_args!(
                "ERROR compressed cluster {index} with data file, entry={:#x}",
                entry.0
            ));
            self.report.corruptions += 1;
            return Ok(());
        }
        if full.subclusters != Subclusters::NONE {
            self.say(format_args!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, \
                 entry={:#x}",
                entry.0
            ));
            self.report.corruptions += 1;
            return Ok(());
        }
        self.count(offset, entry.compressed(cluster_bits).len)?;
        if owner == Owner::Active {
            self.report.allocated_clusters += 1;
            self.report.compressed_clusters += 1;
            // Neighbours share sectors, which are read once for each of them.
            self.report.fragmented_clusters += 1;
        }
        Ok(())
    }

    fn count_cluster(
        &mut self,
        table: &mut Table<'_>,
        index: usize,
        at: HostOffset,
        zero: bool,
        fix: Fix,
    ) -> Result<()> {
        let geometry = self.image.geometry;
        if !at.is_aligned(geometry.cluster_bits) {
            self.report.corruptions += 1;
            if zero {
                self.say(format_args!(
                    "{} offset={at:x}: Preallocated cluster is not properly aligned; L2 entry \
                     corrupted.",
                    if fix.errors { "Repairing" } else { "ERROR" }
                ));
                if fix.errors && self.make_zero(table, index)? {
                    return Ok(());
                }
            } else {
                self.say(format_args!(
                    "ERROR offset={at:x}: Data cluster is not properly aligned; L2 entry corrupted."
                ));
            }
        }
        if table.owner == Owner::Active {
            self.report.allocated_clusters += 1;
            if table.next.is_some_and(|next| next != at.0) {
                self.report.fragmented_clusters += 1;
            }
            table.next = Some(at.0 + geometry.cluster_size());
        }
        if self.image.has_data_file() {
            return Ok(());
        }
        self.count(at.0, geometry.cluster_size())
    }

    /// Takes the host cluster from an entry that reads as zeroes anyway. `false`
    /// where it could not be written; an error ends the check, as the table may
    /// not be written at all.
    fn make_zero(&mut self, table: &mut Table<'_>, index: usize) -> Result<bool> {
        let kind = match table.owner {
            Owner::Active => MetadataKind::ACTIVE_L2,
            Owner::Snapshot => MetadataKind::INACTIVE_L2,
        };
        let geometry = self.image.geometry;
        let mut words = [0; 16];
        let bytes = &mut words[..1 << geometry.l2_entry_bits];
        if geometry.has_subclusters() {
            let zeroes = entry_of(&geometry, table.bytes, index).subclusters;
            bytes[8..].copy_from_slice(&zeroes.only_zeroes().0.to_be_bytes());
        } else {
            bytes.copy_from_slice(&L2Entry::ZERO_PLAIN.0.to_be_bytes());
        }
        let len = bytes.len() as u64;
        let at = table.offset.0 + index as u64 * len;
        if let Err(error) = self.image.ensure_no_overlap(self.st, kind, at, len) {
            self.say(format_args!("ERROR: Overlap check failed"));
            self.report.check_errors += 1;
            return Err(error);
        }
        let file = self.image.host.file();
        if let Err(error) = file.write(at, bytes).and_then(|()| file.flush()) {
            self.say(format_args!(
                "ERROR: Failed to overwrite L2 table entry: {}",
                strerror(&error)
            ));
            self.report.check_errors += 1;
            return Ok(false);
        }
        let place = index << geometry.l2_entry_bits;
        table.bytes[place..][..bytes.len()].copy_from_slice(bytes);
        self.image.l2.discard(table.offset, geometry.cluster_size());
        self.report.corruptions -= 1;
        self.report.corruptions_fixed += 1;
        Ok(true)
    }
}

/// Number `index` of a table of 64-bit words.
pub(super) fn word(table: &[u8], index: usize) -> u64 {
    let mut be = [0; 8];
    be.copy_from_slice(&table[index * 8..][..8]);
    u64::from_be_bytes(be)
}

/// Entry number `index` of an L2 table.
pub(super) fn entry_of(geometry: &Geometry, table: &[u8], index: usize) -> ClusterEntry {
    if geometry.has_subclusters() {
        ClusterEntry::extended(word(table, 2 * index), word(table, 2 * index + 1))
    } else {
        ClusterEntry::standard(L2Entry(word(table, index)))
    }
}
