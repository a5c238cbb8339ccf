//! The snapshot table: reading it, with repairs, and counting it.

use super::{Check, Fix, strerror};
use crate::error::Result;
use crate::format::geometry::MAX_SNAPSHOTS;
use crate::format::header::field;
use crate::format::snapshots::{ENTRY_HEADER, V3_EXTRA_DATA};
use crate::host::{File, Host};
use crate::image::snapshots::{Repair, read_snapshot_table};

/// What was found wrong with the table. It is added to the report at the end,
/// as it says nothing of refcounts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TableReport {
    /// Entries that are mended when the table is written anew.
    pub(super) unfit: u64,
    /// Entries that were left out.
    pub(super) fixed: u64,
}

impl<H: Host> Check<'_, '_, H> {
    /// Reads the snapshot table into the image.
    pub(super) fn read_snapshots(&mut self, fix: Fix) -> Result<TableReport> {
        let result = self.try_read_snapshots(fix);
        if result.is_err() {
            self.report.check_errors += 1;
        }
        result
    }

    fn try_read_snapshots(&mut self, fix: Fix) -> Result<TableReport> {
        let (offset, told) = {
            let shared = self.image.shared.read();
            (shared.header.snapshots_offset, shared.header.nb_snapshots)
        };
        let overhanging = told.saturating_sub(MAX_SNAPSHOTS);
        let mut count = told;
        if overhanging > 0 && fix.errors {
            self.say(format_args!(
                "Discarding {overhanging} overhanging snapshots"
            ));
            count = MAX_SNAPSHOTS;
        }
        let size = ENTRY_HEADER as u64;
        let valid = self.image.geometry.validate_table(
            offset,
            u64::from(count),
            size,
            size * u64::from(MAX_SNAPSHOTS),
            "snapshot table",
        );
        if let Err(error) = valid {
            self.tell("ERROR", &error);
            if count > MAX_SNAPSHOTS {
                self.say(format_args!(
                    "You can force-remove all {overhanging} overhanging snapshots with qemu-img \
                     check -r all"
                ));
            }
            return Err(error);
        }
        let disk_size = self.image.visible_size();
        let file = self.image.host.file();
        let mut repair = Repair {
            say: &mut *self.out,
            overhanging: u64::from(told - count),
            trimmed: 0,
        };
        let repairs = fix.errors.then_some(&mut repair);
        let table = read_snapshot_table(&file, offset, count, disk_size, repairs);
        let (overhanging, trimmed) = (repair.overhanging, repair.trimmed);
        let table = match table {
            Ok(table) => table,
            Err(error) => {
                self.tell("ERROR failed to read the snapshot table:", &error);
                if let Some(hint) = error.hint() {
                    self.say(format_args!("{hint}"));
                }
                return Err(error);
            }
        };
        if overhanging > 0 {
            self.shorten_snapshots(table.list.len() as u32)?;
        }
        let mut report = TableReport {
            unfit: trimmed,
            fixed: overhanging,
        };
        if self.image.geometry.version >= 3 {
            let what = if fix.errors { "Repairing" } else { "ERROR" };
            for (index, snapshot) in table.list.iter().enumerate() {
                if snapshot.extra_data_size < V3_EXTRA_DATA {
                    report.unfit += 1;
                    self.say(format_args!(
                        "{what} snapshot table entry {index} is incomplete"
                    ));
                }
            }
        }
        self.image.shared.write().snapshots = table;
        self.image.forget_overlap_map();
        Ok(report)
    }

    /// Gives up the last snapshots in the header, before their clusters are
    /// counted, so that those are leaks.
    fn shorten_snapshots(&mut self, count: u32) -> Result<()> {
        let file = self.image.host.file();
        let written = file
            .write(field::SNAPSHOTS, &count.to_be_bytes())
            .and_then(|()| file.flush());
        if let Err(error) = written {
            let reason = strerror(&error);
            self.say(format_args!(
                "ERROR failed to update the snapshot count in the image header: {reason}"
            ));
            return Err(error);
        }
        self.image.shared.write().header.nb_snapshots = count;
        Ok(())
    }

    /// Counts the clusters of the table.
    pub(super) fn count_snapshot_table(&mut self) -> Result<()> {
        let (offset, bytes) = {
            let shared = self.image.shared.read();
            (shared.header.snapshots_offset, shared.snapshots.bytes)
        };
        self.count(offset, bytes)
    }

    /// Writes the table anew where that mends it, now that clusters can be
    /// taken, and adds what was found to the report.
    pub(super) fn mend_snapshots(&mut self, found: TableReport, fix: Fix) -> Result<()> {
        self.report.corruptions_fixed += found.fixed;
        if found.unfit == 0 || !fix.errors {
            self.report.corruptions += found.unfit;
            return Ok(());
        }
        let list = self.image.snapshots();
        if let Err(error) = self.image.write_snapshot_table(self.st, list) {
            let reason = strerror(&error);
            self.say(format_args!(
                "ERROR failed to update snapshot table: {reason}"
            ));
            self.report.corruptions += found.unfit;
            self.report.check_errors += 1;
            return Err(error);
        }
        self.report.corruptions_fixed += found.unfit;
        Ok(())
    }
}
