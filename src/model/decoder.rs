//! The decoder in candle operations, over projections of either kind: masters that are quantised
//! as they are used, or packed ternary weights.

use candle_core::{Result, Tensor};

use super::ops::{self, Heads, Rope};
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
pub struct Layer<L> {
    pub input_layernorm: Tensor,
    pub qkv: L,
    pub attn_sub_norm: Tensor,
    pub o: L,
    pub post_attention_layernorm: Tensor,
    pub gate_up: L,
    pub ffn_sub_norm: Tensor,
    pub down: L,
}

/// What all layers have in common.
#[derive(Debug)]
struct Block {
    heads: Heads,
    rope: Rope,
    activation: Activation,
    eps: f64,
}

/// Rotated keys and values of the tokens before, for each layer.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
}

/// Keys and values, (batch, kv_heads, capacity, head_dim), of which `len` tokens are filled.
#[derive(Debug)]
pub struct LayerCache {
    tensors: Option<[Tensor; 2]>,
    capacity: usize,
    len: usize,
}

impl Cache {
    /// With room for `capacity` tokens.
    pub fn new(layers: usize, capacity: usize) -> Self {
        let layer = || LayerCache {
            tensors: None,
            capacity,
            len: 0,
        };
        Self {
            layers: (0..layers).map(|_| layer()).collect(),
        }
    }

    /// Forgets all tokens but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.len = layer.len.min(len);
        }
    }
}

impl LayerCache {
    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.len
    }

    /// Appends keys and values (batch, kv_heads, seq, head_dim); returns all there are.
    pub fn append(&mut self, new: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        if self.tensors.is_none() {
            let (batch, kv_heads, _, head_dim) = new[0].dims4()?;
            let shape = (batch, kv_heads, self.capacity, head_dim);
            let empty = || Tensor::zeros(shape, new[0].dtype(), new[0].device());
            self.tensors = Some([empty()?, empty()?]);
        }
        let tensors = self.tensors.as_ref().expect("just made");
        let (start, seq) = (self.len, new[0].dim(2)?);
        for (all, new) in tensors.iter().zip(new) {
            all.slice_set(&new.contiguous()?, 2, start)?;
        }
        self.len += seq;
        let [k, v] = tensors;
        Ok([k.narrow(2, 0, self.len)?, v.narrow(2, 0, self.len)?])
    }
}

impl<L: BitLinear> Decoder<L> {
    pub fn new(
        config: &BitNetConfig,
        embed_tokens: Tensor,
        layers: Vec<Layer<L>>,
        norm: Tensor,
        lm_head: Tensor,
        rope: Rope,
    ) -> Self {
        Self {
            embed_tokens,
            layers,
            norm,
            lm_head,
            block: Block {
                heads: Heads::of(config),
                rope,
                activation: config.activation,
                eps: config.rms_norm_eps,
            },
        }
    }

    /// Normalised final activations: ids (batch, seq) u32, which follow those of the cache if there
    /// is one -> (batch, seq, hidden).
    pub fn hidden(&self, ids: &Tensor, mut cache: Option<&mut Cache>) -> Result<Tensor> {
        let (batch, seq) = ids.dims2()?;
        let hidden_size = self.embed_tokens.dim(1)?;
        let mut x = self
            .embed_tokens
            .index_select(&ids.flatten_all()?, 0)?
            .reshape((batch, seq, hidden_size))?;
        for (i, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| &mut cache.layers[i]);
            x = layer.forward(&x, &self.block, cache)?;
        }
        ops::rms_norm(&x, &self.norm, self.block.eps)
    }

    /// hidden (batch, seq, hidden) -> logits (batch * seq, vocab).
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        hidden.flatten(0, 1)?.matmul(&self.lm_head.t()?)
    }
}

impl<L: BitLinear> Layer<L> {
    /// x (batch, seq, hidden) -> (batch, seq, hidden).
    fn forward(&self, x: &Tensor, block: &Block, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let n = ops::rms_norm(x, &self.input_layernorm, block.eps)?;
        let a = ops::attention(&self.qkv.forward(&n)?, block.heads, &block.rope, cache)?;
        let a = ops::rms_norm(&a, &self.attn_sub_norm, block.eps)?;
        let h = (x + self.o.forward(&a)?)?;

        let n = ops::rms_norm(&h, &self.post_attention_layernorm, block.eps)?;
        let f = ops::gated_activation(&self.gate_up.forward(&n)?, block.activation)?;
        let f = ops::rms_norm(&f, &self.ffn_sub_norm, block.eps)?;
        h + self.down.forward(&f)?
    }
}
