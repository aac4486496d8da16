//! The operations a layer is made of, spelt in candle primitives: any device, gradients by candle.
//! The oracle of the faster passes on the CPU (`super::cpu`) and on a GPU (`crate::cuda`).

use candle_core::{D, Device, Result, Tensor};
use candle_nn::ops::softmax;

use super::config::{Activation, BitNetConfig};
use super::decoder::LayerCache;
use crate::quant::ternary::EPSILON;

/// Head layout of grouped-query attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Heads {
    pub fn of(config: &BitNetConfig) -> Self {
        Self {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim(),
        }
    }

    /// Features of the fused query, key and value projection.
    pub fn qkv_features(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Rotary tables: `cos` and `sin` of position x theta^(-2i/head_dim), (max_seq_len,
/// head_dim / 2), f32 angles as `transformers` computes them (RoFormer, arXiv 2104.09864).
#[derive(Clone, Debug)]
pub struct Rope {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

/// The tables of [`Rope`] on the host: cos, sin.
pub fn rope_tables(head_dim: usize, max_seq_len: usize, theta: f64) -> [Vec<f32>; 2] {
    let inverse_frequency: Vec<f32> = (0..head_dim / 2)
        .map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64) as f32)
        .collect();
    let table = |f: fn(f64) -> f64| {
        (0..max_seq_len)
            .flat_map(|position| {
                inverse_frequency
                    .iter()
                    .map(move |frequency| f((position as f32 * frequency) as f64) as f32)
            })
            .collect()
    };
    [table(f64::cos), table(f64::sin)]
}

impl Rope {
    pub fn new(head_dim: usize, max_seq_len: usize, theta: f64, device: &Device) -> Result<Self> {
        let [cos, sin] = rope_tables(head_dim, max_seq_len, theta);
        let shape = (max_seq_len, head_dim / 2);
        Ok(Self {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
        })
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467).
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
    let absmax = absmax.maximum(EPSILON as f64)?;
    let s = absmax.ones_like()?.affine(127.0, 0.0)?.div(&absmax)?;
    let scaled = x.broadcast_mul(&s)?;
    let codes = round_half_even(&scaled)?.clamp(-128.0, 127.0)?;
    Ok((straight_through(&codes, &scaled)?, s))
}

/// Ternary codes as f32 with their STE gradient, and the scale b: (N, K), scalar.
fn ternary_codes(w: &Tensor) -> Result<(Tensor, Tensor)> {
    let b = w.detach().abs()?.mean_all()?.maximum(EPSILON as f64)?;
    let scaled = w.broadcast_div(&b)?;
    let codes = round_half_even(&scaled.clamp(-1.0, 1.0)?)?;
    Ok((straight_through(&codes, &scaled)?, b))
}

/// BitLinear over one or several weights that share the input: x (..., K), weights (N_i, K)
/// -> (..., sum N_i). Int8 codes per token, ternary codes per weight, exact integer sums,
/// straight-through gradients ("The Era of 1-bit LLMs: Training Tips, Code and FAQ").
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

/// Rotates pairs (i, i + head_dim/2) of x (..., seq, head_dim), of positions from `first` on.
fn rotate(x: &Tensor, rope: &Rope, first: usize) -> Result<Tensor> {
    let (seq, half) = (x.dim(D::Minus2)?, x.dim(D::Minus1)? / 2);
    let cos = rope.cos.narrow(0, first, seq)?;
    let sin = rope.sin.narrow(0, first, seq)?;
    let x1 = x.narrow(D::Minus1, 0, half)?;
    let x2 = x.narrow(D::Minus1, half, half)?;
    let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    Tensor::cat(&[y1, y2], D::Minus1)
}

/// (seq, past + seq), queries of positions from `past` on: 0 where key <= query, -inf elsewhere.
fn causal_mask(seq: usize, past: usize, device: &Device) -> Result<Tensor> {
    let keys = past + seq;
    let mask: Vec<f32> = (0..seq * keys)
        .map(|i| {
            if i % keys <= past + i / keys {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    Tensor::from_vec(mask, (seq, keys), device)
}

/// Rotary embedding and causal grouped-query attention: qkv (batch, seq, qkv_features)
/// -> (batch, seq, heads * head_dim). Scores are scaled by 1/sqrt(head_dim). The tokens follow those
/// of `cache` if there is one, and are added to it.
pub fn attention(
    qkv: &Tensor,
    heads: Heads,
    rope: &Rope,
    cache: Option<&mut LayerCache>,
) -> Result<Tensor> {
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
    let past = cache.as_ref().map_or(0, |cache| cache.tokens());
    let q = rotate(&split(0, heads)?, rope, past)?;
    let k = rotate(&split(heads, kv_heads)?, rope, past)?;
    let v = split(heads + kv_heads, kv_heads)?;
    let [k, v] = match cache {
        Some(cache) => cache.append([&k, &v])?,
        None => [k, v],
    };
    let keys = past + seq;
    // The query heads of a group stack along the sequence, so that keys need no copies.
    let group = heads / kv_heads;
    let q = q.reshape((batch, kv_heads, group * seq, head_dim))?;
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (head_dim as f64).powf(-0.5))?;
    let scores = scores
        .reshape((batch, kv_heads, group, seq, keys))?
        .broadcast_add(&causal_mask(seq, past, qkv.device())?)?;
    let weights = softmax(&scores, D::Minus1)?.reshape((batch, kv_heads, group * seq, keys))?;
    weights
        .matmul(&v.contiguous()?)?
        .reshape((batch, heads, seq, head_dim))?
        .transpose(1, 2)?
        .reshape((batch, seq, heads * head_dim))
}

/// `act(gate) * up`: gate_up (..., 2I), gate first -> (..., I).
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
