//! New images.

use crate::error::{Error, Result};
use crate::format::extension::Extensions;
use crate::format::geometry::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS};
use crate::format::header::{
    Autoclear, Compatible, CompressionType, Header, Incompatible, V2_LENGTH, V3_LENGTH,
};
use crate::format::refcount::RefcountOrder;
use crate::host::{File, Preallocation};

/// Cluster size without a word from the user, in bytes.
pub const DEFAULT_CLUSTER_SIZE: u64 = 65536;
/// Width of the refcounts without a word from the user, in bits.
pub const DEFAULT_REFCOUNT_BITS: u64 = 16;
/// The unit of disk sizes.
const SECTOR: u64 = 512;

/// What a new image is to be, as the user said it; `None` where he did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CreateRequest {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Version of the format, 2 or 3.
    pub version: Option<u32>,
    /// Bytes of a cluster.
    pub cluster_size: Option<u64>,
    /// Width of the refcounts in bits.
    pub refcount_bits: Option<u64>,
    /// Refcounts are written late.
    pub lazy_refcounts: bool,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// L2 entries know subclusters.
    pub extended_l2: bool,
    /// There is a name of a backing file.
    pub backing_file: bool,
    /// There is a format of the backing file.
    pub backing_format: bool,
    /// There is an external data file.
    pub data_file: bool,
    /// The external data file is a raw image of the disk.
    pub data_file_raw: bool,
    /// How the disk's clusters are prepared.
    pub preallocation: Preallocation,
}

/// What [`format()`] has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateParams {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Width of the refcounts.
    pub refcount_order: RefcountOrder,
    /// Refcounts are written late.
    pub lazy_refcounts: bool,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// Guest data go to a file of their own.
    pub data_file: bool,
    /// That file is a raw image of the disk.
    pub data_file_raw: bool,
    /// L2 entries know subclusters.
    pub extended_l2: bool,
}

/// The logarithm of a cluster size, for extended L2 entries or standard ones.
///
/// # Errors
/// Where it is no power of two or out of range.
pub fn cluster_bits(cluster_size: u64, extended_l2: bool) -> Result<u32> {
    let range = 1 << MIN_CLUSTER_BITS..=1 << MAX_CLUSTER_BITS;
    if !cluster_size.is_power_of_two() || !range.contains(&cluster_size) {
        return Err(Error::invalid(format!(
            "Cluster size must be a power of two between {} and {}k",
            range.start(),
            range.end() >> 10
        )));
    }
    let bits = cluster_size.ilog2();
    if extended_l2 && bits < MIN_EXTENDED_L2_CLUSTER_BITS {
        return Err(Error::invalid(format!(
            "Extended L2 entries are only supported with cluster sizes of at least {} bytes",
            1 << MIN_EXTENDED_L2_CLUSTER_BITS
        )));
    }
    Ok(bits)
}

/// The width of the refcounts for a number of bits. `remedy` is what the user
/// is told to set where the version is too old for it.
///
/// # Errors
/// Where that is no width, or none that the version knows.
pub fn refcount_order(bits: u64, version: u32, remedy: &str) -> Result<RefcountOrder> {
    let order = Some(bits)
        .filter(|bits| bits.is_power_of_two())
        .and_then(|bits| RefcountOrder::new(bits.ilog2()))
        .ok_or_else(|| {
            Error::invalid("Refcount width must be a power of two and may not exceed 64 bits")
        })?;
    if version < 3 && order != RefcountOrder::BITS_16 {
        return Err(Error::invalid(format!(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use \
             {remedy} or greater)"
        )));
    }
    Ok(order)
}

/// Checks the request and fills in what the user did not say.
///
/// # Errors
/// The sentences that users of QEMU know, the first one that applies.
pub fn validate(request: &CreateRequest) -> Result<CreateParams> {
    if request.size % SECTOR != 0 {
        return Err(Error::invalid(format!(
            "Image size must be a multiple of {SECTOR} bytes"
        )));
    }
    let version = request.version.unwrap_or(3);
    let needs_v3 = |what: &str| {
        Error::invalid(format!(
            "{what} only supported with compatibility level 1.1 and above (use version=v3 or \
             greater)"
        ))
    };
    if request.extended_l2 && version < 3 {
        return Err(needs_v3("Extended L2 entries are"));
    }
    let cluster_size = request.cluster_size.unwrap_or(DEFAULT_CLUSTER_SIZE);
    let cluster_bits = cluster_bits(cluster_size, request.extended_l2)?;
    if request.backing_file && request.preallocation != Preallocation::Off && !request.extended_l2 {
        return Err(Error::invalid(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ));
    }
    if request.backing_format && !request.backing_file {
        return Err(Error::invalid(
            "Backing format cannot be used without backing file",
        ));
    }
    if request.lazy_refcounts && version < 3 {
        return Err(needs_v3("Lazy refcounts"));
    }
    let bits = request.refcount_bits.unwrap_or(DEFAULT_REFCOUNT_BITS);
    let refcount_order = refcount_order(bits, version, "version=v3")?;
    if request.data_file_raw && !request.data_file {
        return Err(Error::invalid("data-file-raw requires data-file"));
    }
    if request.data_file_raw && request.backing_file {
        return Err(Error::invalid(
            "Backing file and data-file-raw cannot be used at the same time",
        ));
    }
    if request.data_file && version < 3 {
        return Err(needs_v3("External data files are"));
    }
    if request.compression != CompressionType::Zlib && version < 3 {
        return Err(needs_v3("Non-zlib compression type is"));
    }
    Ok(CreateParams {
        version,
        cluster_bits,
        refcount_order,
        lazy_refcounts: request.lazy_refcounts,
        compression: request.compression,
        data_file: request.data_file,
        data_file_raw: request.data_file_raw,
        extended_l2: request.extended_l2,
    })
}

/// What a test that wants nothing special begins with.
#[cfg(test)]
pub(super) const PLAIN: CreateParams = CreateParams {
    version: 3,
    cluster_bits: 16,
    refcount_order: RefcountOrder::BITS_16,
    lazy_refcounts: false,
    compression: CompressionType::Zlib,
    data_file: false,
    data_file_raw: false,
    extended_l2: false,
};

/// Writes an image of a disk of size zero: header, refcount table and one
/// refcount block, in this order and counted. Everything else comes with the
/// first resize. `data_file` is the name of the external data file, if there
/// is to be one.
///
/// # Errors
/// Those of the file.
pub fn format<F: File>(file: &F, params: &CreateParams, data_file: Option<&[u8]>) -> Result<()> {
    let cluster_size = 1u64 << params.cluster_bits;
    let mut incompatible = Incompatible::empty();
    incompatible.set(
        Incompatible::COMPRESSION,
        params.compression != CompressionType::Zlib,
    );
    incompatible.set(Incompatible::DATA_FILE, params.data_file);
    let mut autoclear = Autoclear::empty();
    autoclear.set(Autoclear::RAW_DATA_FILE, params.data_file_raw);
    incompatible.set(Incompatible::EXTENDED_L2, params.extended_l2);
    let mut compatible = Compatible::empty();
    compatible.set(Compatible::LAZY_REFCOUNTS, params.lazy_refcounts);
    let mut header = Header {
        version: params.version,
        cluster_bits: params.cluster_bits,
        size: 0,
        backing_name: None,
        crypt_method: 0,
        l1_size: 0,
        l1_table_offset: 0,
        refcount_table_offset: cluster_size,
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible,
        autoclear,
        refcount_order: params.refcount_order,
        header_length: if params.version < 3 {
            V2_LENGTH
        } else {
            V3_LENGTH
        } as u32,
        compression: match params.compression {
            CompressionType::Zlib => 0,
            CompressionType::Zstd => 1,
        },
        unknown_fields: Vec::new(),
    };
    let extensions = Extensions {
        data_file: data_file.map(ToOwned::to_owned),
        ..Extensions::default()
    };
    let first = extensions.encode(&mut header, None)?;
    file.write(0, &first)
        .map_err(|e| e.context("Could not write qcow2 header"))?;

    let cluster = first.len();
    let mut refcounts = vec![0; 2 * cluster];
    refcounts[..8].copy_from_slice(&(2 * cluster_size).to_be_bytes());
    for used in 0..3 {
        params
            .refcount_order
            .set(&mut refcounts[cluster..], used, 1);
    }
    file.write(cluster_size, &refcounts)
        .map_err(|e| e.context("Could not write refcount table"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(request: CreateRequest) -> String {
        validate(&request).unwrap_err().to_string()
    }

    #[test]
    fn defaults() {
        let params = validate(&CreateRequest {
            size: 1 << 30,
            ..Default::default()
        })
        .unwrap();
        assert_eq!(params.version, 3);
        assert_eq!(params.cluster_bits, 16);
        assert_eq!(params.refcount_order, RefcountOrder::BITS_16);
    }

    #[test]
    fn every_cluster_size_and_width() {
        for bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
            assert_eq!(cluster_bits(1 << bits, false).unwrap(), bits);
        }
        for size in [0, 256, 513, 4 << 20, u64::MAX] {
            assert_eq!(
                cluster_bits(size, false).unwrap_err().to_string(),
                "Cluster size must be a power of two between 512 and 2048k"
            );
        }
        assert_eq!(cluster_bits(16384, true).unwrap(), 14);
        assert_eq!(
            cluster_bits(8192, true).unwrap_err().to_string(),
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
        );
        for order in 0..=6 {
            assert_eq!(refcount_order(1 << order, 3, "").unwrap().order(), order);
        }
        for bits in [0, 3, 65, 128] {
            assert!(refcount_order(bits, 3, "").is_err());
        }
        assert!(refcount_order(8, 2, "").is_err());
    }

    #[test]
    fn contradictions_are_refused() {
        let base = CreateRequest::default();
        assert_eq!(
            refusal(CreateRequest { size: 100, ..base }),
            "Image size must be a multiple of 512 bytes"
        );
        assert_eq!(
            refusal(CreateRequest {
                version: Some(2),
                lazy_refcounts: true,
                ..base
            }),
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 \
             or greater)"
        );
        assert_eq!(
            refusal(CreateRequest {
                version: Some(2),
                compression: CompressionType::Zstd,
                ..base
            }),
            "Non-zlib compression type is only supported with compatibility level 1.1 and above \
             (use version=v3 or greater)"
        );
        assert_eq!(
            refusal(CreateRequest {
                backing_format: true,
                ..base
            }),
            "Backing format cannot be used without backing file"
        );
        assert!(
            refusal(CreateRequest {
                backing_file: true,
                preallocation: Preallocation::Full,
                ..base
            })
            .starts_with("Backing file and preallocation")
        );
    }
}
