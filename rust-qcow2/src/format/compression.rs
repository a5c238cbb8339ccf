//! Compressing and decompressing clusters. No I/O.
//!
//! What comes in may be anything: a cluster comes out whole or not at all.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer};

use super::header::CompressionType;
use crate::error::{Error, Result};

/// log2 of the window of raw deflate: what readers of the format expect, which
/// may not understand a larger one.
const WINDOW_BITS: u8 = 12;

impl CompressionType {
    /// Compresses a cluster into at most `room` bytes; `None` where it does not
    /// fit.
    ///
    /// # Errors
    /// `EIO` where the library fails.
    pub(crate) fn compress(self, cluster: &[u8], room: usize) -> Result<Option<Vec<u8>>> {
        let mut packed = vec![0; room];
        let len = match self {
            Self::Zlib => {
                let mut stream =
                    Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS);
                match stream.compress(cluster, &mut packed, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => Some(stream.total_out() as usize),
                    Ok(_) => None,
                    Err(_) => return Err(Error::errno(libc::EIO)),
                }
            }
            // Too little room is the one error that there can be.
            Self::Zstd => zstd::bulk::compress_to_buffer(
                cluster,
                &mut packed,
                zstd::DEFAULT_COMPRESSION_LEVEL,
            )
            .ok(),
        };
        Ok(len.map(|len| {
            packed.truncate(len);
            packed
        }))
    }

    /// Decompresses a cluster. What follows its data in `packed` is ignored.
    ///
    /// # Errors
    /// `EIO` where that does not give all of the cluster.
    pub(crate) fn decompress(self, packed: &[u8], cluster: &mut [u8]) -> Result<()> {
        let whole = match self {
            Self::Zlib => {
                let mut stream = Decompress::new(false);
                let done = stream.decompress(packed, cluster, FlushDecompress::Finish);
                done.is_ok() && stream.total_out() == cluster.len() as u64
            }
            Self::Zstd => inflate_frames(packed, cluster),
        };
        if whole {
            Ok(())
        } else {
            Err(Error::errno(libc::EIO))
        }
    }
}

/// A cluster may consist of several frames.
fn inflate_frames(packed: &[u8], cluster: &mut [u8]) -> bool {
    let Some(mut context) = DCtx::try_create() else {
        return false;
    };
    let len = cluster.len();
    let mut output = OutBuffer::around(cluster);
    let mut input = InBuffer::around(packed);
    while output.pos() < len {
        let before = (input.pos(), output.pos());
        let result = context.decompress_stream(&mut output, &mut input);
        if result.is_err() || before == (input.pos(), output.pos()) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPES: [CompressionType; 2] = [CompressionType::Zlib, CompressionType::Zstd];

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 7 % 251) as u8).collect()
    }

    #[test]
    fn a_cluster_comes_back() {
        for kind in TYPES {
            for len in [512, 65536, 2 << 20] {
                let cluster = text(len);
                let mut packed = kind.compress(&cluster, len - 1).unwrap().unwrap();
                assert!(packed.len() < len / 2);
                // The last sector has something else behind the data.
                packed.extend([0xaa; 300]);
                let mut back = vec![0; len];
                kind.decompress(&packed, &mut back).unwrap();
                assert!(back == cluster);
            }
        }
    }

    #[test]
    fn noise_does_not_fit() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..65536)
            .map(|_| {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (state >> 56) as u8
            })
            .collect();
        for kind in TYPES {
            assert_eq!(kind.compress(&noise, noise.len() - 1).unwrap(), None);
        }
    }

    #[test]
    fn damaged_data_are_an_error() {
        for kind in TYPES {
            let cluster = text(65536);
            let packed = kind.compress(&cluster, 65535).unwrap().unwrap();
            let mut back = vec![0; 65536];
            assert!(
                kind.decompress(&packed[..packed.len() / 2], &mut back)
                    .is_err()
            );
            assert!(kind.decompress(&[], &mut back).is_err());
            assert!(kind.decompress(&[0xff; 512], &mut back).is_err());
            assert!(kind.decompress(&packed, &mut vec![0; 131_072]).is_err());
        }
    }

    #[test]
    fn several_frames() {
        let cluster = text(65536);
        let mut packed = Vec::new();
        for half in cluster.chunks(32768) {
            packed.extend(
                CompressionType::Zstd
                    .compress(half, 32768)
                    .unwrap()
                    .unwrap(),
            );
        }
        let mut back = vec![0; 65536];
        CompressionType::Zstd
            .decompress(&packed, &mut back)
            .unwrap();
        assert!(back == cluster);
    }
}
