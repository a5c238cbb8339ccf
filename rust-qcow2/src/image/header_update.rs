//! Changing the header: state bits, backing file.

use std::sync::atomic::Ordering;

use super::{Image, Shared, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::extension::MAX_FORMAT_NAME;
use crate::format::geometry::MAX_BACKING_NAME;
use crate::format::header::{Incompatible, field};
use crate::host::{Corruption, File, Host};

impl Shared {
    /// Header, extensions and backing file name as they belong in the file.
    fn encode(&mut self) -> Result<Vec<u8>> {
        self.extensions
            .encode(&mut self.header, self.backing_file.as_deref())
    }
}

impl<H: Host> Image<H> {
    /// Whether the image may be written now.
    pub fn is_writable(&self) -> bool {
        let shared = self.shared.read();
        shared.flags.writable && !shared.flags.inactive
    }

    /// Writes header, extensions and names anew.
    pub(super) fn update_header(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let bytes = self.shared.write().encode()?;
        self.ensure_no_overlap(st, MetadataKind::MAIN_HEADER, 0, bytes.len() as u64)?;
        self.host.file().write(0, &bytes)
    }

    /// [`Image::update_header`] where it is as a whole a pointer, to be had or
    /// not: see [`Image::write_pointer`].
    pub(super) fn switch_header(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let bytes = self.shared.write().encode()?;
        self.write_pointer(st, MetadataKind::MAIN_HEADER, 0, &bytes)
    }

    /// Sets the dirty bit before the first write whose refcounts come late.
    pub(super) fn mark_dirty(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        let bits = self.shared.read().header.incompatible;
        if bits.contains(Incompatible::DIRTY) {
            return Ok(());
        }
        let bits = bits | Incompatible::DIRTY;
        let bytes = bits.bits().to_be_bytes();
        self.ensure_no_overlap(st, MetadataKind::MAIN_HEADER, field::INCOMPATIBLE, 8)?;
        let file = self.host.file();
        file.write(field::INCOMPATIBLE, &bytes)?;
        file.flush()?;
        self.shared.write().header.incompatible = bits;
        Ok(())
    }

    /// Clears the dirty bit, after everything in memory was written.
    pub(super) fn mark_clean(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        self.clear_state(st, Incompatible::DIRTY)
    }

    /// Clears the corrupt bit, after everything in memory was written.
    pub(super) fn mark_consistent(&self, st: &mut StateGuard<'_, H>) -> Result<()> {
        self.clear_state(st, Incompatible::CORRUPT)
    }

    fn clear_state(&self, st: &mut StateGuard<'_, H>, bit: Incompatible) -> Result<()> {
        if !self.shared.read().header.incompatible.contains(bit) {
            return Ok(());
        }
        self.write_back_all(st)?;
        self.shared.write().header.incompatible.remove(bit);
        self.update_header(st)
    }

    /// Reports corruption, marks the image where that is possible, and returns
    /// the error for the request that met it. After a fatal one (which only a
    /// writable image can have) every further request fails.
    pub(super) fn corrupt(
        &self,
        _st: &mut StateGuard<'_, H>,
        fatal: bool,
        offset: Option<u64>,
        size: Option<u64>,
        message: String,
    ) -> Error {
        let fatal = fatal && self.is_writable();
        let mark = {
            let mut shared = self.shared.write();
            let known = shared.header.incompatible.contains(Incompatible::CORRUPT);
            if shared.corruption_signaled && (!fatal || known) {
                return Error::errno(libc::EIO);
            }
            shared.corruption_signaled = true;
            if fatal && !known && shared.header.version >= 3 {
                shared.header.incompatible.insert(Incompatible::CORRUPT);
                Some(shared.header.incompatible.bits())
            } else {
                None
            }
        };
        if let Some(bits) = mark {
            // Straight to the file: the overlap check may be what brought us
            // here. A failure changes nothing for the caller.
            let file = self.host.file();
            if file.write(field::INCOMPATIBLE, &bits.to_be_bytes()).is_ok() {
                let _ = file.flush();
            }
        }
        if fatal {
            self.set_broken();
        }
        self.host.report_corruption(&Corruption {
            fatal,
            offset,
            size,
            message,
        });
        Error::errno(libc::EIO)
    }

    /// Records another backing file; `None` for none.
    ///
    /// # Errors
    /// `EINVAL` for a name of more than 1023 bytes, a format of more than 15, or any
    /// name with a raw data file, `ENOSPC` where the header has no room, and those
    /// of the file; the old name is kept then.
    pub fn change_backing(&self, file: Option<&[u8]>, format: Option<&[u8]>) -> Result<()> {
        if file.is_some_and(|name| name.len() > MAX_BACKING_NAME as usize) {
            return Err(Error::errno(libc::EINVAL));
        }
        if format.is_some_and(|name| name.len() > MAX_FORMAT_NAME) {
            // Nobody would open the image any more.
            return Err(Error::errno(libc::EINVAL));
        }
        if file.is_some() && self.data_file_is_raw() {
            // The data file alone would not be the disk any more.
            return Err(Error::errno(libc::EINVAL));
        }
        let mut st = self.lock();
        self.ensure_usable()?;
        let exchange = |file, format| {
            let mut shared = self.shared.write();
            (
                std::mem::replace(&mut shared.backing_file, file),
                std::mem::replace(&mut shared.extensions.backing_format, format),
            )
        };
        let old = exchange(file.map(ToOwned::to_owned), format.map(ToOwned::to_owned));
        let result = self.update_header(&mut st);
        if result.is_err() {
            // Else no other change of the header would fit in.
            exchange(old.0, old.1);
        }
        result
    }

    /// Whether a fatal corruption or a failure in the driver has ended the use
    /// of the image.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Ends the use of the image: every further request fails with `ENOMEDIUM`. For
    /// the surroundings, when they cannot trust its state any more.
    pub fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
        self.links().changed_altogether();
    }
}
