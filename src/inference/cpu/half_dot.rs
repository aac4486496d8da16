//! Products of rows in 16 bits with one vector in 32, as fast as the rows can be read: one row after the
//! other, which is what the processor foresees best.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::simd::{dot, vectorized};

/// `y[i] = rows[i] . x`: rows (y.len(), K) row-major, x (K,). Sums in an order of its own.
pub fn multiply_rows(y: &mut [f32], rows: &[f16], x: &[f32]) {
    assert_eq!(rows.len(), y.len() * x.len());
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions, as just asked.
            return unsafe { x86::avx512(y, rows, x) };
        }
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            // SAFETY: as above.
            return unsafe { x86::avx2(y, rows, x) };
        }
    }
    portable(y, rows, x);
}

fn portable(y: &mut [f32], rows: &[f16], x: &[f32]) {
    let mut wide = vec![0f32; x.len()];
    for (y, row) in y.iter_mut().zip(rows.chunks_exact(x.len())) {
        row.convert_to_f32_slice(&mut wide);
        *y = product(&wide, x);
    }
}

vectorized! {
    fn product(x: &[f32], y: &[f32]) -> f32 {
        dot(x, y)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::f16;

    /// Sums of a row, so that one addition need not wait for the one before.
    const SUMS: usize = 4;

    /// The end of a row that fills no vectors.
    fn tail(row: &[f16], x: &[f32]) -> f32 {
        row.iter().zip(x).map(|(w, x)| w.to_f32() * x).sum()
    }

    #[target_feature(enable = "avx512f")]
    pub fn avx512(y: &mut [f32], rows: &[f16], x: &[f32]) {
        const STEP: usize = 16 * SUMS;
        let whole = x.len() / STEP * STEP;
        for (y, row) in y.iter_mut().zip(rows.chunks_exact(x.len())) {
            let mut sums = [_mm512_setzero_ps(); SUMS];
            for at in (0..whole).step_by(STEP) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = at + 16 * i;
                    // SAFETY: `whole` values are whole steps of x and of the row.
                    unsafe {
                        let w = _mm256_loadu_si256(row.as_ptr().add(at).cast());
                        let x = _mm512_loadu_ps(x.as_ptr().add(at));
                        *sum = _mm512_fmadd_ps(_mm512_cvtph_ps(w), x, *sum);
                    }
                }
            }
            let [a, b, c, d] = sums;
            let sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
            *y = _mm512_reduce_add_ps(sum) + tail(&row[whole..], &x[whole..]);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn avx2(y: &mut [f32], rows: &[f16], x: &[f32]) {
        const STEP: usize = 8 * SUMS;
        let whole = x.len() / STEP * STEP;
        for (y, row) in y.iter_mut().zip(rows.chunks_exact(x.len())) {
            let mut sums = [_mm256_setzero_ps(); SUMS];
            for at in (0..whole).step_by(STEP) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let at = at + 8 * i;
                    // SAFETY: as in `avx512`.
                    unsafe {
                        let w = _mm_loadu_si128(row.as_ptr().add(at).cast());
                        let x = _mm256_loadu_ps(x.as_ptr().add(at));
                        *sum = _mm256_fmadd_ps(_mm256_cvtph_ps(w), x, *sum);
                    }
                }
            }
            let [a, b, c, d] = sums;
            let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
            let mut lanes = [0f32; 8];
            // SAFETY: there is room for a vector.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
            *y = lanes.iter().sum::<f32>() + tail(&row[whole..], &x[whole..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    type MultiplyRows = fn(&mut [f32], &[f16], &[f32]);

    /// Every implementation that this processor has.
    fn implementations() -> Vec<(&'static str, MultiplyRows)> {
        let mut all: Vec<(_, MultiplyRows)> = vec![("portable", portable), ("best", multiply_rows)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            // SAFETY: the processor has the instructions, as just asked.
            all.push(("AVX2", |y, rows, x| unsafe { x86::avx2(y, rows, x) }));
        }
        all
    }

    #[test]
    fn products_are_those_in_f64() {
        let mut random = SplitMix64(3);
        let mut value = || random.unit() as f32 - 0.5;
        for (count, k) in [(1, 1), (3, 15), (4, 16), (5, 33), (9, 768), (2, 100)] {
            let mut rows: Vec<f16> = (0..count * k).map(|_| f16::from_f32(value())).collect();
            rows[0] = f16::from_f32(3e-6); // subnormal
            let x: Vec<f32> = (0..k).map(|_| value()).collect();
            for (name, multiply) in implementations() {
                let mut y = vec![f32::NAN; count];
                multiply(&mut y, &rows, &x);
                for (y, row) in y.iter().zip(rows.chunks_exact(k)) {
                    let products = row.iter().zip(&x).map(|(w, x)| w.to_f64() * f64::from(*x));
                    let exact: f64 = products.clone().sum();
                    let size: f64 = products.map(f64::abs).sum();
                    let error = (f64::from(*y) - exact).abs();
                    assert!(error <= 1e-6 * size, "{name} {count} x {k}: {error:e}");
                }
            }
        }
    }
}
