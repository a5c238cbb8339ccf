//! What follows from the cluster size, and the limits of the format.

use super::entry::{L2Entry, Mapping};
use super::header::{Header, Incompatible};
use super::refcount::RefcountOrder;
use super::subclusters::{SUBCLUSTER_COUNT_BITS, SUBCLUSTERS};
use crate::error::{Error, Result};
use crate::units::{ClusterIndex, GuestOffset, HostOffset, div_up};

/// Logarithm of the smallest cluster size, 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Logarithm of the size of a standard L2 entry.
pub const L2_ENTRY_BITS: u32 = 3;
/// Logarithm of the size of an extended L2 entry.
pub const EXTENDED_L2_ENTRY_BITS: u32 = 4;
/// Logarithm of the largest cluster size, 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Logarithm of the smallest cluster size with extended L2 entries, 16 KiB:
/// no subcluster is smaller than the smallest cluster.
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = MIN_CLUSTER_BITS + SUBCLUSTER_COUNT_BITS;
/// The largest L1 table in bytes that is read.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The largest refcount table in bytes that is read.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// The largest number of internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The largest snapshot table in bytes.
pub const MAX_SNAPSHOTS_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// The longest name of a backing file in bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// No offset in a file may reach this: L1 and L2 entries have 56 bits for it.
pub const MAX_HOST_OFFSET: u64 = 1 << 56;

/// The fixed sizes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Logarithm of the number of entries in an L2 table.
    pub l2_bits: u32,
    /// Logarithm of the size of an L2 entry: 3, with subclusters 4.
    pub l2_entry_bits: u32,
    /// Width of the refcounts.
    pub refcount_order: RefcountOrder,
    /// Version of the image, 2 or 3.
    pub version: u32,
    /// Guest data are in a file of their own, each at its guest offset.
    pub external_data: bool,
}

impl Geometry {
    /// The geometry that a header describes.
    #[must_use]
    pub fn of(header: &Header) -> Self {
        let l2_entry_bits = if header.incompatible.contains(Incompatible::EXTENDED_L2) {
            EXTENDED_L2_ENTRY_BITS
        } else {
            L2_ENTRY_BITS
        };
        Self {
            external_data: header.incompatible.contains(Incompatible::DATA_FILE),
            ..Self::new(
                header.cluster_bits,
                l2_entry_bits,
                header.refcount_order,
                header.version,
            )
        }
    }

    /// A geometry from its parts. `cluster_bits` is in range.
    #[must_use]
    pub const fn new(
        cluster_bits: u32,
        l2_entry_bits: u32,
        refcount_order: RefcountOrder,
        version: u32,
    ) -> Self {
        Self {
            cluster_bits,
            l2_bits: cluster_bits - l2_entry_bits,
            l2_entry_bits,
            refcount_order,
            version,
            external_data: false,
        }
    }

    /// What an L2 entry says of its cluster. Offset 0 means no cluster but in
    /// an external data file, whose first cluster it is if the copied flag is
    /// set.
    #[inline]
    #[must_use]
    pub const fn mapping(&self, entry: L2Entry) -> Mapping {
        match entry.mapping() {
            Mapping::Unallocated if self.external_data && entry.copied() => {
                Mapping::Normal(HostOffset(0))
            }
            other => other,
        }
    }

    /// Bytes of a cluster.
    #[inline]
    #[must_use]
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries are extended ones.
    #[inline]
    #[must_use]
    pub const fn has_subclusters(&self) -> bool {
        self.l2_entry_bits != L2_ENTRY_BITS
    }

    /// Logarithm of the smallest part of a cluster that has a mapping of its
    /// own; without subclusters that is all of it.
    #[inline]
    #[must_use]
    pub const fn subcluster_bits(&self) -> u32 {
        if self.has_subclusters() {
            self.cluster_bits - SUBCLUSTER_COUNT_BITS
        } else {
            self.cluster_bits
        }
    }

    /// The subcluster of its cluster that a guest offset is in.
    #[inline]
    #[must_use]
    pub const fn subcluster_index(&self, guest: GuestOffset) -> u32 {
        (guest.0 >> self.subcluster_bits()) as u32 & (SUBCLUSTERS - 1)
    }

    /// Entries of an L2 table.
    #[inline]
    #[must_use]
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits
    }

    /// Logarithm of the guest bytes that one L2 table maps.
    #[inline]
    #[must_use]
    pub const fn l2_span_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits
    }

    /// The L1 entry for a guest offset.
    #[inline]
    #[must_use]
    pub const fn l1_index(&self, guest: GuestOffset) -> u64 {
        guest.0 >> self.l2_span_bits()
    }

    /// The entry in its L2 table for a guest offset.
    #[inline]
    #[must_use]
    pub const fn l2_index(&self, guest: GuestOffset) -> u64 {
        (guest.0 >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// The L1 entries that a disk of `size` bytes needs.
    #[must_use]
    pub const fn l1_entries_for(&self, size: u64) -> u64 {
        div_up(size, 1 << self.l2_span_bits())
    }

    /// The number of the cluster at a host offset.
    #[inline]
    #[must_use]
    pub const fn cluster_of(&self, offset: HostOffset) -> ClusterIndex {
        ClusterIndex(offset.0 >> self.cluster_bits)
    }

    /// The host offset of a cluster.
    #[inline]
    #[must_use]
    pub const fn offset_of(&self, cluster: ClusterIndex) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Refcounts of one refcount block.
    #[inline]
    #[must_use]
    pub const fn refcounts_per_block(&self) -> u64 {
        self.refcount_order.per_bytes(self.cluster_size())
    }

    /// Checks that a table lies where tables may lie: aligned to a cluster, of
    /// at most `max_bytes`, its end below the end of the address range.
    ///
    /// # Errors
    /// `EFBIG` when it is too large, `EINVAL` when its place is wrong; `name`
    /// begins the sentence.
    pub fn validate_table(
        &self,
        offset: u64,
        entries: u64,
        entry_size: u64,
        max_bytes: u64,
        name: &str,
    ) -> Result<()> {
        if entries > max_bytes / entry_size {
            return Err(Error::new(libc::EFBIG, format!("{name} too large")));
        }
        let bytes = entries * entry_size;
        // The signed limit is that of every file interface.
        if (i64::MAX as u64) - bytes < offset || !HostOffset(offset).is_aligned(self.cluster_bits) {
            return Err(Error::invalid(format!("{name} offset invalid")));
        }
        Ok(())
    }
}
