//! RMSNorm by rows (arXiv 1910.07467).

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::gemm::Write;
use crate::simd::{dot, vectorized};

/// 1 / sqrt(mean(x^2) + eps)
#[inline(always)]
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    (dot(x, x) / x.len() as f32 + eps).sqrt().recip()
}

vectorized! {
    fn forward_rows(y: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
        let features = weight.len();
        for (y, x) in y.chunks_exact_mut(features).zip(x.chunks_exact(features)) {
            let r = inverse_rms(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * r * w;
            }
        }
    }
}

vectorized! {
    /// With r = 1 / rms(x) and g = dy * w, row by row:
    /// dx = r * g - x * r^3 * (g . x) / n, written or added;  dw += dy * x * r.
    /// `dy` is left as g.
    pub fn backward_rows(
        dx: &mut [f32],
        write: Write,
        dw: &mut [f32],
        dy: &mut [f32],
        x: &[f32],
        weight: &[f32],
        eps: f32,
    ) {
        let features = weight.len();
        let rows = dx
            .chunks_exact_mut(features)
            .zip(x.chunks_exact(features))
            .zip(dy.chunks_exact_mut(features));
        for ((dx, x), dy) in rows {
            let r = inverse_rms(x, eps);
            for (((dy, dw), x), w) in dy.iter_mut().zip(dw.iter_mut()).zip(x).zip(weight) {
                *dw += *dy * x * r;
                *dy *= w;
            }
            let shrink = dot(dy, x) * r * r * r / features as f32;
            let row = dx.iter_mut().zip(dy).zip(x);
            match write {
                Write::Replace => row.for_each(|((dx, g), x)| *dx = r * *g - x * shrink),
                Write::Add => row.for_each(|((dx, g), x)| *dx += r * *g - x * shrink),
            }
        }
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight`: x (rows, features), weight (features,).
pub fn forward(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut y = vec![0f32; x.len()];
    let block = ROWS_PER_TASK * weight.len();
    y.par_chunks_mut(block)
        .zip(x.par_chunks(block))
        .for_each(|(y, x)| forward_rows(y, x, weight, eps));
    y
}

/// Gradients of x (rows, features) and of the weight (features,); `dy` is used up.
pub fn backward(dy: &mut [f32], x: &[f32], weight: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let features = weight.len();
    let block = ROWS_PER_TASK * features;
    let mut dx = vec![0f32; x.len()];
    let partial_sums: Vec<Vec<f32>> = dx
        .par_chunks_mut(block)
        .zip(x.par_chunks(block))
        .zip(dy.par_chunks_mut(block))
        .map(|((dx, x), dy)| {
            let mut dw = vec![0f32; features];
            backward_rows(dx, Write::Replace, &mut dw, dy, x, weight, eps);
            dw
        })
        .collect();
    (dx, column_sums(&partial_sums, features))
}

/// The sum of equally long vectors, in order.
pub fn column_sums<'a>(parts: impl IntoIterator<Item = &'a Vec<f32>>, features: usize) -> Vec<f32> {
    let mut total = vec![0f32; features];
    for part in parts {
        for (sum, part) in total.iter_mut().zip(part) {
            *sum += part;
        }
    }
    total
}
