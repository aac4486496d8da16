//! Means and their standard errors.

use serde::Serialize;

/// A mean, and how far it may be off by chance.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub value: f64,
    /// Standard error; fewer than two samples have none.
    pub stderr: Option<f64>,
}

impl Estimate {
    /// Sum of the totals over sum of the sizes, of samples (total, size) that are independent of each
    /// other, whatever there is within one. With residuals r = total - value * size and n samples,
    /// stderr^2 = n / (n - 1) * sum(r^2) / sum(size)^2 (Cochran, Sampling Techniques, section 2.11).
    pub fn ratio(samples: impl Iterator<Item = (f64, f64)> + Clone) -> Self {
        let (total, size, n) = samples
            .clone()
            .fold((0.0, 0.0, 0.0), |(totals, sizes, n), (total, size)| {
                (totals + total, sizes + size, n + 1.0)
            });
        let value = total / size;
        let residuals = samples.map(|(total, size)| (total - value * size).powi(2));
        let variance = n / (n - 1.0) * residuals.sum::<f64>() / (size * size);
        Self {
            value,
            stderr: (n > 1.0).then(|| variance.sqrt()),
        }
    }

    /// Of independent samples; the standard error is their standard deviation (with n - 1) over
    /// the root of their number.
    pub fn mean(samples: impl Iterator<Item = f64> + Clone) -> Self {
        Self::ratio(samples.map(|sample| (sample, 1.0)))
    }

    /// In another unit.
    pub fn scaled(self, factor: f64) -> Self {
        Self {
            value: self.value * factor,
            stderr: self.stderr.map(|stderr| stderr * factor.abs()),
        }
    }

    /// e to this; the standard error by the delta method, e^value * stderr.
    pub fn exp(self) -> Self {
        let value = self.value.exp();
        Self {
            value,
            stderr: self.stderr.map(|stderr| stderr * value),
        }
    }
}
