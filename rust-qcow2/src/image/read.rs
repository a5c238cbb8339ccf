//! Reading guest data.

use super::map::Run;
use super::{Image, MAX_PIECES, MAX_WORKERS};
use crate::error::{Error, Result};
use crate::format::entry::Mapping;
use crate::host::{Buf, File, GuestBuf, Host, Task};
use crate::units::GuestOffset;

/// A run and where its data belong in the guest's memory.
struct Piece {
    guest: GuestOffset,
    run: Run,
    at: usize,
}

impl<H: Host> Image<H> {
    /// Reads `len` bytes at `guest` into guest memory from `at` on.
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
        let _token = self.inflight.enter();
        let run = self.lookup(guest, len)?;
        if run.len == len {
            return self.read_run(guest, run, buf, at);
        }
        self.read_runs(guest, len, run, buf, at)
    }

    /// Reads a range that is more than one run: some runs at a time, in
    /// parallel.
    fn read_runs(
        &self,
        mut guest: GuestOffset,
        mut len: u64,
        first: Run,
        buf: GuestBuf<'_, H>,
        mut at: usize,
    ) -> Result<()> {
        let mut next = Some(first);
        while len > 0 {
            let mut pieces = Vec::new();
            while len > 0 && pieces.len() < MAX_PIECES {
                let run = match next.take() {
                    Some(run) => run,
                    None => self.lookup(guest, len)?,
                };
                pieces.push(Piece { guest, run, at });
                guest = guest.add(run.len);
                at += run.len as usize;
                len -= run.len;
            }
            let tasks = pieces
                .into_iter()
                .map(|piece| -> Task<'_> {
                    Box::new(move || self.read_run(piece.guest, piece.run, buf, piece.at))
                })
                .collect();
            self.host.parallel(MAX_WORKERS, tasks)?;
        }
        Ok(())
    }

    fn read_run(
        &self,
        guest: GuestOffset,
        run: Run,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<()> {
        let len = run.len as usize;
        match run.mapping {
            Mapping::Normal(host) => self.host.file().read_guest(host.0, buf, at, len),
            Mapping::ZeroPlain | Mapping::ZeroAllocated(_) => {
                buf.zero(at, len);
                Ok(())
            }
            Mapping::Unallocated => match self.host.backing() {
                Some(backing) => backing.read_guest(guest.0, buf, at, len),
                None => {
                    buf.zero(at, len);
                    Ok(())
                }
            },
            Mapping::Compressed => Err(compressed_clusters()),
        }
    }

    /// Reads guest data into driver memory, for copy-on-write.
    pub(super) fn read_bytes(&self, mut guest: GuestOffset, mut bytes: &mut [u8]) -> Result<()> {
        while !bytes.is_empty() {
            let run = self.lookup(guest, bytes.len() as u64)?;
            let (part, rest) = bytes.split_at_mut(run.len as usize);
            match run.mapping {
                Mapping::Normal(host) => self.host.file().read(host.0, part)?,
                Mapping::ZeroPlain | Mapping::ZeroAllocated(_) => part.fill(0),
                Mapping::Unallocated => match self.host.backing() {
                    Some(backing) => backing.read(guest.0, part)?,
                    None => part.fill(0),
                },
                Mapping::Compressed => return Err(compressed_clusters()),
            }
            guest = guest.add(run.len);
            bytes = rest;
        }
        Ok(())
    }
}

/// The error for a cluster that this stage does not read.
pub(super) fn compressed_clusters() -> Error {
    Error::unsupported("rqcow2 does not support compressed clusters yet")
}
