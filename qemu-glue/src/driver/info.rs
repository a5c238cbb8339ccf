//! What the block layer and the user ask about an image.

use std::ffi::{CStr, CString, c_int};
use std::ptr;

use rust_qcow2::chain::stats::ChainStatistics;
use rust_qcow2::format::bitmaps::{Bitmap, BitmapFlags};
use rust_qcow2::format::header::CompressionType;
use rust_qcow2::image::{Image, ImageInfo};

use super::io::file_has_zero_init;
use crate::coroutine;
use crate::error::{self, ErrorPtr};
use crate::host::Qemu;
use crate::node::{Access, Node, request};
use crate::panic::contain;
use crate::sys;

pub(super) unsafe extern "C" fn refresh_limits(bs: *mut sys::BlockDriverState, _errp: ErrorPtr) {
    contain("refresh_limits", (), || {
        // SAFETY: a callback of the driver for `bs`, which owns the limits.
        unsafe {
            if let Some(node) = Node::of(bs) {
                let geometry = node.image().geometry();
                if node.image().encryption().is_some() {
                    // What is encrypted as a unit.
                    (*bs).bl.request_alignment = sys::BDRV_SECTOR_SIZE;
                }
                (*bs).bl.pwrite_zeroes_alignment = 1 << geometry.subcluster_bits();
                (*bs).bl.pdiscard_alignment = geometry.cluster_size() as u32;
            }
        }
    });
}

/// A new image reads as zeroes unless space was reserved in a file that does
/// not begin as zeroes.
pub(super) unsafe extern "C" fn has_zero_init(bs: *mut sys::BlockDriverState) -> c_int {
    contain("has_zero_init", 0, || {
        // SAFETY: a callback of the driver for `bs`.
        unsafe {
            match Node::of(bs) {
                // Zeroes in the file are something else for the guest.
                Some(node) if node.image().encryption().is_some() => {
                    c_int::from(!node.image().begins_with_table())
                }
                Some(node) if !node.image().begins_with_table() => 1,
                _ => file_has_zero_init(bs),
            }
        }
    })
}

pub(super) unsafe extern "C" fn get_info(
    bs: *mut sys::BlockDriverState,
    info: *mut sys::BlockDriverInfo,
) -> c_int {
    // SAFETY: a callback of the driver for `bs`; QEMU passes a place for the
    // answer.
    unsafe {
        request(bs, Access::Read, |image| {
            let known = image.info();
            (*info).cluster_size = known.cluster_size as c_int;
            (*info).subcluster_size = known.subcluster_size as c_int;
            (*info).vm_state_offset = known.vm_state_offset as i64;
            (*info).is_dirty = known.dirty;
            Ok(())
        })
    }
}

pub(super) unsafe extern "C" fn get_specific_info(
    bs: *mut sys::BlockDriverState,
    errp: ErrorPtr,
) -> *mut sys::ImageInfoSpecific {
    contain("get_specific_info", ptr::null_mut(), || {
        // SAFETY: a callback of the driver for `bs`; its name is a C string.
        unsafe {
            let Some(node) = Node::of(bs) else {
                return ptr::null_mut();
            };
            let name = CStr::from_ptr((*(*bs).drv).format_name);
            let image = node.image();
            let bitmaps = if image.has_bitmaps() {
                coroutine::run(bs, || node.serve(Access::Read, Image::bitmaps))
            } else {
                Ok(Vec::new())
            };
            let bitmaps = match bitmaps {
                Ok(bitmaps) => bitmaps,
                Err(error) => {
                    error::set(errp, &error, "Could not read the bitmap directory");
                    return ptr::null_mut();
                }
            };
            let encryption = match image.host().cipher() {
                Some(cipher) => {
                    let info = encryption_info(cipher.info(errp));
                    if info.is_null() {
                        return ptr::null_mut();
                    }
                    info
                }
                None => ptr::null_mut(),
            };
            let info = specific_info(&image.info(), &bitmaps, kind(name));
            (*(*info).u.qcow2.data).encrypt = encryption;
            if (*info).type_ == sys::IMAGE_INFO_SPECIFIC_KIND_RQCOW2 {
                (*(*info).u.rqcow2.data).chain = chain_info(bs, image);
            }
            info
        }
    })
}

/// What an encryption tells, in the form for qcow2. Takes `info`, which may be
/// null.
///
/// # Safety
/// `info` is QEMU's.
unsafe fn encryption_info(
    info: *mut sys::QCryptoBlockInfo,
) -> *mut sys::ImageInfoSpecificQCow2Encryption {
    if info.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: promised by the caller; what the branch refers to moves from one
    // structure to the other.
    unsafe {
        let result = zeroed::<sys::ImageInfoSpecificQCow2Encryption>();
        if (*info).format == sys::QCRYPTO_BLOCK_FORMAT_LUKS {
            (*result).format = sys::BLOCKDEV_QCOW2_ENCRYPTION_FORMAT_LUKS;
            (*result).u.luks = (*info).u.luks;
        } else {
            (*result).format = sys::BLOCKDEV_QCOW2_ENCRYPTION_FORMAT_AES;
        }
        (*info).u = Default::default();
        sys::qapi_free_QCryptoBlockInfo(info);
        result
    }
}

/// The chain below a node that is the top of it; null for a layer of one, and
/// where nothing is below.
///
/// # Safety
/// Called in a callback of the driver for `bs`, whose image this is, under the
/// graph lock.
unsafe fn chain_info(
    bs: *mut sys::BlockDriverState,
    image: &Image<Qemu>,
) -> *mut sys::ImageInfoSpecificRqcow2Chain {
    // SAFETY: nodes that are linked live under the graph lock, the layers of a
    // chain among them; names are C strings. Zeroes are valid for C structures.
    unsafe {
        if (*bs).backing.is_null() || Node::is_layer(bs) {
            return ptr::null_mut();
        }
        let (count, lowest) = image.layers_below();
        let lowest = lowest.map_or(bs, |layer| layer.host().node());
        let result = zeroed::<sys::ImageInfoSpecificRqcow2Chain>();
        (*result).layers = count + 1;
        (*result).lowest = sys::g_strdup((&raw const (*(*(*lowest).file).bs).filename).cast());
        let link = (*lowest).backing;
        if !link.is_null() {
            let driver = (*(*link).bs).drv;
            if !driver.is_null() {
                (*result).below = sys::g_strdup((*driver).format_name);
            }
        }
        result
    }
}

/// How QMP names what follows, for a driver of that name.
fn kind(name: &CStr) -> sys::ImageInfoSpecificKind {
    if name == super::NAME {
        sys::IMAGE_INFO_SPECIFIC_KIND_RQCOW2
    } else {
        sys::IMAGE_INFO_SPECIFIC_KIND_QCOW2
    }
}

/// A zeroed structure that QEMU will free.
///
/// # Safety
/// A `T` of zero bytes is valid.
unsafe fn zeroed<T>() -> *mut T {
    // SAFETY: g_malloc0() aborts rather than return null.
    unsafe { sys::g_malloc0(size_of::<T>() as sys::gsize).cast() }
}

/// What the driver counts, for `query-blockstats`.
pub(super) unsafe extern "C" fn get_specific_stats(
    bs: *mut sys::BlockDriverState,
) -> *mut sys::BlockStatsSpecific {
    contain("get_specific_stats", ptr::null_mut(), || {
        // SAFETY: a callback of the driver for `bs`, under the graph lock.
        let Some(node) = (unsafe { Node::of(bs) }) else {
            return ptr::null_mut();
        };
        specific_stats(&node.image().chain_statistics())
    })
}

fn specific_stats(statistics: &ChainStatistics) -> *mut sys::BlockStatsSpecific {
    // SAFETY: zeroes are valid for C structures; what is filled in is owned by
    // them. The structure of a branch is part of the union.
    unsafe {
        let result = zeroed::<sys::BlockStatsSpecific>();
        (*result).driver = sys::BLOCKDEV_DRIVER_RQCOW2;
        let data = &raw mut (*result).u.rqcow2;
        (*data).layers = statistics.layers;
        (*data).index_bytes = statistics.index_bytes;
        (*data).cache_bytes = statistics.cache_bytes;
        (*data).cache_limit = statistics.cache_limit;
        (*data).hits = statistics.hits;
        (*data).misses = statistics.misses;
        (*data).merged_slices = statistics.merged_slices;
        (*data).table_reads = statistics.table_reads;
        (*data).zero_reads = statistics.zero_reads;
        (*data).below_reads = statistics.below_reads;
        for count in statistics.reads_by_depth.iter().rev() {
            let element = zeroed::<sys::uint64List>();
            (*element).value = *count;
            (*element).next = (*data).reads_by_depth;
            (*data).reads_by_depth = element;
        }
        result
    }
}

/// Bitmaps as QMP lists them.
fn bitmap_list(bitmaps: &[Bitmap]) -> *mut sys::Qcow2BitmapInfoList {
    const FLAGS: [(BitmapFlags, sys::Qcow2BitmapInfoFlags); 2] = [
        (BitmapFlags::IN_USE, sys::QCOW2_BITMAP_INFO_FLAGS_IN_USE),
        (BitmapFlags::AUTO, sys::QCOW2_BITMAP_INFO_FLAGS_AUTO),
    ];
    let mut list = ptr::null_mut();
    for bitmap in bitmaps.iter().rev() {
        let name = CString::new(bitmap.name.as_slice()).unwrap_or_default();
        // SAFETY: zeroes are valid for C structures; what is filled in is owned
        // by them.
        unsafe {
            let info = zeroed::<sys::Qcow2BitmapInfo>();
            (*info).name = sys::g_strdup(name.as_ptr());
            (*info).granularity = 1 << bitmap.granularity_bits;
            for (_, flag) in FLAGS
                .iter()
                .rev()
                .filter(|flag| bitmap.flags.contains(flag.0))
            {
                let element = zeroed::<sys::Qcow2BitmapInfoFlagsList>();
                (*element).value = *flag;
                (*element).next = (*info).flags;
                (*info).flags = element;
            }
            let element = zeroed::<sys::Qcow2BitmapInfoList>();
            (*element).value = info;
            (*element).next = list;
            list = element;
        }
    }
    list
}

fn specific_info(
    info: &ImageInfo,
    bitmaps: &[Bitmap],
    kind: sys::ImageInfoSpecificKind,
) -> *mut sys::ImageInfoSpecific {
    // SAFETY: zeroes are valid for C structures; what is filled in is owned by
    // them. The variant of this driver begins with that of qcow2.
    unsafe {
        let result = zeroed::<sys::ImageInfoSpecific>();
        let data: *mut sys::ImageInfoSpecificQCow2 = if kind == sys::IMAGE_INFO_SPECIFIC_KIND_RQCOW2
        {
            zeroed::<sys::ImageInfoSpecificRqcow2>().cast()
        } else {
            zeroed()
        };
        (*result).type_ = kind;
        (*result).u.qcow2.data = data;
        (*data).refcount_bits = i64::from(info.refcount_bits);
        if info.version < 3 {
            (*data).compat = sys::g_strdup(c"0.10".as_ptr());
            return result;
        }
        (*data).compat = sys::g_strdup(c"1.1".as_ptr());
        (*data).has_lazy_refcounts = true;
        (*data).lazy_refcounts = info.lazy_refcounts;
        (*data).has_corrupt = true;
        (*data).corrupt = info.corrupt;
        (*data).has_extended_l2 = true;
        (*data).extended_l2 = info.extended_l2;
        (*data).bitmaps = bitmap_list(bitmaps);
        (*data).has_bitmaps = !bitmaps.is_empty();
        if let Some(name) = &info.data_file {
            (*data).data_file = sys::g_strdup(crate::error::c_text(name).as_ptr());
        }
        (*data).has_data_file_raw = info.external_data;
        (*data).data_file_raw = info.raw_data_file;
        (*data).compression_type = match info.compression {
            CompressionType::Zlib => sys::QCOW2_COMPRESSION_TYPE_ZLIB,
            CompressionType::Zstd => sys::QCOW2_COMPRESSION_TYPE_ZSTD,
        };
        result
    }
}
