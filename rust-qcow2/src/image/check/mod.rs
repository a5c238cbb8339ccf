//! Verifying and repairing an image.
//!
//! 1. Everything that the image refers to is counted: header, tables, data
//!    (`references`, `snapshots`, `extras`, `blocks`). Tables that are wrong in themselves
//!    are reported on the way.
//! 2. The counts are compared with the refcounts in the file (`compare`). A
//!    count that is too high is a leak, one that is too low a corruption.
//! 3. Where refcounts have no place in the file, or the places are broken, the
//!    whole structure is written anew (`rebuild`); else single counts are
//!    mended.
//! 4. The copied flags of the tables are made to agree with the refcounts
//!    (`copied`).
//!
//! The wording and the counters are those of QEMU's own driver, as scripts
//! and people know them.

mod blocks;
mod compare;
mod copied;
mod counts;
mod extras;
mod rebuild;
mod references;
mod snapshots;
#[cfg(test)]
mod tests;

use std::fmt;

use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::host::{File, Host};
use crate::units::div_up;
use counts::Counts;

/// Files of more clusters are not checked, and none is made that long.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// What [`Image::check`] may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fix {
    /// Space that nothing refers to.
    pub leaks: bool,
    /// Everything else.
    pub errors: bool,
}

impl Fix {
    /// Repair nothing.
    const NONE: Self = Self {
        leaks: false,
        errors: false,
    };

    const fn any(self) -> bool {
        self.leaks || self.errors
    }
}

/// What [`Image::check`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Errors that endanger data and were not repaired.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are referred to, and were
    /// not repaired.
    pub leaks: u64,
    /// Failures of the check itself.
    pub check_errors: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// The end of the last cluster in use.
    pub image_end_offset: u64,
    /// Guest clusters that have a place in the file.
    pub allocated_clusters: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Guest clusters that do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Guest clusters that are compressed.
    pub compressed_clusters: u64,
}

/// A check that is going on.
struct Check<'a, 'g, H: Host> {
    image: &'a Image<H>,
    st: &'a mut StateGuard<'g, H>,
    out: &'a mut dyn FnMut(&str),
    report: CheckReport,
    /// References that were found.
    counts: Counts,
    /// Bytes of the file.
    file_len: u64,
    /// The refcount structure has to be written anew.
    rebuild: bool,
    /// The last comparison left no difference, so that [`Check::counts`] says
    /// what the refcounts are.
    exact: bool,
    /// The last cluster that is referred to or counted.
    highest: u64,
    /// A refcount block could not be used; the image is closed to requests
    /// afterwards.
    fatal: bool,
}

impl<H: Host> Image<H> {
    /// Verifies refcounts and mappings, and repairs what `fix` allows. Each
    /// finding is a line for `out`. While something is repaired there must be
    /// no request in flight.
    ///
    /// # Errors
    /// `EACCES` for a repair of an image that may not be written; where the
    /// check could not be brought to its end those of the file, and `EINVAL`
    /// and `EIO` for what it could not cope with.
    pub fn check(&self, fix: Fix, out: &mut dyn FnMut(&str)) -> Result<CheckReport> {
        let mut st = self.lock();
        self.ensure_usable()?;
        self.need_refcounts(&mut st)?;
        if self.is_writable() {
            // From here on the file is the truth.
            self.reclaim_all(&mut st)?;
            self.write_back_all(&mut st)?;
        } else if fix.any() {
            return Err(Error::errno(libc::EACCES));
        }
        let mut check = Check {
            image: self,
            st: &mut st,
            out,
            report: CheckReport::default(),
            counts: Counts::new(self.geometry.refcount_order.max()),
            file_len: 0,
            rebuild: false,
            exact: false,
            highest: 0,
            fatal: false,
        };
        let result = check.run(fix);
        let report = check.report.clone();
        if check.fatal {
            self.set_broken();
        }
        if fix.any() {
            self.forget_overlap_map();
        }
        result.map(|()| report)
    }
}

impl<H: Host> Check<'_, '_, H> {
    fn run(&mut self, fix: Fix) -> Result<()> {
        let found = self.read_snapshots(fix)?;
        if let Err(error) = self.check_refcounts(fix) {
            self.report.corruptions += found.unfit;
            self.report.corruptions_fixed += found.fixed;
            return Err(error);
        }
        self.mend_snapshots(found, fix)?;
        if fix.any() && !self.fatal {
            self.finish()
        } else {
            Ok(())
        }
    }

    /// Compares refcounts and copied flags with what the image refers to.
    fn check_refcounts(&mut self, fix: Fix) -> Result<()> {
        self.measure_file()?;
        let size = self.image.visible_size();
        self.report.total_clusters = div_up(size, self.image.geometry.cluster_size());

        self.count_references(fix)?;
        let before = self.report.clone();
        self.compare(Fix::NONE);
        if self.rebuild && fix.errors {
            self.rebuild_and_recount(fix)?;
        } else if self.rebuild && fix.any() {
            self.say(format_args!("ERROR need to rebuild refcount structures"));
            self.report.check_errors += 1;
            return Err(Error::errno(libc::EIO));
        } else if fix.any() && (self.report.leaks > 0 || self.report.corruptions > 0) {
            // The same again, this time with consequences.
            self.report = before;
            self.compare(fix);
        }
        self.check_copied(fix)?;
        self.report.image_end_offset = (self.highest + 1) << self.image.geometry.cluster_bits;
        Ok(())
    }

    /// Writes what was repaired, and takes back the marks of a damaged image
    /// where it is none any more.
    fn finish(&mut self) -> Result<()> {
        self.image.write_back_all(self.st)?;
        self.image.pass_discards(self.st)?;
        if self.report.check_errors == 0 && self.report.corruptions == 0 {
            self.image.mark_clean(self.st)?;
            self.image.mark_consistent(self.st)?;
        }
        Ok(())
    }

    fn measure_file(&mut self) -> Result<()> {
        let len = self
            .image
            .host
            .file()
            .length()
            .inspect_err(|_| self.report.check_errors += 1)?;
        let clusters = div_up(len, self.image.geometry.cluster_size());
        if clusters > MAX_CLUSTERS {
            self.report.check_errors += 1;
            return Err(Error::errno(libc::EFBIG));
        }
        self.file_len = len;
        self.grow_counts(clusters)
    }

    fn grow_counts(&mut self, clusters: u64) -> Result<()> {
        self.counts
            .grow(clusters)
            .inspect_err(|_| self.report.check_errors += 1)
    }

    /// Tells of a failure as of one of the program, not as a finding.
    fn tell(&self, what: &str, error: &Error) {
        let line = Error::invalid(format!("{what} {error}"));
        self.image.host.report(&line);
    }

    fn say(&mut self, line: fmt::Arguments<'_>) {
        (self.out)(&line.to_string());
    }
}

/// What the system calls an error, without the number behind it.
fn strerror(error: &Error) -> String {
    let mut text = std::io::Error::from_raw_os_error(error.code()).to_string();
    if let Some(end) = text.find(" (os error ") {
        text.truncate(end);
    }
    text
}
