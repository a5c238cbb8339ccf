//! Reading guest data.

use super::map::Run;
use super::{Image, MAX_PIECES, MAX_WORKERS, StateGuard};
use crate::chain::walk::{find, find_by};
use crate::error::Result;
use crate::host::{GuestBuf, Host, Task};
use crate::units::GuestOffset;

impl<H: Host> Image<H> {
    /// Reads `len` bytes at `guest` into guest memory from `at` on, from this
    /// image or from the one below that has them.
    ///
    /// # Errors
    /// Those of the files, `EIO` for damaged tables.
    pub fn read(
        &self,
        guest: GuestOffset,
        len: u64,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let traced = self.host.traces_reads();
        let first = find(self, guest, len)?;
        if first.len == len {
            if traced {
                first.trace(self, guest);
            }
            return first.read_guest(guest, buf, at);
        }
        drop(first);
        self.read_pieces(guest, len, buf, at, traced)
    }

    /// Reads a range that comes from several places: some of them at a time,
    /// in parallel.
    fn read_pieces(
        &self,
        mut guest: GuestOffset,
        mut len: u64,
        buf: GuestBuf<'_, H>,
        mut at: usize,
        traced: bool,
    ) -> Result<()> {
        while len > 0 {
            let mut tasks: Vec<Task<'_>> = Vec::new();
            while len > 0 && tasks.len() < MAX_PIECES {
                let found = find(self, guest, len)?;
                if traced {
                    found.trace(self, guest);
                }
                let (piece, place) = (guest, at);
                guest = guest.add(found.len);
                at += found.len as usize;
                len -= found.len;
                tasks.push(Box::new(move || found.read_guest(piece, buf, place)));
            }
            self.host.parallel(MAX_WORKERS, tasks)?;
        }
        Ok(())
    }

    /// Reads guest data into driver memory, for copy-on-write.
    pub(super) fn read_bytes(&self, guest: GuestOffset, bytes: &mut [u8]) -> Result<()> {
        self.read_bytes_by(guest, bytes, |guest, len| self.lookup(guest, len))
    }

    /// [`Image::read_bytes`] with the metadata lock held.
    pub(super) fn read_bytes_locked(
        &self,
        st: &mut StateGuard<'_, H>,
        guest: GuestOffset,
        bytes: &mut [u8],
    ) -> Result<()> {
        self.read_bytes_by(guest, bytes, |guest, len| {
            self.lookup_locked(st, guest, len)
        })
    }

    fn read_bytes_by(
        &self,
        mut guest: GuestOffset,
        mut bytes: &mut [u8],
        mut lookup: impl FnMut(GuestOffset, u64) -> Result<Run>,
    ) -> Result<()> {
        while !bytes.is_empty() {
            let found = find_by(self, guest, bytes.len() as u64, |len| lookup(guest, len))?;
            let (part, rest) = bytes.split_at_mut(found.len as usize);
            found.read(guest, part)?;
            guest = guest.add(found.len);
            bytes = rest;
        }
        Ok(())
    }
}
