//! Counting refcount blocks.

use super::{Check, Fix, MAX_CLUSTERS, strerror};
use crate::error::{Error, Result};
use crate::host::{File, Host, Preallocation};
use crate::image::refcounts::TABLE_OFFSET_MASK;
use crate::units::{HostOffset, div_up};

impl<H: Host> Check<'_, '_, H> {
    /// Counts the refcount blocks, and finds out whether they can be used.
    pub(super) fn count_blocks(&mut self, fix: Fix) -> Result<()> {
        let geometry = self.image.geometry;
        for index in 0..self.st.refcounts.table().len() {
            let entry = self.st.refcounts.table()[index];
            let offset = HostOffset(entry & TABLE_OFFSET_MASK);
            let cluster = geometry.cluster_of(offset).0;
            if entry & !TABLE_OFFSET_MASK != 0 {
                self.say(format_args!(
                    "ERROR refcount table entry {index} has reserved bits set"
                ));
                self.broken_block();
            } else if !offset.is_aligned(geometry.cluster_bits) {
                self.say(format_args!(
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry \
                     corrupted"
                ));
                self.broken_block();
            } else if cluster >= self.counts.len() {
                self.block_outside(index, offset, fix)?;
            } else if offset.0 != 0 {
                // A count of one bit does not tell one reference from two.
                let others = self.counts.get(cluster);
                self.count(offset.0, geometry.cluster_size())?;
                if others != 0 {
                    let count = others + 1;
                    self.say(format_args!(
                        "ERROR refcount block {index} refcount={count}"
                    ));
                    self.broken_block();
                }
            }
        }
        Ok(())
    }

    fn broken_block(&mut self) {
        self.report.corruptions += 1;
        self.rebuild = true;
    }

    /// A block beyond the end of the file counts nothing; a longer file is all
    /// it needs.
    fn block_outside(&mut self, index: usize, offset: HostOffset, fix: Fix) -> Result<()> {
        self.report.corruptions += 1;
        self.say(format_args!(
            "{} refcount block {index} is outside image",
            if fix.errors { "Repairing" } else { "ERROR" }
        ));
        if !fix.errors {
            return Ok(());
        }
        if let Err(error) = self.lengthen_file(offset) {
            self.rebuild = true;
            let reason = strerror(&error);
            self.say(format_args!("ERROR could not resize image: {reason}"));
            return Ok(());
        }
        self.report.corruptions -= 1;
        self.report.corruptions_fixed += 1;
        self.grow_counts(div_up(self.file_len, self.image.geometry.cluster_size()))?;
        self.count(offset.0, self.image.geometry.cluster_size())
    }

    /// Makes the file long enough for a cluster at `offset`.
    fn lengthen_file(&mut self, offset: HostOffset) -> Result<()> {
        let size = self.image.geometry.cluster_size();
        if offset.0 > i64::MAX as u64 - size {
            return Err(Error::errno(libc::EINVAL));
        }
        let end = offset.0 + size;
        if div_up(end, size) > MAX_CLUSTERS {
            return Err(Error::errno(libc::EFBIG));
        }
        let file = self.image.host.file();
        if let Err(error) = file.truncate(end, false, Preallocation::Off, false) {
            if error.message().is_some() {
                let text = error.to_string();
                self.say(format_args!("{text}"));
            }
            return Err(error);
        }
        let len = file.length()?;
        if len < end || div_up(len, size) > MAX_CLUSTERS {
            return Err(Error::errno(libc::EINVAL));
        }
        self.file_len = len;
        Ok(())
    }
}
