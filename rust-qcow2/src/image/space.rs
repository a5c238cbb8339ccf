//! Space of freed clusters that goes back to the file.

use super::refcounts::Reason;
use super::{Image, StateGuard};
use crate::error::Result;
use crate::host::{File, Host};
use crate::units::HostOffset;

/// How many ranges of an encrypted image may wait, before tables are written
/// for their sake.
const MAX_WAITING: usize = 1024;

/// Ranges of the file that nobody refers to any more.
#[derive(Debug, Default)]
pub(super) struct Space {
    ranges: Vec<(HostOffset, u64)>,
    /// Some of it was not discarded by a guest.
    by_others: bool,
}

impl Space {
    /// Takes note of freed clusters.
    pub(super) fn add(&mut self, offset: HostOffset, len: u64, reason: Reason) {
        self.by_others |= reason != Reason::Request;
        match self.ranges.last_mut() {
            Some((at, before)) if at.add(*before) == offset => *before += len,
            _ => self.ranges.push((offset, len)),
        }
    }
}

impl<H: Host> Image<H> {
    /// Gives freed space back to the file. What a guest discarded may go at
    /// once: zeroes are as good as what was there. Everything else has to wait
    /// until the tables that do not refer to it any more are durable, as after
    /// a crash the old ones count. So has all of an encrypted image, where a
    /// hole reads as noise; it waits for the guest's next flush.
    pub(super) fn pass_discards(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let space = &st.refcounts.space;
        let few = space.ranges.len() < MAX_WAITING;
        if self.encryption.is_some() && few && !space.by_others {
            return Ok(());
        }
        self.pass_all_discards(st)
    }

    /// [`Image::pass_discards`] for what might wait as well.
    pub(super) fn pass_all_discards(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        self.ensure_usable()?;
        if st.refcounts.space.ranges.is_empty() {
            return Ok(());
        }
        let space = std::mem::take(&mut st.refcounts.space);
        if self.encryption.is_some() || space.by_others {
            self.write_back(st)?;
            self.host.file().flush()?;
        }
        for (offset, len) in space.ranges {
            // Advice: where the file cannot, nothing is lost. A cluster that
            // was given out again meanwhile keeps its content.
            self.discard_free(st, offset, len);
        }
        Ok(())
    }

    fn discard_free(&self, st: &mut StateGuard<'_, H>, offset: HostOffset, len: u64) {
        let size = self.geometry.cluster_size();
        let mut start = offset.0;
        let end = offset.0 + len;
        while start < end {
            let mut stop = start;
            while stop < end
                && matches!(
                    self.refcount(st, self.geometry.cluster_of(HostOffset(stop))),
                    Ok(0)
                )
            {
                stop += size;
            }
            if stop > start {
                let _ = self.host.file().discard(start, stop - start);
            }
            start = stop + size;
        }
    }
}
