//! The structures of a qcow2 file and their validation. No I/O.
//!
//! Section names refer to `docs/interop/qcow2.txt` of QEMU. All numbers in a
//! file are big-endian; they are native everywhere outside of this folder.
//!
//! - [`header`]: the header and its feature bits
//! - [`extension`]: header extensions, the feature name table among them
//! - [`geometry`]: what follows from cluster size and disk size, and the limits
//! - [`entry`]: L1 and L2 table entries
//! - `compression`: compressed clusters
//! - [`bitmaps`]: persistent dirty bitmaps
//! - [`refcount`]: refcount blocks of all widths
//! - [`snapshots`]: the snapshot table
//! - [`subclusters`]: extended L2 entries

pub mod bitmaps;
mod compression;
pub mod entry;
pub mod extension;
pub mod geometry;
pub mod header;
pub mod refcount;
pub mod snapshots;
pub mod subclusters;
