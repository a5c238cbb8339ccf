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

    /// Shares the memory of an image above from now on.
    pub(crate) fn join_pool(&self, pool: &Arc<Pool>) {
        self.l2.move_to(pool);
    }

    /// Reads a part of an L2 table. The table may change or go meanwhile; then
    /// those who watch the image have been told, or the entries say nothing.
    pub(crate) fn read_piece(&self, piece: &TablePiece) -> Result<Vec<ClusterEntry>> {
        let unknown = || Ok(vec![UNKNOWN; piece.entries]);
        let geometry = &self.geometry;
        let table = match piece.l1_entry.table() {
            Some(table) if table.is_aligned(geometry.cluster_bits) => table,
            _ => return unknown(),
        };
        let first = geometry.l2_index(piece.guest) as usize;
        let cached = self.cached_slices(piece);
        let mut entries = Vec::new();
        let per_slice = self.l2.slice_size() >> geometry.l2_entry_bits;
        if cached.iter().all(Option::is_some) {
            entries.resize(piece.entries, ClusterEntry::UNALLOCATED);
        } else {
            let offset = table.add((first as u64) << geometry.l2_entry_bits);
            let mut bytes = self.host.aligned(piece.entries << geometry.l2_entry_bits)?;
            self.host.event(Event::L2Load);
            self.host.file().read(offset.0, &mut bytes)?;
            let words = bytes.chunks_exact(8).map(|bytes| {
                let mut word = [0; 8];
                word.copy_from_slice(bytes);
                u64::from_be_bytes(word)
            });
            if geometry.has_subclusters() {
                let second = words.clone().skip(1).step_by(2);
                let pairs = words.step_by(2).zip(second);
                entries.extend(pairs.map(|(a, b)| ClusterEntry::extended(a, b)));
            } else {
                entries.extend(words.map(|word| ClusterEntry::standard(L2Entry(word))));
            }
        }
        // What is cached may be newer than the file.
        if cached.iter().any(Option::is_some) {
            for (entry, index) in entries.iter_mut().zip(first..) {
                if let Some(slice) = &cached[index / per_slice - first / per_slice] {
                    // Who keeps changing it has it told.
                    *entry = slice.try_get(index % per_slice).unwrap_or(UNKNOWN);
                }
            }
        }
        if self.l1.get(piece.l1_index) == piece.l1_entry {
            Ok(entries)
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
