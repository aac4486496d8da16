//! RMSNorm followed by BitLinear, as before every projection of the network, over several weights
//! that share the input. Blocks of rows stay in cache from the norm to the dequantised sums.

use rayon::prelude::*;

use super::gemm::{Mat, Threads, Write, matmul};
use super::rms_norm::{backward_rows, column_sums, inverse_rms};
use super::{ROWS_PER_SUM, rows_per_product};
use crate::quant::ternary::EPSILON;
use crate::simd::{abs_sum, max_by, vectorized};

/// Elements of a weight that one task quantises.
const WEIGHT_BLOCK: usize = 1 << 14;

/// `residual + bit_linear(rms_norm(x))`: x (tokens, K), norm (K,), weights (N_i, K)
/// -> (tokens, sum N_i).
pub struct NormedBitLinear<'a, const WEIGHTS: usize> {
    pub norm: &'a [f32],
    pub weights: [&'a [f32]; WEIGHTS],
    pub eps: f32,
}

/// What the backward pass needs of the forward pass.
pub struct Saved {
    /// Codes of the normalised input over their scale, xq / s: (tokens, K).
    inputs: Vec<f32>,
    /// Ternary codes times their scale, wq * b: (N, K).
    weights: Vec<f32>,
}

/// Gradients of the norm (K,) and of each weight (N_i, K).
pub struct Gradients<const WEIGHTS: usize> {
    pub norm: Vec<f32>,
    pub weights: [Vec<f32>; WEIGHTS],
}

vectorized! {
    fn block_abs_sum(w: &[f32]) -> f32 {
        abs_sum(w)
    }
}

vectorized! {
    fn block_ternary_codes(codes: &mut [f32], w: &[f32], b: f32) {
        for (code, w) in codes.iter_mut().zip(w) {
            *code = (w / b).clamp(-1.0, 1.0).round_ties_even();
        }
    }
}

/// Ternary codes of one weight as f32, and its scale b.
fn ternary_codes(codes: &mut [f32], w: &[f32]) -> f32 {
    let sums: Vec<f32> = w.par_chunks(WEIGHT_BLOCK).map(block_abs_sum).collect();
    let sum: f64 = sums.iter().map(|s| *s as f64).sum();
    // Comparisons, not `max`, so that a NaN reaches the loss and the stability monitor sees it.
    let mean = (sum / w.len() as f64) as f32;
    let b = if mean < EPSILON { EPSILON } else { mean };
    codes
        .par_chunks_mut(WEIGHT_BLOCK)
        .zip(w.par_chunks(WEIGHT_BLOCK))
        .for_each(|(codes, w)| block_ternary_codes(codes, w, b));
    b
}

vectorized! {
    /// Int8 codes of the normalised tokens as f32, and their scales s.
    fn normalise_and_quantise(
        codes: &mut [f32],
        scales: &mut [f32],
        x: &[f32],
        norm: &[f32],
        eps: f32,
    ) {
        let k = norm.len();
        let tokens = codes.chunks_exact_mut(k).zip(x.chunks_exact(k)).zip(scales);
        for ((codes, x), scale) in tokens {
            let r = inverse_rms(x, eps);
            for ((n, x), w) in codes.iter_mut().zip(x).zip(norm) {
                *n = x * r * w;
            }
            let absmax = max_by(codes, f32::abs);
            let s = 127.0 / if absmax < EPSILON { EPSILON } else { absmax };
            *scale = s;
            for code in codes {
                *code = (*code * s).round_ties_even().clamp(-128.0, 127.0);
            }
        }
    }
}

vectorized! {
    /// Integer sums to activations: y = sums * b / s, b per column and s per row.
    fn dequantise_sums(y: &mut [f32], column_scales: &[f32], token_scales: &[f32]) {
        for (y, s) in y.chunks_exact_mut(column_scales.len()).zip(token_scales) {
            for (y, b) in y.iter_mut().zip(column_scales) {
                *y = *y * b / s;
            }
        }
    }
}

vectorized! {
    fn dequantise_codes(codes: &mut [f32], k: usize, token_scales: &[f32]) {
        for (codes, s) in codes.chunks_exact_mut(k).zip(token_scales) {
            for code in codes {
                *code /= s;
            }
        }
    }
}

vectorized! {
    fn add(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

vectorized! {
    fn scale(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

impl<const WEIGHTS: usize> NormedBitLinear<'_, WEIGHTS> {
    /// Output features N of all weights together.
    fn features(&self) -> usize {
        self.weights.iter().map(|w| w.len()).sum::<usize>() / self.norm.len()
    }

    /// Ternary codes of all weights, (N, K), and the scale of every output column.
    fn quantise_weights(&self) -> (Vec<f32>, Vec<f32>) {
        let (n, k) = (self.features(), self.norm.len());
        let mut codes = vec![0f32; n * k];
        let mut column_scales = Vec::with_capacity(n);
        let mut rest = codes.as_mut_slice();
        for weight in self.weights {
            let (part, after) = rest.split_at_mut(weight.len());
            let b = ternary_codes(part, weight);
            column_scales.extend(std::iter::repeat_n(b, weight.len() / k));
            rest = after;
        }
        (codes, column_scales)
    }

    /// x (tokens, K) and residual (tokens, N) -> y (tokens, N), with N the sum of all N_i.
    pub fn forward(&self, x: &[f32], residual: Option<&[f32]>) -> (Vec<f32>, Saved) {
        let (n, k) = (self.features(), self.norm.len());
        let tokens = x.len() / k;
        let (mut weights, column_scales) = self.quantise_weights();
        let block = rows_per_product(tokens);
        let mut y = vec![0f32; tokens * n];
        let mut inputs = vec![0f32; tokens * k];
        y.par_chunks_mut(block * n)
            .zip(inputs.par_chunks_mut(block * k))
            .zip(x.par_chunks(block * k))
            .enumerate()
            .for_each(|(i, ((y, codes), x))| {
                let rows = x.len() / k;
                let mut scales = vec![0f32; rows];
                normalise_and_quantise(codes, &mut scales, x, self.norm, self.eps);
                // Integer operands: the f32 sums are exact while |sum| < 2^24.
                let lhs = Mat::new(codes, rows, k);
                let rhs = Mat::new(&weights, n, k).t();
                matmul(y, Write::Replace, 1.0, lhs, rhs, Threads::One);
                dequantise_sums(y, &column_scales, &scales);
                if let Some(residual) = residual {
                    add(y, &residual[i * block * n..][..rows * n]);
                }
                dequantise_codes(codes, k, &scales);
            });
        weights
            .par_chunks_mut(k)
            .zip(&column_scales)
            .for_each(|(row, b)| scale(row, *b));
        (y, Saved { inputs, weights })
    }

    /// With n = rms_norm(x): dn = dY . (wq * b), dW = dY^T . (xq / s), straight through both
    /// roundings. x and dx are (tokens, K), dy is (tokens, N); the gradient of x is written to
    /// `dx` or added to it, that of the residual is `dy` itself.
    pub fn backward(
        &self,
        saved: Saved,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        write: Write,
    ) -> Gradients<WEIGHTS> {
        let (n, k) = (self.features(), self.norm.len());
        let tokens = x.len() / k;
        let block = rows_per_product(tokens);
        let part = ROWS_PER_SUM * k;
        let norm_sums: Vec<Vec<Vec<f32>>> = dx
            .par_chunks_mut(block * k)
            .zip(x.par_chunks(block * k))
            .zip(dy.par_chunks(block * n))
            .map(|((dx, x), dy)| {
                let mut dn = vec![0f32; x.len()];
                let lhs = Mat::new(dy, x.len() / k, n);
                let rhs = Mat::new(&saved.weights, n, k);
                matmul(&mut dn, Write::Replace, 1.0, lhs, rhs, Threads::One);
                dx.chunks_mut(part)
                    .zip(dn.chunks_mut(part))
                    .zip(x.chunks(part))
                    .map(|((dx, dn), x)| {
                        let mut dnorm = vec![0f32; k];
                        backward_rows(dx, write, &mut dnorm, dn, x, self.norm, self.eps);
                        dnorm
                    })
                    .collect()
            })
            .collect();

        let mut stacked = vec![0f32; n * k];
        let lhs = Mat::new(dy, tokens, n).t();
        let rhs = Mat::new(&saved.inputs, tokens, k);
        matmul(&mut stacked, Write::Replace, 1.0, lhs, rhs, Threads::All);
        let mut rest = stacked.as_slice();
        let weights = self.weights.map(|weight| {
            let (part, after) = rest.split_at(weight.len());
            rest = after;
            part.to_vec()
        });
        Gradients {
            norm: column_sums(norm_sums.iter().flatten(), k),
            weights,
        }
    }
}
