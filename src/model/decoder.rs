//! The decoder in candle operations, over projections of either kind: masters that are quantised
//! as they are used, or packed ternary weights.

use candle_core::{Result, Tensor};

use super::ops::{self, Heads, Rope};
use super::weights::{LayerWeights, Weights};
use super::{Activation, BitNetConfig};

/// One BitLinear, or several that share their input, side by side.
pub trait BitLinear {
    /// x (..., K) -> (..., N).
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
}

/// A whole model. Norms (features,), embedding and LM head (vocab, hidden).
#[derive(Debug)]
pub struct Decoder<L> {
    embed_tokens: Tensor,
    layers: Vec<Layer<L>>,
    norm: Tensor,
    lm_head: Tensor,
    block: Block,
}

#[derive(Debug)]
struct Layer<L> {
    input_layernorm: Tensor,
    qkv: L,
    attn_sub_norm: Tensor,
    o: L,
    post_attention_layernorm: Tensor,
    gate_up: L,
    ffn_sub_norm: Tensor,
    down: L,
}

/// What all layers have in common.
#[derive(Debug)]
struct Block {
    heads: Heads,
    rope: Rope,
    activation: Activation,
    eps: f64,
}

impl<L: BitLinear> Decoder<L> {
    /// Over the weights of a model; `bit_linear` makes one of several weights (N_i, K).
    ///
    /// # Errors
    /// Those of `bit_linear`.
    pub fn new<E>(
        config: &BitNetConfig,
        weights: &Weights<Tensor>,
        rope: &Rope,
        bit_linear: impl Fn(&[&Tensor]) -> std::result::Result<L, E>,
    ) -> std::result::Result<Self, E> {
        let layer = |w: &LayerWeights<Tensor>| {
            Ok(Layer {
                input_layernorm: w.input_layernorm.clone(),
                qkv: bit_linear(&[&w.q_proj, &w.k_proj, &w.v_proj])?,
                attn_sub_norm: w.attn_sub_norm.clone(),
                o: bit_linear(&[&w.o_proj])?,
                post_attention_layernorm: w.post_attention_layernorm.clone(),
                gate_up: bit_linear(&[&w.gate_proj, &w.up_proj])?,
                ffn_sub_norm: w.ffn_sub_norm.clone(),
                down: bit_linear(&[&w.down_proj])?,
            })
        };
        Ok(Self {
            embed_tokens: weights.embed_tokens.clone(),
            layers: weights
                .layers
                .iter()
                .map(layer)
                .collect::<std::result::Result<_, E>>()?,
            norm: weights.norm.clone(),
            lm_head: weights.lm_head().clone(),
            block: Block {
                heads: Heads::of(config),
                rope: rope.clone(),
                activation: config.activation,
                eps: config.rms_norm_eps,
            },
        })
    }

    /// ids (batch, seq) u32 -> logits (batch * seq, vocab).
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, seq) = ids.dims2()?;
        let hidden_size = self.embed_tokens.dim(1)?;
        let mut x = self
            .embed_tokens
            .index_select(&ids.flatten_all()?, 0)?
            .reshape((batch, seq, hidden_size))?;
        for layer in &self.layers {
            x = layer.forward(&x, &self.block)?;
        }
        let hidden = ops::rms_norm(&x, &self.norm, self.block.eps)?;
        hidden.flatten(0, 1)?.matmul(&self.lm_head.t()?)
    }
}

impl<L: BitLinear> Layer<L> {
    /// x (batch, seq, hidden) -> (batch, seq, hidden).
    fn forward(&self, x: &Tensor, block: &Block) -> Result<Tensor> {
        let n = ops::rms_norm(x, &self.input_layernorm, block.eps)?;
        let a = ops::attention(&self.qkv.forward(&n)?, block.heads, &block.rope)?;
        let a = ops::rms_norm(&a, &self.attn_sub_norm, block.eps)?;
        let h = (x + self.o.forward(&a)?)?;

        let n = ops::rms_norm(&h, &self.post_attention_layernorm, block.eps)?;
        let f = ops::gated_activation(&self.gate_up.forward(&n)?, block.activation)?;
        let f = ops::rms_norm(&f, &self.ffn_sub_norm, block.eps)?;
        h + self.down.forward(&f)?
    }
}
