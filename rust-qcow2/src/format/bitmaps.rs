//! Persistent dirty bitmaps (sections "Bitmaps extension" and "Bitmaps").
//!
//! The header extension points to a directory, whose entries point to bitmap
//! tables, whose entries point to clusters of bits. A bitmap that is in use is
//! in memory only: what the file has of it is out of date.

use bitflags::bitflags;

use super::geometry::Geometry;
use crate::error::{Error, Result};
use crate::units::{HostOffset, div_up};

/// The largest number of bitmaps of an image.
pub const MAX_BITMAPS: u32 = 65535;
/// The largest directory in bytes.
pub const MAX_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;
/// The longest name in bytes.
pub const MAX_NAME: usize = 1023;
/// Logarithm of the smallest granularity, 512 bytes.
pub const MIN_GRANULARITY_BITS: u32 = 9;
/// Logarithm of the largest granularity, 2 GiB.
pub const MAX_GRANULARITY_BITS: u32 = 31;
/// The longest bitmap table in entries.
const MAX_TABLE: u64 = 0x800_0000;
/// The largest bitmap in bytes, as it takes as many in memory.
pub const MAX_BYTES: u64 = 0x2000_0000;

/// Bytes of the content of the header extension.
pub const EXTENSION: usize = 24;
/// Bytes of a directory entry without the name.
const ENTRY: usize = 24;
/// The one type of bitmaps there is.
const DIRTY_TRACKING: u8 = 1;
/// Bits of a table entry that have to be zero.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits of a table entry that hold an offset.
const TABLE_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The content of the header extension: where the directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directory {
    /// Number of bitmaps.
    pub count: u32,
    /// Length in bytes.
    pub size: u64,
    /// Place, at a cluster.
    pub offset: HostOffset,
}

impl Directory {
    /// Reads the content of the extension.
    ///
    /// # Errors
    /// The sentences that users of QEMU know.
    pub fn parse(data: &[u8], geometry: &Geometry) -> Result<Self> {
        if data.len() != EXTENSION {
            return Err(Error::invalid("bitmaps_ext: Invalid extension length"));
        }
        let (count, reserved) = (u32_at(data, 0), u32_at(data, 4));
        let (size, offset) = (u64_at(data, 8), HostOffset(u64_at(data, 16)));
        let refuse = |text: String| Err(Error::invalid(text));
        if reserved != 0 {
            return refuse("bitmaps_ext: Reserved field is not zero".into());
        }
        if count > MAX_BITMAPS {
            return refuse(format!(
                "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of \
                 {MAX_BITMAPS}"
            ));
        }
        if count == 0 {
            return refuse("found bitmaps extension with zero bitmaps".into());
        }
        if !offset.is_aligned(geometry.cluster_bits) {
            return refuse("bitmaps_ext: invalid bitmap directory offset".into());
        }
        if size > MAX_DIRECTORY {
            return refuse(format!(
                "bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size \
                 ({MAX_DIRECTORY})"
            ));
        }
        Ok(Self {
            count,
            size,
            offset,
        })
    }

    /// The content of the extension.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(EXTENSION);
        data.extend_from_slice(&self.count.to_be_bytes());
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&self.size.to_be_bytes());
        data.extend_from_slice(&self.offset.0.to_be_bytes());
        data
    }
}

bitflags! {
    /// Flags of a directory entry.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct BitmapFlags: u32 {
        /// The bitmap was not saved: its data are out of date.
        const IN_USE = 1 << 0;
        /// It is to record writes from the moment the image is opened.
        const AUTO = 1 << 1;
    }
}

/// The place of a bitmap table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TablePlace {
    /// Where, at a cluster.
    pub offset: HostOffset,
    /// How many entries.
    pub entries: u32,
}

impl TablePlace {
    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.entries as u64 * 8
    }
}

/// A directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Where its table is.
    pub table: TablePlace,
    /// Its flags.
    pub flags: BitmapFlags,
    /// Logarithm of the bytes of the disk that one bit stands for.
    pub granularity_bits: u32,
    /// Its name, up to the first NUL; nobody promises UTF-8.
    pub name: Vec<u8>,
}

impl Bitmap {
    /// Whether the data in the file are out of date.
    #[must_use]
    pub const fn in_use(&self) -> bool {
        self.flags.contains(BitmapFlags::IN_USE)
    }

    /// The name for a person.
    #[must_use]
    pub fn display_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Logarithm of the granularity that it has in memory. One in use has no
    /// bits: if it does not fit the disk any more it need not take the memory.
    #[must_use]
    pub fn granularity_in_memory(&self, disk_size: u64) -> u32 {
        let mut bits = self.granularity_bits;
        while self.in_use()
            && bits < MAX_GRANULARITY_BITS
            && bytes_needed(disk_size, bits) > MAX_BYTES
        {
            bits += 1;
        }
        bits
    }

    /// Whether the entry is one that may be in a directory, for a disk of
    /// `disk_size` bytes. One in use may have any size: the disk may have
    /// been resized since.
    fn is_valid(&self, geometry: &Geometry, disk_size: u64) -> bool {
        let granularities = MIN_GRANULARITY_BITS..=MAX_GRANULARITY_BITS;
        let TablePlace { offset, entries } = self.table;
        if entries == 0
            || u64::from(entries) > MAX_TABLE
            || offset.0 == 0
            || !offset.is_aligned(geometry.cluster_bits)
            || !granularities.contains(&self.granularity_bits)
            || self.name.len() > MAX_NAME
        {
            return false;
        }
        let bytes = u64::from(entries) << geometry.cluster_bits;
        bytes <= MAX_BYTES && (self.in_use() || disk_size <= (bytes * 8) << self.granularity_bits)
    }
}

/// Bytes of a directory entry with a name of `name_len` bytes.
#[must_use]
pub const fn entry_size(name_len: usize) -> u64 {
    (ENTRY + name_len).next_multiple_of(8) as u64
}

/// Reads the entries of a directory.
///
/// # Errors
/// The sentences that users of QEMU know.
pub fn parse_directory(
    bytes: &[u8],
    count: u32,
    geometry: &Geometry,
    disk_size: u64,
) -> Result<Vec<Bitmap>> {
    let broken = || Error::invalid("Broken bitmap directory");
    let mut list = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let fixed = rest.get(..ENTRY).ok_or_else(broken)?;
        if list.len() >= count as usize {
            return Err(Error::invalid(
                "More bitmaps found than specified in header extension",
            ));
        }
        let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
        let extra = u32_at(fixed, 20) as usize;
        let len = (ENTRY + name_len + extra).next_multiple_of(8);
        let entry = rest.get(..len).ok_or_else(broken)?;
        if extra != 0 {
            return Err(Error::invalid("Bitmap extra data is not supported"));
        }
        let name = &entry[ENTRY..ENTRY + name_len];
        let flags = BitmapFlags::from_bits(u32_at(fixed, 12));
        let bitmap = Bitmap {
            table: TablePlace {
                offset: HostOffset(u64_at(fixed, 0)),
                entries: u32_at(fixed, 8),
            },
            flags: flags.unwrap_or_default(),
            granularity_bits: u32::from(fixed[17]),
            name: name.to_vec(),
        };
        let valid =
            flags.is_some() && fixed[16] == DIRTY_TRACKING && bitmap.is_valid(geometry, disk_size);
        let end = name.iter().position(|byte| *byte == 0);
        let bitmap = Bitmap {
            name: name[..end.unwrap_or(name_len)].to_vec(),
            ..bitmap
        };
        if !valid {
            return Err(Error::invalid(format!(
                "Bitmap '{}' doesn't satisfy the constraints",
                bitmap.display_name()
            )));
        }
        list.push(bitmap);
        rest = &rest[len..];
    }
    if list.len() != count as usize {
        return Err(Error::invalid(
            "Less bitmaps found than specified in header extension",
        ));
    }
    Ok(list)
}

/// The bytes of a directory of at least one bitmap.
///
/// # Errors
/// `EINVAL` for an entry that could not be read again, and for too many of them.
pub fn encode_directory(list: &[Bitmap], geometry: &Geometry, disk_size: u64) -> Result<Vec<u8>> {
    let size: u64 = list
        .iter()
        .map(|bitmap| entry_size(bitmap.name.len()))
        .sum();
    if list.is_empty() || list.len() > MAX_BITMAPS as usize || size > MAX_DIRECTORY {
        return Err(Error::errno(libc::EINVAL));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    for bitmap in list {
        if !bitmap.is_valid(geometry, disk_size) {
            return Err(Error::errno(libc::EINVAL));
        }
        bytes.extend_from_slice(&bitmap.table.offset.0.to_be_bytes());
        bytes.extend_from_slice(&bitmap.table.entries.to_be_bytes());
        bytes.extend_from_slice(&bitmap.flags.bits().to_be_bytes());
        bytes.extend_from_slice(&[DIRTY_TRACKING, bitmap.granularity_bits as u8]);
        bytes.extend_from_slice(&(bitmap.name.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&bitmap.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    Ok(bytes)
}

/// What an entry of a bitmap table says of its part of the bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableEntry {
    /// All bits are zero.
    #[default]
    Zeroes,
    /// All bits are one.
    Ones,
    /// The bits are in that cluster.
    Cluster(HostOffset),
}

impl TableEntry {
    /// Reads an entry; `None` where it is damaged.
    #[must_use]
    pub const fn parse(raw: u64, cluster_bits: u32) -> Option<Self> {
        let offset = HostOffset(raw & TABLE_OFFSET);
        if raw & TABLE_RESERVED != 0 {
            None
        } else if offset.0 == 0 {
            Some(if raw & 1 == 0 {
                Self::Zeroes
            } else {
                Self::Ones
            })
        } else if raw & 1 == 0 && offset.is_aligned(cluster_bits) {
            Some(Self::Cluster(offset))
        } else {
            None
        }
    }

    /// The entry as a number.
    #[must_use]
    pub const fn raw(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => 1,
            Self::Cluster(offset) => offset.0,
        }
    }
}

/// Bytes of a bitmap for a disk of `disk_size` bytes.
#[must_use]
pub const fn bytes_needed(disk_size: u64, granularity_bits: u32) -> u64 {
    div_up(div_up(disk_size, 1 << granularity_bits), 8)
}

/// Checks that a bitmap can be stored.
///
/// # Errors
/// The sentences that users of QEMU know.
pub fn check_constraints(
    name_len: usize,
    granularity_bits: u32,
    geometry: &Geometry,
    disk_size: u64,
) -> Result<()> {
    let refuse = |text: String| Err(Error::invalid(text));
    if granularity_bits > MAX_GRANULARITY_BITS {
        return refuse(format!(
            "Granularity exceeds maximum ({} bytes)",
            1u64 << MAX_GRANULARITY_BITS
        ));
    }
    if granularity_bits < MIN_GRANULARITY_BITS {
        return refuse(format!(
            "Granularity is under minimum ({} bytes)",
            1u64 << MIN_GRANULARITY_BITS
        ));
    }
    let bytes = bytes_needed(disk_size, granularity_bits);
    if bytes > MAX_BYTES || bytes > MAX_TABLE << geometry.cluster_bits {
        return refuse(
            "Too much space will be occupied by the bitmap. Use larger granularity".into(),
        );
    }
    if name_len > MAX_NAME {
        return refuse(format!(
            "Name length exceeds maximum ({MAX_NAME} characters)"
        ));
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    (u64::from(u32_at(bytes, at)) << 32) | u64::from(u32_at(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::super::refcount::RefcountOrder;
    use super::*;

    const SIZE: u64 = 1 << 30;

    fn geometry() -> Geometry {
        Geometry::new(16, 3, RefcountOrder::BITS_16, 3)
    }

    fn sample(name: &str) -> Bitmap {
        Bitmap {
            table: TablePlace {
                offset: HostOffset(0x50000),
                entries: 1,
            },
            flags: BitmapFlags::AUTO,
            granularity_bits: 16,
            name: name.into(),
        }
    }

    #[test]
    fn extension() {
        let good = Directory {
            count: 2,
            size: 64,
            offset: HostOffset(0x30000),
        };
        let bytes = good.encode();
        assert_eq!(Directory::parse(&bytes, &geometry()).unwrap(), good);
        let with = |at: usize, value: u32| {
            let mut bytes = bytes.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            Directory::parse(&bytes, &geometry())
                .unwrap_err()
                .to_string()
        };
        assert_eq!(with(0, 0), "found bitmaps extension with zero bitmaps");
        assert_eq!(
            with(0, 65536),
            "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535"
        );
        assert_eq!(with(4, 1), "bitmaps_ext: Reserved field is not zero");
        assert_eq!(
            with(20, 512),
            "bitmaps_ext: invalid bitmap directory offset"
        );
        assert!(with(8, 1).ends_with("exceeds the maximum supported size (67107840)"));
        assert!(Directory::parse(&bytes[..23], &geometry()).is_err());
    }

    #[test]
    fn directory() {
        let list = vec![sample("a"), sample("a longer name"), sample("")];
        let bytes = encode_directory(&list, &geometry(), SIZE).unwrap();
        assert_eq!(bytes.len() as u64, 32 + 40 + 24);
        let parse = |bytes: &[u8], count| parse_directory(bytes, count, &geometry(), SIZE);
        assert_eq!(parse(&bytes, 3).unwrap(), list);
        let fail = |bytes: &[u8], count| parse(bytes, count).unwrap_err().to_string();
        assert_eq!(
            fail(&bytes, 2),
            "More bitmaps found than specified in header extension"
        );
        assert_eq!(
            fail(&bytes, 4),
            "Less bitmaps found than specified in header extension"
        );
        assert_eq!(fail(&bytes[..40], 3), "Broken bitmap directory");
        assert_eq!(fail(&bytes[..90], 3), "Broken bitmap directory");
        let with = |at: usize, value: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            fail(&bytes, 3)
        };
        let constraints = "Bitmap 'a' doesn't satisfy the constraints";
        assert_eq!(with(23, 1), "Bitmap extra data is not supported");
        assert_eq!(with(15, 4), constraints);
        assert_eq!(with(16, 2), constraints);
        assert_eq!(with(17, 8), constraints);
        assert_eq!(with(17, 32), constraints);
        assert_eq!(with(11, 0), constraints);
        assert_eq!(with(8, 1), constraints);
        assert_eq!(with(6, 1), constraints);
    }

    #[test]
    fn sizes() {
        let list = [sample("b")];
        // One cluster of bits is enough for 32 GiB.
        assert!(encode_directory(&list, &geometry(), 32 << 30).is_ok());
        assert!(encode_directory(&list, &geometry(), (32 << 30) + 1).is_err());
        let in_use = [Bitmap {
            flags: BitmapFlags::IN_USE,
            ..sample("b")
        }];
        assert!(encode_directory(&in_use, &geometry(), u64::MAX).is_ok());
        let check = |bits, size| check_constraints(1, bits, &geometry(), size);
        assert!(check(9, 2 << 40).is_ok());
        assert!(check(9, (2 << 40) + 1).is_err());
        assert!(check(8, 1).is_err());
        assert!(check(32, 1).is_err());
        assert!(check_constraints(1024, 16, &geometry(), 1).is_err());
    }

    #[test]
    fn table_entries() {
        for entry in [
            TableEntry::Zeroes,
            TableEntry::Ones,
            TableEntry::Cluster(HostOffset(0x70000)),
        ] {
            assert_eq!(TableEntry::parse(entry.raw(), 16), Some(entry));
        }
        for raw in [2, 0x70001, 0x70200, 1 << 56, 1 << 63] {
            assert_eq!(TableEntry::parse(raw, 16), None);
        }
    }
}
