//! Counting what hangs off the header besides the tables of the disk:
//! internal snapshots, persistent bitmaps, the encryption header.

use super::references::word;
use super::{Check, strerror};
use crate::error::{Error, Result};
use crate::format::geometry::{MAX_SNAPSHOTS, MAX_SNAPSHOTS_BYTES};
use crate::format::header::Autoclear;
use crate::host::{File, Host};
use crate::units::{HostOffset, round_up};

/// Bytes of the fixed part of a snapshot table entry.
const SNAPSHOT_HEADER: u64 = 40;
/// The largest extra data of a snapshot table entry.
const MAX_EXTRA_DATA: u32 = 1024;
/// The least extra data that version 3 asks for.
const V3_EXTRA_DATA: u32 = 16;

/// Bytes of the fixed part of a bitmap directory entry.
const BITMAP_HEADER: usize = 24;
/// The largest bitmap directory.
const MAX_BITMAP_DIRECTORY: u64 = 65535 * 1024;
/// The longest bitmap table, in entries.
const MAX_BITMAP_TABLE: u64 = 0x800_0000;
/// Bits of a bitmap table entry that have to be zero.
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits of a bitmap table entry that hold an offset.
const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bytes of a bitmap table that are read at a time.
const PIECE: usize = 65536;

/// What a snapshot refers to.
pub(super) struct Snapshot {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    /// The end of its entry, counted from the begin of the snapshot table.
    end: u64,
}

impl<H: Host> Check<'_, '_, H> {
    /// Reads the snapshot table. It is not repaired.
    pub(super) fn read_snapshots(&mut self) -> Result<Vec<Snapshot>> {
        let (offset, count) = {
            let shared = self.image.shared.read();
            (shared.header.snapshots_offset, shared.header.nb_snapshots)
        };
        let max = SNAPSHOT_HEADER * u64::from(MAX_SNAPSHOTS);
        let valid = self.image.geometry.validate_table(
            offset,
            u64::from(count),
            SNAPSHOT_HEADER,
            max,
            "snapshot table",
        );
        if let Err(error) = valid {
            let text = error.to_string();
            self.say(format_args!("ERROR {text}"));
            if let Some(more) = count.checked_sub(MAX_SNAPSHOTS).filter(|more| *more > 0) {
                self.say(format_args!(
                    "You can force-remove all {more} overhanging snapshots with qemu-img check -r \
                     all"
                ));
            }
            self.report.check_errors += 1;
            return Err(error);
        }
        let mut snapshots: Vec<Snapshot> = Vec::new();
        for index in 0..count {
            let from = snapshots.last().map_or(0, |last| round_up(last.end, 3));
            match self.read_snapshot(offset, from, index, count - index) {
                Ok(snapshot) => snapshots.push(snapshot),
                Err(error) => {
                    self.report.check_errors += 1;
                    return Err(error);
                }
            }
        }
        Ok(snapshots)
    }

    /// Reads the entry that begins `from` bytes behind the begin of the table.
    fn read_snapshot(&mut self, table: u64, from: u64, index: u32, left: u32) -> Result<Snapshot> {
        const FAILED: &str = "ERROR failed to read the snapshot table:";
        let image = self.image;
        let mut read = |at: u64, bytes: &mut [u8]| {
            let result = image.host.file().read(table.saturating_add(at), bytes);
            if let Err(error) = &result {
                let reason = strerror(error);
                (self.out)(&format!("{FAILED} Failed to read snapshot table: {reason}"));
            }
            result
        };
        let mut fixed = [0; SNAPSHOT_HEADER as usize];
        read(from, &mut fixed)?;
        let half = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
        let quad = |at: usize| u32::from(half(at)) << 16 | u32::from(half(at + 2));
        let (id_len, name_len, extra) = (half(12), half(14), quad(36));
        if extra > MAX_EXTRA_DATA {
            self.say(format_args!(
                "{FAILED} Too much extra metadata in snapshot table entry {index}"
            ));
            self.say(format_args!(
                "You can force-remove this extra metadata with qemu-img check -r all"
            ));
            return Err(Error::errno(libc::EFBIG));
        }
        let mut names = vec![0; usize::from(id_len) + usize::from(name_len)];
        let at = from + SNAPSHOT_HEADER + u64::from(extra);
        read(at, &mut names)?;
        let end = at + names.len() as u64;
        if end > MAX_SNAPSHOTS_BYTES {
            self.say(format_args!("{FAILED} Snapshot table is too big"));
            self.say(format_args!(
                "You can force-remove all {left} overhanging snapshots with qemu-img check -r all"
            ));
            return Err(Error::errno(libc::EFBIG));
        }
        if self.image.geometry.version >= 3 && extra < V3_EXTRA_DATA {
            self.report.corruptions += 1;
            self.say(format_args!(
                "ERROR snapshot table entry {index} is incomplete"
            ));
        }
        let (id, name) = names.split_at(usize::from(id_len));
        Ok(Snapshot {
            id: text(id),
            name: text(name),
            l1_offset: u64::from(quad(0)) << 32 | u64::from(quad(4)),
            l1_size: quad(8),
            end,
        })
    }

    pub(super) fn count_snapshot_table(&mut self, snapshots: &[Snapshot]) -> Result<()> {
        let offset = self.image.shared.read().header.snapshots_offset;
        self.count(offset, snapshots.last().map_or(0, |last| last.end))
    }

    pub(super) fn count_crypto_header(&mut self) -> Result<()> {
        let extension = self.image.shared.read().extensions.crypto_header.clone();
        match extension {
            Some(data) if data.len() >= 16 => self.count(word(&data, 0), word(&data, 1)),
            _ => Ok(()),
        }
    }

    /// Counts the directory of the bitmaps, their tables and their data.
    pub(super) fn count_bitmaps(&mut self) -> Result<()> {
        let extension = {
            let shared = self.image.shared.read();
            // Without the flag the extension is out of date and void.
            if !shared.header.autoclear.contains(Autoclear::BITMAPS) {
                return Ok(());
            }
            shared.extensions.bitmaps.clone()
        };
        let Some(data) = extension.filter(|data| data.len() >= 24) else {
            return Ok(());
        };
        let bitmaps = word(&data, 0) >> 32;
        let (size, offset) = (word(&data, 1), word(&data, 2));
        if bitmaps == 0 {
            return Ok(());
        }
        self.count(offset, size)?;
        let result = self.count_directory(offset, size, bitmaps);
        if result.is_err() {
            self.report.corruptions += 1;
        }
        result
    }

    fn count_directory(&mut self, offset: u64, size: u64, bitmaps: u64) -> Result<()> {
        let broken = || Error::errno(libc::EINVAL);
        if size == 0 || size > MAX_BITMAP_DIRECTORY {
            return Err(broken());
        }
        let mut directory = vec![0; size as usize];
        self.image.host.file().read(offset, &mut directory)?;
        let mut rest = directory.as_slice();
        let mut found = 0;
        while !rest.is_empty() {
            let fixed = rest.get(..BITMAP_HEADER).ok_or_else(broken)?;
            let (table, sizes, names) = (word(fixed, 0), word(fixed, 1), word(fixed, 2));
            let entries = sizes >> 32;
            let (name_len, extra) = (names >> 32 & 0xffff, names & 0xffff_ffff);
            let len = (BITMAP_HEADER as u64 + name_len).next_multiple_of(8) as usize;
            let unusable = extra != 0
                || !(1..=MAX_BITMAP_TABLE).contains(&entries)
                || !HostOffset(table).is_aligned(self.image.geometry.cluster_bits)
                || len > rest.len();
            found += 1;
            if unusable || found > bitmaps {
                return Err(broken());
            }
            self.count_bitmap_table(table, entries)?;
            rest = &rest[len..];
        }
        if found == bitmaps {
            Ok(())
        } else {
            Err(broken())
        }
    }

    fn count_bitmap_table(&mut self, offset: u64, entries: u64) -> Result<()> {
        let geometry = self.image.geometry;
        self.count(offset, entries * 8)?;
        // Beyond the end of the file there are only zeroes.
        let end = (offset.saturating_add(entries * 8)).min(self.file_len);
        let mut piece = vec![0; PIECE];
        let mut at = offset;
        while at < end {
            let len = (end - at).min(PIECE as u64) as usize / 8 * 8;
            if len == 0 {
                break;
            }
            self.image.host.file().read(at, &mut piece[..len])?;
            for index in 0..len / 8 {
                let entry = word(&piece, index);
                let data = HostOffset(entry & BITMAP_OFFSET);
                let bad = entry & BITMAP_RESERVED != 0
                    || data.0 != 0 && entry & 1 != 0
                    || !data.is_aligned(geometry.cluster_bits);
                if bad {
                    return Err(Error::errno(libc::EINVAL));
                }
                if data.0 != 0 {
                    self.count(data.0, geometry.cluster_size())?;
                }
            }
            at += len as u64;
        }
        Ok(())
    }
}

/// The text up to the first NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
