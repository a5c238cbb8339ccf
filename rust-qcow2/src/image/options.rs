//! What a user can set when opening an image, and what follows from it.

use super::overlap::template;
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::geometry::Geometry;
use crate::format::header::{Compatible, Header};
use crate::units::div_up;

/// Largest L2 cache without a word from the user, in bytes.
pub const DEFAULT_L2_CACHE_MAX: u64 = 32 << 20;
/// Seconds between two cleanings of the caches, without a word from the user.
pub const DEFAULT_CLEAN_INTERVAL: u64 = 600;
/// Least number of L2 tables in the cache.
const MIN_L2_TABLES: u64 = 2;
/// Least number of refcount blocks in the cache.
const MIN_REFCOUNT_BLOCKS: u64 = 4;

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// Writes are allowed.
    pub writable: bool,
    /// Another process owns the image (incoming migration): nothing may be
    /// written or repaired yet.
    pub inactive: bool,
    /// Opened for a check: a dirty image is not repaired, a corrupt one may be
    /// opened for writing.
    pub check: bool,
    /// No guest data will be read or written.
    pub no_io: bool,
    /// Discard requests of the guest reach the file (`discard=unmap`).
    pub unmap: bool,
}

/// Runtime options as the user gave them; `None` where he did not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OptionRequest {
    /// `lazy-refcounts`.
    pub lazy_refcounts: Option<bool>,
    /// `pass-discard-request`.
    pub discard_request: Option<bool>,
    /// `pass-discard-snapshot`.
    pub discard_snapshot: Option<bool>,
    /// `pass-discard-other`.
    pub discard_other: Option<bool>,
    /// `discard-no-unref`.
    pub discard_no_unref: Option<bool>,
    /// `overlap-check`, and its long form `overlap-check.template`.
    pub overlap_check: Option<String>,
    /// `overlap-check.template`.
    pub overlap_template: Option<String>,
    /// The single switches of `overlap-check.*`, in any order.
    pub overlap_switches: Vec<(MetadataKind, bool)>,
    /// `cache-size`, bytes.
    pub cache_size: Option<u64>,
    /// `l2-cache-size`, bytes.
    pub l2_cache_size: Option<u64>,
    /// `l2-cache-entry-size`, bytes.
    pub l2_cache_entry_size: Option<u64>,
    /// `refcount-cache-size`, bytes.
    pub refcount_cache_size: Option<u64>,
    /// `cache-clean-interval`, seconds; 0 turns cleaning off.
    pub cache_clean_interval: Option<u64>,
}

/// The sizes of the metadata caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSizes {
    /// Number of L2 slices.
    pub l2_slices: usize,
    /// Bytes of one L2 slice.
    pub l2_slice_size: usize,
    /// Number of refcount blocks.
    pub refcount_blocks: usize,
}

/// Options in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Sizes of the caches.
    pub caches: CacheSizes,
    /// Seconds between cleanings, 0 for never.
    pub clean_interval: u64,
    /// Refcounts are written late, under the dirty bit.
    pub lazy_refcounts: bool,
    /// Guest discards are passed on to the file.
    pub discard_request: bool,
    /// What snapshot deletion frees is discarded in the file.
    pub discard_snapshot: bool,
    /// What is freed for any other reason is discarded in the file.
    pub discard_other: bool,
    /// A guest discard keeps the host cluster and its reference.
    pub discard_no_unref: bool,
    /// What a write is checked against.
    pub overlap_check: MetadataKind,
}

impl Options {
    /// What `request` amounts to for an image.
    ///
    /// # Errors
    /// The sentences that users of QEMU know, for contradictions and values
    /// out of range.
    pub fn resolve(header: &Header, flags: OpenFlags, request: &OptionRequest) -> Result<Self> {
        let geometry = Geometry::of(header);
        let caches = CacheSizes::resolve(&geometry, header.size, request)?;
        let clean_interval = request.cache_clean_interval.unwrap_or(DEFAULT_CLEAN_INTERVAL);
        if clean_interval > u64::from(u32::MAX) {
            return Err(Error::invalid("Cache clean interval too big"));
        }
        let lazy_refcounts = request
            .lazy_refcounts
            .unwrap_or(header.compatible.contains(Compatible::LAZY_REFCOUNTS));
        if header.version < 3 && lazy_refcounts {
            return Err(Error::invalid(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            ));
        }
        let overlap_check = Self::overlap(request)?;
        let discard_no_unref = request.discard_no_unref.unwrap_or(false);
        if discard_no_unref && header.version < 3 {
            return Err(Error::invalid(
                "discard-no-unref is only supported since qcow2 version 3",
            ));
        }
        Ok(Self {
            caches,
            clean_interval,
            lazy_refcounts,
            discard_request: request.discard_request.unwrap_or(flags.unmap),
            discard_snapshot: request.discard_snapshot.unwrap_or(true),
            discard_other: request.discard_other.unwrap_or(false),
            discard_no_unref,
            overlap_check,
        })
    }

    fn overlap(request: &OptionRequest) -> Result<MetadataKind> {
        let name = match (&request.overlap_check, &request.overlap_template) {
            (Some(short), Some(long)) if short != long => {
                return Err(Error::invalid(format!(
                    "Conflicting values for qcow2 options 'overlap-check' ('{short}') and \
                     'overlap-check.template' ('{long}')"
                )));
            }
            (Some(name), _) | (None, Some(name)) => name.as_str(),
            (None, None) => "cached",
        };
        let mut kinds = template(name).ok_or_else(|| {
            Error::invalid(format!(
                "Unsupported value '{name}' for qcow2 option 'overlap-check'. Allowed are any \
                 of the following: none, constant, cached, all"
            ))
        })?;
        for (kind, on) in &request.overlap_switches {
            kinds.set(*kind, *on);
        }
        Ok(kinds)
    }
}

impl CacheSizes {
    /// Shares out the memory as documented in `docs/qcow2-cache.txt`: the L2
    /// cache covers the disk if it can, the refcount cache gets its minimum,
    /// a given total is shared between the two.
    fn resolve(geometry: &Geometry, disk: u64, request: &OptionRequest) -> Result<Self> {
        let cluster = geometry.cluster_size();
        let entry = request.l2_cache_entry_size.unwrap_or(cluster);
        let min_refcount = MIN_REFCOUNT_BLOCKS * cluster;
        // As many L2 tables as the disk can have, in whole clusters.
        let entry_bytes = 1 << geometry.l2_entry_bits;
        let max_l2 = div_up(div_up(disk, cluster) * entry_bytes, cluster) * cluster;
        let set = (request.cache_size, request.l2_cache_size, request.refcount_cache_size);
        let (l2, refcount) = match set {
            (Some(_), Some(_), Some(_)) => {
                return Err(Error::invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the \
                     same time",
                ));
            }
            (Some(total), Some(l2), None) => {
                if l2 > total {
                    return Err(Error::invalid("l2-cache-size may not exceed cache-size"));
                }
                (l2.min(max_l2), total - l2)
            }
            (Some(total), None, Some(refcount)) => {
                if refcount > total {
                    return Err(Error::invalid("refcount-cache-size may not exceed cache-size"));
                }
                ((total - refcount).min(max_l2), refcount)
            }
            (Some(total), None, None) => {
                let l2 = if max_l2 < total { max_l2.max(total.saturating_sub(min_refcount).min(max_l2)) }
                    else { total - total.min(min_refcount) };
                (l2.min(max_l2), total - l2.min(total))
            }
            (None, l2, refcount) => {
                (l2.unwrap_or(DEFAULT_L2_CACHE_MAX).min(max_l2), refcount.unwrap_or(min_refcount))
            }
        };
        // Where the cache cannot hold all tables, small slices waste less.
        let covered = l2 == max_l2;
        let slice = match request.l2_cache_entry_size {
            Some(_) => entry,
            None if covered => cluster,
            None => cluster.min(4096),
        };
        if slice < 512 || slice > cluster || !slice.is_power_of_two() {
            return Err(Error::invalid(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size \
                 ({cluster})"
            )));
        }
        let slices = (l2 / slice).max(MIN_L2_TABLES);
        let blocks = (refcount / cluster).max(MIN_REFCOUNT_BLOCKS);
        if slices > i32::MAX as u64 {
            return Err(Error::invalid("L2 cache size too big"));
        }
        if blocks > i32::MAX as u64 {
            return Err(Error::invalid("Refcount cache size too big"));
        }
        Ok(Self {
            l2_slices: slices as usize,
            l2_slice_size: slice as usize,
            refcount_blocks: blocks as usize,
        })
    }
}
