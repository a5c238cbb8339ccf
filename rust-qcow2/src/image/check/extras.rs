//! Counting what hangs off the header besides the tables of the disk:
//! persistent bitmaps, the encryption header.

use super::Check;
use super::references::word;
use crate::error::Result;
use crate::format::bitmaps::TableEntry;
use crate::host::Host;

impl<H: Host> Check<'_, '_, H> {
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
