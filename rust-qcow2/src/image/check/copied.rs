//! The copied flags: whether a cluster or table is referred to exactly once.

use super::references::entry_of;
use super::{Check, Fix, strerror};
use crate::error::Result;
use crate::format::entry::{L1Entry, MetadataKind};
use crate::host::{File, Host};
use crate::units::HostOffset;

impl<H: Host> Check<'_, '_, H> {
    /// Compares the copied flags of the active tables with the refcounts.
    pub(super) fn check_copied(&mut self, fix: Fix) -> Result<()> {
        // The refcounts can be trusted if they were wrong and were mended.
        let sound =
            self.report.check_errors == 0 && self.report.corruptions == 0 && self.report.leaks == 0;
        let repair = fix.errors || fix.leaks && sound;
        let size = self.image.geometry.cluster_size();
        let mut bytes = self.image.host.aligned(size as usize)?;
        for index in 0..self.image.l1.len() {
            let entry = self.image.l1.get(index);
            let Some(table) = entry.table() else { continue };
            let cluster = self.image.geometry.cluster_of(table).0;
            // A failure was reported when refcounts were compared.
            let Ok(refcount) = self.refcount_after(cluster) else {
                continue;
            };
            if (refcount == 1) != entry.copied() {
                self.copied_l1(index, entry, refcount, repair)?;
            }
            self.copied_l2(table, &mut bytes, repair)?;
        }
        Ok(())
    }

    fn copied_l1(&mut self, index: u64, entry: L1Entry, refcount: u64, repair: bool) -> Result<()> {
        self.report.corruptions += 1;
        self.say(format_args!(
            "{} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={:x} refcount={refcount}",
            if repair { "Repairing" } else { "ERROR" },
            entry.0
        ));
        if repair {
            self.image.l1.set(index, entry.with_copied(refcount == 1));
            if let Err(error) = self.image.write_l1_entry(self.st, index) {
                self.image.l1.set(index, entry);
                self.report.check_errors += 1;
                return Err(error);
            }
            self.report.corruptions -= 1;
            self.report.corruptions_fixed += 1;
        }
        Ok(())
    }

    fn copied_l2(&mut self, table: HostOffset, bytes: &mut [u8], repair: bool) -> Result<()> {
        if let Err(error) = self.image.host.file().read(table.0, bytes) {
            let reason = strerror(&error);
            self.say(format_args!("ERROR: Could not read L2 table: {reason}"));
            self.report.check_errors += 1;
            return Err(error);
        }
        let entry_bits = self.image.geometry.l2_entry_bits;
        let mut changed = 0;
        for index in 0..self.image.geometry.l2_entries() as usize {
            let entry = entry_of(&self.image.geometry, bytes, index).entry;
            let Some(at) = self.image.geometry.mapping(entry).host_cluster() else {
                continue;
            };
            let refcount = if self.image.has_data_file() {
                Ok(1)
            } else {
                self.refcount_after(self.image.geometry.cluster_of(at).0)
            };
            let Ok(refcount) = refcount else {
                continue;
            };
            if (refcount == 1) == entry.copied() {
                continue;
            }
            self.report.corruptions += 1;
            self.say(format_args!(
                "{} OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}",
                if repair { "Repairing" } else { "ERROR" },
                entry.0
            ));
            if repair {
                let entry = entry.with_copied(refcount == 1);
                bytes[index << entry_bits..][..8].copy_from_slice(&entry.0.to_be_bytes());
                changed += 1;
            }
        }
        if changed > 0 {
            self.write_l2(table, bytes)?;
            self.report.corruptions -= changed;
            self.report.corruptions_fixed += changed;
        }
        Ok(())
    }

    fn write_l2(&mut self, table: HostOffset, bytes: &[u8]) -> Result<()> {
        let image = self.image;
        let size = image.geometry.cluster_size();
        if let Err(error) = image.ensure_no_overlap(self.st, MetadataKind::ACTIVE_L2, table.0, size)
        {
            self.say(format_args!(
                "ERROR: Could not write L2 table; metadata overlap check failed: {}",
                strerror(&error)
            ));
            self.report.check_errors += 1;
            return Err(error);
        }
        if let Err(error) = image.host.file().write(table.0, bytes) {
            self.say(format_args!(
                "ERROR: Could not write L2 table: {}",
                strerror(&error)
            ));
            self.report.check_errors += 1;
            return Err(error);
        }
        image.l2.discard(table, size);
        Ok(())
    }
}
