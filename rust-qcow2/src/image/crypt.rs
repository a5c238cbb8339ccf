//! Encrypted guest data: what is read and written goes through a buffer and
//! the cipher of the surroundings.

use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::header::{Encryption, Header};
use crate::host::{Buf, Crypt, CryptoHeader, File, GuestBuf, Host, Part, ZeroFlags};
use crate::units::{GuestOffset, HostOffset, round_up};

/// What is encrypted as a unit.
const SECTOR_BITS: u32 = 9;
/// The largest buffer of one request.
const CHUNK: u64 = 1 << 20;

/// The encryption that an image asks for, and where its header is.
pub(super) fn encryption_of(
    header: &Header,
    extension: Option<&[u8]>,
) -> Result<Option<(Encryption, Option<CryptoHeader>)>> {
    let luks = header.crypt_method == Encryption::Luks as u32;
    let mut place = None;
    if let Some(data) = extension {
        if !luks {
            return Err(Error::invalid(
                "CRYPTO header extension only expected with LUKS encryption method",
            ));
        }
        let &[a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = data else {
            return Err(Error::invalid(format!(
                "CRYPTO header extension size {}, but expected size 16",
                data.len()
            )));
        };
        let at = HostOffset(u64::from_be_bytes([a, b, c, d, e, f, g, h]));
        if !at.is_aligned(header.cluster_bits) {
            return Err(Error::invalid(format!(
                "Encryption header offset '{}' is not a multiple of cluster size '{}'",
                at.0,
                1u64 << header.cluster_bits
            )));
        }
        place = Some(CryptoHeader {
            offset: at,
            len: u64::from_be_bytes([i, j, k, l, m, n, o, p]),
        });
    }
    match header.crypt_method {
        0 => Ok(None),
        1 => Ok(Some((Encryption::Aes, None))),
        2 if place.is_some() => Ok(Some((Encryption::Luks, place))),
        2 => Err(Error::invalid("Missing CRYPTO header for crypt method 2")),
        other => Err(Error::invalid(format!(
            "Unsupported encryption method {}",
            other as i32
        ))),
    }
}

impl<H: Host> Image<H> {
    /// How guest data are encrypted, if they are.
    #[inline]
    pub fn encryption(&self) -> Option<Encryption> {
        self.encryption
    }

    /// Encrypts or decrypts bytes in place.
    fn crypt(
        &self,
        how: Crypt,
        guest: GuestOffset,
        host: HostOffset,
        bytes: &mut [u8],
    ) -> Result<()> {
        let offset = match self.encryption {
            Some(Encryption::Aes) => guest.0,
            _ => host.0,
        };
        self.host.crypt(how, offset, bytes)
    }

    /// Passes the plain bytes of a range on, piece by piece: `put` gets the
    /// number of bytes before the piece. Ranges within sectors are fine.
    fn decrypted(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        len: u64,
        mut put: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let file = self.data_file()?;
        let mut done = 0;
        while done < len {
            let at = guest.add(done);
            let skip = at.within(SECTOR_BITS);
            let here = (len - done).min(CHUNK - skip);
            let mut bytes = self
                .host
                .scratch(round_up(skip + here, SECTOR_BITS) as usize)?;
            let place = HostOffset(host.0 + done - skip);
            file.read(place.0, &mut bytes)?;
            self.crypt(Crypt::Decrypt, GuestOffset(at.0 - skip), place, &mut bytes)?;
            put(done as usize, &bytes[skip as usize..(skip + here) as usize]);
            done += here;
        }
        Ok(())
    }

    pub(super) fn read_encrypted_guest(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        buf: GuestBuf<'_, H>,
        at: usize,
        len: usize,
    ) -> Result<()> {
        self.decrypted(guest, host, len as u64, |done, bytes| {
            buf.put(at + done, bytes);
        })
    }

    pub(super) fn read_encrypted(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        into: &mut [u8],
    ) -> Result<()> {
        self.decrypted(guest, host, into.len() as u64, |done, bytes| {
            into[done..done + bytes.len()].copy_from_slice(bytes);
        })
    }

    /// Writes parts that follow each other, whole sectors together.
    pub(super) fn write_encrypted(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        parts: &[Part<'_, GuestBuf<'_, H>>],
    ) -> Result<()> {
        let file = self.data_file()?;
        let total: usize = parts.iter().map(part_len).sum();
        let mut done = 0;
        while done < total {
            let here = (total - done).min(CHUNK as usize);
            let mut bytes = self.host.scratch(here)?;
            gather(parts, done, &mut bytes);
            let (at, place) = (guest.add(done as u64), host.add(done as u64));
            self.crypt(Crypt::Encrypt, at, place, &mut bytes)?;
            file.write(place.0, &bytes)?;
            done += here;
        }
        Ok(())
    }

    /// Takes clusters for the header of the encryption, full of zeroes.
    ///
    /// # Errors
    /// Those of the file.
    pub fn allocate_crypto_header(&self, len: u64) -> Result<CryptoHeader> {
        let mut st = self.lock();
        let offset = self.allocate(&mut st, len)?;
        let clusters = round_up(len, self.geometry.cluster_bits);
        self.ensure_no_overlap(&mut st, MetadataKind::empty(), offset.0, clusters)?;
        self.write_back(&mut st)?;
        self.host
            .file()
            .write_zeroes(offset.0, clusters, ZeroFlags::default())?;
        Ok(CryptoHeader { offset, len })
    }

    /// Where the header of the encryption is.
    pub fn crypto_header(&self) -> Option<CryptoHeader> {
        let shared = self.shared.read();
        let found = encryption_of(&shared.header, shared.extensions.crypto_header.as_deref());
        found.ok().flatten().and_then(|(_, header)| header)
    }

    /// Records in a new image how it is encrypted. It has to be opened anew to
    /// be used.
    ///
    /// # Errors
    /// Those of the file.
    pub fn record_encryption(
        &self,
        encryption: Encryption,
        header: Option<CryptoHeader>,
    ) -> Result<()> {
        let mut st: StateGuard<'_, H> = self.lock();
        {
            let mut shared = self.shared.write();
            shared.header.crypt_method = encryption as u32;
            shared.extensions.crypto_header = header.map(|header| {
                let mut data = header.offset.0.to_be_bytes().to_vec();
                data.extend_from_slice(&header.len.to_be_bytes());
                data
            });
        }
        self.update_header(&mut st)
    }
}

fn part_len<B>(part: &Part<'_, B>) -> usize {
    match part {
        Part::Bytes(data) => data.len(),
        Part::Guest { len, .. } => *len,
    }
}

/// Copies what the parts have from byte `from` on.
fn gather<B: Buf>(parts: &[Part<'_, B>], from: usize, bytes: &mut [u8]) {
    let mut begin = 0;
    let mut done = 0;
    for part in parts {
        let len = part_len(part);
        let skip = (from + done).saturating_sub(begin).min(len);
        let here = (len - skip).min(bytes.len() - done);
        if here > 0 {
            let into = &mut bytes[done..done + here];
            match part {
                Part::Bytes(data) => into.copy_from_slice(&data[skip..skip + here]),
                Part::Guest { buf, at, .. } => buf.get(at + skip, into),
            }
            done += here;
        }
        begin += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::local::SharedBuf;
    use parking_lot::Mutex;

    #[test]
    fn parts_are_gathered_from_anywhere() {
        let memory = Mutex::new((10..20).collect::<Vec<u8>>());
        let buf = SharedBuf(&memory);
        let parts = [
            Part::Bytes(&[0, 1, 2]),
            Part::Guest { buf, at: 2, len: 5 },
            Part::Bytes(&[7, 8]),
        ];
        let whole = [0, 1, 2, 12, 13, 14, 15, 16, 7, 8];
        for from in 0..whole.len() {
            for len in 1..=whole.len() - from {
                let mut bytes = vec![0; len];
                gather(&parts, from, &mut bytes);
                assert_eq!(bytes, whole[from..from + len]);
            }
        }
    }
}
