//! Addresses with their unit in the type.
//!
//! A byte offset in the guest's disk and a byte offset in an image file are
//! both 64-bit numbers and must never be mixed up; the two newtypes make the
//! compiler keep them apart.

use std::fmt;

macro_rules! offset_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The offset as a plain number of bytes.
            #[inline]
            #[must_use]
            pub const fn bytes(self) -> u64 {
                self.0
            }

            /// The offset `len` bytes further on.
            ///
            /// Offsets that come from a file are checked against the limits of
            /// the format before they are used, so the sum cannot wrap; should
            /// that be violated, the result saturates instead of wrapping.
            #[inline]
            #[must_use]
            pub const fn add(self, len: u64) -> Self {
                Self(self.0.saturating_add(len))
            }

            /// The part of the offset below a multiple of `1 << bits`.
            #[inline]
            #[must_use]
            pub const fn within(self, bits: u32) -> u64 {
                self.0 & ((1 << bits) - 1)
            }

            /// The offset rounded down to a multiple of `1 << bits`.
            #[inline]
            #[must_use]
            pub const fn align_down(self, bits: u32) -> Self {
                Self(self.0 & !((1 << bits) - 1))
            }

            /// Whether the offset is a multiple of `1 << bits`.
            #[inline]
            #[must_use]
            pub const fn is_aligned(self, bits: u32) -> bool {
                self.within(bits) == 0
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

offset_type! {
    /// A byte offset in the disk that the guest sees.
    GuestOffset
}

offset_type! {
    /// A byte offset in an image file.
    HostOffset
}

/// The number of a cluster in an image file: its [`HostOffset`] divided by the
/// cluster size of that image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct ClusterIndex(pub u64);

/// A number in hexadecimal as C's `%#x` prints it: zero has no prefix.
#[derive(Clone, Copy, Debug)]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            f.write_str("0")
        } else {
            write!(f, "{:#x}", self.0)
        }
    }
}

/// `a / b` rounded up; `b` is not zero.
#[inline]
#[must_use]
pub const fn div_up(a: u64, b: u64) -> u64 {
    a.div_ceil(b)
}

/// `a` rounded up to a multiple of `1 << bits`, saturating at the top.
#[inline]
#[must_use]
pub const fn round_up(a: u64, bits: u32) -> u64 {
    let mask = (1u64 << bits) - 1;
    match a.checked_add(mask) {
        Some(sum) => sum & !mask,
        None => !mask,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding() {
        assert_eq!(round_up(0, 16), 0);
        assert_eq!(round_up(1, 16), 65536);
        assert_eq!(round_up(65536, 16), 65536);
        assert_eq!(round_up(u64::MAX, 16), !0xffff);
        assert_eq!(GuestOffset(0x12345).align_down(16), GuestOffset(0x10000));
        assert_eq!(HostOffset(0x12345).within(16), 0x2345);
        assert_eq!(
            (Hex(0).to_string(), Hex(10).to_string()),
            ("0".into(), "0xa".into())
        );
    }
}
