//! RMSNorm followed by BitLinear, over packed weights.

use rayon::prelude::*;

use crate::inference::Projections;
use crate::model::cpu::rms_norm::inverse_rms;
use crate::quant::matmul::{TernaryMatmul, Threads};
use crate::quant::ternary::EPSILON;
use crate::simd::{max_by, vectorized};

/// Tokens that one task normalises.
const TOKENS_PER_TASK: usize = 16;

vectorized! {
    /// Int8 codes and scale s of the normalised token `x`, which is left in `normed`.
    pub fn quantize_normed(
        codes: &mut [i8],
        normed: &mut [f32],
        x: &[f32],
        norm: &[f32],
        eps: f32,
    ) -> f32 {
        let r = inverse_rms(x, eps);
        for ((n, x), w) in normed.iter_mut().zip(x).zip(norm) {
            *n = x * r * w;
        }
        let absmax = max_by(normed, f32::abs);
        let s = 127.0 / if absmax < EPSILON { EPSILON } else { absmax };
        for (code, n) in codes.iter_mut().zip(normed) {
            *code = (*n * s).round_ties_even() as i8;
        }
        s
    }
}

/// `bit_linear(rms_norm(x))`: x (tokens, K), norm (K,), weights (N, K) -> (tokens, N).
pub fn normed(x: &[f32], norm: &[f32], eps: f32, weights: &Projections) -> Vec<f32> {
    let k = norm.len();
    let tokens = x.len() / k;
    let (mut codes, mut scales) = (vec![0; x.len()], vec![0f32; tokens]);
    codes
        .par_chunks_mut(TOKENS_PER_TASK * k)
        .zip(scales.par_chunks_mut(TOKENS_PER_TASK))
        .zip(x.par_chunks(TOKENS_PER_TASK * k))
        .for_each_init(
            || vec![0f32; k],
            |normed, ((codes, scales), x)| {
                let tokens = codes.chunks_exact_mut(k).zip(scales).zip(x.chunks_exact(k));
                for ((codes, scale), x) in tokens {
                    *scale = quantize_normed(codes, normed, x, norm, eps);
                }
            },
        );
    let mut y = vec![0f32; tokens * weights.packed.rows()];
    TernaryMatmul::new(Threads::All)
        .scaled(&mut y, &codes, &scales, &weights.packed, &weights.scales)
        .expect("matching shapes, and K as the configuration bounds it");
    y
}

/// [`normed`] added to `sum` (tokens, N).
pub fn add_normed(sum: &mut [f32], x: &[f32], norm: &[f32], eps: f32, weights: &Projections) {
    let y = normed(x, norm, eps, weights);
    sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += y);
}
