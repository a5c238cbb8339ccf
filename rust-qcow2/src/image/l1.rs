//! The L1 table in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;

use crate::format::entry::L1Entry;

/// The L1 table in use.
///
/// It is looked up without a lock. Entries are atomics; the table is exchanged
/// as a whole when it becomes longer or shorter. A layer of a long chain often
/// has few L2 tables, and nobody changes it: its table is kept as a list of
/// the entries that are not empty.
///
/// Entries are loaded and stored in the one order that all threads agree on, as
/// those of L2 slices are: [`inflight`](super::inflight) says why.
pub(super) struct L1Table(ArcSwap<Table>);

enum Table {
    Full(Box<[AtomicU64]>),
    Sparse {
        len: u64,
        /// Index and entry, in order.
        entries: Box<[(u32, u64)]>,
    },
}

impl Table {
    fn full(entries: impl IntoIterator<Item = u64>) -> Arc<Self> {
        Arc::new(Self::Full(
            entries.into_iter().map(AtomicU64::new).collect(),
        ))
    }

    fn len(&self) -> u64 {
        match self {
            Self::Full(entries) => entries.len() as u64,
            Self::Sparse { len, .. } => *len,
        }
    }

    fn get(&self, index: u64) -> u64 {
        match self {
            Self::Full(entries) => {
                let index = usize::try_from(index).ok();
                let entry = index.and_then(|index| entries.get(index));
                entry.map_or(0, |entry| entry.load(Ordering::SeqCst))
            }
            Self::Sparse { entries, .. } => {
                let at = entries.binary_search_by_key(&index, |(index, _)| u64::from(*index));
                at.map_or(0, |at| entries[at].1)
            }
        }
    }
}

impl L1Table {
    pub(super) fn new(entries: impl IntoIterator<Item = u64>) -> Self {
        Self(ArcSwap::new(Table::full(entries)))
    }

    /// Number of entries.
    pub(super) fn len(&self) -> u64 {
        self.0.load().len()
    }

    /// An entry; one that is beyond the end of the table is empty.
    #[inline]
    pub(super) fn get(&self, index: u64) -> L1Entry {
        L1Entry(self.0.load().get(index))
    }

    /// Changes an entry that exists. The caller holds the metadata lock.
    pub(super) fn set(&self, index: u64, entry: L1Entry) {
        self.make_changeable();
        if let Table::Full(entries) = &**self.0.load() {
            entries[index as usize].store(entry.0, Ordering::SeqCst);
        }
    }

    /// All entries.
    pub(super) fn to_vec(&self) -> Vec<u64> {
        let table = self.0.load();
        match &**table {
            Table::Full(entries) => {
                let entries = entries.iter();
                entries.map(|entry| entry.load(Ordering::Relaxed)).collect()
            }
            Table::Sparse { len, entries } => {
                let mut all = vec![0; *len as usize];
                for (index, entry) in entries {
                    all[*index as usize] = *entry;
                }
                all
            }
        }
    }

    /// Exchanges the whole table.
    pub(super) fn replace(&self, entries: impl IntoIterator<Item = u64>) {
        self.0.store(Table::full(entries));
    }

    /// Makes the table as small as it gets, for an image that is only read.
    pub(super) fn compact(&self) {
        let all = self.to_vec();
        let used = all.iter().filter(|entry| **entry != 0).count();
        if used * size_of::<(u32, u64)>() >= all.len() * size_of::<u64>() {
            return;
        }
        let entries = (0..).zip(&all).filter(|(_, entry)| **entry != 0);
        self.0.store(Arc::new(Table::Sparse {
            len: all.len() as u64,
            entries: entries.map(|(index, entry)| (index, *entry)).collect(),
        }));
    }

    /// Undoes [`L1Table::compact`].
    fn make_changeable(&self) {
        if matches!(&**self.0.load(), Table::Sparse { .. }) {
            self.replace(self.to_vec());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compact_tables_say_the_same() {
        let mut all = vec![0; 1000];
        all[3] = 0x30000;
        all[999] = 0x50000;
        let table = L1Table::new(all.clone());
        table.compact();
        assert!(matches!(&**table.0.load(), Table::Sparse { .. }));
        assert_eq!(table.len(), 1000);
        assert_eq!(table.to_vec(), all);
        for index in [0, 3, 4, 998, 999, 1000, u64::MAX] {
            let expected = all.get(index as usize).copied().unwrap_or(0);
            assert_eq!(table.get(index).0, expected);
        }
        table.set(4, L1Entry(0x40000));
        all[4] = 0x40000;
        assert_eq!(table.to_vec(), all);
    }
}
