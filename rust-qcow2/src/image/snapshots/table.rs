//! The snapshot table in the file.

use super::super::refcounts::Reason;
use super::super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::geometry::MAX_SNAPSHOTS_BYTES;
use crate::format::header::field;
use crate::format::snapshots::{ENTRY_HEADER, EntryHeader, MAX_EXTRA_DATA, Snapshot, encode_table};
use crate::host::{File, Host};
use crate::units::{HostOffset, round_up};

/// The snapshots of an image.
#[derive(Clone, Debug, Default)]
pub(in crate::image) struct SnapshotTable {
    pub(in crate::image) list: Vec<Snapshot>,
    /// Bytes of the table in the file.
    pub(in crate::image) bytes: u64,
}

/// Repairs of a table while it is read.
pub(in crate::image) struct Repair<'a> {
    /// Hears of each.
    pub(in crate::image) say: &'a mut dyn FnMut(&str),
    /// Snapshots that were given up.
    pub(in crate::image) overhanging: u64,
    /// Snapshots whose extra data were cut off.
    pub(in crate::image) trimmed: u64,
}

/// Reads the snapshot table, of `count` entries. A disk whose size is not told
/// has `disk_size` bytes.
///
/// # Errors
/// Those of the file, and `EFBIG` for what is too large, unless it may be
/// repaired: then that is left out.
pub(in crate::image) fn read_snapshot_table<F: File>(
    file: &F,
    offset: u64,
    count: u32,
    disk_size: u64,
    mut repair: Option<&mut Repair<'_>>,
) -> Result<SnapshotTable> {
    let read = |at: u64, bytes: &mut [u8]| {
        file.read(offset.saturating_add(at), bytes)
            .map_err(|error| Error::with_errno(error.code(), "Failed to read snapshot table"))
    };
    let mut table = SnapshotTable::default();
    // Bytes of the entries, without what was cut off.
    let mut length = 0;
    for index in 0..count {
        let mut at = round_up(table.bytes, 3);
        length = round_up(length, 3);
        let mut fixed = [0; ENTRY_HEADER];
        read(at, &mut fixed)?;
        at += ENTRY_HEADER as u64;
        let header = EntryHeader::parse(fixed);
        let told = header.extra_data_size();
        let taken = told.min(MAX_EXTRA_DATA);
        if told > taken {
            let Some(repair) = repair.as_deref_mut() else {
                let text = format!("Too much extra metadata in snapshot table entry {index}");
                return Err(Error::new(libc::EFBIG, text).with_hint(
                    "You can force-remove this extra metadata with qemu-img check -r all",
                ));
            };
            (repair.say)(&format!(
                "Discarding too much extra metadata in snapshot table entry {index} ({told} > \
                 {MAX_EXTRA_DATA})"
            ));
            repair.trimmed += 1;
        }
        let mut rest = vec![0; taken as usize + header.names_size()];
        let (extra, names) = rest.split_at_mut(taken as usize);
        if told == taken {
            read(at, &mut rest)?;
        } else {
            read(at, extra)?;
            read(at + u64::from(told), names)?;
        }
        length += (ENTRY_HEADER + rest.len()) as u64;
        let end = at + u64::from(told) + header.names_size() as u64;
        if length > MAX_SNAPSHOTS_BYTES || end > i32::MAX as u64 {
            let left = count - index;
            let Some(repair) = repair else {
                let text = "Snapshot table is too big";
                return Err(Error::new(libc::EFBIG, text).with_hint(format!(
                    "You can force-remove all {left} overhanging snapshots with qemu-img check -r \
                     all"
                )));
            };
            (repair.say)(&format!(
                "Discarding {left} overhanging snapshots (snapshot table is too big)"
            ));
            repair.overhanging += u64::from(left);
            break;
        }
        let (extra, names) = rest.split_at(taken as usize);
        table.list.push(header.snapshot(extra, names, disk_size));
        table.bytes = end;
    }
    Ok(table)
}

impl<H: Host> Image<H> {
    /// Writes the snapshot table anew and gives the old one back.
    ///
    /// # Errors
    /// `EFBIG` where it gets too long, and those of the file; the old table is
    /// in force then.
    pub(in crate::image) fn write_snapshot_table(
        &self,
        st: &mut StateGuard<'_, H>,
        mut list: Vec<Snapshot>,
    ) -> Result<()> {
        let bytes = encode_table(&list)?;
        let len = bytes.len() as u64;
        let offset = if bytes.is_empty() {
            HostOffset(0)
        } else {
            self.allocate(st, len)?
        };
        if let Err(error) = self.enter_snapshot_table(st, offset, &bytes, list.len() as u32) {
            self.free(st, offset, len, Reason::Always);
            return Err(error);
        }
        for snapshot in &mut list {
            snapshot.extra_data_size = snapshot.encoded_extra_data();
        }
        let (old_offset, old) = {
            let mut shared = self.shared.write();
            let old_offset = shared.header.snapshots_offset;
            shared.header.snapshots_offset = offset.0;
            shared.header.nb_snapshots = list.len() as u32;
            let new = SnapshotTable { list, bytes: len };
            (old_offset, std::mem::replace(&mut shared.snapshots, new))
        };
        self.forget_overlap_map();
        if old.bytes > 0 {
            self.free(st, HostOffset(old_offset), old.bytes, Reason::Snapshot);
        }
        Ok(())
    }

    fn enter_snapshot_table(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        bytes: &[u8],
        count: u32,
    ) -> Result<()> {
        self.write_back_all(st)?;
        if !bytes.is_empty() {
            self.ensure_no_overlap(st, MetadataKind::empty(), offset.0, bytes.len() as u64)?;
            self.host.file().write(offset.0, bytes)?;
        }
        let mut pointer = [0; 12];
        pointer[..4].copy_from_slice(&count.to_be_bytes());
        pointer[4..].copy_from_slice(&offset.0.to_be_bytes());
        self.write_pointer(st, MetadataKind::MAIN_HEADER, field::SNAPSHOTS, &pointer)
    }
}
