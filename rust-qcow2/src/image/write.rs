//! Writing guest data: in place, or into new clusters with copy-on-write.

use std::ops::Range;
use std::sync::Arc;

use super::inflight::Token;
use super::map::SliceAt;
use super::pending::{Allocation, Marking};
use super::{Image, MAX_PIECES, MAX_WORKERS, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::{L2Entry, Mapping, MetadataKind};
use crate::format::subclusters::ClusterEntry;
use crate::host::{GuestBuf, Host, Task};
use crate::units::{GuestOffset, HostOffset, round_up};

/// The largest part of a write that is treated as one, in bytes.
const MAX_ALLOCATION: u64 = 1 << 30;

/// Where what is written comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The guest, which flushes what it wants to keep.
    Guest,
    /// The layers below, where it may have been flushed.
    Below,
}

/// A part of a write: a run of host bytes.
pub(super) struct Piece<'a, H: Host> {
    pub(super) guest: GuestOffset,
    pub(super) len: u64,
    pub(super) host: HostOffset,
    pub(super) allocation: Option<Arc<Allocation<H>>>,
    token: Token<'a>,
}

impl<H: Host> Piece<'_, H> {
    fn end(&self) -> GuestOffset {
        self.guest.add(self.len)
    }

    /// What is written in the cluster of the first byte before it, and in that
    /// of the last byte behind it.
    pub(super) fn ends(&self) -> (u64, u64) {
        self.allocation.as_ref().map_or((0, 0), |allocation| {
            let head = self.guest.0 - allocation.written_start.0;
            (head, allocation.written_end.0 - self.end().0)
        })
    }

    /// Whether `next`, the piece behind this one, goes to the bytes behind it,
    /// with nothing in between.
    fn continues_in(&self, next: &Self) -> bool {
        self.host.add(self.len) == next.host && self.ends().1 == 0 && next.ends().0 == 0
    }
}

/// Whether `next` follows the pieces of a batch in the file as well, and can be
/// written with them.
fn takes<H: Host>(batch: &[Piece<'_, H>], next: &Piece<'_, H>) -> bool {
    let len: u64 = batch.iter().map(|piece| piece.len).sum();
    let last = batch.last();
    len + next.len <= MAX_ALLOCATION && last.is_some_and(|last| last.continues_in(next))
}

impl<H: Host> Image<H> {
    /// Writes `len` bytes of guest memory from `at` on to `guest`.
    ///
    /// # Errors
    /// Those of the files, `EIO` for damaged tables.
    pub fn write(
        &self,
        guest: GuestOffset,
        len: u64,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<()> {
        self.write_from(guest, len, buf, at, Source::Guest)
    }

    /// The same with what the guest reads there already, as copied from the
    /// layers below, where it is durable: so a crash must not leave a mapping
    /// to a place that it has not reached.
    ///
    /// # Errors
    /// As for [`Image::write`].
    pub fn write_unchanged(
        &self,
        guest: GuestOffset,
        len: u64,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<()> {
        self.write_from(guest, len, buf, at, Source::Below)
    }

    fn write_from(
        &self,
        guest: GuestOffset,
        len: u64,
        buf: GuestBuf<'_, H>,
        at: usize,
        source: Source,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.ensure_usable()?;
        {
            let _token = self.inflight.enter();
            if let Some(host) = self.in_place(guest, len) {
                return self.write_data_guest(guest, host, buf, at, len as usize);
            }
        }
        self.write_mapped(guest, len, buf, at, source)
    }

    /// Where `len` bytes can be written as they are, known without lock and I/O.
    #[inline]
    fn in_place(&self, guest: GuestOffset, len: u64) -> Option<HostOffset> {
        let run = self.lookup_fast(guest, len)?;
        let Mapping::Normal(host) = run.mapping else {
            return None;
        };
        let clear = self.has_data_file()
            || self.overlap_fast(MetadataKind::empty(), host.0, len) == Some(None);
        (run.copied && run.len == len && clear).then_some(host)
    }

    fn write_mapped(
        &self,
        mut guest: GuestOffset,
        mut len: u64,
        buf: GuestBuf<'_, H>,
        mut at: usize,
        source: Source,
    ) -> Result<()> {
        let mut failure = None;
        let mut after = None;
        while len > 0 && failure.is_none() {
            let mut pieces = Vec::new();
            let begin = at;
            let mut st = self.lock();
            while len > 0 && pieces.len() < MAX_PIECES {
                match self.plan(&mut st, guest, len, after, pieces.is_empty()) {
                    Ok(Some(piece)) => {
                        let done = piece.len;
                        after = Some(piece.host.add(done));
                        pieces.push(piece);
                        guest = guest.add(done);
                        at += done as usize;
                        len -= done;
                    }
                    // Others have to get on before this; they may wait for
                    // what is planned already, so that goes first.
                    Ok(None) => break,
                    Err(error) => {
                        failure = Some(error);
                        break;
                    }
                }
            }
            drop(st);
            let result = self.run_pieces(pieces, buf, begin, source);
            failure = failure.or(result.err());
        }
        failure.map_or(Ok(()), Err)
    }

    /// Writes pieces that follow each other in the guest's memory from `at` on.
    fn run_pieces(
        &self,
        pieces: Vec<Piece<'_, H>>,
        buf: GuestBuf<'_, H>,
        at: usize,
        source: Source,
    ) -> Result<()> {
        if pieces.len() <= 1 {
            return self.run_batch(pieces, buf, at, source);
        }
        let mut batches: Vec<Vec<Piece<'_, H>>> = Vec::new();
        for piece in pieces {
            match batches.last_mut().filter(|batch| takes(batch, &piece)) {
                Some(batch) => batch.push(piece),
                None => batches.push(vec![piece]),
            }
        }
        // Every batch has to run, even after a failure, to end its allocations:
        // so the failure is kept aside.
        let failure = parking_lot::Mutex::new(None);
        let mut next = at;
        let tasks = batches
            .into_iter()
            .map(|batch| -> Task<'_> {
                let failure = &failure;
                let at = next;
                next += batch.iter().map(|piece| piece.len as usize).sum::<usize>();
                Box::new(move || {
                    if let Err(error) = self.run_batch(batch, buf, at, source) {
                        failure.lock().get_or_insert(error);
                    }
                    Ok(())
                })
            })
            .collect();
        self.host.parallel(MAX_WORKERS, tasks)?;
        failure.into_inner().map_or(Ok(()), Err)
    }

    /// Decides where the first bytes of a write go: best to `after`, where the
    /// bytes before them went. `None` where that has to
    /// wait for another request and `may_wait` does not allow it.
    fn plan(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
        after: Option<HostOffset>,
        may_wait: bool,
    ) -> Result<Option<Piece<'_, H>>> {
        let bits = self.geometry.cluster_bits;
        let Some(len) = self.await_allocations(st, guest, len, may_wait) else {
            return Ok(None);
        };
        self.ensure_usable()?;
        if !st.refcounts.unfreed.is_empty() {
            // What this request is counted in for it could not use itself.
            self.reclaim(st)?;
        }
        let token = self.inflight.enter();
        let at = self.entry_for_change(st, guest)?;
        let entry = at.slice.get(at.index);
        self.ensure_good_entry(st, guest, entry)?;

        // Entries that are treated alike, in this slice.
        let room = (at.slice.len() - at.index) as u64;
        // What is copied at the ends is written together with the data, and no
        // request may be longer than 31 bits tell.
        let wanted = round_up(guest.within(bits) + len, bits).min(MAX_ALLOCATION) >> bits;
        let mut count = 1;
        while count < room.min(wanted) {
            let next = at.slice.get(at.index + count as usize);
            if !self.same_treatment(entry, next, count << bits) {
                break;
            }
            count += 1;
        }
        let start = guest.align_down(bits);
        let len = len.min((count << bits) - guest.within(bits));

        let copied = entry.entry.copied();
        let (host, reserved) = match self.geometry.mapping(entry.entry) {
            Mapping::Normal(host) | Mapping::ZeroAllocated(host) if copied => {
                self.ensure_free_for_data(st, host, count << bits)?;
                (host, true)
            }
            _ if self.has_data_file() => (HostOffset(start.0), false),
            _ => {
                let host;
                (host, count) = self.find_space(st, after, count)?;
                (host, false)
            }
        };
        let len = len.min((count << bits) - guest.within(bits));
        let piece = |allocation| Piece {
            guest,
            len,
            host: host.add(guest.within(bits)),
            allocation,
            token,
        };
        // Clusters at either end that are data already are just written.
        let marked = if reserved {
            match self.to_be_marked(&at, count, guest, len) {
                Some(marked) => marked,
                None => return Ok(Some(piece(None))),
            }
        } else {
            0..count
        };
        let (written_start, written_end) = if self.geometry.has_subclusters() {
            self.written_range(&at, guest, len, reserved)
        } else {
            let first = if marked.start == 0 { start } else { guest };
            let behind = start.add(count << bits);
            let last = if marked.end == count {
                behind
            } else {
                guest.add(len)
            };
            (first, last)
        };
        let allocation = Arc::new(Allocation {
            start: start.add(marked.start << bits),
            end: start.add(marked.end << bits),
            host: host.add(marked.start << bits),
            written_start,
            written_end,
            reserved,
            over_data: reserved && self.is_any_data(&at, guest, len),
            done: H::WaitQueue::default(),
        });
        st.allocations.push(&allocation);
        Ok(Some(piece(Some(allocation))))
    }

    /// Which of `count` clusters from `at` on, that have their place, do not
    /// say yet that they are data where `len` bytes at `guest` are going to be.
    fn to_be_marked(
        &self,
        at: &SliceAt,
        count: u64,
        guest: GuestOffset,
        len: u64,
    ) -> Option<Range<u64>> {
        if self.geometry.has_subclusters() {
            let all = self.is_all_data(at, guest, len);
            return (!all).then_some(0..count);
        }
        let is_zero = |i: &u64| at.slice.get(at.index + *i as usize).entry.has_zero_flag();
        let first = (0..count).find(is_zero)?;
        let last = (0..count).rfind(is_zero)?;
        Some(first..last + 1)
    }

    /// Refuses to write guest data over metadata.
    pub(super) fn ensure_free_for_data(
        &self,
        st: &mut StateGuard<'_, H>,
        host: HostOffset,
        len: u64,
    ) -> Result<()> {
        if self.has_data_file() {
            return self.ensure_usable();
        }
        self.ensure_no_overlap(st, MetadataKind::empty(), host.0, len)
    }

    /// Takes up to `count` clusters for guest data in one piece: at `after`, as
    /// far as that is free, else all of them anywhere. Returns how many.
    fn find_space(
        &self,
        st: &mut StateGuard<'_, H>,
        after: Option<HostOffset>,
        count: u64,
    ) -> Result<(HostOffset, u64)> {
        let bits = self.geometry.cluster_bits;
        if let Some(after) = after.filter(|after| after.is_aligned(bits)) {
            let got = self.allocate_at(st, after, count)?;
            if got > 0 {
                self.ensure_no_overlap(st, MetadataKind::empty(), after.0, got << bits)?;
                return Ok((after, got));
            }
        }
        let host = self.allocate_data(st, count << bits)?;
        self.ensure_no_overlap(st, MetadataKind::empty(), host.0, count << bits)?;
        if host.0 == 0 {
            let message = "Preventing invalid allocation of data cluster at offset 0".to_owned();
            return Err(self.corrupt(st, true, None, None, message));
        }
        Ok((host, count))
    }

    /// Writes pieces that follow each other in the file as well.
    fn run_batch(
        &self,
        pieces: Vec<Piece<'_, H>>,
        buf: GuestBuf<'_, H>,
        at: usize,
        source: Source,
    ) -> Result<()> {
        let result = self
            .write_pieces(&pieces, buf, at)
            .map(|copied| copied || source == Source::Below);
        // What this request frees need not wait for this request.
        let allocations: Vec<_> = pieces
            .into_iter()
            .filter_map(|piece| piece.allocation)
            .collect();
        if allocations.is_empty() {
            return result.map(drop);
        }
        let mut st = self.lock();
        let mut outcome = result.clone().map(drop);
        for allocation in &allocations {
            let ended = self.end_allocation(&mut st, allocation, result.clone(), Marking::Written);
            outcome = outcome.and(ended);
        }
        outcome
    }

    /// Gives an area, first byte and length, on host clusters; what shares a
    /// cluster with it is copied. Before the L2 entries say where a part of it
    /// is `prepare` is called with that place and length, and tells whether it
    /// has written there.
    pub(super) fn preallocate(
        &self,
        st: &mut StateGuard<'_, H>,
        (mut guest, mut len): (GuestOffset, u64),
        marking: Marking,
        mut prepare: impl FnMut(HostOffset, u64) -> Result<bool>,
    ) -> Result<()> {
        while len > 0 {
            let Some(piece) = self.plan(st, guest, len, None, true)? else {
                return Err(Error::errno(libc::EAGAIN));
            };
            drop(piece.token);
            let behind = guest.add(piece.len);
            let written = prepare(piece.host, piece.len);
            if let Some(allocation) = piece.allocation {
                let written = written.and_then(|written| {
                    let copied = self.copy_ends(st, &allocation, guest, behind)?;
                    Ok(written || copied)
                });
                self.end_allocation(st, &allocation, written, marking)?;
            } else {
                written?;
            }
            guest = behind;
            len -= piece.len;
        }
        Ok(())
    }
}

impl<H: Host> Image<H> {
    /// Whether a write treats an entry like the one `distance` bytes before it.
    fn same_treatment(&self, first: ClusterEntry, next: ClusterEntry, distance: u64) -> bool {
        let (entry, other) = (first.entry, next.entry);
        let mapping = self.geometry.mapping(other);
        if self.geometry.has_subclusters() && next.contradicts_itself(mapping) {
            return false;
        }
        match (self.geometry.mapping(entry), entry.copied()) {
            (Mapping::Normal(host) | Mapping::ZeroAllocated(host), true) => {
                let place = host.add(distance);
                other == L2Entry::normal(place)
                    || !self.geometry.has_subclusters() && other == L2Entry::zero_allocated(place)
            }
            _ => {
                let in_place = other.copied() && mapping.host_cluster().is_some();
                !in_place
            }
        }
    }
}
