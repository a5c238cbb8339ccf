//! Several measurements of the same.

use serde::{Deserialize, Serialize};

use crate::model::figure::Figure;

/// What they have in common.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub median: f64,
    pub least: f64,
    pub most: f64,
    pub count: usize,
}

impl Sample {
    /// What the models are about. Of times it is the least, as whatever else
    /// goes on only makes things take longer.
    pub fn value(&self, figure: Figure) -> f64 {
        match figure {
            Figure::MemoryOpen | Figure::MemoryWarm => self.median,
            _ => self.least,
        }
    }

    /// `None` of nothing.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        Some(Self {
            median: median(&values)?,
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
