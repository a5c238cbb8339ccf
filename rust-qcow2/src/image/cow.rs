//! Copy-on-write: what new clusters hold beside the data that is written.

use super::pending::Allocation;
use super::write::Piece;
use super::{Image, StateGuard};
use crate::chain::walk::{Source, find};
use crate::error::{Error, Result};
use crate::host::{Content, Event, File, GuestBuf, Host, Part, ZeroFlags};
use crate::units::{GuestOffset, HostOffset};

/// Up to this size of the middle, both ends around it are read in one go.
const MERGE_READ_MAX: u64 = 16 << 10;

impl<H: Host> Image<H> {
    /// Writes guest data to pieces that follow each other in the file, copied
    /// parts at both ends included. Returns whether anything but the guest's own
    /// data had to be written.
    pub(super) fn write_pieces(
        &self,
        pieces: &[Piece<'_, H>],
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<bool> {
        let [first, ..] = pieces else {
            return Ok(false);
        };
        let last = pieces.last().unwrap_or(first);
        let (head, tail) = (first.ends().0, last.ends().1);
        let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
        let len = bytes as usize;
        if head == 0 && tail == 0 {
            self.write_data_guest(first.guest, first.host, buf, at, len)?;
            return Ok(false);
        }
        let tail_at = first.guest.add(bytes);
        if self.zero_ends(
            pieces,
            (GuestOffset(first.guest.0 - head), head),
            (tail_at, tail),
        )? {
            self.write_data_guest(first.guest, first.host, buf, at, len)?;
            return Ok(true);
        }
        let start = GuestOffset(first.guest.0 - head);
        let host = HostOffset(first.host.0 - head);
        self.host.event(Event::CowRead);
        let guest_part = Part::Guest { buf, at, len };
        let (head_len, tail_len) = (head as usize, tail as usize);
        if head > 0 && tail > 0 && bytes <= MERGE_READ_MAX {
            let mut whole = self.host.scratch(head_len + len + tail_len)?;
            self.read_bytes(start, &mut whole)?;
            let parts = [
                Part::Bytes(&whole[..head_len]),
                guest_part,
                Part::Bytes(&whole[head_len + len..]),
            ];
            self.host.event(Event::CowWrite);
            self.write_data_parts(start, host, &parts)?;
        } else {
            let mut ends = self.host.scratch(head_len + tail_len)?;
            let (head_bytes, tail_bytes) = ends.split_at_mut(head_len);
            self.read_bytes(start, head_bytes)?;
            self.read_bytes(tail_at, tail_bytes)?;
            let parts = [Part::Bytes(head_bytes), guest_part, Part::Bytes(tail_bytes)];
            // One of the ends may be empty, and no part of a write may be.
            let first = usize::from(head_len == 0);
            let behind = parts.len() - usize::from(tail_len == 0);
            self.host.event(Event::CowWrite);
            self.write_data_parts(start, host, &parts[first..behind])?;
        }
        Ok(true)
    }

    /// Makes new clusters zeroes where what they hold beside the data of `pieces`
    /// is known to be that, in `head` and `tail`, and that is the faster way.
    /// Returns whether that was done.
    fn zero_ends(
        &self,
        pieces: &[Piece<'_, H>],
        head: (GuestOffset, u64),
        tail: (GuestOffset, u64),
    ) -> Result<bool> {
        let file = self.data_file()?;
        // Zeroes go over the data of the piece as well, where a read or a failure
        // must not find them in the place of data that were there before.
        let new = || {
            let with_ends = pieces.iter().filter(|piece| piece.ends() != (0, 0));
            with_ends.filter_map(|piece| piece.allocation.as_deref())
        };
        if !file.zeroes_fast()
            || new().any(|allocation| allocation.over_data)
            || self.encryption.is_some()
            || !self.is_zero(head.0, head.1, false)?
            || !self.is_zero(tail.0, tail.1, false)?
        {
            return Ok(false);
        }
        self.host.event(Event::ClusterAllocSpace);
        let flags = ZeroFlags {
            may_unmap: false,
            no_fallback: true,
        };
        for allocation in new() {
            let (start, end) = (allocation.written_start, allocation.written_end);
            let host = allocation.host_of(start);
            match file.write_zeroes(host.0, end.0 - start.0, flags) {
                Ok(()) => {}
                Err(error) if [libc::ENOTSUP, libc::EAGAIN].contains(&error.code()) => {
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Whether a range reads as zeroes, as far as that is known; `precise` as
    /// in [`File::content`].
    pub(super) fn is_zero(
        &self,
        mut guest: GuestOffset,
        mut len: u64,
        precise: bool,
    ) -> Result<bool> {
        while len > 0 {
            let found = find(self, guest, len)?;
            let known = match found.source {
                Source::Zero => found.len,
                Source::Layer(held, host) if precise => {
                    match held.image().hole_at(host, found.len)? {
                        Some(known) => known,
                        None => return Ok(false),
                    }
                }
                Source::Own(..) | Source::Layer(..) | Source::Packed(..) => return Ok(false),
                Source::Below(file) => match file.content(guest.0, found.len, precise)? {
                    (Content::Zero, known) => known,
                    (Content::Data, _) => return Ok(false),
                },
            };
            if known == 0 {
                return Err(Error::errno(libc::EIO));
            }
            guest = guest.add(known);
            len -= known.min(len);
        }
        Ok(true)
    }

    /// Copies what new clusters hold before `from` and from `to` on. Returns
    /// whether that was anything.
    pub(super) fn copy_ends(
        &self,
        st: &mut StateGuard<'_, H>,
        allocation: &Allocation<H>,
        from: GuestOffset,
        to: GuestOffset,
    ) -> Result<bool> {
        let mut copied = false;
        let (start, end) = (allocation.written_start, allocation.written_end);
        for (start, end) in [(start, from), (to, end)] {
            if start < end {
                let at = allocation.host_of(start);
                self.copy_to(st, start, end.0 - start.0, at)?;
                copied = true;
            }
        }
        Ok(copied)
    }

    /// Copies guest bytes, of one cluster, to a place in the file.
    pub(super) fn copy_to(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        len: u64,
        host: HostOffset,
    ) -> Result<()> {
        let mut bytes = self.host.scratch(len as usize)?;
        self.read_bytes_locked(st, guest, &mut bytes)?;
        self.write_data(guest, host, &bytes)
    }
}
