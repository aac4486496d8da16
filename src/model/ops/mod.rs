//! The operations a layer is made of. Each exists twice: [`composed`] spells the formula in
//! candle primitives, differentiated by candle, on any device, and is the oracle; [`fused`] is
//! one threaded pass with an explicit backward, for the CPU. The functions here pick.

pub mod composed;
pub mod fused;

use candle_core::{DType, Device, Result, Tensor};

use super::config::Activation;

/// Head layout of grouped-query attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Heads {
    /// Features of the fused query, key and value projection.
    pub fn qkv_features(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Rotary tables: `cos` and `sin` of position x theta^(-2i/head_dim), (max_seq_len,
/// head_dim / 2), f32 angles as `transformers` computes them (RoFormer, arXiv 2104.09864).
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub fn new(head_dim: usize, max_seq_len: usize, theta: f64, device: &Device) -> Result<Self> {
        let half = head_dim / 2;
        let inverse_frequency: Vec<f32> = (0..half)
            .map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64) as f32)
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..max_seq_len)
                .flat_map(|position| {
                    inverse_frequency
                        .iter()
                        .map(move |frequency| f((position as f32 * frequency) as f64) as f32)
                })
                .collect();
            Tensor::from_vec(values, (max_seq_len, half), device)
        };
        Ok(Self {
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
        })
    }
}

fn fusable(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467).
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if fusable(x) {
        fused::rms_norm(x, weight, eps)
    } else {
        composed::rms_norm(x, weight, eps)
    }
}

/// BitLinear over one or several weights that share the input: x (..., K), weights (N_i, K)
/// -> (..., sum N_i). Int8 codes per token, ternary codes per weight, exact integer sums,
/// straight-through gradients.
pub fn bit_linear(x: &Tensor, weights: &[&Tensor]) -> Result<Tensor> {
    if fusable(x) {
        fused::bit_linear(x, weights)
    } else {
        composed::bit_linear(x, weights)
    }
}

/// Rotary embedding and causal grouped-query attention: qkv (batch, seq, qkv_features)
/// -> (batch, seq, heads * head_dim). Scores are scaled by 1/sqrt(head_dim).
pub fn attention(qkv: &Tensor, heads: Heads, rope: &Rope) -> Result<Tensor> {
    if fusable(qkv) {
        fused::attention(qkv, heads, rope)
    } else {
        composed::attention(qkv, heads, rope)
    }
}

/// `act(gate) * up`: gate_up (..., 2I), gate first -> (..., I).
pub fn gated_activation(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    if fusable(gate_up) {
        fused::gated_activation(gate_up, activation)
    } else {
        composed::gated_activation(gate_up, activation)
    }
}

/// Mean cross-entropy in nats of the LM head's prediction: hidden (tokens, K), weight
/// (vocab, K), targets (tokens,) u32 -> scalar. The fused form never holds all logits.
pub fn lm_loss(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if fusable(hidden) {
        fused::lm_loss(hidden, weight, targets)
    } else {
        composed::lm_loss(hidden, weight, targets)
    }
}
