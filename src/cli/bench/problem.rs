//! The product that is measured: random operands, and the check of a result against them.

use rayon::prelude::*;

use crate::Result;
use crate::quant::PackedTernary;
use crate::random::SplitMix64;

/// Wrong rows that are computed anew to say how far off they are.
const ROWS_EXAMINED: usize = 16;

/// Random ternary weights of shape (n, k).
pub struct Weights {
    pub n: usize,
    pub k: usize,
    pub codes: Vec<i8>,
    pub packed: PackedTernary,
    /// A factor for each output column.
    pub scales: Vec<f32>,
}

/// `y = x . w^T` with random int8 `x` of shape (m, k).
pub struct Problem<'a> {
    pub m: usize,
    pub x: Vec<i8>,
    /// A scale for each row of x: a divisor on a CPU, a factor on a GPU.
    pub scales: Vec<f32>,
    pub weights: &'a Weights,
}

/// How a result compares with the exact product.
#[derive(Debug, PartialEq)]
pub struct Agreement {
    pub wrong_rows: usize,
    /// Largest absolute error in the first wrong rows; 0 if none is wrong.
    pub max_error: f64,
}

impl Agreement {
    pub fn exact(&self) -> bool {
        self.wrong_rows == 0
    }
}

impl Weights {
    /// The same numbers each time for the same shape.
    pub fn random(n: usize, k: usize) -> Result<Self> {
        let mut random = SplitMix64(0);
        let codes: Vec<i8> = (0..n * k).map(|_| (random.below(3) as i8) - 1).collect();
        Ok(Self {
            n,
            k,
            packed: PackedTernary::pack(&codes, n, k)?,
            codes,
            scales: (0..n).map(|_| 0.01 + random.unit() as f32).collect(),
        })
    }
}

impl<'a> Problem<'a> {
    /// The same numbers each time for the same shape.
    pub fn random(m: usize, weights: &'a Weights) -> Self {
        let mut random = SplitMix64(1);
        Self {
            m,
            x: (0..m * weights.k).map(|_| random.next() as i8).collect(),
            scales: (0..m).map(|_| 10.0 + random.unit() as f32).collect(),
            weights,
        }
    }

    /// Compares a result `y` of shape (m, n) with the exact product, all rows of it.
    ///
    /// Freivalds' check (1977): for a random vector r, `y . r` must equal `x . (w^T . r)`, which
    /// costs O(n^2) rather than O(n^3). In integers modulo 2^64 it never refuses a right row and
    /// lets a wrong one pass with a chance below 2^-31 (the error of an entry is below 2^33).
    pub fn check<T: Copy + Into<f64> + Sync>(&self, y: &[T]) -> Agreement {
        let &Weights {
            n, k, ref codes, ..
        } = self.weights;
        let mut random = SplitMix64(2);
        let r: Vec<i64> = (0..n).map(|_| random.next() as i64).collect();
        let mut wr = vec![0i64; k];
        for (w, &r) in codes.chunks_exact(k).zip(&r) {
            for (wr, &w) in wr.iter_mut().zip(w) {
                *wr = wr.wrapping_add(r.wrapping_mul(w.into()));
            }
        }
        let wrong: Vec<(&[i8], &[T])> = self
            .x
            .par_chunks_exact(k)
            .zip(y.par_chunks_exact(n))
            .filter(|(x, y)| {
                let expected = inner(x.iter().map(|&x| x.into()), &wr);
                let integers = y.iter().all(|&y| y.into().fract() == 0.0);
                !integers || inner(y.iter().map(|&y| y.into() as i64), &r) != expected
            })
            .collect();
        let max_error = wrong
            .par_iter()
            .take(ROWS_EXAMINED)
            .map(|(x, y)| self.row_error(x, y))
            .reduce(|| 0.0, f64::max);
        Agreement {
            wrong_rows: wrong.len(),
            max_error,
        }
    }

    /// Compares sums (m, n) with the exact product, and `y` (m, n) with what `scaled` makes of each sum
    /// and the scales of its weight row and token.
    pub fn check_scaled<T: Copy + Into<f64> + Sync>(
        &self,
        sums: &[i32],
        y: &[T],
        scaled: impl Fn(i32, f32, f32) -> T + Sync,
    ) -> Agreement {
        let of_sums = self.check(sums);
        if !of_sums.exact() {
            return of_sums;
        }
        let n = self.weights.n;
        let rows = sums.par_chunks(n).zip(y.par_chunks(n)).zip(&self.scales);
        let errors = rows.map(|((sums, y), &s)| {
            let columns = sums.iter().zip(y).zip(&self.weights.scales);
            largest(columns.map(|((&sum, &y), &b)| y.into() - scaled(sum, b, s).into()))
        });
        let errors: Vec<f64> = errors.filter(|error| *error > 0.0).collect();
        Agreement {
            wrong_rows: errors.len(),
            max_error: errors.into_iter().fold(0.0, f64::max),
        }
    }

    /// Largest absolute error in one row of the result, by the definition of the product in i64.
    fn row_error<T: Copy + Into<f64>>(&self, x: &[i8], y: &[T]) -> f64 {
        let rows = self.weights.codes.chunks_exact(self.weights.k);
        largest(rows.zip(y).map(|(w, &y)| {
            let products = x.iter().zip(w).map(|(&x, &w)| i64::from(x) * i64::from(w));
            y.into() - products.sum::<i64>() as f64
        }))
    }
}

/// Of absolute values. A NaN is as wrong as can be; f64::max would drop it.
fn largest(errors: impl Iterator<Item = f64>) -> f64 {
    errors.fold(0.0, |worst, error| match error.is_nan() {
        true => f64::INFINITY,
        false => worst.max(error.abs()),
    })
}

/// Inner product modulo 2^64.
fn inner(a: impl Iterator<Item = i64>, b: &[i64]) -> i64 {
    a.zip(b)
        .fold(0, |sum, (a, &b)| sum.wrapping_add(a.wrapping_mul(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The product by its definition.
    fn product(problem: &Problem) -> Vec<i32> {
        let Weights { k, codes, .. } = problem.weights;
        let rows = problem.x.chunks_exact(*k);
        rows.flat_map(|x| {
            let columns = codes.chunks_exact(*k);
            columns.map(|w| {
                x.iter()
                    .zip(w)
                    .map(|(&x, &w)| i32::from(x) * i32::from(w))
                    .sum()
            })
        })
        .collect()
    }

    #[test]
    fn operands_take_every_value() {
        let weights = Weights::random(70, 60).unwrap();
        let problem = Problem::random(50, &weights);
        for code in -1..=1 {
            let count = weights.codes.iter().filter(|&&w| w == code).count();
            let share = count as f64 / (60.0 * 70.0);
            assert!(
                (share - 1.0 / 3.0).abs() < 0.05,
                "code {code} makes up {share}"
            );
        }
        assert!((-128..=127).all(|code| problem.x.contains(&code)));
        assert_eq!(weights.packed.unpack(), weights.codes);
    }

    #[test]
    fn the_exact_product_agrees() {
        let weights = Weights::random(7, 33).unwrap();
        let problem = Problem::random(5, &weights);
        let y = product(&problem);
        let exact = Agreement {
            wrong_rows: 0,
            max_error: 0.0,
        };
        assert_eq!(problem.check(&y), exact);
        let floats: Vec<f32> = y.iter().map(|&y| y as f32).collect();
        assert_eq!(problem.check(&floats), exact);
    }

    #[test]
    fn one_wrong_value_anywhere_is_found_and_measured() {
        let weights = Weights::random(6, 20).unwrap();
        let problem = Problem::random(4, &weights);
        let y = product(&problem);
        for at in 0..y.len() {
            for error in [1, -3, 1 << 30] {
                let mut y = y.clone();
                y[at] += error;
                let found = problem.check(&y);
                let expected = Agreement {
                    wrong_rows: 1,
                    max_error: f64::from(error).abs(),
                };
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn rounded_and_undefined_values_are_wrong() {
        let weights = Weights::random(4, 9).unwrap();
        let problem = Problem::random(3, &weights);
        let mut y: Vec<f32> = product(&problem).iter().map(|&y| y as f32).collect();
        y[0] += 0.25;
        y[11] = f32::NAN;
        let expected = Agreement {
            wrong_rows: 2,
            max_error: f64::INFINITY,
        };
        assert_eq!(problem.check(&y), expected);
    }

    #[test]
    fn a_wrong_scale_is_found() {
        let weights = Weights::random(6, 20).unwrap();
        let problem = Problem::random(4, &weights);
        let sums = product(&problem);
        let scaled = |sum: i32, b: f32, s: f32| sum as f32 * b / s;
        let mut y: Vec<f32> = (0..sums.len())
            .map(|i| scaled(sums[i], weights.scales[i % 6], problem.scales[i / 6]))
            .collect();
        assert!(problem.check_scaled(&sums, &y, scaled).exact());
        y[7] += 0.5;
        let agreement = problem.check_scaled(&sums, &y, scaled);
        assert_eq!(agreement.wrong_rows, 1);
        assert!((agreement.max_error - 0.5).abs() < 1e-5, "{agreement:?}");
        let wrong_sums = vec![0; sums.len()];
        assert!(!problem.check_scaled(&wrong_sums, &y, scaled).exact());
    }
}
