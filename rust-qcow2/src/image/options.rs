//! What a user can set when opening an image, and what follows from it.

use super::overlap::template;
use super::refcounts::Reason;
use crate::error::{Error, Result};
use crate::format::entry::MetadataKind;
use crate::format::geometry::{Geometry, MIN_CLUSTER_BITS};
use crate::format::header::{Compatible, Header};
use crate::units::{div_up, round_up};

/// Largest L2 cache without a word from the user, in bytes.
pub const DEFAULT_L2_CACHE_MAX: u64 = 32 << 20;
/// Seconds between two cleanings of the caches, without a word from the user.
pub const DEFAULT_CLEAN_INTERVAL: u64 = 600;
/// Bytes of an L2 slice where the cache does not cover the disk.
const SMALL_SLICE: u64 = 4096;
/// Least number of L2 slices in the cache.
const MIN_L2_SLICES: u64 = 2;
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
    /// Bytes for L2 slices and for the index of the layers below, together
    /// with the slices that those layers keep themselves.
    pub pool: usize,
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
        let caches = CacheSizes::resolve(&geometry, header.size, flags.writable, request)?;
        let clean_interval = request
            .cache_clean_interval
            .unwrap_or(DEFAULT_CLEAN_INTERVAL);
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

    /// Whether a discard for this reason is passed on to the file.
    pub(super) fn passes(&self, reason: Reason) -> bool {
        match reason {
            Reason::Request => self.discard_request,
            Reason::Snapshot => self.discard_snapshot,
            Reason::Other => self.discard_other,
            Reason::Never => false,
            Reason::Always => true,
        }
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
    /// Shares out the memory as documented in QEMU's `docs/qcow2-cache.txt`: the L2
    /// cache covers the disk if it can, the refcount cache gets its minimum,
    /// a given total is shared between the two.
    fn resolve(
        geometry: &Geometry,
        disk: u64,
        writable: bool,
        request: &OptionRequest,
    ) -> Result<Self> {
        let cluster = geometry.cluster_size();
        // As many L2 tables as the disk can have, in whole clusters.
        let entries = div_up(disk, cluster);
        let max_l2 = round_up(entries << geometry.l2_entry_bits, geometry.cluster_bits);
        let (l2, refcount) = Self::share(max_l2, MIN_REFCOUNT_BLOCKS * cluster, request)?;

        // Where the cache cannot hold all tables, small slices cost less to
        // load and to evict. Of a layer that is only read most is read through
        // the index of the layers above.
        let slice = match request.l2_cache_entry_size {
            Some(size) => size,
            None if l2 < max_l2 || !writable => cluster.min(SMALL_SLICE),
            None => cluster,
        };
        let smallest = 1 << MIN_CLUSTER_BITS;
        if !(smallest..=cluster).contains(&slice) || !slice.is_power_of_two() {
            return Err(Error::invalid(format!(
                "L2 cache entry size must be a power of two between {smallest} and the cluster \
                 size ({cluster})"
            )));
        }
        let l2_slices = (l2 / slice).max(MIN_L2_SLICES);
        if l2_slices > i32::MAX as u64 {
            return Err(Error::invalid("L2 cache size too big"));
        }
        let refcount_blocks = (refcount / cluster).max(MIN_REFCOUNT_BLOCKS);
        if refcount_blocks > i32::MAX as u64 {
            return Err(Error::invalid("Refcount cache size too big"));
        }
        Ok(Self {
            // More than the disk can have would never be filled.
            l2_slices: l2_slices.min((max_l2 / slice).max(MIN_L2_SLICES)) as usize,
            l2_slice_size: slice as usize,
            refcount_blocks: refcount_blocks as usize,
            // The index is not limited by what the tables of this image can
            // be, as it stands for those of others.
            pool: match (request.l2_cache_size, request.cache_size) {
                (None, None) => DEFAULT_L2_CACHE_MAX,
                (Some(bytes), _) => bytes.max(l2_slices * slice),
                (None, Some(total)) => total.saturating_sub(refcount).max(l2_slices * slice),
            } as usize,
        })
    }

    /// The bytes of the L2 cache and of the refcount cache, before their
    /// minima are applied.
    fn share(max_l2: u64, min_refcount: u64, request: &OptionRequest) -> Result<(u64, u64)> {
        let OptionRequest {
            cache_size,
            l2_cache_size,
            refcount_cache_size,
            ..
        } = *request;
        let l2_setting = l2_cache_size.unwrap_or(DEFAULT_L2_CACHE_MAX);
        let l2 = l2_setting.min(max_l2);
        let refcount = refcount_cache_size.unwrap_or(0);
        let Some(total) = cache_size else {
            return Ok((l2, refcount));
        };
        if l2_cache_size.is_some() && refcount_cache_size.is_some() {
            return Err(Error::invalid(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ));
        }
        if l2_cache_size.is_some() && l2_setting > total {
            return Err(Error::invalid("l2-cache-size may not exceed cache-size"));
        }
        if refcount > total {
            return Err(Error::invalid(
                "refcount-cache-size may not exceed cache-size",
            ));
        }
        Ok(if l2_cache_size.is_some() {
            (l2, total - l2)
        } else if refcount_cache_size.is_some() {
            (total - refcount, refcount)
        } else if total >= max_l2.saturating_add(min_refcount) {
            (max_l2, total - max_l2)
        } else {
            let refcount = total.min(min_refcount);
            (total - refcount, refcount)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::refcount::RefcountOrder;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn sizes(disk: u64, request: &OptionRequest) -> Result<(usize, usize, usize)> {
        let geometry = Geometry::new(16, 3, RefcountOrder::BITS_16, 3);
        CacheSizes::resolve(&geometry, disk, true, request)
            .map(|c| (c.l2_slices, c.l2_slice_size, c.refcount_blocks))
    }

    fn refusal(request: &OptionRequest) -> String {
        sizes(8 * GIB, request).unwrap_err().to_string()
    }

    /// 64 KiB clusters need 128 KiB of L2 tables for each GiB.
    #[test]
    fn the_l2_cache_covers_the_disk_up_to_its_limit() {
        let none = OptionRequest::default();
        assert_eq!(sizes(8 * GIB, &none).unwrap(), (16, 65536, 4));
        assert_eq!(sizes(256 * GIB, &none).unwrap(), (512, 65536, 4));
        assert_eq!(sizes(257 * GIB, &none).unwrap(), (8192, 4096, 4));
        assert_eq!(sizes(0, &none).unwrap(), (2, 65536, 4));
    }

    #[test]
    fn a_given_size_is_honoured() {
        let request = OptionRequest {
            l2_cache_size: Some(512 * KIB),
            ..Default::default()
        };
        assert_eq!(sizes(8 * GIB, &request).unwrap(), (128, 4096, 4));
        let request = OptionRequest {
            l2_cache_size: Some(512 * KIB),
            l2_cache_entry_size: Some(16 * KIB),
            refcount_cache_size: Some(MIB),
            ..Default::default()
        };
        assert_eq!(sizes(8 * GIB, &request).unwrap(), (32, 16384, 16));
    }

    #[test]
    fn a_total_is_shared() {
        let total = |cache_size, l2_cache_size, refcount_cache_size| {
            let request = OptionRequest {
                cache_size: Some(cache_size),
                l2_cache_size,
                refcount_cache_size,
                ..Default::default()
            };
            sizes(8 * GIB, &request).unwrap()
        };
        // Enough for all: the rest goes to the refcount cache.
        assert_eq!(total(2 * MIB, None, None), (16, 65536, 16));
        // Not enough: the refcount cache gets its least.
        assert_eq!(total(MIB, None, None), (192, 4096, 4));
        assert_eq!(total(100 * KIB, None, None), (2, 4096, 4));
        assert_eq!(total(MIB, Some(512 * KIB), None), (128, 4096, 8));
        assert_eq!(total(MIB, None, Some(512 * KIB)), (128, 4096, 8));
        assert_eq!(total(64 * MIB, None, Some(MIB)), (16, 65536, 16));
    }

    #[test]
    fn contradictions_are_refused() {
        let request = OptionRequest {
            cache_size: Some(MIB),
            l2_cache_size: Some(1),
            refcount_cache_size: Some(1),
            ..Default::default()
        };
        assert!(refusal(&request).ends_with("may not be set at the same time"));
        let request = OptionRequest {
            cache_size: Some(MIB),
            l2_cache_size: Some(2 * MIB),
            ..Default::default()
        };
        assert_eq!(refusal(&request), "l2-cache-size may not exceed cache-size");
        let request = OptionRequest {
            cache_size: Some(MIB),
            refcount_cache_size: Some(2 * MIB),
            ..Default::default()
        };
        assert_eq!(
            refusal(&request),
            "refcount-cache-size may not exceed cache-size"
        );
        for size in [0, 256, 5000, 128 * KIB] {
            let request = OptionRequest {
                l2_cache_entry_size: Some(size),
                ..Default::default()
            };
            assert_eq!(
                refusal(&request),
                "L2 cache entry size must be a power of two between 512 and the cluster size \
                 (65536)"
            );
        }
        let request = OptionRequest {
            refcount_cache_size: Some(1 << 50),
            ..Default::default()
        };
        assert_eq!(refusal(&request), "Refcount cache size too big");
    }
}
