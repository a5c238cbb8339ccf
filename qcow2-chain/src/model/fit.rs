//! Least squares with constants that cannot be negative: they are times and
//! bytes.

use serde::{Deserialize, Serialize};

/// Rounds of the descent at most.
const ROUNDS: usize = 20_000;
/// Where the constants do not move any more.
const STILL: f64 = 1e-10;

/// What was fitted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// One for each term.
    pub constants: Vec<f64>,
    /// Relative error of a single prediction, one standard deviation.
    pub relative_error: f64,
    /// The inverse of the normal matrix, row by row: how far the points that
    /// were fitted pin each combination of terms down.
    pub inverse: Vec<f64>,
    /// Number of points.
    pub points: usize,
}

/// A point.
#[derive(Clone, Debug)]
pub struct Point {
    /// What the constants are multiplied with.
    pub terms: Vec<f64>,
    /// The part of the value that needs no constant.
    pub known: f64,
    /// What was measured.
    pub value: f64,
}

/// Fits `value = known + constants * terms`, errors counted relative to the value.
/// `None` where there are fewer points than terms or one is not a number.
pub fn fit(points: &[Point]) -> Option<Fit> {
    let count = points.first()?.terms.len();
    if points.len() < count.max(2) {
        return None;
    }
    // Columns of like size, so that the descent goes straight.
    let mut scale = vec![0.0f64; count];
    for point in points {
        for (scale, term) in scale.iter_mut().zip(&point.terms) {
            *scale = scale.max((term / point.value).abs());
        }
    }
    scale.iter_mut().for_each(|scale| {
        if *scale == 0.0 {
            *scale = 1.0;
        }
    });
    let rows: Vec<Vec<f64>> = points
        .iter()
        .map(|point| {
            let terms = point.terms.iter().zip(&scale);
            terms
                .map(|(term, scale)| term / point.value / scale)
                .collect()
        })
        .collect();
    if rows.iter().flatten().any(|term| !term.is_finite()) {
        return None;
    }
    let normal = |a: usize, b: usize| rows.iter().map(|row| row[a] * row[b]).sum::<f64>();
    let matrix: Vec<Vec<f64>> = (0..count)
        .map(|a| (0..count).map(|b| normal(a, b)).collect())
        .collect();
    let wanted = points
        .iter()
        .map(|point| (point.value - point.known) / point.value);
    let wanted: Vec<f64> = wanted.collect();
    let both = |a: usize| rows.iter().zip(&wanted).map(|(row, w)| row[a] * w).sum();
    let target: Vec<f64> = (0..count).map(both).collect();
    let mut found = vec![0.0; count];
    for _ in 0..ROUNDS {
        let mut moved = 0.0f64;
        for a in 0..count {
            if matrix[a][a] == 0.0 {
                continue;
            }
            let other: f64 = (0..count).map(|b| matrix[a][b] * found[b]).sum();
            let next = (found[a] + (target[a] - other) / matrix[a][a]).max(0.0);
            moved = moved.max((next - found[a]).abs());
            found[a] = next;
        }
        if moved < STILL {
            break;
        }
    }
    let residuals = rows.iter().zip(&wanted).map(|(row, wanted)| {
        let value: f64 = row
            .iter()
            .zip(&found)
            .map(|(term, constant)| term * constant)
            .sum();
        value - wanted
    });
    let squares: f64 = residuals.map(|residual| residual * residual).sum();
    let used = found.iter().filter(|constant| **constant > 0.0).count();
    let free = points.len().saturating_sub(used).max(1);
    let inverse = inverse(&matrix, &found);
    Some(Fit {
        constants: found
            .iter()
            .zip(&scale)
            .map(|(c, scale)| c / scale)
            .collect(),
        relative_error: (squares / free as f64).sqrt(),
        inverse: (0..count * count)
            .map(|at| inverse[at] / scale[at / count] / scale[at % count])
            .collect(),
        points: points.len(),
    })
}

/// The inverse of the part of the matrix whose constants are not zero; zero
/// elsewhere.
fn inverse(matrix: &[Vec<f64>], found: &[f64]) -> Vec<f64> {
    let count = found.len();
    let used: Vec<_> = (0..count).filter(|at| found[*at] > 0.0).collect();
    let size = used.len();
    // A ridge keeps terms apart that the points cannot tell apart.
    let mut work: Vec<Vec<f64>> = (0..size)
        .map(|a| {
            let left = (0..size).map(|b| {
                let ridge = if a == b { 1e-9 } else { 0.0 };
                matrix[used[a]][used[b]] + ridge
            });
            let right = (0..size).map(|b| f64::from(u8::from(a == b)));
            left.chain(right).collect()
        })
        .collect();
    for at in 0..size {
        let best = (at..size).max_by(|a, b| work[*a][at].abs().total_cmp(&work[*b][at].abs()));
        work.swap(at, best.unwrap_or(at));
        let pivot = work[at].clone();
        if pivot[at] == 0.0 {
            continue;
        }
        for (other, row) in work.iter_mut().enumerate() {
            let factor = if other == at {
                1.0 - 1.0 / pivot[at]
            } else {
                row[at] / pivot[at]
            };
            row.iter_mut()
                .zip(&pivot)
                .for_each(|(cell, pivot)| *cell -= factor * pivot);
        }
    }
    let mut result = vec![0.0; count * count];
    for (a, row) in work.iter().enumerate() {
        for b in 0..size {
            result[used[a] * count + used[b]] = row[size + b];
        }
    }
    result
}

impl Fit {
    /// The prediction, and its relative error, one standard deviation: that of
    /// a single point, more where the points do not reach.
    pub fn predict(&self, terms: &[f64], known: f64) -> (f64, f64) {
        let value: f64 = terms.iter().zip(&self.constants).map(|(t, c)| t * c).sum();
        let value = value + known;
        let count = self.constants.len();
        let mut reach = 0.0;
        for a in 0..count.min(terms.len()) {
            for b in 0..count.min(terms.len()) {
                let cell = self.inverse.get(a * count + b).copied().unwrap_or(0.0);
                reach += terms[a] * terms[b] * cell;
            }
        }
        let reach = (reach / (value * value).max(f64::MIN_POSITIVE)).max(0.0);
        (value, self.relative_error * (1.0 + reach).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(law: impl Fn(f64) -> f64) -> Vec<Point> {
        let at = [1.0, 3.0, 10.0, 40.0, 100.0, 300.0];
        let point = |x: &f64| Point {
            terms: vec![1.0, *x, x * x],
            known: 0.0,
            value: law(*x),
        };
        at.iter().map(point).collect()
    }

    #[test]
    fn finds_what_is_there() {
        let found = fit(&points(|x| 5.0 + 0.5 * x + 0.01 * x * x)).unwrap();
        for (constant, expected) in found.constants.iter().zip([5.0, 0.5, 0.01]) {
            assert!((constant / expected - 1.0).abs() < 1e-3, "{found:?}");
        }
        let (value, error) = found.predict(&[1.0, 1000.0, 1e6], 0.0);
        assert!((value / 10_505.0 - 1.0).abs() < 1e-3 && error < 1e-3);
    }

    #[test]
    fn nothing_is_negative() {
        let found = fit(&points(|x| 50.0 + x - 0.001 * x * x)).unwrap();
        assert_eq!(found.constants[2], 0.0);
        assert!(found.constants.iter().all(|constant| *constant >= 0.0));
        assert!(found.relative_error > 0.0);
    }

    #[test]
    fn less_is_known_further_away() {
        let mut noisy = points(|x| 5.0 + 0.5 * x + 0.01 * x * x);
        for (number, point) in noisy.iter_mut().enumerate() {
            point.value *= if number % 2 == 0 { 1.05 } else { 0.95 };
        }
        let found = fit(&noisy).unwrap();
        let error = |x: f64| found.predict(&[1.0, x, x * x], 0.0).1;
        assert!(error(10_000.0) > error(100.0));
    }

    #[test]
    fn too_little() {
        assert!(fit(&[]).is_none());
        assert!(fit(&points(|_| 1.0)[..2]).is_none());
        assert!(fit(&points(|_| 0.0)).is_none());
    }
}
