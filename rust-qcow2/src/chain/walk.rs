//! From the top down to the layer that has the data.

use crate::error::{Error, Result};
use crate::format::entry::Mapping;
use crate::host::{Buf, File, GuestBuf, Host};
use crate::image::{Image, Token};
use crate::units::{GuestOffset, HostOffset};

/// Where guest bytes are.
pub(crate) enum Source<'a, H: Host> {
    /// In the file of a layer. The token keeps the place from being reused.
    Data {
        /// The layer.
        layer: &'a Image<H>,
        /// The place in its file.
        host: HostOffset,
        /// Held until the bytes were read.
        _token: Token<'a>,
    },
    /// They are zeroes.
    Zero,
    /// In what is below the last layer of this kind.
    Below(H::File),
}

/// A range of guest bytes that come from one source.
pub(crate) struct Found<'a, H: Host> {
    /// Bytes of the range, at least 1.
    pub(crate) len: u64,
    /// Where they are.
    pub(crate) source: Source<'a, H>,
}

impl<H: Host> Found<'_, H> {
    /// Reads the range, whose first byte is `guest`, into guest memory.
    pub(crate) fn read_guest(
        &self,
        guest: GuestOffset,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<()> {
        let len = self.len as usize;
        match &self.source {
            Source::Data { layer, host, .. } => {
                layer.host().file().read_guest(host.0, buf, at, len)
            }
            Source::Zero => {
                buf.zero(at, len);
                Ok(())
            }
            Source::Below(file) => file.read_guest(guest.0, buf, at, len),
        }
    }

    /// Reads the range, whose first byte is `guest`, into driver memory.
    pub(crate) fn read(&self, guest: GuestOffset, bytes: &mut [u8]) -> Result<()> {
        match &self.source {
            Source::Data { layer, host, .. } => layer.host().file().read(host.0, bytes),
            Source::Zero => {
                bytes.fill(0);
                Ok(())
            }
            Source::Below(file) => file.read(guest.0, bytes),
        }
    }
}

/// Finds the first of the `len` > 0 bytes at `guest`, and as many of the
/// following ones as come from the same place in one piece.
///
/// # Errors
/// Those of a layer's file, `EIO` for damaged tables, `ENOTSUP` for compressed
/// clusters.
pub(crate) fn find<H: Host>(top: &Image<H>, guest: GuestOffset, len: u64) -> Result<Found<'_, H>> {
    let mut layer = top;
    let mut len = len;
    loop {
        // Most layers of a long chain have nothing there, and that is cheap to
        // see.
        if let Some(clear) = layer.without_table(guest, len) {
            len = clear;
        } else {
            let token = layer.enter();
            let run = layer.lookup(guest, len)?;
            len = run.len;
            match run.mapping {
                Mapping::Normal(host) => {
                    let source = Source::Data {
                        layer,
                        host,
                        _token: token,
                    };
                    return Ok(Found { len, source });
                }
                Mapping::ZeroPlain | Mapping::ZeroAllocated(_) => {
                    return Ok(Found {
                        len,
                        source: Source::Zero,
                    });
                }
                Mapping::Compressed => return Err(compressed_clusters()),
                Mapping::Unallocated => {}
            }
        }
        let Some(below) = layer.host().layer_below() else {
            let source = layer.host().backing().map_or(Source::Zero, Source::Below);
            return Ok(Found { len, source });
        };
        // A layer that is shorter ends there, whatever is below it.
        let size = below.size();
        if guest.0 >= size {
            return Ok(Found {
                len,
                source: Source::Zero,
            });
        }
        len = len.min(size - guest.0);
        layer = below;
    }
}

/// The error for a cluster that this stage does not read.
fn compressed_clusters() -> Error {
    Error::unsupported("rqcow2 does not support compressed clusters yet")
}
