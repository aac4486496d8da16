//! The BitNet b1.58 decoder (arXiv 2402.17764; norm placement of 2B4T, arXiv 2504.12285):
//!
//! ```text
//! h = x + o_proj(attn_sub_norm(attention(q, k, v_proj(input_layernorm(x)))))
//! y = h + down_proj(ffn_sub_norm(act(gate_proj(n)) * up_proj(n))),  n = post_attention_layernorm(h)
//! ```

use candle_core::{Device, Tensor};

use super::ops::{self, Heads, Rope};
use super::{Activation, BitNetConfig, Parameters};
use crate::{Error, Result};

#[derive(Clone, Debug)]
struct Layer {
    input_layernorm: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    attn_sub_norm: Tensor,
    o_proj: Tensor,
    post_attention_layernorm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    ffn_sub_norm: Tensor,
    down_proj: Tensor,
    heads: Heads,
    activation: Activation,
    eps: f64,
}

impl Layer {
    /// x (batch, seq, hidden) -> (batch, seq, hidden).
    fn forward(&self, x: &Tensor, rope: &Rope) -> candle_core::Result<Tensor> {
        let n = ops::rms_norm(x, &self.input_layernorm, self.eps)?;
        let qkv = ops::bit_linear(&n, &[&self.q_proj, &self.k_proj, &self.v_proj])?;
        let a = ops::attention(&qkv, self.heads, rope)?;
        let a = ops::rms_norm(&a, &self.attn_sub_norm, self.eps)?;
        let h = (x + ops::bit_linear(&a, &[&self.o_proj])?)?;

        let n = ops::rms_norm(&h, &self.post_attention_layernorm, self.eps)?;
        let gate_up = ops::bit_linear(&n, &[&self.gate_proj, &self.up_proj])?;
        let f = ops::gated_activation(&gate_up, self.activation)?;
        let f = ops::rms_norm(&f, &self.ffn_sub_norm, self.eps)?;
        h + ops::bit_linear(&f, &[&self.down_proj])?
    }
}

/// What a forward pass returns.
#[derive(Clone, Debug)]
pub struct Output {
    /// (batch, seq, vocab), f32.
    pub logits: Tensor,
    /// Mean cross-entropy in nats, scalar; present when labels were given.
    pub loss: Option<Tensor>,
}

/// A BitNet b1.58 language model.
#[derive(Clone, Debug)]
pub struct BitNetTransformer {
    config: BitNetConfig,
    parameters: Parameters,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Tensor,
    rope: Rope,
}

impl BitNetTransformer {
    /// A freshly initialised model; the same seed gives the same weights on every device.
    pub fn new(config: &BitNetConfig, seed: u64, device: &Device) -> Result<Self> {
        config.validate()?;
        Self::with_parameters(config, Parameters::init(config, seed, device)?)
    }

    /// A model over existing weights.
    pub fn with_parameters(config: &BitNetConfig, parameters: Parameters) -> Result<Self> {
        config.validate()?;
        let weight = |name: &str| parameters.tensor(&format!("{name}.weight"));
        let embedding = weight("model.embed_tokens")?;
        let layers = (0..config.layers)
            .map(|i| {
                let weight = |name: &str| weight(&format!("model.layers.{i}.{name}"));
                Ok(Layer {
                    input_layernorm: weight("input_layernorm")?,
                    q_proj: weight("self_attn.q_proj")?,
                    k_proj: weight("self_attn.k_proj")?,
                    v_proj: weight("self_attn.v_proj")?,
                    attn_sub_norm: weight("self_attn.attn_sub_norm")?,
                    o_proj: weight("self_attn.o_proj")?,
                    post_attention_layernorm: weight("post_attention_layernorm")?,
                    gate_proj: weight("mlp.gate_proj")?,
                    up_proj: weight("mlp.up_proj")?,
                    ffn_sub_norm: weight("mlp.ffn_sub_norm")?,
                    down_proj: weight("mlp.down_proj")?,
                    heads: Heads {
                        heads: config.heads,
                        kv_heads: config.kv_heads,
                        head_dim: config.head_dim(),
                    },
                    activation: config.activation,
                    eps: config.rms_norm_eps,
                })
            })
            .collect::<Result<_>>()?;
        let rope = Rope::new(
            config.head_dim(),
            config.max_seq_len,
            config.rope_theta,
            embedding.device(),
        )?;
        Ok(Self {
            norm: weight("model.norm")?,
            lm_head: match config.tie_embeddings {
                true => embedding.clone(),
                false => weight("lm_head")?,
            },
            config: config.clone(),
            embedding,
            layers,
            rope,
            parameters,
        })
    }

    /// A view of the same weights that records nothing for a backward pass: activations are
    /// freed as it goes. Later updates of the weights show in it.
    pub fn for_inference(&self) -> Self {
        let mut view = self.clone();
        let detach = |tensor: &mut Tensor| *tensor = tensor.detach();
        for layer in &mut view.layers {
            for tensor in [
                &mut layer.input_layernorm,
                &mut layer.q_proj,
                &mut layer.k_proj,
                &mut layer.v_proj,
                &mut layer.attn_sub_norm,
                &mut layer.o_proj,
                &mut layer.post_attention_layernorm,
                &mut layer.gate_proj,
                &mut layer.up_proj,
                &mut layer.ffn_sub_norm,
                &mut layer.down_proj,
            ] {
                detach(tensor);
            }
        }
        for tensor in [&mut view.embedding, &mut view.norm, &mut view.lm_head] {
            detach(tensor);
        }
        view
    }

    pub fn config(&self) -> &BitNetConfig {
        &self.config
    }

    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Normalised final activations: ids (batch, seq) u32 -> (batch * seq, hidden).
    fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, seq) = ids.dims2()?;
        if seq > self.config.max_seq_len {
            return Err(Error::usage(format!(
                "a sequence of {seq} tokens exceeds model.max_seq_len ({})",
                self.config.max_seq_len
            )));
        }
        let mut x = self
            .embedding
            .index_select(&ids.flatten_all()?, 0)?
            .reshape((batch, seq, self.config.hidden_size))?;
        for layer in &self.layers {
            x = layer.forward(&x, &self.rope)?;
        }
        let hidden = ops::rms_norm(&x, &self.norm, self.config.rms_norm_eps)?;
        Ok(hidden.flatten(0, 1)?)
    }

    /// Logits, and the loss when labels are given: ids and labels (batch, seq) u32, label i being
    /// the token that follows id i.
    ///
    /// # Errors
    /// A sequence longer than `max_seq_len`; an id or label outside the vocabulary.
    pub fn forward(&self, ids: &Tensor, labels: Option<&Tensor>) -> Result<Output> {
        let (batch, seq) = ids.dims2()?;
        let logits = self.hidden(ids)?.matmul(&self.lm_head.t()?)?;
        let loss = labels
            .map(|labels| candle_nn::loss::cross_entropy(&logits, &labels.flatten_all()?))
            .transpose()?;
        let logits = logits.reshape((batch, seq, self.config.vocab_size))?;
        Ok(Output { logits, loss })
    }

    /// The mean cross-entropy alone, scalar, in nats: what training needs, and on the CPU
    /// without ever holding all logits. Shapes as in [`Self::forward`].
    pub fn loss(&self, ids: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden(ids)?;
        Ok(ops::lm_loss(
            &hidden,
            &self.lm_head,
            &labels.flatten_all()?,
        )?)
    }
}
