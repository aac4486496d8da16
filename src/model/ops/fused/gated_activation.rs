use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::storage::{Reader, slice};
use crate::model::Activation;
use crate::simd::{exp, vectorized};

struct GatedActivation {
    activation: Activation,
}

/// Value and derivative of the gate's activation.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
}

#[inline(always)]
fn relu2(x: f32) -> (f32, f32) {
    // Not `max`: it would turn NaN into 0.
    let positive = if x < 0.0 { 0.0 } else { x };
    (positive * positive, 2.0 * positive)
}

#[inline(always)]
fn forward_with(y: &mut [f32], gate_up: &[f32], features: usize, act: impl Fn(f32) -> (f32, f32)) {
    let rows = gate_up.chunks_exact(2 * features);
    for (y, row) in y.chunks_exact_mut(features).zip(rows) {
        let (gate, up) = row.split_at(features);
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = act(*g).0 * u;
        }
    }
}

#[inline(always)]
fn backward_with(
    dgate_up: &mut [f32],
    gate_up: &[f32],
    dy: &[f32],
    features: usize,
    act: impl Fn(f32) -> (f32, f32),
) {
    let rows = dgate_up
        .chunks_exact_mut(2 * features)
        .zip(gate_up.chunks_exact(2 * features))
        .zip(dy.chunks_exact(features));
    for ((gradient, source), dy) in rows {
        let (dgate, dup) = gradient.split_at_mut(features);
        let (gate, up) = source.split_at(features);
        let columns = dgate.iter_mut().zip(dup).zip(gate).zip(up).zip(dy);
        for ((((dgate, dup), gate), up), dy) in columns {
            let (value, derivative) = act(*gate);
            *dgate = dy * up * derivative;
            *dup = dy * value;
        }
    }
}

vectorized! {
    fn forward_rows(y: &mut [f32], gate_up: &[f32], features: usize, activation: Activation) {
        match activation {
            Activation::Silu => forward_with(y, gate_up, features, silu),
            Activation::Relu2 => forward_with(y, gate_up, features, relu2),
        }
    }
}

vectorized! {
    fn backward_rows(
        dgate_up: &mut [f32],
        gate_up: &[f32],
        dy: &[f32],
        features: usize,
        activation: Activation,
    ) {
        match activation {
            Activation::Silu => backward_with(dgate_up, gate_up, dy, features, silu),
            Activation::Relu2 => backward_with(dgate_up, gate_up, dy, features, relu2),
        }
    }
}

impl CustomOp1 for GatedActivation {
    fn name(&self) -> &'static str {
        "gated_activation"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let gate_up = slice(gate_up, layout)?;
        let mut dims = layout.dims().to_vec();
        let last = dims.len() - 1;
        dims[last] /= 2;
        let features = dims[last];
        let mut y = vec![0f32; gate_up.len() / 2];
        y.par_chunks_mut(ROWS_PER_TASK * features)
            .zip(gate_up.par_chunks(ROWS_PER_TASK * 2 * features))
            .for_each(|(y, gate_up)| forward_rows(y, gate_up, features, self.activation));
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(&self, gate_up: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let features = dy.dim(D::Minus1)?;
        let (read, dy_read) = (Reader::new(gate_up), Reader::new(&dy));
        let (source, dys) = (read.slice()?, dy_read.slice()?);
        let mut gradient = vec![0f32; source.len()];
        gradient
            .par_chunks_mut(ROWS_PER_TASK * 2 * features)
            .zip(source.par_chunks(ROWS_PER_TASK * 2 * features))
            .zip(dys.par_chunks(ROWS_PER_TASK * features))
            .for_each(|((gradient, source), dy)| {
                backward_rows(gradient, source, dy, features, self.activation);
            });
        Tensor::from_vec(gradient, gate_up.shape(), gate_up.device()).map(Some)
    }
}

pub fn gated_activation(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    gate_up
        .contiguous()?
        .apply_op1(GatedActivation { activation })
}
