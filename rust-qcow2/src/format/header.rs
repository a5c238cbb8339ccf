//! The header and its feature bits (section "Header").

use bitflags::bitflags;
use static_assertions::const_assert_eq;
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry;
use super::refcount::RefcountOrder;
use crate::error::{Error, Result};

/// `"QFI\xfb"`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Length of the header of version 2.
pub const V2_LENGTH: usize = 72;
/// The least length of a header of version 3.
pub const V3_MIN_LENGTH: usize = 104;
/// Length of the header that is written for version 3.
pub const V3_LENGTH: usize = 112;

bitflags! {
    /// Features that a reader has to know, or it must not open the image.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Incompatible: u64 {
        /// Refcounts may be too low; repaired before the first write.
        const DIRTY = 1 << 0;
        /// Metadata is damaged; the image may not be written before a repair.
        const CORRUPT = 1 << 1;
        /// Guest clusters are in a file of their own.
        const DATA_FILE = 1 << 2;
        /// The compression type field is not the default.
        const COMPRESSION = 1 << 3;
        /// L2 entries are 128 bits wide and know subclusters.
        const EXTENDED_L2 = 1 << 4;
        const _ = !0;
    }
}

bitflags! {
    /// Features that a reader may ignore.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Compatible: u64 {
        /// Refcounts may be written late, under the dirty bit.
        const LAZY_REFCOUNTS = 1 << 0;
        const _ = !0;
    }
}

bitflags! {
    /// Features whose bit a writer that does not know them has to clear.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1 << 0;
        /// The external data file is a raw image of the disk.
        const RAW_DATA_FILE = 1 << 1;
        const _ = !0;
    }
}

/// Incompatible features that this implementation knows.
pub const KNOWN_INCOMPATIBLE: Incompatible = Incompatible::from_bits_retain(0x1f);
/// Autoclear features that this implementation keeps up to date.
pub const KNOWN_AUTOCLEAR: Autoclear = Autoclear::BITMAPS.union(Autoclear::RAW_DATA_FILE);

/// How guest data are encrypted: the numbers in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Encryption {
    /// AES with the guest offset as initial value.
    Aes = 1,
    /// LUKS, with the host offset.
    Luks = 2,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

impl CompressionType {
    /// The name that users know.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// The fixed part as it is in the file.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    // Version 3 from here on.
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
    compression_type: u8,
    padding: [u8; 7],
}
const_assert_eq!(size_of::<Raw>(), V3_LENGTH);

/// The header, with native numbers, checked as far as it can be alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Logarithm of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Where the name of the backing file is, and its length in bytes; `None`
    /// without a backing file.
    pub backing_name: Option<(u64, u32)>,
    /// 0 none, 1 AES, 2 LUKS; other values are refused later, by name.
    pub crypt_method: u32,
    /// Number of entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table is, bytes.
    pub l1_table_offset: u64,
    /// Where the refcount table is, bytes.
    pub refcount_table_offset: u64,
    /// Length of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Where the snapshot table is, bytes.
    pub snapshots_offset: u64,
    /// Feature bits that have to be understood.
    pub incompatible: Incompatible,
    /// Feature bits that need not be understood.
    pub compatible: Compatible,
    /// Feature bits that are cleared when not understood.
    pub autoclear: Autoclear,
    /// Width of the refcounts.
    pub refcount_order: RefcountOrder,
    /// Length of the header in bytes.
    pub header_length: u32,
    /// The raw compression type; [`Self::compression_type`] interprets it.
    pub compression: u8,
    /// What a longer header has behind the fields known here. Kept as it is.
    pub unknown_fields: Vec<u8>,
}

impl Header {
    /// Whether `start`, the first bytes of a file, begin a qcow2 image.
    #[must_use]
    pub fn probe(start: &[u8]) -> bool {
        start.len() >= V2_LENGTH
            && start[..4] == MAGIC.to_be_bytes()
            && start[4..8] >= 2u32.to_be_bytes()[..]
    }

    /// Reads the header from `start`, which has to hold the first
    /// [`V3_LENGTH`] bytes of the file (less only where the file is shorter).
    ///
    /// `unknown_fields` stays empty; the caller adds what lies between
    /// [`V3_LENGTH`] and `header_length`.
    ///
    /// # Errors
    /// The sentences that users of QEMU know, for anything out of range.
    pub fn parse(start: &[u8]) -> Result<Self> {
        if start.len() < V2_LENGTH {
            return Err(Error::invalid("Image is not in qcow2 format"));
        }
        let mut full = [0; V3_LENGTH];
        let len = start.len().min(V3_LENGTH);
        full[..len].copy_from_slice(&start[..len]);
        let raw: Raw = zerocopy::transmute!(full);

        if raw.magic.get() != MAGIC {
            return Err(Error::invalid("Image is not in qcow2 format"));
        }
        let version = raw.version.get();
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!(
                "Unsupported qcow2 version {version}"
            )));
        }
        let cluster_bits = raw.cluster_bits.get();
        if !(geometry::MIN_CLUSTER_BITS..=geometry::MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Error::invalid(format!(
                "Unsupported cluster size: 2^{cluster_bits}"
            )));
        }
        let cluster_size = 1u64 << cluster_bits;

        let mut header = Self {
            version,
            cluster_bits,
            size: raw.size.get(),
            backing_name: None,
            crypt_method: raw.crypt_method.get(),
            l1_size: raw.l1_size.get(),
            l1_table_offset: raw.l1_table_offset.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: RefcountOrder::BITS_16,
            header_length: V2_LENGTH as u32,
            compression: 0,
            unknown_fields: Vec::new(),
        };
        if version >= 3 {
            header.incompatible = Incompatible::from_bits_retain(raw.incompatible_features.get());
            header.compatible = Compatible::from_bits_retain(raw.compatible_features.get());
            header.autoclear = Autoclear::from_bits_retain(raw.autoclear_features.get());
            header.header_length = raw.header_length.get();
            if header.header_length < V3_MIN_LENGTH as u32 {
                return Err(Error::invalid("qcow2 header too short"));
            }
            if header.header_length as usize > V3_MIN_LENGTH {
                header.compression = raw.compression_type;
            }
        }
        if u64::from(header.header_length) > cluster_size {
            return Err(Error::invalid("qcow2 header exceeds cluster size"));
        }
        let backing_offset = raw.backing_file_offset.get();
        if backing_offset > cluster_size {
            return Err(Error::invalid("Invalid backing file offset"));
        }
        if backing_offset != 0 {
            header.backing_name = Some((backing_offset, raw.backing_file_size.get()));
        }
        if version >= 3 {
            header.refcount_order =
                RefcountOrder::new(raw.refcount_order.get()).ok_or_else(|| {
                    Error::invalid("Reference count entry width too large; may not exceed 64 bits")
                })?;
        }
        Ok(header)
    }

    /// The compression type.
    ///
    /// # Errors
    /// For an unknown one, and where the field and its feature bit disagree.
    pub fn compression_type(&self) -> Result<CompressionType> {
        let kind = match self.compression {
            0 => CompressionType::Zlib,
            1 => CompressionType::Zstd,
            other => {
                return Err(Error::unsupported(format!(
                    "qcow2: unknown compression type: {other}"
                )));
            }
        };
        let bit = self.incompatible.contains(Incompatible::COMPRESSION);
        match (kind, bit) {
            (CompressionType::Zlib, true) => Err(Error::invalid(
                "qcow2: Compression type incompatible feature bit must not be set",
            )),
            (CompressionType::Zstd, false) => Err(Error::invalid(
                "qcow2: Compression type incompatible feature bit must be set",
            )),
            _ => Ok(kind),
        }
    }

    /// The fixed part and the unknown fields as bytes. A header of version 3
    /// gets at least [`V3_LENGTH`] bytes. `backing_name` is taken as it is.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (backing_offset, backing_size) = self.backing_name.unwrap_or((0, 0));
        let raw = Raw {
            magic: MAGIC.into(),
            version: self.version.into(),
            backing_file_offset: backing_offset.into(),
            backing_file_size: backing_size.into(),
            cluster_bits: self.cluster_bits.into(),
            size: self.size.into(),
            crypt_method: self.crypt_method.into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_table_offset.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.nb_snapshots.into(),
            snapshots_offset: self.snapshots_offset.into(),
            incompatible_features: self.incompatible.bits().into(),
            compatible_features: self.compatible.bits().into(),
            autoclear_features: self.autoclear.bits().into(),
            refcount_order: self.refcount_order.order().into(),
            header_length: ((V3_LENGTH + self.unknown_fields.len()) as u32).into(),
            compression_type: self.compression,
            padding: [0; 7],
        };
        let mut bytes = raw.as_bytes().to_vec();
        if self.version < 3 {
            bytes.truncate(V2_LENGTH);
        } else {
            bytes.extend_from_slice(&self.unknown_fields);
        }
        bytes
    }
}

/// Byte offsets of single fields, for updates in place.
pub mod field {
    /// `backing_file_offset`, then `backing_file_size`.
    pub const BACKING_FILE: u64 = 8;
    /// `size`.
    pub const SIZE: u64 = 24;
    /// `l1_size`, then `l1_table_offset`.
    pub const L1: u64 = 36;
    /// `refcount_table_offset`, then `refcount_table_clusters`.
    pub const REFCOUNT_TABLE: u64 = 48;
    /// `nb_snapshots`, then `snapshots_offset`.
    pub const SNAPSHOTS: u64 = 60;
    /// `incompatible_features`.
    pub const INCOMPATIBLE: u64 = 72;
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Header {
        Header {
            version: 3,
            cluster_bits: 16,
            size: 1 << 30,
            backing_name: Some((0x200, 8)),
            crypt_method: 0,
            l1_size: 2,
            l1_table_offset: 0x30000,
            refcount_table_offset: 0x10000,
            refcount_table_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible: Incompatible::DIRTY,
            compatible: Compatible::LAZY_REFCOUNTS,
            autoclear: Autoclear::empty(),
            refcount_order: RefcountOrder::BITS_16,
            header_length: V3_LENGTH as u32,
            compression: 0,
            unknown_fields: Vec::new(),
        }
    }

    #[test]
    fn round_trip() {
        let header = sample();
        assert_eq!(Header::parse(&header.encode()).unwrap(), header);
        assert!(Header::probe(&header.encode()));
    }

    #[test]
    fn fields_are_where_the_table_says() {
        let bytes = sample().encode();
        let at = |offset: u64| &bytes[offset as usize..];
        assert_eq!(at(field::BACKING_FILE)[..8], 0x200u64.to_be_bytes());
        assert_eq!(at(field::SIZE)[..8], (1u64 << 30).to_be_bytes());
        assert_eq!(at(field::L1)[..4], 2u32.to_be_bytes());
        assert_eq!(at(field::REFCOUNT_TABLE)[..8], 0x10000u64.to_be_bytes());
        assert_eq!(at(field::INCOMPATIBLE)[..8], 1u64.to_be_bytes());
    }

    #[test]
    fn hostile_headers_are_refused() {
        let good = sample().encode();
        let with = |at: usize, value: u32| {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            Header::parse(&bytes).unwrap_err().to_string()
        };
        assert_eq!(with(0, 0), "Image is not in qcow2 format");
        assert_eq!(with(4, 4), "Unsupported qcow2 version 4");
        assert_eq!(with(20, 8), "Unsupported cluster size: 2^8");
        assert_eq!(with(20, 99), "Unsupported cluster size: 2^99");
        assert_eq!(with(100, 103), "qcow2 header too short");
        assert_eq!(with(100, 65537), "qcow2 header exceeds cluster size");
        assert_eq!(with(8, 1), "Invalid backing file offset");
        assert!(with(96, 7).contains("may not exceed 64 bits"));
        assert!(Header::parse(&good[..60]).is_err());
    }
}
