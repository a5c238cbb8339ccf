//! L1 and L2 table entries (section "Cluster mapping").

use bitflags::bitflags;

use crate::units::HostOffset;

/// The bits that hold a host offset in L1 entries and standard L2 entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits of an L1 entry that have to be zero.
pub const L1_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that have to be zero.
pub const L2_STD_RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;

/// An entry of the L1 table: where an L2 table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry for an L2 table that only this L1 table refers to.
    #[must_use]
    pub const fn owned(table: HostOffset) -> Self {
        Self(table.0 | COPIED)
    }

    /// The L2 table, `None` where there is none and all is unallocated.
    #[must_use]
    pub const fn table(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// Whether the refcount of the L2 table is exactly one.
    #[must_use]
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with the copied flag as given.
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        Self(if copied {
            self.0 | COPIED
        } else {
            self.0 & !COPIED
        })
    }

    /// Reserved bits that are set.
    #[must_use]
    pub const fn reserved(self) -> u64 {
        self.0 & L1_RESERVED_MASK
    }
}

/// An entry of an L2 table: where a guest cluster is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry(pub u64);

/// What an [`L2Entry`] says of its cluster (without subclusters).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Not in this image: look in the backing file, else zeroes.
    Unallocated,
    /// Reads as zeroes, no space reserved.
    ZeroPlain,
    /// Reads as zeroes; the host cluster is reserved for it.
    ZeroAllocated(HostOffset),
    /// Data, at this place.
    Normal(HostOffset),
    /// Compressed data: see [`L2Entry::compressed`].
    Compressed,
}

impl Mapping {
    /// Whether the image says itself what is in the cluster.
    #[must_use]
    pub const fn is_decided(self) -> bool {
        !matches!(self, Self::Unallocated)
    }

    /// The host cluster that is reserved for this guest cluster alone.
    #[must_use]
    pub const fn host_cluster(self) -> Option<HostOffset> {
        match self {
            Self::Normal(at) | Self::ZeroAllocated(at) => Some(at),
            _ => None,
        }
    }
}

/// Where the compressed data of a cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedExtent {
    /// First byte, not aligned to anything.
    pub offset: HostOffset,
    /// Upper bound of the length in bytes: data end within these bytes.
    pub len: u64,
}

impl L2Entry {
    /// The entry of a cluster that is not in the image.
    pub const UNALLOCATED: Self = Self(0);
    /// The entry of a cluster that reads as zeroes and has no space.
    pub const ZERO_PLAIN: Self = Self(ZERO);

    /// Data in a host cluster that only this entry refers to.
    #[must_use]
    pub const fn normal(at: HostOffset) -> Self {
        Self(at.0 | COPIED)
    }

    /// Zeroes, with a host cluster reserved that only this entry refers to.
    #[must_use]
    pub const fn zero_allocated(at: HostOffset) -> Self {
        Self(at.0 | COPIED | ZERO)
    }

    /// What the entry says. Version 2 knows no zero flag, where the bit is
    /// reserved; callers pass what the image has.
    #[must_use]
    pub const fn mapping(self) -> Mapping {
        if self.0 & COMPRESSED != 0 {
            return Mapping::Compressed;
        }
        let at = self.0 & OFFSET_MASK;
        match (self.0 & ZERO != 0, at) {
            (true, 0) => Mapping::ZeroPlain,
            (true, at) => Mapping::ZeroAllocated(HostOffset(at)),
            (false, 0) => Mapping::Unallocated,
            (false, at) => Mapping::Normal(HostOffset(at)),
        }
    }

    /// Whether the refcount of the host cluster is exactly one, so that it may
    /// be written in place.
    #[must_use]
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with the copied flag as given.
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        Self(if copied {
            self.0 | COPIED
        } else {
            self.0 & !COPIED
        })
    }

    /// Whether the compressed flag is set.
    #[must_use]
    pub const fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// Whether the zero flag is set (not for compressed entries).
    #[must_use]
    pub const fn has_zero_flag(self) -> bool {
        self.0 & (COMPRESSED | ZERO) == ZERO
    }

    /// Reserved bits of a standard entry that are set.
    #[must_use]
    pub const fn reserved(self) -> u64 {
        if self.is_compressed() {
            0
        } else {
            self.0 & L2_STD_RESERVED_MASK
        }
    }

    /// The entry for `len` > 0 bytes of compressed data at `at`, which end
    /// below [`L2Entry::packed_limit`].
    #[must_use]
    pub const fn packed(at: HostOffset, len: u64, cluster_bits: u32) -> Self {
        let offset_bits = 62 - (cluster_bits - 8);
        let sectors = (at.0 + len - 1) / 512 - at.0 / 512;
        Self(COMPRESSED | (sectors << offset_bits) | at.0)
    }

    /// Where compressed data have to end, for their place to fit into an entry.
    #[must_use]
    pub const fn packed_limit(cluster_bits: u32) -> u64 {
        let offset_bits = 62 - (cluster_bits - 8);
        1 << if offset_bits < 56 { offset_bits } else { 56 }
    }

    /// The place of compressed data, for an entry with the compressed flag.
    ///
    /// The low `x = 62 - (cluster_bits - 8)` bits are the offset, the bits from
    /// there to 61 the number of further 512-byte sectors.
    #[must_use]
    pub const fn compressed(self, cluster_bits: u32) -> CompressedExtent {
        let offset_bits = 62 - (cluster_bits - 8);
        let offset = self.0 & ((1 << offset_bits) - 1) & ((1 << 56) - 1);
        let sectors = ((self.0 & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
        CompressedExtent {
            offset: HostOffset(offset),
            len: sectors * 512 - (offset & 511),
        }
    }
}

bitflags! {
    /// The kinds of metadata that a write must not hit by accident: the names
    /// of the `overlap-check` options.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct MetadataKind: u16 {
        /// The header.
        const MAIN_HEADER = 1 << 0;
        /// The L1 table in use.
        const ACTIVE_L1 = 1 << 1;
        /// An L2 table in use.
        const ACTIVE_L2 = 1 << 2;
        /// A refcount block.
        const REFCOUNT_BLOCK = 1 << 3;
        /// The refcount table.
        const REFCOUNT_TABLE = 1 << 4;
        /// The snapshot table.
        const SNAPSHOT_TABLE = 1 << 5;
        /// The L1 table of a snapshot.
        const INACTIVE_L1 = 1 << 6;
        /// An L2 table of a snapshot.
        const INACTIVE_L2 = 1 << 7;
        /// The directory of persistent bitmaps.
        const BITMAP_DIRECTORY = 1 << 8;

        /// What is cheap and static: the template `constant`.
        const CONSTANT = Self::MAIN_HEADER.bits()
            | Self::ACTIVE_L1.bits()
            | Self::REFCOUNT_TABLE.bits()
            | Self::SNAPSHOT_TABLE.bits()
            | Self::BITMAP_DIRECTORY.bits();
        /// What needs no I/O: the template `cached`, the default.
        const CACHED = Self::CONSTANT.bits()
            | Self::ACTIVE_L2.bits()
            | Self::REFCOUNT_BLOCK.bits()
            | Self::INACTIVE_L1.bits();
        /// Everything: the template `all`.
        const ALL = Self::CACHED.bits() | Self::INACTIVE_L2.bits();
    }
}

impl MetadataKind {
    /// The words for a person, for one single kind.
    #[must_use]
    pub fn describe(self) -> &'static str {
        if self.contains(Self::MAIN_HEADER) {
            "qcow2_header"
        } else if self.contains(Self::ACTIVE_L1) {
            "active L1 table"
        } else if self.contains(Self::ACTIVE_L2) {
            "active L2 table"
        } else if self.contains(Self::REFCOUNT_BLOCK) {
            "refcount block"
        } else if self.contains(Self::REFCOUNT_TABLE) {
            "refcount table"
        } else if self.contains(Self::SNAPSHOT_TABLE) {
            "snapshot table"
        } else if self.contains(Self::INACTIVE_L1) {
            "inactive L1 table"
        } else if self.contains(Self::INACTIVE_L2) {
            "inactive L2 table"
        } else {
            "bitmap directory"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_entries() {
        let at = HostOffset(0x50000);
        assert_eq!(L2Entry::normal(at).mapping(), Mapping::Normal(at));
        assert!(L2Entry::normal(at).copied());
        assert_eq!(
            L2Entry::zero_allocated(at).mapping(),
            Mapping::ZeroAllocated(at)
        );
        assert_eq!(L2Entry::ZERO_PLAIN.mapping(), Mapping::ZeroPlain);
        assert_eq!(L2Entry::UNALLOCATED.mapping(), Mapping::Unallocated);
        assert_eq!(L2Entry(0x50002).reserved(), 2);
        assert_eq!(L1Entry::owned(at).table(), Some(at));
        assert_eq!(L1Entry(0x50001).reserved(), 1);
    }

    #[test]
    fn compressed_entries() {
        // 64 KiB clusters: 54 bits of offset, then 8 bits of sectors.
        let entry = L2Entry((1 << 62) | (3 << 54) | 0x1_2345);
        assert_eq!(entry.mapping(), Mapping::Compressed);
        let extent = entry.compressed(16);
        assert_eq!(extent.offset, HostOffset(0x1_2345));
        assert_eq!(extent.len, 4 * 512 - 0x145);

        for (at, len, bits) in [
            (0x1_2345, 1, 16),
            (0x1_2345, 65535, 16),
            (512, 512, 9),
            (7 << 40, 5000, 21),
        ] {
            let entry = L2Entry::packed(HostOffset(at), len, bits);
            let extent = entry.compressed(bits);
            assert_eq!(
                (entry.mapping(), extent.offset.0),
                (Mapping::Compressed, at)
            );
            assert!(extent.len >= len && extent.len < len + 512);
        }
    }
}
