//! Writing the refcount structure anew.
//!
//! New blocks and a new table go where nothing is that the image refers to,
//! the old structure included, so until the header points to the new table the
//! file is as it was.

use super::{Check, Fix, MAX_CLUSTERS, strerror};
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::geometry::MAX_REFTABLE_BYTES;
use crate::format::header::field;
use crate::host::{File, Host};
use crate::units::{ClusterIndex, HostOffset, div_up};

impl<H: Host> Check<'_, '_, H> {
    /// Rebuilds the structure from the references that were counted, counts
    /// again, and gives back what the old structure took.
    pub(super) fn rebuild_and_recount(&mut self, fix: Fix) -> Result<()> {
        let before = self.report.clone();
        self.say(format_args!("Rebuilding refcount structure"));
        self.rebuild_structure()?;

        self.report.corruptions = 0;
        self.report.leaks = 0;
        self.report.allocated_clusters = 0;
        self.report.fragmented_clusters = 0;
        self.report.compressed_clusters = 0;
        self.rebuild = false;
        self.exact = false;
        self.counts.clear();
        self.measure_file()?;
        self.count_references(Fix::NONE)?;

        let mut fresh_leaks = 0;
        if fix.leaks {
            // Every leak is of our making, and none was there before.
            let counted = self.report.clone();
            self.compare(Fix {
                leaks: true,
                errors: false,
            });
            if self.rebuild {
                self.say(format_args!(
                    "ERROR rebuilt refcount structure is still broken"
                ));
            }
            fresh_leaks = self.report.leaks - counted.leaks;
            self.report = counted;
        }
        let report = &mut self.report;
        report.corruptions_fixed += before.corruptions.saturating_sub(report.corruptions);
        report.leaks_fixed += before.leaks.saturating_sub(report.leaks);
        report.leaks += fresh_leaks;
        Ok(())
    }

    fn rebuild_structure(&mut self) -> Result<()> {
        self.st.refcounts.forget_blocks();
        let size = self.image.geometry.cluster_size();
        let mut table = Vec::new();
        let end = self.counts.len();
        self.write_blocks(0..end, &mut table)?;
        // The table is counted by the blocks that it lists: a longer table may
        // need another block, and that a longer table.
        let offset = loop {
            let bytes = table.len() as u64 * 8;
            let taken = if bytes == 0 || bytes > MAX_REFTABLE_BYTES {
                Err(Error::errno(libc::EFBIG))
            } else {
                self.counts.take(bytes / size, &mut 0, MAX_CLUSTERS)
            };
            let first = taken.map_err(|error| self.failed("allocating reftable", error))?;
            let len = table.len();
            self.write_blocks(first..first + bytes / size, &mut table)?;
            if table.len() == len {
                break self.image.geometry.offset_of(ClusterIndex(first));
            }
        };
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.write_new(offset.0, &bytes)
            .map_err(|error| self.failed("writing reftable", error))?;
        self.enter_table(offset, table)
            .map_err(|error| self.failed("setting reftable", error))
    }

    /// Makes the header point to the new table. A damaged table may claim to be
    /// where the header is; that does not keep the header from being mended.
    fn enter_table(&mut self, offset: HostOffset, table: Vec<u64>) -> Result<()> {
        let clusters = (table.len() as u64 * 8 / self.image.geometry.cluster_size()) as u32;
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&offset.0.to_be_bytes());
        bytes[8..].copy_from_slice(&clusters.to_be_bytes());
        let file = self.image.host.file();
        file.flush()?;
        file.write(field::REFCOUNT_TABLE, &bytes)?;
        file.flush()?;
        {
            let mut shared = self.image.shared.write();
            shared.header.refcount_table_offset = offset.0;
            shared.header.refcount_table_clusters = clusters;
        }
        self.st.refcounts.replace_table(table, offset);
        self.st.refcounts.forget_blocks();
        self.st.refcounts.free_hint = 0;
        self.image.forget_overlap_map();
        Ok(())
    }

    /// Writes the block of each cluster in the range that has references, and
    /// the blocks that count those blocks. The table grows as needed, in whole
    /// clusters.
    fn write_blocks(&mut self, clusters: std::ops::Range<u64>, table: &mut Vec<u64>) -> Result<()> {
        let geometry = self.image.geometry;
        let per_block = geometry.refcounts_per_block();
        let per_table_cluster = geometry.cluster_size() / 8;
        let mut bytes = self.image.host.aligned(geometry.cluster_size() as usize)?;
        let mut free = 0;
        let mut end = clusters.end;
        let mut from = clusters.start;
        while let Some(used) = self.counts.next_used(from, end) {
            let index = used / per_block;
            let start = index * per_block;
            from = start + per_block;
            let mut offset = table.get(index as usize).copied().unwrap_or(0);
            if offset == 0 {
                // Not into the range of a block that is written already.
                free = start.max(free);
                let cluster = self
                    .counts
                    .take(1, &mut free, MAX_CLUSTERS)
                    .map_err(|error| self.failed("allocating refblock", error))?;
                end = end.max(cluster + 1);
                let entries = div_up(index + 1, per_table_cluster) * per_table_cluster;
                if table.len() < entries as usize {
                    table.resize(entries as usize, 0);
                }
                offset = geometry.offset_of(ClusterIndex(cluster)).0;
                table[index as usize] = offset;
            }
            bytes.fill(0);
            let mut next = start;
            while let Some(cluster) = self.counts.next_used(next, start + per_block) {
                let place = (cluster - start) as usize;
                geometry
                    .refcount_order
                    .set(&mut bytes, place, self.counts.get(cluster));
                next = cluster + 1;
            }
            self.write_new(offset, &bytes)
                .map_err(|error| self.failed("writing refblock", error))?;
        }
        Ok(())
    }

    /// Writes a part of the new structure. Blocks of the old one that are in
    /// order are counted and so never in the way.
    fn write_new(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let ignore = MetadataKind::REFCOUNT_BLOCK;
        self.image
            .ensure_no_overlap(self.st, ignore, offset, bytes.len() as u64)?;
        self.image.host.file().write(offset, bytes)
    }

    fn failed(&mut self, what: &str, error: Error) -> Error {
        let reason = strerror(&error);
        self.say(format_args!("ERROR {what}: {reason}"));
        self.report.check_errors += 1;
        error
    }
}
