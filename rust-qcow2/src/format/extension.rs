//! Header extensions (section "Header extensions").

use super::header::{Header, Incompatible};
use crate::error::{Error, Result};

/// Ends the list.
pub const END: u32 = 0;
/// Name of the format of the backing file.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub const FEATURE_TABLE: u32 = 0x6803_f857;
/// Where the LUKS header is.
pub const CRYPTO_HEADER: u32 = 0x0537_be77;
/// Where the persistent bitmaps are.
pub const BITMAPS: u32 = 0x2385_2875;
/// Name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;

/// Longest name of a backing format.
pub const MAX_FORMAT_NAME: usize = 15;

/// One header extension, as it is in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Which one.
    pub kind: u32,
    /// Its content without padding.
    pub data: Vec<u8>,
}

/// The extensions of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// The format of the backing file, as recorded.
    pub backing_format: Option<Vec<u8>>,
    /// The feature name table, unparsed; used to name unknown features.
    pub feature_table: Vec<u8>,
    /// The LUKS header pointer, unparsed.
    pub crypto_header: Option<Vec<u8>>,
    /// The bitmaps extension, unparsed.
    pub bitmaps: Option<Vec<u8>>,
    /// The name of the external data file. Like that of a backing file it is
    /// what the system takes as one: nobody promises UTF-8.
    pub data_file: Option<Vec<u8>>,
    /// What is not known here, in the order of the file; written back as is.
    pub unknown: Vec<Extension>,
}

/// Which feature word a name in the table belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum FeatureType {
    Incompatible = 0,
    Compatible = 1,
    Autoclear = 2,
}

/// The names this implementation writes.
const FEATURES: [(FeatureType, u8, &str); 8] = [
    (FeatureType::Incompatible, 0, "dirty bit"),
    (FeatureType::Incompatible, 1, "corrupt bit"),
    (FeatureType::Incompatible, 2, "external data file"),
    (FeatureType::Incompatible, 3, "compression type"),
    (FeatureType::Incompatible, 4, "extended L2 entries"),
    (FeatureType::Compatible, 0, "lazy refcounts"),
    (FeatureType::Autoclear, 0, "bitmaps"),
    (FeatureType::Autoclear, 1, "raw external data"),
];
const FEATURE_ENTRY: usize = 48;

impl Extensions {
    /// Reads the extensions from `bytes`, which begin behind the header at
    /// file offset `start` and end at the first cluster's end or at the name
    /// of the backing file.
    ///
    /// # Errors
    /// For a length that goes beyond `bytes` and for names that are too long.
    pub fn parse(bytes: &[u8], start: u64) -> Result<Self> {
        let mut result = Self::default();
        let mut rest = bytes;
        let mut offset = start;
        while !rest.is_empty() {
            if rest.len() < 8 {
                return Err(Error::invalid("Header extension too large"));
            }
            let kind = u32::from_be_bytes([rest[0], rest[1], rest[2], rest[3]]);
            let len = u32::from_be_bytes([rest[4], rest[5], rest[6], rest[7]]) as usize;
            offset += 8;
            rest = &rest[8..];
            if len > rest.len() {
                return Err(Error::invalid("Header extension too large"));
            }
            let data = &rest[..len];
            match kind {
                END => return Ok(result),
                BACKING_FORMAT => {
                    if len > MAX_FORMAT_NAME {
                        return Err(Error::invalid(format!(
                            "ERROR: ext_backing_format: len={len} too large (>={})",
                            MAX_FORMAT_NAME + 1
                        )));
                    }
                    result.backing_format = Some(up_to_nul(data).to_vec());
                }
                FEATURE_TABLE => result.feature_table = data.to_vec(),
                CRYPTO_HEADER => result.crypto_header = Some(data.to_vec()),
                BITMAPS => result.bitmaps = Some(data.to_vec()),
                DATA_FILE => result.data_file = Some(up_to_nul(data).to_vec()),
                _ => result.unknown.push(Extension {
                    kind,
                    data: data.to_vec(),
                }),
            }
            let padded = (len + 7) & !7;
            offset += padded as u64;
            rest = rest.get(padded..).unwrap_or(&[]);
        }
        let _ = offset;
        Ok(result)
    }

    /// The names of the features in `bits` of the incompatible word, from the
    /// image's own table where it has them.
    #[must_use]
    pub fn name_incompatible(&self, bits: u64) -> String {
        let mut names = Vec::new();
        let mut unnamed = bits;
        // The last name may be cut short.
        for entry in self
            .feature_table
            .chunks(FEATURE_ENTRY)
            .filter(|entry| entry.len() > 2)
        {
            if entry[0] == FeatureType::Incompatible as u8
                && entry[1] < 64
                && unnamed & (1 << entry[1]) != 0
            {
                unnamed &= !(1 << entry[1]);
                names.push(c_string(&entry[2..]));
            }
        }
        if unnamed != 0 {
            names.push(format!("Unknown incompatible feature: {unnamed:x}"));
        }
        names.join(", ")
    }

    /// The first cluster's content: header, extensions, and the name of the
    /// backing file. The header's `backing_name` is set accordingly.
    ///
    /// # Errors
    /// `ENOSPC` where it does not fit one cluster.
    pub fn encode(&self, header: &mut Header, backing_file: Option<&[u8]>) -> Result<Vec<u8>> {
        let cluster_size = 1usize << header.cluster_bits;
        let mut tail = Vec::new();
        let mut put = |kind: u32, data: &[u8]| {
            tail.extend_from_slice(&kind.to_be_bytes());
            tail.extend_from_slice(&(data.len() as u32).to_be_bytes());
            tail.extend_from_slice(data);
            tail.resize(tail.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            put(BACKING_FORMAT, format);
        }
        if let Some(name) = &self.data_file {
            if header.incompatible.contains(Incompatible::DATA_FILE) {
                put(DATA_FILE, name);
            }
        }
        if let Some(data) = &self.crypto_header {
            put(CRYPTO_HEADER, data);
        }
        // Small clusters need their room for the name of the backing file.
        if header.version >= 3 && cluster_size > 4096 {
            put(FEATURE_TABLE, &feature_table());
        }
        if let Some(data) = &self.bitmaps {
            put(BITMAPS, data);
        }
        for extension in &self.unknown {
            put(extension.kind, &extension.data);
        }
        put(END, &[]);

        header.backing_name = None;
        let fixed = header.encode().len();
        if let Some(name) = backing_file {
            header.backing_name = Some(((fixed + tail.len()) as u64, name.len() as u32));
            tail.extend_from_slice(name);
        }
        let mut bytes = header.encode();
        header.header_length = fixed as u32;
        bytes.extend_from_slice(&tail);
        if bytes.len() > cluster_size {
            return Err(Error::errno(libc::ENOSPC));
        }
        bytes.resize(cluster_size, 0);
        Ok(bytes)
    }
}

fn feature_table() -> Vec<u8> {
    let mut table = vec![0; FEATURES.len() * FEATURE_ENTRY];
    for (entry, (kind, bit, name)) in table.chunks_exact_mut(FEATURE_ENTRY).zip(FEATURES) {
        entry[0] = kind as u8;
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
    }
    table
}

/// A name as the file has it: no NUL is part of one.
pub(crate) fn up_to_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The text up to the first NUL, for a person.
fn c_string(bytes: &[u8]) -> String {
    String::from_utf8_lossy(up_to_nul(bytes)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::header::{V3_LENGTH, tests::sample};
    use super::*;

    #[test]
    fn names_need_not_be_utf8() {
        let extensions = Extensions {
            backing_format: Some(b"a\xffb".to_vec()),
            data_file: Some(b"\xfe\xff".to_vec()),
            ..Default::default()
        };
        let mut header = sample();
        header.incompatible.insert(Incompatible::DATA_FILE);
        let bytes = extensions.encode(&mut header, Some(b"\xff.img")).unwrap();
        let (at, len) = header.backing_name.unwrap();
        assert_eq!(&bytes[at as usize..][..len as usize], b"\xff.img");
        let again = Extensions::parse(&bytes[V3_LENGTH..at as usize], V3_LENGTH as u64).unwrap();
        assert_eq!(again.backing_format, extensions.backing_format);
        assert_eq!(again.data_file, extensions.data_file);
    }

    #[test]
    fn round_trip_keeps_what_is_not_understood() {
        let extensions = Extensions {
            backing_format: Some("qcow2".into()),
            unknown: vec![Extension {
                kind: 0x1234_5678,
                data: b"odd length".to_vec(),
            }],
            ..Default::default()
        };
        let mut header = sample();
        let bytes = extensions.encode(&mut header, Some(b"base.img")).unwrap();
        assert_eq!(bytes.len(), 65536);
        let parsed = Header::parse(&bytes).unwrap();
        let (at, len) = parsed.backing_name.unwrap();
        assert_eq!(&bytes[at as usize..][..len as usize], b"base.img");
        let again = Extensions::parse(&bytes[V3_LENGTH..at as usize], V3_LENGTH as u64).unwrap();
        assert_eq!(again.backing_format, extensions.backing_format);
        assert_eq!(again.unknown, extensions.unknown);
        assert_eq!(again.name_incompatible(1), "dirty bit");
        let short = Extensions {
            feature_table: b"\0\x3fShort".to_vec(),
            ..Default::default()
        };
        assert_eq!(short.name_incompatible(1 << 63), "Short");
        assert_eq!(
            again.name_incompatible(1 << 40),
            "Unknown incompatible feature: 10000000000"
        );
    }

    #[test]
    fn too_long_is_refused() {
        let mut bytes = BACKING_FORMAT.to_be_bytes().to_vec();
        bytes.extend_from_slice(&100u32.to_be_bytes());
        assert!(Extensions::parse(&bytes, 112).is_err());
        bytes.resize(200, b'x');
        assert!(Extensions::parse(&bytes, 112).is_err());
    }
}
