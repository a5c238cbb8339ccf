//! Counting what hangs off the header besides the tables of the disk:
//! internal snapshots, persistent bitmaps, the encryption header.

use super::references::word;
use super::{Check, strerror};
use crate::error::{Error, Result};
use crate::format::bitmaps::TableEntry;
use crate::format::geometry::{MAX_SNAPSHOTS, MAX_SNAPSHOTS_BYTES};
use crate::host::{File, Host};
use crate::units::round_up;

/// Bytes of the fixed part of a snapshot table entry.
const SNAPSHOT_HEADER: u64 = 40;
/// The largest extra data of a snapshot table entry.
const MAX_EXTRA_DATA: u32 = 1024;
/// The least extra data that version 3 asks for.
const V3_EXTRA_DATA: u32 = 16;

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
        let Some(directory) = self.image.bitmap_directory() else {
            return Ok(());
        };
        self.count(directory.offset.0, directory.size)?;
        let list = self
            .image
            .bitmaps()
            .inspect_err(|_| self.report.corruptions += 1)?;
        for bitmap in list {
            self.count(bitmap.table.offset.0, bitmap.table.bytes())?;
            let table = self
                .image
                .read_bitmap_table(bitmap.table)
                .inspect_err(|_| self.report.corruptions += 1)?;
            for entry in table {
                if let TableEntry::Cluster(offset) = entry {
                    self.count(offset.0, self.image.geometry.cluster_size())?;
                }
            }
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
