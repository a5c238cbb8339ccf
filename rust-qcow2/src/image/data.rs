//! Guest data on their way between the guest and the file that holds them:
//! the image file, or an external data file.

use super::refcounts::Reason;
use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::host::{File, GuestBuf, Host, Part};
use crate::units::{GuestOffset, HostOffset};

impl<H: Host> Image<H> {
    /// Whether guest data are in a file of their own.
    #[inline]
    pub fn has_data_file(&self) -> bool {
        self.geometry.external_data
    }

    /// Whether that file has to be a raw image of the disk.
    pub(super) fn data_file_is_raw(&self) -> bool {
        use crate::format::header::Autoclear;
        let shared = self.shared.read();
        shared.header.autoclear.contains(Autoclear::RAW_DATA_FILE)
    }

    /// The file that holds guest data.
    ///
    /// # Errors
    /// `EIO` where the image was opened without it.
    #[inline]
    pub(crate) fn data_file(&self) -> Result<H::File> {
        if self.has_data_file() {
            let file = self.host.data_file();
            file.ok_or_else(|| Error::errno(libc::EIO))
        } else {
            Ok(self.host.file())
        }
    }

    /// Reads `len` bytes of the guest at `guest`, which are at `host`, into
    /// guest memory from `at` on.
    #[inline]
    pub(crate) fn read_data_guest(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        buf: GuestBuf<'_, H>,
        at: usize,
        len: usize,
    ) -> Result<()> {
        if self.encryption.is_some() {
            return self.read_encrypted_guest(guest, host, buf, at, len);
        }
        self.data_file()?.read_guest(host.0, buf, at, len)
    }

    /// The same into driver memory.
    pub(crate) fn read_data(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        bytes: &mut [u8],
    ) -> Result<()> {
        if self.encryption.is_some() {
            return self.read_encrypted(guest, host, bytes);
        }
        self.data_file()?.read(host.0, bytes)
    }

    /// Writes `len` bytes of the guest from `at` on, whose place is `host`.
    #[inline]
    pub(super) fn write_data_guest(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        buf: GuestBuf<'_, H>,
        at: usize,
        len: usize,
    ) -> Result<()> {
        if self.encryption.is_some() {
            return self.write_encrypted(guest, host, &[Part::Guest { buf, at, len }]);
        }
        self.data_file()?.write_guest(host.0, buf, at, len)
    }

    /// The same from driver memory.
    pub(super) fn write_data(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        bytes: &[u8],
    ) -> Result<()> {
        if self.encryption.is_some() {
            return self.write_encrypted(guest, host, &[Part::Bytes(bytes)]);
        }
        self.data_file()?.write(host.0, bytes)
    }

    /// The same for parts that follow each other.
    pub(super) fn write_data_parts(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        parts: &[Part<'_, GuestBuf<'_, H>>],
    ) -> Result<()> {
        if self.encryption.is_some() {
            return self.write_encrypted(guest, host, parts);
        }
        self.data_file()?.write_parts(host.0, parts)
    }

    /// Makes guest data durable that are not in the image file.
    pub(super) fn flush_data_file(&self) -> Result<()> {
        if self.has_data_file() {
            self.data_file()?.flush()
        } else {
            Ok(())
        }
    }

    /// Passes it on that clusters are not needed any more whose place stays that
    /// of the guest cluster. At once: the next write there may come any time.
    pub(super) fn discard_in_place(
        &self,
        st: &mut StateGuard<'_, H>,
        places: &[HostOffset],
        reason: Reason,
    ) -> Result<()> {
        if places.is_empty() {
            return Ok(());
        }
        if self.encryption.is_some() || reason != Reason::Request {
            // Until the tables say so a hole is noise, or zeroes that nobody asked
            // for: of an image that is emptied, which shows its backing file then.
            self.write_slices(st)?;
            self.host.file().flush()?;
        }
        let size = self.geometry.cluster_size();
        let file = self.data_file()?;
        let next_to = |a: &HostOffset, b: &HostOffset| a.add(size) == *b;
        for run in places.chunk_by(next_to) {
            // Advice, as for other discards.
            let _ = file.discard(run[0].0, run.len() as u64 * size);
        }
        Ok(())
    }
}
