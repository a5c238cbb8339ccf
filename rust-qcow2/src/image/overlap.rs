//! Where metadata is, so that no write hits it by accident.
//!
//! A damaged image may hand out a cluster that is in use as a table. Before
//! anything is written, its range is looked up here; on a hit the image is
//! marked corrupt and the write refused.

use rustc_hash::FxHashMap;

use super::{Image, StateGuard};
use crate::error::Result;
use crate::format::entry::{L1Entry, MetadataKind};
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
        (first..=last).find_map(hit)
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
    /// `ignore`, and marks the image corrupt.
    pub(super) fn ensure_no_overlap(
        &self,
        st: &mut StateGuard<'_, H>,
        ignore: MetadataKind,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.ensure_usable()?;
        let hit = loop {
            match self.overlap_fast(ignore, offset, len) {
                Some(hit) => break hit,
                None => self.make_overlap_map(st),
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

    fn make_overlap_map(&self, st: &StateGuard<'_, H>) {
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
                shared.header.snapshots_offset,
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
        if snapshots != 0 {
            range(snapshots, 1, MetadataKind::SNAPSHOT_TABLE);
        }
        *self.overlap.write() = Some(map);
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
