//! The snapshot table: one entry of variable length for each internal snapshot.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::MAX_SNAPSHOTS_BYTES;
use crate::error::{Error, Result};
use crate::units::round_up;

/// Bytes of the fixed part of an entry.
pub const ENTRY_HEADER: usize = size_of::<Raw>();
/// The most extra data of an entry that is taken, in bytes.
pub const MAX_EXTRA_DATA: u32 = 1024;
/// The least extra data that version 3 asks for: state size and disk size.
pub const V3_EXTRA_DATA: u32 = 16;
/// The extra data whose meaning is known here; entries are written with it.
const KNOWN_EXTRA_DATA: usize = 24;
/// What stands for an unknown number of instructions.
const NO_ICOUNT: u64 = u64::MAX;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    l1_table_offset: U64,
    l1_size: U32,
    id_str_size: U16,
    name_size: U16,
    date_sec: U32,
    date_nsec: U32,
    vm_clock_nsec: U64,
    vm_state_size: U32,
    extra_data_size: U32,
}

/// An internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is, bytes.
    pub l1_table_offset: u64,
    /// Number of entries of its L1 table.
    pub l1_size: u32,
    /// Its identity: text without NUL, a decimal number as it is made here.
    pub id_str: Vec<u8>,
    /// Its name: text without NUL.
    pub name: Vec<u8>,
    /// When it was taken, seconds since 1970.
    pub date_sec: u32,
    /// The rest of that in nanoseconds.
    pub date_nsec: u32,
    /// The time that the guest had been running, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of the state of the virtual machine behind the disk.
    pub vm_state_size: u64,
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Instructions that the guest had run; all ones where that is not known.
    pub icount: u64,
    /// Bytes of extra data in the file.
    pub extra_data_size: u32,
    /// Extra data of unknown meaning. Kept as they are.
    pub unknown_extra_data: Vec<u8>,
}

/// The fixed part of an entry, and what it says of the rest.
pub struct EntryHeader {
    raw: Raw,
}

impl EntryHeader {
    /// The fixed part from its bytes.
    #[must_use]
    pub fn parse(bytes: [u8; ENTRY_HEADER]) -> Self {
        let raw: Raw = zerocopy::transmute!(bytes);
        Self { raw }
    }

    /// Bytes of extra data that follow.
    #[must_use]
    pub fn extra_data_size(&self) -> u32 {
        self.raw.extra_data_size.get()
    }

    /// Bytes of identity and name, which follow on the extra data.
    #[must_use]
    pub fn names_size(&self) -> usize {
        usize::from(self.raw.id_str_size.get()) + usize::from(self.raw.name_size.get())
    }

    /// The snapshot. `extra` is what is taken of the extra data, `names` as
    /// long as [`EntryHeader::names_size`] says. Where the extra data do not
    /// tell the size of the disk it is `disk_size`.
    #[must_use]
    pub fn snapshot(&self, extra: &[u8], names: &[u8], disk_size: u64) -> Snapshot {
        let word = |at: usize| {
            let bytes = extra.get(at..at + 8)?;
            Some(U64::from_bytes(bytes.try_into().ok()?).get())
        };
        let (id_str, name) = names.split_at(usize::from(self.raw.id_str_size.get()));
        Snapshot {
            l1_table_offset: self.raw.l1_table_offset.get(),
            l1_size: self.raw.l1_size.get(),
            id_str: text(id_str),
            name: text(name),
            date_sec: self.raw.date_sec.get(),
            date_nsec: self.raw.date_nsec.get(),
            vm_clock_nsec: self.raw.vm_clock_nsec.get(),
            vm_state_size: word(0).unwrap_or_else(|| self.raw.vm_state_size.get().into()),
            disk_size: word(8).unwrap_or(disk_size),
            icount: word(16).unwrap_or(NO_ICOUNT),
            extra_data_size: extra.len() as u32,
            unknown_extra_data: extra.get(KNOWN_EXTRA_DATA..).unwrap_or(&[]).to_vec(),
        }
    }
}

/// The text up to the first NUL.
fn text(bytes: &[u8]) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0);
    bytes[..end.unwrap_or(bytes.len())].to_vec()
}

impl Snapshot {
    /// Appends the entry to a table.
    fn encode(&self, table: &mut Vec<u8>) {
        let raw = Raw {
            l1_table_offset: self.l1_table_offset.into(),
            l1_size: self.l1_size.into(),
            id_str_size: (self.id_str.len() as u16).into(),
            name_size: (self.name.len() as u16).into(),
            date_sec: self.date_sec.into(),
            date_nsec: self.date_nsec.into(),
            vm_clock_nsec: self.vm_clock_nsec.into(),
            // Programs that know 32 bits only are to see no state rather than
            // a part of it.
            vm_state_size: u32::try_from(self.vm_state_size).unwrap_or(0).into(),
            extra_data_size: self.encoded_extra_data().into(),
        };
        table.extend_from_slice(raw.as_bytes());
        for word in [self.vm_state_size, self.disk_size, self.icount] {
            table.extend_from_slice(&word.to_be_bytes());
        }
        table.extend_from_slice(&self.unknown_extra_data);
        table.extend_from_slice(&self.id_str);
        table.extend_from_slice(&self.name);
    }

    /// Bytes of extra data that the entry has when it is written.
    #[must_use]
    pub fn encoded_extra_data(&self) -> u32 {
        (KNOWN_EXTRA_DATA + self.unknown_extra_data.len()) as u32
    }

    /// Its identity as text.
    #[must_use]
    pub fn id_text(&self) -> String {
        String::from_utf8_lossy(&self.id_str).into_owned()
    }

    /// Its name as text.
    #[must_use]
    pub fn name_text(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }
}

/// The bytes of a snapshot table, with all that is known of each snapshot.
///
/// # Errors
/// `EFBIG` for a table that is longer than a table may be.
pub fn encode_table(snapshots: &[Snapshot]) -> Result<Vec<u8>> {
    let mut table = Vec::new();
    for snapshot in snapshots {
        table.resize(round_up(table.len() as u64, 3) as usize, 0);
        let names = snapshot.id_str.len() + snapshot.name.len();
        let len = table.len() + ENTRY_HEADER + snapshot.encoded_extra_data() as usize + names;
        if len as u64 > MAX_SNAPSHOTS_BYTES {
            return Err(Error::errno(libc::EFBIG));
        }
        snapshot.encode(&mut table);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Snapshot {
        Snapshot {
            l1_table_offset: 0x50000,
            l1_size: 3,
            id_str: b"12".to_vec(),
            name: b"before".to_vec(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size: 5 << 32,
            disk_size: 1 << 30,
            icount: 7,
            extra_data_size: 27,
            unknown_extra_data: b"new".to_vec(),
        }
    }

    fn parse(bytes: &[u8], disk_size: u64) -> Snapshot {
        let (fixed, rest) = bytes.split_at(ENTRY_HEADER);
        let header = EntryHeader::parse(fixed.try_into().unwrap());
        let (extra, rest) = rest.split_at(header.extra_data_size() as usize);
        header.snapshot(extra, &rest[..header.names_size()], disk_size)
    }

    #[test]
    fn round_trip() {
        let table = encode_table(&[sample(), sample()]).unwrap();
        assert_eq!(parse(&table, 0), sample());
        let second = round_up((ENTRY_HEADER + 27 + 2 + 6) as u64, 3) as usize;
        assert_eq!(parse(&table[second..], 0), sample());
        // The state does not fit into the old field.
        assert_eq!(table[32..36], [0; 4]);
    }

    #[test]
    fn old_entries_have_less() {
        let mut bytes = vec![0; ENTRY_HEADER];
        bytes[13] = 1;
        bytes[15] = 2;
        bytes[35] = 9;
        bytes.extend_from_slice(b"1ab");
        let snapshot = parse(&bytes, 4096);
        assert_eq!(snapshot.vm_state_size, 9);
        assert_eq!(snapshot.disk_size, 4096);
        assert_eq!(snapshot.icount, u64::MAX);
        assert_eq!(
            (&*snapshot.id_str, &*snapshot.name),
            (&b"1"[..], &b"ab"[..])
        );
    }

    #[test]
    fn a_table_that_gets_too_long_is_refused() {
        let long = Snapshot {
            name: vec![b'x'; 65535],
            ..sample()
        };
        let error = encode_table(&vec![long; 1100]).unwrap_err();
        assert_eq!(error.code(), libc::EFBIG);
    }
}
