//! The formulas in candle primitives: any device, gradients by candle.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::ops::softmax;

use super::{Heads, Rope};
use crate::model::Activation;

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + eps)?.sqrt()?)?
        .broadcast_mul(weight)
}

/// Rounds half to even, which `Tensor::round` does not. Adding and subtracting 1.5 * 2^23 leaves
/// the rounding to the f32 addition; right for |x| < 2^22.
fn round_half_even(x: &Tensor) -> Result<Tensor> {
    const MAGIC: f64 = 12_582_912.0;
    x.affine(1.0, MAGIC)?.affine(1.0, -MAGIC)
}

/// The value of `value` with the gradient of `through` (the difference added is exactly 0).
fn straight_through(value: &Tensor, through: &Tensor) -> Result<Tensor> {
    value.detach().add(&through.sub(&through.detach())?)
}

/// Int8 activation codes as f32 with their STE gradient, and the scale s: (..., K), (..., 1).
fn activation_codes(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let absmax = x.detach().abs()?.max_keepdim(D::Minus1)?;
    let s = absmax.maximum(1e-5)?.recip()?.affine(127.0, 0.0)?;
    let scaled = x.broadcast_mul(&s)?;
    let codes = round_half_even(&scaled)?.clamp(-128.0, 127.0)?;
    Ok((straight_through(&codes, &scaled)?, s))
}

/// Ternary codes as f32 with their STE gradient, and the scale b: (N, K), scalar.
fn ternary_codes(w: &Tensor) -> Result<(Tensor, Tensor)> {
    let b = w.detach().abs()?.mean_all()?.maximum(1e-5)?;
    let scaled = w.broadcast_div(&b)?;
    let codes = round_half_even(&scaled.clamp(-1.0, 1.0)?)?;
    Ok((straight_through(&codes, &scaled)?, b))
}

pub fn bit_linear(x: &Tensor, weights: &[&Tensor]) -> Result<Tensor> {
    let (xq, s) = activation_codes(x)?;
    let rows = xq.flatten_to(xq.rank() - 2)?;
    let outputs = weights
        .iter()
        .map(|w| {
            let (wq, b) = ternary_codes(w)?;
            rows.matmul(&wq.t()?)?.broadcast_mul(&b)
        })
        .collect::<Result<Vec<_>>>()?;
    let sums = Tensor::cat(&outputs, D::Minus1)?;
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = sums.dim(1)?;
    sums.reshape(shape)?.broadcast_div(&s)
}

/// Rotates pairs (i, i + head_dim/2) of x (..., seq, head_dim).
fn rotate(x: &Tensor, rope: &Rope) -> Result<Tensor> {
    let (seq, half) = (x.dim(D::Minus2)?, x.dim(D::Minus1)? / 2);
    let cos = rope.cos.narrow(0, 0, seq)?;
    let sin = rope.sin.narrow(0, 0, seq)?;
    let x1 = x.narrow(D::Minus1, 0, half)?;
    let x2 = x.narrow(D::Minus1, half, half)?;
    let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    Tensor::cat(&[y1, y2], D::Minus1)
}

/// (seq, seq): 0 where key <= query, -inf elsewhere.
fn causal_mask(seq: usize, device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..seq * seq)
        .map(|i| {
            if i % seq <= i / seq {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    Tensor::from_vec(mask, (seq, seq), device)
}

pub fn attention(qkv: &Tensor, heads: Heads, rope: &Rope) -> Result<Tensor> {
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = heads;
    let (batch, seq, _) = qkv.dims3()?;
    let split = |first: usize, count: usize| {
        qkv.narrow(2, first * head_dim, count * head_dim)?
            .reshape((batch, seq, count, head_dim))?
            .transpose(1, 2)?
            .contiguous()
    };
    let q = rotate(&split(0, heads)?, rope)?;
    let k = rotate(&split(heads, kv_heads)?, rope)?;
    let v = split(heads + kv_heads, kv_heads)?;
    // The query heads of a group stack along the sequence, so that keys need no copies.
    let group = heads / kv_heads;
    let q = q.reshape((batch, kv_heads, group * seq, head_dim))?;
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (head_dim as f64).powf(-0.5))?;
    let scores = scores
        .reshape((batch, kv_heads, group, seq, seq))?
        .broadcast_add(&causal_mask(seq, qkv.device())?)?;
    let weights = softmax(&scores, D::Minus1)?.reshape((batch, kv_heads, group * seq, seq))?;
    weights
        .matmul(&v)?
        .reshape((batch, heads, seq, head_dim))?
        .transpose(1, 2)?
        .reshape((batch, seq, heads * head_dim))
}

pub fn gated_activation(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let features = gate_up.dim(D::Minus1)? / 2;
    let gate = gate_up.narrow(D::Minus1, 0, features)?;
    let up = gate_up.narrow(D::Minus1, features, features)?;
    let gate = match activation {
        Activation::Silu => gate.silu()?,
        Activation::Relu2 => gate.relu()?.sqr()?,
    };
    gate.mul(&up)
}

pub fn lm_loss(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    candle_nn::loss::cross_entropy(&hidden.matmul(&weight.t()?)?, targets)
}
