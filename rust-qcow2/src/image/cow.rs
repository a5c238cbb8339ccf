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
    /// Writes the data of new clusters, copied parts included. Returns whether
    /// anything but the guest's own data had to be written.
    pub(super) fn write_new(
        &self,
        piece: &Piece<'_, H>,
        allocation: &Allocation<H>,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<bool> {
        let (start, end) = (allocation.written_start, allocation.written_end);
        let host = allocation.host_of(start);
        let head = piece.guest.0 - start.0;
        let tail_at = piece.guest.add(piece.len);
        let tail = end.0 - tail_at.0;
        let len = piece.len as usize;
        if head == 0 && tail == 0 {
            self.write_data_guest(piece.guest, piece.host, buf, at, len)?;
            return Ok(false);
        }
        let file = self.data_file()?;
        // Zeroes go over the middle as well, where a read or a failure must not
        // find them in the place of data that were there before.
        if file.zeroes_fast()
            && !allocation.over_data
            && self.encryption.is_none()
            && self.is_zero(start, head, false)?
            && self.is_zero(tail_at, tail, false)?
        {
            self.host.event(Event::ClusterAllocSpace);
            let flags = ZeroFlags {
                may_unmap: false,
                no_fallback: true,
            };
            match file.write_zeroes(host.0, head + piece.len + tail, flags) {
                Ok(()) => {
                    self.write_data_guest(piece.guest, piece.host, buf, at, len)?;
                    return Ok(true);
                }
                Err(error) if [libc::ENOTSUP, libc::EAGAIN].contains(&error.code()) => {}
                Err(error) => return Err(error),
            }
        }
        self.host.event(Event::CowRead);
        let guest_part = Part::Guest { buf, at, len };
        let (head_len, tail_len) = (head as usize, tail as usize);
        if head > 0 && tail > 0 && piece.len <= MERGE_READ_MAX {
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
