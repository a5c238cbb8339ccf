//! One entry of the index: where some guest bytes are, in 64 bits.
//!
//! | bits | meaning |
//! |---|---|
//! | 62, 63 | kind: 0 data, 1 zeroes, 2 below the last layer, 3 ask the layer |
//! | 46 to 61 | number of the layer, counted from the lowest one |
//! | 0 to 45 | for data: the place in the layer's file, in units of 512 bytes |

use crate::units::HostOffset;

const KIND_SHIFT: u32 = 62;
const LAYER_SHIFT: u32 = 46;
const LAYER_MASK: u64 = 0xffff;
const SECTOR_MASK: u64 = (1 << LAYER_SHIFT) - 1;
const SECTOR_BITS: u32 = 9;

/// Chains longer than this are walked rather than indexed.
pub(super) const MAX_LAYERS: usize = 0xffff;

/// A packed [`Resolved`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u64);

/// Where the bytes of one index cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resolved {
    /// In the file of a layer, at this place.
    Data(usize, HostOffset),
    /// They are zeroes, and this layer says so.
    Zero(usize),
    /// No layer has them.
    Below,
    /// This layer has them, in a way that the index does not know (compressed,
    /// cut by the end of the layer's disk, damaged).
    Ask(usize),
}

impl Resolved {
    /// The answer for the lowest `layers` > 0 layers alone: where one above
    /// them has decided, the highest of them has to be asked.
    #[inline]
    pub(super) fn below(self, layers: usize) -> Self {
        match self {
            Self::Data(layer, _) | Self::Zero(layer) | Self::Ask(layer) if layer >= layers => {
                Self::Ask(layers - 1)
            }
            other => other,
        }
    }
}

impl Entry {
    /// Not known yet. No resolved entry looks like this.
    pub(super) const UNDECIDED: Self = Self(u64::MAX);
    const BELOW: Self = Self(2 << KIND_SHIFT);

    /// Packs an entry; data that lie too far out for it are left to the layer.
    #[inline]
    pub(super) fn pack(resolved: Resolved) -> Self {
        let (kind, layer, sector) = match resolved {
            Resolved::Data(layer, host) => {
                let sector = host.0 >> SECTOR_BITS;
                if sector > SECTOR_MASK || host.within(SECTOR_BITS) != 0 {
                    (3, layer, 0)
                } else {
                    (0, layer, sector)
                }
            }
            Resolved::Zero(layer) => (1, layer, 0),
            Resolved::Below => return Self::BELOW,
            Resolved::Ask(layer) => (3, layer, 0),
        };
        debug_assert!(layer < MAX_LAYERS);
        Self((kind << KIND_SHIFT) | ((layer as u64 & LAYER_MASK) << LAYER_SHIFT) | sector)
    }

    /// The other way round.
    #[inline]
    pub(super) fn unpack(self) -> Resolved {
        let layer = ((self.0 >> LAYER_SHIFT) & LAYER_MASK) as usize;
        match self.0 >> KIND_SHIFT {
            0 => Resolved::Data(layer, HostOffset((self.0 & SECTOR_MASK) << SECTOR_BITS)),
            1 => Resolved::Zero(layer),
            2 => Resolved::Below,
            _ => Resolved::Ask(layer),
        }
    }

    /// The entry that continues this one `step` bytes further on.
    #[inline]
    pub(super) fn plus(self, step: u64) -> Self {
        if self.0 >> KIND_SHIFT == 0 {
            // A carry into the layer number gives an entry that cannot be
            // equal to a good one of this layer; it is only compared.
            Self(self.0.wrapping_add(step >> SECTOR_BITS))
        } else {
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_reversible() {
        for resolved in [
            Resolved::Data(0, HostOffset(0x200)),
            Resolved::Data(MAX_LAYERS - 1, HostOffset((1 << 55) - 512)),
            Resolved::Zero(17),
            Resolved::Below,
            Resolved::Ask(MAX_LAYERS - 1),
        ] {
            let entry = Entry::pack(resolved);
            assert_eq!(entry.unpack(), resolved);
            assert_ne!(entry, Entry::UNDECIDED);
        }
    }

    #[test]
    fn fewer_layers_ask_where_others_have_decided() {
        let data = Resolved::Data(5, HostOffset(0x200));
        assert_eq!(data.below(6), data);
        assert_eq!(data.below(5), Resolved::Ask(4));
        assert_eq!(Resolved::Zero(5).below(1), Resolved::Ask(0));
        assert_eq!(Resolved::Ask(5).below(5), Resolved::Ask(4));
        assert_eq!(Resolved::Below.below(1), Resolved::Below);
    }

    #[test]
    fn what_does_not_fit_is_left_to_the_layer() {
        let far = Resolved::Data(3, HostOffset(1 << 55));
        assert_eq!(Entry::pack(far).unpack(), Resolved::Ask(3));
    }

    #[test]
    fn data_go_on_where_they_end() {
        let first = Entry::pack(Resolved::Data(5, HostOffset(0x10000)));
        let next = Entry::pack(Resolved::Data(5, HostOffset(0x20000)));
        assert_eq!(first.plus(0x10000), next);
        let zero = Entry::pack(Resolved::Zero(5));
        assert_eq!(zero.plus(0x10000), zero);
    }
}
