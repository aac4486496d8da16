//! RMSNorm followed by BitLinear, as before every projection of the network, over several weights
//! that share the input. Blocks of rows stay in cache from the norm to the scaled sums.

use rayon::prelude::*;

use super::gemm::{Mat, Write, matmul};
use super::rms_norm::{backward_rows, column_sums, inverse_rms};
use super::{ROWS_PER_SUM, rows_per_product};
use crate::quant::PackedTernary;
use crate::quant::matmul::{TernaryMatmul, Threads};
use crate::quant::packing::{VALUES_PER_WORD, pack_fields};
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
    /// One row of a weight to ternary codes, packed into `words` and as wq * b.
    fn quantise_row(words: &mut [u32], scaled: &mut [f32], w: &[f32], b: f32) {
        for ((word, scaled), w) in words
            .iter_mut()
            .zip(scaled.chunks_mut(VALUES_PER_WORD))
            .zip(w.chunks(VALUES_PER_WORD))
        {
            // The padding is code 0.
            let mut fields = [1u8; VALUES_PER_WORD];
            for ((field, scaled), w) in fields.iter_mut().zip(scaled).zip(w) {
                // round(w / b) with ties to even, clamped to -1..=1.
                let ratio = w / b;
                let code = i8::from(ratio > 0.5) - i8::from(ratio < -0.5);
                *field = (code + 1) as u8;
                *scaled = f32::from(code) * b;
            }
            *word = pack_fields(&fields);
        }
    }
}

/// Scale b of a weight.
fn weight_scale(w: &[f32]) -> f32 {
    let sums: Vec<f32> = w.par_chunks(WEIGHT_BLOCK).map(block_abs_sum).collect();
    let sum: f64 = sums.iter().map(|s| *s as f64).sum();
    // Comparisons, not `max`, so that a NaN reaches the loss and the stability monitor sees it.
    let mean = (sum / w.len() as f64) as f32;
    if mean < EPSILON { EPSILON } else { mean }
}

vectorized! {
    /// Int8 codes of the normalised tokens, their scales s, and the codes over their scales.
    fn normalise_and_quantise(
        codes: &mut [i8],
        scales: &mut [f32],
        inputs: &mut [f32],
        x: &[f32],
        norm: &[f32],
        eps: f32,
    ) {
        let k = norm.len();
        let tokens = (codes.chunks_exact_mut(k).zip(scales))
            .zip(inputs.chunks_exact_mut(k).zip(x.chunks_exact(k)));
        for ((codes, scale), (inputs, x)) in tokens {
            let r = inverse_rms(x, eps);
            for ((n, x), w) in inputs.iter_mut().zip(x).zip(norm) {
                *n = x * r * w;
            }
            let absmax = max_by(inputs, f32::abs);
            let s = 127.0 / if absmax < EPSILON { EPSILON } else { absmax };
            *scale = s;
            for (code, input) in codes.iter_mut().zip(inputs) {
                let rounded = (*input * s).round_ties_even().clamp(-128.0, 127.0);
                *code = rounded as i8;
                *input = rounded / s;
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

impl<const WEIGHTS: usize> NormedBitLinear<'_, WEIGHTS> {
    /// Output features N of all weights together.
    fn features(&self) -> usize {
        self.weights.iter().map(|w| w.len()).sum::<usize>() / self.norm.len()
    }

    /// Ternary codes of all weights, (N, K), the scale of every output column, and wq * b, (N, K).
    fn quantise_weights(&self) -> (PackedTernary, Vec<f32>, Vec<f32>) {
        let (n, k) = (self.features(), self.norm.len());
        let row_words = k.div_ceil(VALUES_PER_WORD);
        let mut words = vec![0; n * row_words];
        let mut scaled = vec![0f32; n * k];
        let mut column_scales = Vec::with_capacity(n);
        let (mut words_left, mut scaled_left) = (words.as_mut_slice(), scaled.as_mut_slice());
        for weight in self.weights {
            let rows = weight.len() / k;
            let (words, scaled);
            (words, words_left) = words_left.split_at_mut(rows * row_words);
            (scaled, scaled_left) = scaled_left.split_at_mut(weight.len());
            let b = weight_scale(weight);
            words
                .par_chunks_exact_mut(row_words)
                .zip(scaled.par_chunks_exact_mut(k))
                .zip(weight.par_chunks_exact(k))
                .for_each(|((words, scaled), w)| quantise_row(words, scaled, w, b));
            column_scales.extend(std::iter::repeat_n(b, rows));
        }
        (
            PackedTernary::from_words(words, n, k),
            column_scales,
            scaled,
        )
    }

    /// x (tokens, K) and residual (tokens, N) -> y (tokens, N), with N the sum of all N_i.
    pub fn forward(&self, x: &[f32], residual: Option<&[f32]>) -> (Vec<f32>, Saved) {
        let (n, k) = (self.features(), self.norm.len());
        let tokens = x.len() / k;
        let (packed, column_scales, weights) = self.quantise_weights();
        let product = TernaryMatmul::new(Threads::One);
        let block = rows_per_product(tokens);
        let mut y = vec![0f32; tokens * n];
        let mut inputs = vec![0f32; tokens * k];
        y.par_chunks_mut(block * n)
            .zip(inputs.par_chunks_mut(block * k))
            .zip(x.par_chunks(block * k))
            .enumerate()
            .for_each(|(i, ((y, inputs), x))| {
                let rows = x.len() / k;
                let (mut codes, mut scales) = (vec![0; x.len()], vec![0f32; rows]);
                normalise_and_quantise(&mut codes, &mut scales, inputs, x, self.norm, self.eps);
                product
                    .scaled(y, &codes, &scales, &packed, &column_scales)
                    .expect("matching shapes, and K as the configuration bounds it");
                if let Some(residual) = residual {
                    add(y, &residual[i * block * n..][..rows * n]);
                }
            });
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
