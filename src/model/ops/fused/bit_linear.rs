use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::gemm::{Mat, Threads, Write, matmul};
use super::rows_per_product;
use super::storage::{Reader, slice};
use crate::simd::{abs_sum, max_by, vectorized};

/// What the backward needs, kept from the forward.
struct Saved {
    /// xq / s, (tokens, K)
    x_dequantised: Vec<f32>,
    /// wq * b, (N, K)
    w_dequantised: Vec<f32>,
}

/// One matrix product for weights stacked along N, each with a scale of its own.
struct BitLinear {
    /// Output features of each stacked weight.
    features: Vec<usize>,
    saved: Mutex<Option<Saved>>,
    keep: bool,
}

/// Elements of a weight that one task quantises.
const WEIGHT_BLOCK: usize = 1 << 14;

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
fn ternary_codes(w: &[f32], codes: &mut [f32]) -> f32 {
    let sums: Vec<f32> = w.par_chunks(WEIGHT_BLOCK).map(block_abs_sum).collect();
    let sum: f64 = sums.iter().map(|s| *s as f64).sum();
    // Comparisons, not `max`, so that a NaN reaches the loss and the stability monitor sees it.
    let mean = (sum / w.len() as f64) as f32;
    let b = if mean < 1e-5 { 1e-5 } else { mean };
    codes
        .par_chunks_mut(WEIGHT_BLOCK)
        .zip(w.par_chunks(WEIGHT_BLOCK))
        .for_each(|(codes, w)| block_ternary_codes(codes, w, b));
    b
}

vectorized! {
    /// Int8 codes of tokens of `k` features as f32, their scales s, and codes / s.
    fn quantise_tokens(
        codes: &mut [f32],
        dequantised: &mut [f32],
        scales: &mut [f32],
        x: &[f32],
        k: usize,
    ) {
        let tokens = codes
            .chunks_exact_mut(k)
            .zip(dequantised.chunks_exact_mut(k))
            .zip(x.chunks_exact(k))
            .zip(scales);
        for (((codes, dequantised), x), scale) in tokens {
            let absmax = max_by(x, f32::abs);
            let s = 127.0 / if absmax < 1e-5 { 1e-5 } else { absmax };
            *scale = s;
            for ((code, value), x) in codes.iter_mut().zip(dequantised).zip(x) {
                *code = (x * s).round_ties_even().clamp(-128.0, 127.0);
                *value = *code / s;
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

impl CustomOp2 for BitLinear {
    fn name(&self) -> &'static str {
        "bit_linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice(x, x_layout)?, slice(w, w_layout)?);
        let (n, k) = w_layout.shape().dims2()?;
        let mut dims = x_layout.dims().to_vec();
        let last = dims.len() - 1;
        if dims[last] != k {
            bail!("bit_linear: {} features meet a weight of {k}", dims[last]);
        }
        dims[last] = n;

        let mut w_codes = vec![0f32; w.len()];
        let mut column_scales = Vec::with_capacity(n);
        let mut first = 0;
        for rows in &self.features {
            let part = first * k..(first + rows) * k;
            let b = ternary_codes(&w[part.clone()], &mut w_codes[part]);
            column_scales.resize(first + rows, b);
            first += rows;
        }

        let tokens = x.len() / k;
        let block = rows_per_product(tokens);
        let mut y = vec![0f32; tokens * n];
        let mut x_dequantised = vec![0f32; x.len()];
        y.par_chunks_mut(block * n)
            .zip(x_dequantised.par_chunks_mut(block * k))
            .zip(x.par_chunks(block * k))
            .for_each(|((y, x_dequantised), x)| {
                let rows = x.len() / k;
                let mut codes = vec![0f32; x.len()];
                let mut scales = vec![0f32; rows];
                quantise_tokens(&mut codes, x_dequantised, &mut scales, x, k);
                // Integer operands: the f32 sums are exact while |sum| < 2^24.
                let lhs = Mat::new(&codes, rows, k);
                let rhs = Mat::new(&w_codes, n, k).t();
                matmul(y, n, Write::Replace, 1.0, lhs, rhs, Threads::One);
                dequantise_sums(y, &column_scales, &scales);
            });

        if self.keep {
            w_codes
                .par_chunks_mut(k)
                .zip(&column_scales)
                .for_each(|(row, b)| row.iter_mut().for_each(|code| *code *= b));
            *self.saved.lock().unwrap_or_else(|e| e.into_inner()) = Some(Saved {
                x_dequantised,
                w_dequantised: w_codes,
            });
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }

    /// dX = dY . (wq * b), dW = dY^T . (xq / s): straight through both roundings.
    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let saved = self.saved.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(saved) = saved else {
            bail!("bit_linear: backward ran twice, or without a forward that keeps its codes");
        };
        let dy = dy.contiguous()?;
        let read = Reader::new(&dy);
        let dys = read.slice()?;
        let (n, k) = w.dims2()?;
        let tokens = dys.len() / n;

        let block = rows_per_product(tokens);
        let mut dx = vec![0f32; tokens * k];
        dx.par_chunks_mut(block * k)
            .zip(dys.par_chunks(block * n))
            .for_each(|(dx, dy)| {
                let lhs = Mat::new(dy, dy.len() / n, n);
                let rhs = Mat::new(&saved.w_dequantised, n, k);
                matmul(dx, k, Write::Replace, 1.0, lhs, rhs, Threads::One);
            });
        let mut dw = vec![0f32; n * k];
        let lhs = Mat::new(dys, tokens, n).t();
        let rhs = Mat::new(&saved.x_dequantised, tokens, k);
        matmul(&mut dw, k, Write::Replace, 1.0, lhs, rhs, Threads::All);
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        let dw = Tensor::from_vec(dw, w.shape(), w.device())?;
        Ok((Some(dx), Some(dw)))
    }
}

pub fn bit_linear(x: &Tensor, weights: &[&Tensor]) -> Result<Tensor> {
    let features = weights
        .iter()
        .map(|w| w.dim(0))
        .collect::<Result<Vec<_>>>()?;
    let stacked = match weights {
        [one] => one.contiguous()?,
        several => Tensor::cat(several, 0)?,
    };
    let op = BitLinear {
        features,
        saved: Mutex::new(None),
        keep: x.track_op() || stacked.track_op(),
    };
    x.contiguous()?.apply_op2(&stacked, op)
}
