//! How large an image file becomes: `qemu-img measure` and preallocation.

use crate::error::{Error, Result};
use crate::format::bitmaps::entry_size;
use crate::format::geometry::MAX_L1_BYTES;
use crate::format::refcount::RefcountOrder;
use crate::units::{div_up, round_up};

/// Bytes of an L1 entry or of an entry of the refcount table.
const TABLE_ENTRY: u64 = 8;

/// The parameters of an image that decide how large its metadata is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Logarithm of the size of an L2 entry: 3, with subclusters 4.
    pub l2_entry_bits: u32,
    /// Width of the refcounts.
    pub refcount_order: RefcountOrder,
}

/// What the refcounts of a file take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountSpace {
    /// Clusters of refcount blocks.
    pub blocks: u64,
    /// Clusters of the refcount table.
    pub table: u64,
}

impl Layout {
    const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of `entries` entries of `1 << entry_bits` bytes, in whole tables
    /// of one cluster.
    const fn tables(&self, entries: u64, entry_bits: u32) -> u64 {
        round_up(entries << entry_bits, self.cluster_bits)
    }

    /// Checks that a disk of `size` bytes has an L1 table of a size that is
    /// read again.
    ///
    /// # Errors
    /// Where the disk is too large.
    pub fn check_size(&self, size: u64) -> Result<()> {
        let l2_bytes = self.tables(div_up(size, self.cluster_size()), self.l2_entry_bits);
        if (l2_bytes >> self.cluster_bits) * TABLE_ENTRY > MAX_L1_BYTES {
            return Err(Error::invalid(
                "The image size is too large (try using a larger cluster size)",
            ));
        }
        Ok(())
    }

    /// What it takes to count `clusters` clusters and the refcount blocks and
    /// tables themselves. A `generous` table has room for half as much again.
    #[must_use]
    pub const fn refcounts(&self, mut clusters: u64, mut generous: bool) -> RefcountSpace {
        let blocks_per_table_cluster = self.cluster_size() / TABLE_ENTRY;
        let counts_per_block = self.refcount_order.per_bytes(self.cluster_size());
        // The least fixed point: what is added needs counts as well.
        let mut space = RefcountSpace {
            blocks: 0,
            table: 0,
        };
        let mut total = 0;
        loop {
            let blocks = div_up(clusters + space.table + space.blocks, counts_per_block);
            let table = div_up(blocks, blocks_per_table_cluster);
            space = RefcountSpace { blocks, table };
            let sum = clusters + blocks + table;
            if sum == total {
                if !generous {
                    return space;
                }
                clusters += div_up(table, 2);
                generous = false;
                total = 0;
            } else {
                total = sum;
            }
        }
    }

    /// Bytes of an image file whose guest clusters are all allocated.
    #[must_use]
    pub const fn fully_allocated(&self, size: u64) -> u64 {
        let data = round_up(size, self.cluster_bits);
        let l2 = self.tables(data >> self.cluster_bits, self.l2_entry_bits);
        let l1 = self.tables(l2 >> self.cluster_bits, TABLE_ENTRY.ilog2());
        let header = self.cluster_size();
        let counted = header + l1 + l2 + data;
        let refcounts = self.refcounts(counted >> self.cluster_bits, false);
        counted + ((refcounts.blocks + refcounts.table) << self.cluster_bits)
    }
}

/// Bytes of bitmaps, each given by the length of its name and its bytes, with
/// their tables and the directory.
pub fn bitmaps_size(cluster_bits: u32, bitmaps: impl Iterator<Item = (usize, u64)>) -> u64 {
    let mut directory = 0;
    let mut total = 0;
    for (name_len, bytes) in bitmaps {
        let bits = round_up(bytes, cluster_bits);
        total += bits + round_up((bits >> cluster_bits) * TABLE_ENTRY, cluster_bits);
        directory += entry_size(name_len);
    }
    total + round_up(directory, cluster_bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout {
        cluster_bits: 16,
        l2_entry_bits: 3,
        refcount_order: RefcountOrder::BITS_16,
    };

    /// The figures that `qemu-img measure -O qcow2 --size` prints.
    #[test]
    fn sizes_that_users_know() {
        assert_eq!(LAYOUT.fully_allocated(0), 196_608);
        assert_eq!(LAYOUT.fully_allocated(1 << 30), 1_074_135_040);
        assert_eq!(LAYOUT.fully_allocated(2 << 40), 2_199_359_062_016);
        let small = Layout {
            cluster_bits: 9,
            ..LAYOUT
        };
        assert_eq!(small.fully_allocated(1 << 30), 1_095_127_040);
    }

    #[test]
    fn too_large_is_refused() {
        assert!(LAYOUT.check_size(1 << 51).is_ok());
        assert!(LAYOUT.check_size((1 << 51) + 1).is_err());
    }

    #[test]
    fn a_generous_table_counts_its_growth() {
        let plain = LAYOUT.refcounts(1 << 30, false);
        let generous = LAYOUT.refcounts(1 << 30, true);
        assert_eq!(
            plain,
            RefcountSpace {
                blocks: 32770,
                table: 5
            }
        );
        assert!(generous.blocks >= plain.blocks && generous.table >= plain.table);
    }
}
