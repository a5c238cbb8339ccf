//! Several measurements of the same.

use serde::{Deserialize, Serialize};

use crate::model::figure::Figure;

/// What they have in common.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub median: f64,
    /// A quarter of all is not more than this.
    pub low: f64,
    pub least: f64,
    pub most: f64,
    pub count: usize,
}

impl Sample {
    /// What the models are about. Of times it is the least, as whatever else
    /// goes on only makes things take longer; but of reads in a row the median,
    /// as some runs, up to a fourth of them, take a fourth of the time of all
    /// others.
    pub fn value(&self, figure: Figure) -> f64 {
        match figure {
            Figure::MemoryOpen | Figure::MemoryWarm | Figure::ReadDisk => self.median,
            _ => self.least,
        }
    }

    /// `None` of nothing.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        Some(Self {
            median: median(&values)?,
            low: *values.get((values.len().max(1) - 1) / 4)?,
            least: *values.first()?,
            most: *values.last()?,
            count: values.len(),
        })
    }
}

/// The median of sorted values.
fn median(sorted: &[f64]) -> Option<f64> {
    let half = sorted.len() / 2;
    let upper = *sorted.get(half)?;
    Some(if sorted.len() % 2 == 0 {
        (sorted[half - 1] + upper) / 2.0
    } else {
        upper
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_to_the_last_bit() {
        // Without float_roundtrip some of them lose it.
        for number in 1..20_000 {
            let value = 1.0 / f64::from(number) * 1e6 / 7.0;
            let sample = Sample::of(vec![value, value / 3.0]).unwrap();
            let text = serde_json::to_string(&sample).unwrap();
            assert_eq!(serde_json::from_str::<Sample>(&text).unwrap(), sample);
        }
    }
}
