//! What the values of options may be.

use clap::builder::RangedU64ValueParser;

/// A count of at least one.
pub fn count() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// A number that can be measured with.
pub fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|number: &f64| number.is_finite() && *number > 0.0)
        .ok_or_else(|| "not a number above 0".to_owned())
}

/// A part of a whole.
pub fn share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|number| (0.0..=1.0).contains(number))
        .ok_or_else(|| "not a share from 0 to 1".to_owned())
}

/// The width of a refcount.
pub fn power_of_two(text: &str) -> Result<u32, String> {
    let number = text.parse().ok();
    number
        .filter(|number: &u32| number.is_power_of_two() && *number <= 64)
        .ok_or_else(|| "not a power of two from 1 to 64".to_owned())
}

/// The largest size.
const LARGEST: u64 = 1 << 60;

/// A size in bytes. The suffixes are QEMU's, and the same with `iB`.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_uppercase();
    let letter = match unit.strip_suffix("IB") {
        Some("") => "IB",
        Some(letter) => letter,
        None => &unit,
    };
    let shift = match letter {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        "E" => 60,
        _ => {
            return Err(
                "unknown suffix: there are K, M, G, T, P, E, and KiB, MiB, ... with \
                        the same meaning, powers of 1024; none for bytes"
                    .into(),
            );
        }
    };
    let large = || "more than 1E".to_owned();
    if let Ok(number) = digits.parse::<u64>() {
        let bytes = number.checked_mul(1 << shift);
        return bytes.filter(|bytes| *bytes <= LARGEST).ok_or_else(large);
    }
    let plain = |c: char| c.is_ascii_digit() || c == '.';
    let number: Option<f64> = digits.parse().ok().filter(|_| digits.chars().all(plain));
    let bytes = number.ok_or("not a size")? * (1u64 << shift) as f64;
    if bytes > LARGEST as f64 {
        return Err(large());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64k", 64 << 10),
            ("64K", 64 << 10),
            ("1.5M", 3 << 19),
            ("2GiB", 2 << 30),
            ("1t", 1 << 40),
            ("100P", 100 << 50),
            ("1E", 1 << 60),
            ("9007199254740993", 9_007_199_254_740_993),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["10ib", "10MB", "10kb", "10Ki", "1X", "10KiBiB"] {
            let error = size(text).unwrap_err();
            assert!(error.contains("KiB"), "{text}: {error}");
        }
        for text in [
            "",
            "K",
            "-1",
            "1e3",
            "nan",
            "inf",
            "1 K",
            "2E",
            "99999999999P",
            "1.1.1",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(positive("0.5"), Ok(0.5));
        for text in ["nan", "inf", "0", "-1", "", "x"] {
            assert!(positive(text).is_err(), "{text}");
        }
        assert_eq!((share("0"), share("1")), (Ok(0.0), Ok(1.0)));
        for text in ["nan", "1.5", "-0.1", ""] {
            assert!(share(text).is_err(), "{text}");
        }
        assert_eq!((power_of_two("1"), power_of_two("64")), (Ok(1), Ok(64)));
        for text in ["0", "3", "128", "-1", ""] {
            assert!(power_of_two(text).is_err(), "{text}");
        }
    }
}
