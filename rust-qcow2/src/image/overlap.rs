//! Where metadata is, so that no write hits it by accident.
//!
//! A damaged image may hand out a cluster that is in use as a table. Before
//! anything is written, its range is looked up here; on a hit the image is
//! marked corrupt and the write refused.

use rustc_hash::FxHashMap;

use super::open::read_table;
use super::{Image, StateGuard};
use crate::error::{Error, Result};
use crate::format::entry::{L1Entry, MetadataKind};
use crate::format::geometry::MAX_L1_BYTES;
use crate::host::Host;
use crate::units::{ClusterIndex, HostOffset};

use super::refcounts::TABLE_OFFSET_MASK;

/// The kinds that a template of the option `overlap-check` stands for.
#[must_use]
pub(super) fn template(name: &str) -> Option<MetadataKind> {
    match name {
        "none" => Some(MetadataKind::empty()),
        "constant" => Some(MetadataKind::CONSTANT),
        "cached" => Some(MetadataKind::CACHED),
        "all" => Some(MetadataKind::ALL),
        _ => None,
    }
}

/// Which clusters hold metadata. Made when it is first needed, so that layers
/// that are never written have none.
#[derive(Default)]
pub(super) struct MetadataMap {
    kinds: FxHashMap<ClusterIndex, MetadataKind>,
    /// L1 tables of snapshots, first and last cluster: sorted, and none touches
    /// another. They may be many, and long.
    inactive_l1: Vec<(u64, u64)>,
}

impl MetadataMap {
    fn add(&mut self, cluster: ClusterIndex, kind: MetadataKind) {
        *self.kinds.entry(cluster).or_insert(MetadataKind::empty()) |= kind;
    }

    fn find(&self, first: u64, last: u64, kinds: MetadataKind) -> Option<MetadataKind> {
        let hit = |cluster: u64| {
            let found = *self.kinds.get(&ClusterIndex(cluster))? & kinds;
            // One name for the message: the lowest bit, the order of checks.
            found.iter().next()
        };
        (first..=last).find_map(hit).or_else(|| {
            let at = self.inactive_l1.partition_point(|(_, end)| *end < first);
            let touched = self
                .inactive_l1
                .get(at)
                .is_some_and(|(start, _)| *start <= last);
            let kind = MetadataKind::INACTIVE_L1;
            (touched && kinds.contains(kind)).then_some(kind)
        })
    }
}

impl<H: Host> Image<H> {
    /// Whether a write of `len` bytes at `offset` hits metadata other than
    /// `ignore`. Without the map (not made yet) the answer is `None`.
    pub(super) fn overlap_fast(
        &self,
        ignore: MetadataKind,
        offset: u64,
        len: u64,
    ) -> Option<Option<MetadataKind>> {
        let kinds = self.shared.read().options.overlap_check & !ignore;
        let overlap = self.overlap.read();
        let map = overlap.as_ref()?;
        if kinds.is_empty() || len == 0 {
            return Some(None);
        }
        let bits = self.geometry.cluster_bits;
        Some(map.find(offset >> bits, (offset + (len - 1)) >> bits, kinds))
    }

    /// Refuses a write of `len` bytes at `offset` that hits metadata other than
    /// `ignore`, and marks the image corrupt. Writes of the header are not
    /// refused: it is where it is, whatever else claims to be there, and a repair
    /// begins with it.
    pub(super) fn ensure_no_overlap(
        &self,
        st: &mut StateGuard<'_, H>,
        ignore: MetadataKind,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.ensure_usable()?;
        if ignore.contains(MetadataKind::MAIN_HEADER) {
            return Ok(());
        }
        let hit = loop {
            match self.overlap_fast(ignore, offset, len) {
                Some(hit) => break hit,
                None => self.make_overlap_map(st)?,
            }
        };
        match hit {
            None => Ok(()),
            Some(kind) => {
                let message = format!(
                    "Preventing invalid write on metadata (overlaps with {})",
                    kind.describe()
                );
                Err(self.corrupt(st, true, Some(offset), Some(len), message))
            }
        }
    }

    fn make_overlap_map(&self, st: &StateGuard<'_, H>) -> Result<()> {
        const INACTIVE_L2: MetadataKind = MetadataKind::INACTIVE_L2;
        let size = self.geometry.cluster_size();
        let mut map = MetadataMap::default();
        let mut range = |offset: u64, len: u64, kind: MetadataKind| {
            if len == 0 {
                return;
            }
            // A damaged table may lie across clusters.
            let last = HostOffset(offset).add(len - 1);
            for cluster in
                self.geometry.cluster_of(HostOffset(offset)).0..=self.geometry.cluster_of(last).0
            {
                map.add(ClusterIndex(cluster), kind);
            }
        };
        range(0, size, MetadataKind::MAIN_HEADER);
        let (l1_offset, snapshots, bitmaps) = {
            let shared = self.shared.read();
            (
                shared.header.l1_table_offset,
                (shared.header.snapshots_offset, shared.snapshots.clone()),
                shared.directory(&self.geometry),
            )
        };
        if let Some(bitmaps) = bitmaps {
            range(
                bitmaps.offset.0,
                bitmaps.size,
                MetadataKind::BITMAP_DIRECTORY,
            );
        }
        if l1_offset != 0 {
            range(l1_offset, self.l1.len() * 8, MetadataKind::ACTIVE_L1);
        }
        for entry in self.l1.to_vec() {
            if let Some(table) = L1Entry(entry).table() {
                range(table.0, size, MetadataKind::ACTIVE_L2);
            }
        }
        let table = st.refcounts.table();
        range(
            st.refcounts.table_offset().0,
            table.len() as u64 * 8,
            MetadataKind::REFCOUNT_TABLE,
        );
        for entry in table {
            if entry & TABLE_OFFSET_MASK != 0 {
                range(
                    entry & TABLE_OFFSET_MASK,
                    size,
                    MetadataKind::REFCOUNT_BLOCK,
                );
            }
        }
        let (table_offset, snapshots) = snapshots;
        range(table_offset, snapshots.bytes, MetadataKind::SNAPSHOT_TABLE);
        // These cost I/O, and are asked for expressly.
        let with_l2 = self.options().overlap_check.contains(INACTIVE_L2);
        let mut inactive_l1 = Vec::new();
        for snapshot in &snapshots.list {
            let l1_size = u64::from(snapshot.l1_size).min(MAX_L1_BYTES / 8);
            if l1_size > 0 {
                let bits = self.geometry.cluster_bits;
                let start = snapshot.l1_table_offset;
                inactive_l1.push((start >> bits, start.saturating_add(l1_size * 8 - 1) >> bits));
            }
            if !with_l2 {
                continue;
            }
            self.validate_snapshot(snapshot)
                .map_err(|error| Error::errno(error.code()))?;
            for entry in read_table(&self.host.file(), snapshot.l1_table_offset, l1_size)? {
                if let Some(table) = L1Entry(entry).table() {
                    range(table.0, size, INACTIVE_L2);
                }
            }
        }
        inactive_l1.sort_unstable();
        map.inactive_l1 = merged(inactive_l1);
        *self.overlap.write() = Some(map);
        Ok(())
    }

    /// Notes that a cluster holds metadata from now on.
    pub(super) fn note_metadata(&self, offset: HostOffset, kind: MetadataKind) {
        if let Some(map) = self.overlap.write().as_mut() {
            map.add(self.geometry.cluster_of(offset), kind);
        }
    }

    /// Notes that a cluster was freed.
    pub(super) fn forget_metadata(&self, offset: HostOffset) {
        let cluster = self.geometry.cluster_of(offset);
        let known = matches!(&*self.overlap.read(), Some(map) if map.kinds.contains_key(&cluster));
        if known {
            if let Some(map) = self.overlap.write().as_mut() {
                map.kinds.remove(&cluster);
            }
        }
    }

    /// Forgets the map; it is made again from the tables in force.
    pub(super) fn forget_overlap_map(&self) {
        *self.overlap.write() = None;
    }
}

/// Sorted ranges, with those that touch each other made one.
fn merged(ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inactive_tables_are_found() {
        let map = MetadataMap {
            inactive_l1: merged(vec![(3, 5), (4, 4), (6, 8), (20, 20)]),
            ..Default::default()
        };
        assert_eq!(map.inactive_l1, [(3, 8), (20, 20)]);
        let found = |first, last| map.find(first, last, MetadataKind::CACHED).is_some();
        assert!(!found(0, 2) && found(0, 3) && found(8, 9) && !found(9, 19));
        assert!(found(5, 6) && found(20, 20) && !found(21, 30));
        assert!(map.find(3, 3, MetadataKind::CONSTANT).is_none());
    }
}
