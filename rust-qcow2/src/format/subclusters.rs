//! Extended L2 entries: clusters in 32 parts (section "Extended L2 Entries").

use super::entry::{L2Entry, Mapping};
use crate::units::HostOffset;

/// Logarithm of the number of subclusters in a cluster.
pub const SUBCLUSTER_COUNT_BITS: u32 = 5;
/// Subclusters in a cluster.
pub const SUBCLUSTERS: u32 = 1 << SUBCLUSTER_COUNT_BITS;

/// The bitmap of an extended entry: bit `i` says that subcluster `i` has data
/// in the host cluster, bit `32 + i` that it reads as zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters(pub u64);

impl Subclusters {
    /// All subclusters are as in the backing file.
    pub const NONE: Self = Self(0);
    /// All subclusters have data.
    pub const ALL_DATA: Self = Self(0xffff_ffff);
    /// All subclusters read as zeroes.
    pub const ALL_ZERO: Self = Self(0xffff_ffff << SUBCLUSTERS);

    /// Which subclusters have data.
    #[inline]
    #[must_use]
    pub const fn data(self) -> u32 {
        self.0 as u32
    }

    /// Which subclusters read as zeroes.
    #[inline]
    #[must_use]
    pub const fn zeroes(self) -> u32 {
        (self.0 >> SUBCLUSTERS) as u32
    }

    /// Bits `first` to `end`.
    const fn range(first: u32, end: u32) -> u64 {
        (1 << end) - (1 << first)
    }

    /// The same with data in the subclusters `first` to `end`.
    #[must_use]
    pub const fn with_data(self, first: u32, end: u32) -> Self {
        let range = Self::range(first, end);
        Self((self.0 | range) & !(range << SUBCLUSTERS))
    }

    /// The same with zeroes in the subclusters `first` to `end`.
    #[must_use]
    pub const fn with_zeroes(self, first: u32, end: u32) -> Self {
        let range = Self::range(first, end);
        Self((self.0 | (range << SUBCLUSTERS)) & !range)
    }

    /// The same, with nothing but zeroes: what had data has none.
    #[must_use]
    pub const fn only_zeroes(self) -> Self {
        Self(self.0 & Self::ALL_ZERO.0)
    }

    /// Whether the subclusters `first` to `end` all have data.
    #[must_use]
    pub const fn have_data(self, first: u32, end: u32) -> bool {
        let range = Self::range(first, end);
        self.0 & range == range
    }

    /// Whether any of the subclusters `first` to `end` has data.
    #[must_use]
    pub const fn have_any_data(self, first: u32, end: u32) -> bool {
        self.0 & Self::range(first, end) != 0
    }
}

/// An L2 entry of any kind: that of a standard image has no subclusters set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterEntry {
    /// The entry, or the first half of an extended one. The latter has no zero
    /// flag: the bit is reserved there, and ignored.
    pub entry: L2Entry,
    /// The second half of an extended entry.
    pub subclusters: Subclusters,
}

impl ClusterEntry {
    /// The entry of a cluster that is not in the image.
    pub const UNALLOCATED: Self = Self {
        entry: L2Entry::UNALLOCATED,
        subclusters: Subclusters::NONE,
    };

    /// An entry of a standard image.
    #[inline]
    #[must_use]
    pub const fn standard(entry: L2Entry) -> Self {
        Self {
            entry,
            subclusters: Subclusters::NONE,
        }
    }

    /// An extended entry from its words.
    #[inline]
    #[must_use]
    pub const fn extended(first: u64, second: u64) -> Self {
        let entry = L2Entry(first);
        let zero_flag = if entry.is_compressed() {
            0
        } else {
            L2Entry::ZERO_PLAIN.0
        };
        Self {
            entry: L2Entry(first & !zero_flag),
            subclusters: Subclusters(second),
        }
    }

    /// Whether an extended entry, whose first half says `mapping`, contradicts
    /// itself. The bitmap of compressed clusters has no meaning.
    #[inline]
    #[must_use]
    pub const fn contradicts_itself(self, mapping: Mapping) -> bool {
        match mapping {
            Mapping::Compressed => false,
            Mapping::Unallocated => self.subclusters.data() != 0,
            _ => self.subclusters.data() & self.subclusters.zeroes() != 0,
        }
    }

    /// What an extended entry, whose first half says `mapping`, says of subcluster `index`, `within` bytes after
    /// the begin of the cluster, and how many subclusters from there on are of
    /// that kind.
    #[inline]
    #[must_use]
    pub fn part(self, mapping: Mapping, index: u32, within: u64) -> (Part, u32) {
        let rest = SUBCLUSTERS - index;
        let data = self.subclusters.data() >> index;
        let zeroes = self.subclusters.zeroes() >> index;
        let host = match mapping {
            Mapping::Compressed => return (Part::plain(Mapping::Compressed), rest),
            Mapping::Normal(host) => Some(host.add(within)),
            _ => None,
        };
        let (mapping, count) = if zeroes & 1 != 0 {
            let mapping = host.map_or(Mapping::ZeroPlain, Mapping::ZeroAllocated);
            (mapping, zeroes.trailing_ones())
        } else if data & 1 != 0 {
            // Data without a place are a contradiction.
            let mapping = host.map_or(Mapping::Unallocated, Mapping::Normal);
            (mapping, data.trailing_ones())
        } else {
            (Mapping::Unallocated, (data | zeroes).trailing_zeros())
        };
        let reserved = host.filter(|_| mapping == Mapping::Unallocated);
        (Part { mapping, reserved }, count.min(rest))
    }
}

/// What a part of a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its kind and place.
    pub mapping: Mapping,
    /// The place kept for it, where it is not allocated itself.
    pub reserved: Option<HostOffset>,
}

impl Part {
    /// A part without a place of its own.
    #[inline]
    #[must_use]
    pub const fn plain(mapping: Mapping) -> Self {
        Self {
            mapping,
            reserved: None,
        }
    }

    /// The part that continues this one `step` bytes further on.
    #[inline]
    #[must_use]
    pub fn plus(self, step: u64) -> Self {
        let mapping = match self.mapping {
            Mapping::Normal(at) => Mapping::Normal(at.add(step)),
            Mapping::ZeroAllocated(at) => Mapping::ZeroAllocated(at.add(step)),
            other => other,
        };
        let reserved = self.reserved.map(|at| at.add(step));
        Self { mapping, reserved }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: HostOffset = HostOffset(0x50000);

    fn contradicts(entry: ClusterEntry) -> bool {
        entry.contradicts_itself(entry.entry.mapping())
    }

    #[test]
    fn ranges() {
        let all = Subclusters::NONE.with_data(0, 32);
        assert_eq!(all, Subclusters::ALL_DATA);
        assert_eq!(all.with_zeroes(0, 32), Subclusters::ALL_ZERO);
        let mixed = all.with_zeroes(4, 6);
        assert_eq!((mixed.data(), mixed.zeroes()), (0xffff_ffcf, 0x30));
        assert!(mixed.have_data(6, 32) && !mixed.have_data(5, 32));
        assert_eq!(mixed.only_zeroes(), Subclusters(0x30 << 32));
        assert_eq!(mixed.with_data(4, 6), all);
    }

    #[test]
    fn parts_of_a_cluster_with_a_place() {
        let entry = ClusterEntry {
            entry: L2Entry::normal(AT),
            subclusters: Subclusters::NONE.with_data(1, 3).with_zeroes(3, 32),
        };
        let (first, count) = entry.part(entry.entry.mapping(), 0, 0);
        let nothing = Part {
            mapping: Mapping::Unallocated,
            reserved: Some(AT),
        };
        assert_eq!((first, count), (nothing, 1));
        let data = Part::plain(Mapping::Normal(AT.add(0x1000)));
        assert_eq!(entry.part(entry.entry.mapping(), 2, 0x1000), (data, 1));
        let zero = Part::plain(Mapping::ZeroAllocated(AT.add(0x1800)));
        assert_eq!(entry.part(entry.entry.mapping(), 3, 0x1800), (zero, 29));
        assert!(!contradicts(entry));
    }

    #[test]
    fn parts_of_a_cluster_without_a_place() {
        let entry = ClusterEntry::extended(1, 1 << 33);
        assert_eq!(entry.entry, L2Entry::UNALLOCATED);
        assert_eq!(
            entry.part(entry.entry.mapping(), 0, 0),
            (Part::plain(Mapping::Unallocated), 1)
        );
        assert_eq!(
            entry.part(entry.entry.mapping(), 1, 0x800),
            (Part::plain(Mapping::ZeroPlain), 1)
        );
        assert_eq!(
            entry.part(entry.entry.mapping(), 2, 0),
            (Part::plain(Mapping::Unallocated), 30)
        );
    }

    #[test]
    fn contradictions() {
        assert!(contradicts(ClusterEntry::extended(0, 1)));
        assert!(!contradicts(ClusterEntry::extended(0, 1 << 32)));
        let both = (1 << 7) | (1 << 39);
        assert!(contradicts(ClusterEntry::extended(AT.0, both)));
        assert!(!contradicts(ClusterEntry::extended(1 << 62, both)));
    }
}
