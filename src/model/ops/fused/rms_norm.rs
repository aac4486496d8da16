use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::storage::{Reader, slice};
use crate::simd::{dot, vectorized};

struct RmsNorm {
    eps: f32,
}

/// 1 / sqrt(mean(x^2) + eps)
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    (dot(x, x) / x.len() as f32 + eps).sqrt().recip()
}

vectorized! {
    /// Rows of y = x / rms(x) * weight.
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
    /// dx = r * g - x * r^3 * (g . x) / n,  dw += dy * x * r.
    fn backward_rows(
        dx: &mut [f32],
        dw: &mut [f32],
        dy: &[f32],
        x: &[f32],
        weight: &[f32],
        eps: f32,
    ) {
        let features = weight.len();
        let rows = dx
            .chunks_exact_mut(features)
            .zip(x.chunks_exact(features))
            .zip(dy.chunks_exact(features));
        for ((dx, x), dy) in rows {
            let r = inverse_rms(x, eps);
            let columns = dx.iter_mut().zip(dw.iter_mut()).zip(dy).zip(x).zip(weight);
            for ((((dx, dw), dy), x), w) in columns {
                *dx = dy * w;
                *dw += dy * x * r;
            }
            let shrink = dot(dx, x) * r * r * r / features as f32;
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx = r * *dx - x * shrink;
            }
        }
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
        let features = weight.len();
        let mut y = vec![0f32; x.len()];
        let block = ROWS_PER_TASK * features;
        y.par_chunks_mut(block)
            .zip(x.par_chunks(block))
            .for_each(|(y, x)| forward_rows(y, x, weight, self.eps));
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (x_read, w_read, dy_read) = (Reader::new(x), Reader::new(weight), Reader::new(&dy));
        let (xs, ws, dys) = (x_read.slice()?, w_read.slice()?, dy_read.slice()?);
        let features = ws.len();
        let block = ROWS_PER_TASK * features;
        let mut dx = vec![0f32; xs.len()];
        let partial_dw: Vec<Vec<f32>> = dx
            .par_chunks_mut(block)
            .zip(xs.par_chunks(block))
            .zip(dys.par_chunks(block))
            .map(|((dx, x), dy)| {
                let mut dw = vec![0f32; features];
                backward_rows(dx, &mut dw, dy, x, ws, self.eps);
                dw
            })
            .collect();
        let mut dw = vec![0f32; features];
        for partial in &partial_dw {
            for (sum, part) in dw.iter_mut().zip(partial) {
                *sum += part;
            }
        }
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        let dw = Tensor::from_vec(dw, weight.shape(), x.device())?;
        Ok((Some(dx), Some(dw)))
    }
}

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    x.contiguous()?
        .apply_op2(&weight.contiguous()?, RmsNorm { eps: eps as f32 })
}
