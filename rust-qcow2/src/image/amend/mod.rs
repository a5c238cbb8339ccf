//! Changing what the header says of an image that is there.
//!
//! What the whole of an image depends on (version, width of refcounts) is
//! changed on disk, between two states that are each complete; then the image
//! is opened anew in its place.

mod downgrade;
mod width;

pub use width::Superseded;

use super::{Image, OpenFlags, OptionRequest};
use crate::error::{Error, Result};
use crate::format::header::{Autoclear, Compatible, V3_LENGTH};
use crate::host::Host;

/// Is told how much of how much is done.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

const NOT_UPDATED: &str = "Failed to update the image header";

const NOT_CLEAN: &str = "Failed to make the image clean";

/// Bytes of extra data that a snapshot of version 3 has at least.
const V3_EXTRA_DATA: u32 = 16;

impl<H: Host> Image<H> {
    /// How the image was opened, to open it again.
    pub fn opened_with(&self) -> (OpenFlags, OptionRequest) {
        let shared = self.shared.read();
        (shared.flags, shared.request.clone())
    }

    /// Makes an image of version 2 one of version 3. The file is complete
    /// afterwards; this value is not to be used any more, but for another one
    /// that is opened in its place.
    ///
    /// # Errors
    /// Those of the file.
    pub fn upgrade(&self, tell: Progress<'_>) -> Result<()> {
        tell(0, 2);
        self.inactivate()?;
        let mut st = self.lock();
        let list = self.snapshots();
        if list.iter().any(|s| s.extra_data_size < V3_EXTRA_DATA) {
            self.write_snapshot_table(&mut st, list).map_err(|error| {
                Error::with_errno(error.code(), "Failed to update the snapshot table")
            })?;
        }
        tell(1, 2);
        self.shared.write().header.version = 3;
        self.shared.write().header.header_length = V3_LENGTH as u32;
        let result = self
            .write_back_all(&mut st)
            .and_then(|()| self.update_header(&mut st));
        if let Err(error) = result {
            self.shared.write().header.version = 2;
            return Err(Error::with_errno(error.code(), NOT_UPDATED));
        }
        tell(2, 2);
        Ok(())
    }

    /// Changes what the header says of the external data file: whether it is
    /// raw, and its name, which goes if it is empty.
    ///
    /// # Errors
    /// Those of the file.
    pub fn amend_data_file(&self, raw: bool, name: Option<&[u8]>) -> Result<()> {
        let mut st = self.lock();
        self.ensure_usable()?;
        {
            let mut shared = self.shared.write();
            shared.header.autoclear.set(Autoclear::RAW_DATA_FILE, raw);
            if let Some(name) = name {
                shared.extensions.data_file = (!name.is_empty()).then(|| name.to_owned());
            }
        }
        self.update_header(&mut st)
            .map_err(|error| Error::with_errno(error.code(), NOT_UPDATED))
    }

    /// Allows lazy refcounts, or ends them, in the header and from now on.
    ///
    /// # Errors
    /// Those of the file.
    pub fn amend_lazy_refcounts(&self, lazy: bool) -> Result<()> {
        let mut st = self.lock();
        self.ensure_usable()?;
        if !lazy {
            self.mark_clean(&mut st)
                .map_err(|error| Error::with_errno(error.code(), NOT_CLEAN))?;
        }
        let set = |lazy| {
            let mut shared = self.shared.write();
            shared
                .header
                .compatible
                .set(Compatible::LAZY_REFCOUNTS, lazy);
            shared.options.lazy_refcounts = lazy;
        };
        set(lazy);
        let result = self.update_header(&mut st);
        if result.is_err() {
            set(!lazy);
        }
        result.map_err(|error| Error::with_errno(error.code(), NOT_UPDATED))
    }
}
