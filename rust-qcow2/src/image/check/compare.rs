//! Comparing refcounts with references.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{Check, Fix, strerror};
use crate::error::Result;
use crate::host::Host;
use crate::image::refcounts::{BlockId, Change, Reason};
use crate::units::ClusterIndex;

impl<H: Host> Check<'_, '_, H> {
    /// Compares the refcount of each cluster with the references to it, and
    /// mends refcounts as far as `fix` allows.
    pub(super) fn compare(&mut self, fix: Fix) {
        self.highest = 0;
        self.exact = true;
        let per_block = self.image.geometry.refcounts_per_block();
        let mut first = 0;
        while first < self.counts.len() {
            let end = (first + per_block).min(self.counts.len());
            let id = BlockId(first / per_block);
            if self.st.refcounts.block_offset(id).is_some() {
                self.compare_block(first..end, fix);
            } else {
                self.compare_missing(first..end, fix);
            }
            first = end;
        }
    }

    /// The clusters of one refcount block.
    fn compare_block(&mut self, clusters: Range<u64>, fix: Fix) {
        let mut failure = None;
        for cluster in clusters {
            if failure.is_none() {
                match self.refcount_in_file(cluster) {
                    Ok(count) => {
                        self.compare_cluster(cluster, count, fix);
                        continue;
                    }
                    Err(error) => failure = Some(strerror(&error)),
                }
            }
            let reason = failure.as_deref().unwrap_or_default();
            (self.out)(&format!(
                "Can't get refcount for cluster {cluster}: {reason}"
            ));
            self.report.check_errors += 1;
            self.exact = false;
        }
    }

    /// Clusters that no refcount block counts.
    fn compare_missing(&mut self, clusters: Range<u64>, fix: Fix) {
        let mut from = clusters.start;
        while let Some(cluster) = self.counts.next_used(from, clusters.end) {
            self.compare_cluster(cluster, 0, fix);
            from = cluster + 1;
        }
    }

    fn compare_cluster(&mut self, cluster: u64, refcount: u64, fix: Fix) {
        let references = self.counts.get(cluster);
        if refcount > 0 || references > 0 {
            self.highest = cluster;
        }
        if refcount == references {
            return;
        }
        let leaked = refcount > references;
        let repair = if refcount == 0 {
            self.rebuild = true;
            false
        } else if leaked {
            fix.leaks
        } else {
            fix.errors
        };
        let what = match (repair, leaked) {
            (true, _) => "Repairing",
            (false, true) => "Leaked",
            (false, false) => "ERROR",
        };
        self.say(format_args!(
            "{what} cluster {cluster} refcount={refcount} reference={references}"
        ));
        if repair && self.set_refcount(cluster, refcount, references).is_ok() {
            if leaked {
                self.report.leaks_fixed += 1;
            } else {
                self.report.corruptions_fixed += 1;
            }
            return;
        }
        self.exact = false;
        if leaked {
            self.report.leaks += 1;
        } else {
            self.report.corruptions += 1;
        }
    }

    fn set_refcount(&mut self, cluster: u64, old: u64, new: u64) -> Result<()> {
        let change = if old > new {
            Change::Sub(old - new)
        } else {
            Change::Add(new - old)
        };
        let offset = self.image.geometry.offset_of(ClusterIndex(cluster));
        self.image
            .change_refcount(self.st, offset, 1, change, Reason::Always)
    }

    /// The refcount of a cluster.
    ///
    /// A block that cannot be used ends the use of the image, but not the check
    /// that may repair it.
    pub(super) fn refcount_in_file(&mut self, cluster: u64) -> Result<u64> {
        let result = self.image.refcount(self.st, ClusterIndex(cluster));
        if result.is_err() && self.image.is_broken() {
            self.fatal = true;
            self.image.broken.store(false, Ordering::Release);
        }
        result
    }

    /// The refcount of a cluster after the comparison.
    pub(super) fn refcount_after(&mut self, cluster: u64) -> Result<u64> {
        if self.exact && cluster < self.counts.len() {
            Ok(self.counts.get(cluster))
        } else {
            self.refcount_in_file(cluster)
        }
    }
}
