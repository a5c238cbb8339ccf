//! Refcount blocks (section "Refcount table and refcount blocks").

/// The width of a refcount: `1 << order` bits, order 0 to 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountOrder(u32);

impl RefcountOrder {
    /// The width of version 2 and the default of version 3: 16 bits.
    pub const BITS_16: Self = Self(4);

    /// The width `1 << order`, `None` above 64 bits.
    #[must_use]
    pub const fn new(order: u32) -> Option<Self> {
        if order <= 6 { Some(Self(order)) } else { None }
    }

    /// The logarithm of the width.
    #[must_use]
    pub const fn order(self) -> u32 {
        self.0
    }

    /// The width in bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest count.
    ///
    /// For 64 bits the specification leaves all of `u64`, while every
    /// implementation stops at `i64::MAX`, so that counts and differences fit
    /// one type.
    #[must_use]
    pub const fn max(self) -> u64 {
        match self.0 {
            6 => i64::MAX as u64,
            order => (1 << (1 << order)) - 1,
        }
    }

    /// How many counts `bytes` bytes hold.
    #[must_use]
    pub const fn per_bytes(self, bytes: u64) -> u64 {
        (bytes << 3) >> self.0
    }

    /// How many bytes `count` counts take, rounded up.
    #[must_use]
    pub const fn bytes_for(self, count: u64) -> u64 {
        ((count << self.0) + 7) >> 3
    }

    /// Count number `index` of `block`. The block is long enough.
    #[must_use]
    pub fn get(self, block: &[u8], index: usize) -> u64 {
        match self.0 {
            order @ 0..=2 => {
                let bit = index << order;
                let mask = (1u16 << (1 << order)) - 1;
                u64::from((u16::from(block[bit / 8]) >> (bit % 8)) & mask)
            }
            3 => u64::from(block[index]),
            order => {
                let width = 1usize << (order - 3);
                block[index * width..][..width]
                    .iter()
                    .fold(0, |value, byte| (value << 8) | u64::from(*byte))
            }
        }
    }

    /// Sets count number `index` of `block` to `value`, at most [`Self::max`].
    pub fn set(self, block: &mut [u8], index: usize, value: u64) {
        debug_assert!(value <= self.max());
        match self.0 {
            order @ 0..=2 => {
                let bit = index << order;
                let mask = ((1u16 << (1 << order)) - 1) as u8;
                let byte = &mut block[bit / 8];
                *byte = *byte & !(mask << (bit % 8)) | ((value as u8 & mask) << (bit % 8));
            }
            3 => block[index] = value as u8,
            order => {
                let width = 1usize << (order - 3);
                block[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits() {
        let max: Vec<u64> = (0..=6)
            .map(|o| RefcountOrder::new(o).unwrap().max())
            .collect();
        assert_eq!(
            max,
            [1, 3, 15, 255, 65535, u64::from(u32::MAX), i64::MAX as u64]
        );
        assert!(RefcountOrder::new(7).is_none());
        assert_eq!(RefcountOrder::BITS_16.per_bytes(65536), 32768);
    }

    proptest! {
        /// Setting one count changes that one and no other.
        #[test]
        fn set_then_get(order in 0u32..=6, index in 0usize..32, value: u64, fill: u8) {
            let order = RefcountOrder::new(order).unwrap();
            let value = value & order.max();
            let mut block = vec![fill; 256];
            let before: Vec<u64> = (0..32).map(|i| order.get(&block, i)).collect();
            order.set(&mut block, index, value);
            for (i, old) in before.into_iter().enumerate() {
                prop_assert_eq!(order.get(&block, i), if i == index { value } else { old });
            }
        }
    }
}
