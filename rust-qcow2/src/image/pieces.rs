//! What an index of a chain asks a layer for: parts of its tables, read past
//! the layer's own cache and lock.

use std::sync::Arc;

use super::Image;
use super::map::is_bad;
use crate::cache::l2::L2Slice;
use crate::cache::pool::Pool;
use crate::error::Result;
use crate::format::entry::{L1Entry, L2Entry};
use crate::format::subclusters::ClusterEntry;
use crate::host::{Event, File, Host};
use crate::units::GuestOffset;

/// A part of an L2 table.
pub(crate) struct TablePiece {
    /// The L1 entry that refers to the table.
    pub(crate) l1_index: u64,
    /// That entry as it was seen.
    pub(crate) l1_entry: L1Entry,
    /// First guest byte of the part.
    pub(crate) guest: GuestOffset,
    /// Number of entries.
    pub(crate) entries: usize,
}

/// An entry of a table, and its number in a part of the table.
pub(crate) type NumberedEntry = (u32, ClusterEntry);

/// An entry that nobody can use without asking the image.
const UNKNOWN: ClusterEntry = ClusterEntry::standard(L2Entry(1 << 62));

impl<H: Host> Image<H> {
    /// An entry of the L1 table.
    #[inline]
    pub(crate) fn l1_entry(&self, index: u64) -> L1Entry {
        self.l1.get(index)
    }

    /// Whether the entry of the guest cluster at `cluster` breaks a rule of the
    /// format.
    #[inline]
    pub(crate) fn is_bad_entry(&self, entry: ClusterEntry, cluster: GuestOffset) -> bool {
        is_bad(&self.geometry, entry, cluster)
    }

    /// The memory that the image and those below it share.
    pub(crate) fn pool(&self) -> Arc<Pool> {
        self.l2.pool()
    }

    /// The same for an image that nobody is on top of, be it that somebody was:
    /// as much as its own options allow.
    pub(crate) fn own_pool_on_top(&self) -> Arc<Pool> {
        self.l2.move_to(&self.own_pool);
        Arc::clone(&self.own_pool)
    }

    /// Shares the memory of an image above from now on.
    pub(crate) fn join_pool(&self, pool: &Arc<Pool>) {
        self.l2.move_to(pool);
    }

    /// Reads a part of an L2 table: the entries that are not empty, in order,
    /// with their numbers in the part. `memory` is what a part was read into
    /// before, and is left for the next one.
    ///
    /// The table may change or go meanwhile; then those who watch the image
    /// have been told, or the entries say nothing. They say nothing either where
    /// the table cannot be read: whoever asks the image gets the error, and
    /// later perhaps the answer.
    pub(crate) fn read_piece(
        &self,
        piece: &TablePiece,
        memory: &mut Option<H::Aligned>,
    ) -> Result<Vec<NumberedEntry>> {
        let unknown = || Ok((0..piece.entries as u32).map(|i| (i, UNKNOWN)).collect());
        let geometry = &self.geometry;
        let table = match piece.l1_entry.table() {
            Some(table) if table.is_aligned(geometry.cluster_bits) => table,
            _ => return unknown(),
        };
        let bits = geometry.l2_entry_bits;
        let first = geometry.l2_index(piece.guest) as usize;
        // What is cached may be newer than the file.
        let cached = self.cached_slices(piece);
        let len = piece.entries << bits;
        if cached.iter().any(Option::is_none) {
            if memory.as_ref().is_none_or(|memory| memory.len() < len) {
                *memory = Some(self.host.scratch(len)?);
            }
            if let Some(memory) = memory {
                self.host.event(Event::L2Load);
                let offset = table.add((first as u64) << bits);
                if self.host.file().read(offset.0, &mut memory[..len]).is_err() {
                    // Only who needs this layer is to hear of that.
                    return unknown();
                }
            }
        }
        let per_slice = self.l2.slice_size() >> bits;
        let mut found = Vec::new();
        let mut from = 0;
        for (slice, number) in cached.iter().zip(first / per_slice + 1..) {
            let to = (number * per_slice - first).min(piece.entries);
            match (slice, memory.as_ref()) {
                (Some(slice), _) => found.extend((from..to).filter_map(|i| {
                    // Who keeps changing it has it told.
                    let entry = slice.try_get((first + i) % per_slice).unwrap_or(UNKNOWN);
                    (entry != ClusterEntry::UNALLOCATED).then_some((i as u32, entry))
                })),
                (None, Some(memory)) => {
                    let bytes = &memory[from << bits..to << bits];
                    collect_entries(bytes, geometry.has_subclusters(), from as u32, &mut found);
                }
                (None, None) => {}
            }
            from = to;
        }
        if self.l1.get(piece.l1_index) == piece.l1_entry {
            Ok(found)
        } else {
            unknown()
        }
    }

    /// The slices of a part that are in the cache.
    fn cached_slices(&self, piece: &TablePiece) -> Vec<Option<Arc<L2Slice>>> {
        let Some(table) = piece.l1_entry.table() else {
            return Vec::new();
        };
        let bits = self.geometry.l2_entry_bits;
        let per_slice = self.l2.slice_size() >> bits;
        let first = self.geometry.l2_index(piece.guest) as usize;
        let last = first + piece.entries - 1;
        (first / per_slice..=last / per_slice)
            .map(|slice| {
                self.l2
                    .peek(table.add(((slice * per_slice) as u64) << bits))
            })
            .collect()
    }
}

/// Adds the entries of a piece of a table that are not empty, the first of
/// which has the number `from`. Nearly all of the tables of a long chain is
/// empty: that is passed over in blocks.
fn collect_entries(bytes: &[u8], extended: bool, from: u32, found: &mut Vec<NumberedEntry>) {
    const EMPTY: [u8; 512] = [0; 512];
    let entry_bytes = if extended { 16 } else { 8 };
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
    for (block, number) in bytes
        .chunks(EMPTY.len())
        .zip((from..).step_by(EMPTY.len() / entry_bytes))
    {
        if *block == EMPTY[..block.len()] {
            continue;
        }
        for (bytes, number) in block.chunks_exact(entry_bytes).zip(number..) {
            let entry = if extended {
                ClusterEntry::extended(word(&bytes[..8]), word(&bytes[8..]))
            } else {
                ClusterEntry::standard(L2Entry(word(bytes)))
            };
            if entry != ClusterEntry::UNALLOCATED {
                found.push((number, entry));
            }
        }
    }
}
