//! The gate of the feed-forward network (SwiGLU of arXiv 2002.05202, or squared ReLU).

use rayon::prelude::*;

use super::ROWS_PER_TASK;
use crate::model::Activation;
use crate::simd::{exp, vectorized};

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
    pub fn forward_rows(y: &mut [f32], gate_up: &[f32], features: usize, activation: Activation) {
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

/// `act(gate) * up`: gate_up (rows, 2 * features), gate first -> (rows, features).
pub fn forward(gate_up: &[f32], features: usize, activation: Activation) -> Vec<f32> {
    let mut y = vec![0f32; gate_up.len() / 2];
    y.par_chunks_mut(ROWS_PER_TASK * features)
        .zip(gate_up.par_chunks(ROWS_PER_TASK * 2 * features))
        .for_each(|(y, gate_up)| forward_rows(y, gate_up, features, activation));
    y
}

/// Gradient of gate_up, (rows, 2 * features), from dy (rows, features).
pub fn backward(gate_up: &[f32], dy: &[f32], features: usize, activation: Activation) -> Vec<f32> {
    let mut gradient = vec![0f32; gate_up.len()];
    gradient
        .par_chunks_mut(ROWS_PER_TASK * 2 * features)
        .zip(gate_up.par_chunks(ROWS_PER_TASK * 2 * features))
        .zip(dy.par_chunks(ROWS_PER_TASK * features))
        .for_each(|((gradient, gate_up), dy)| {
            backward_rows(gradient, gate_up, dy, features, activation);
        });
    gradient
}
