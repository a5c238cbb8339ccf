//! What is where: block status.

use super::Image;
use crate::error::Result;
use crate::format::entry::Mapping;
use crate::host::Host;
use crate::units::{GuestOffset, HostOffset};

/// A range of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Bytes of the range, at least 1.
    pub len: u64,
    /// What they are.
    pub kind: StatusKind,
}

/// What guest bytes are in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusKind {
    /// Not in this image.
    Unallocated,
    /// Zeroes.
    Zero {
        /// The place reserved for them, if any.
        host: Option<HostOffset>,
    },
    /// Data, at this place.
    Data(HostOffset),
    /// Compressed data.
    Compressed,
}

impl<H: Host> Image<H> {
    /// What `len` > 0 bytes at `guest` are in this image, as far as they are of
    /// one kind.
    ///
    /// # Errors
    /// Those of the file, `EIO` for damaged tables.
    pub fn block_status(&self, guest: GuestOffset, len: u64) -> Result<BlockStatus> {
        let run = self.lookup(guest, len)?;
        let kind = match run.mapping {
            Mapping::Unallocated => StatusKind::Unallocated,
            Mapping::ZeroPlain => StatusKind::Zero { host: None },
            Mapping::ZeroAllocated(host) => StatusKind::Zero { host: Some(host) },
            Mapping::Normal(host) => StatusKind::Data(host),
            Mapping::Compressed => StatusKind::Compressed,
        };
        let mut len_known = run.len;
        // Runs end at slices; a status goes on while the kind stays.
        while len_known < len {
            let next = self.lookup(guest.add(len_known), len - len_known)?;
            let continues = match (kind, next.mapping) {
                (StatusKind::Unallocated, Mapping::Unallocated)
                | (StatusKind::Zero { host: None }, Mapping::ZeroPlain) => true,
                (StatusKind::Zero { host: Some(host) }, Mapping::ZeroAllocated(other))
                | (StatusKind::Data(host), Mapping::Normal(other)) => host.add(len_known) == other,
                _ => false,
            };
            if !continues {
                break;
            }
            len_known += next.len;
        }
        Ok(BlockStatus { len: len_known, kind })
    }
}
