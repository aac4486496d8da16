//! The BitNet b1.58 decoder (arXiv 2402.17764; norm placement of 2B4T, arXiv 2504.12285):
//!
//! ```text
//! h = x + o_proj(attn_sub_norm(attention(q, k, v_proj(input_layernorm(x)))))
//! y = h + down_proj(ffn_sub_norm(act(gate_proj(n)) * up_proj(n))),  n = post_attention_layernorm(h)
//! ```
//!
//! Written here in candle operations, for any device; on the CPU, whatever needs no graph takes
//! the faster passes of [`super::cpu`].

use candle_core::{CpuStorage, Device, Layout, Storage, StorageRef, Tensor};

use super::cpu;
use super::decoder::{BitLinear, Decoder, Layer};
use super::ops::{self, Heads, Rope};
use super::weights::{LayerWeights, Weights};
use super::{BitNetConfig, Parameters};
use crate::{Error, Result};

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
    weights: Weights<Tensor>,
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
        let weights = parameters.by_place(config)?;
        let rope = Rope::new(
            config.head_dim(),
            config.max_seq_len,
            config.rope_theta,
            weights.norm.device(),
        )?;
        Ok(Self {
            config: config.clone(),
            parameters,
            weights,
            rope,
        })
    }

    pub fn config(&self) -> &BitNetConfig {
        &self.config
    }

    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    pub fn device(&self) -> &Device {
        self.weights.norm.device()
    }

    /// Logits, and the loss when labels are given: ids and labels (batch, seq) u32, label i being
    /// the token that follows id i. candle can differentiate both. Where no gradient is wanted,
    /// [`Self::logits`] and [`Self::loss`] are faster; for training there is
    /// [`Self::loss_and_gradients`].
    ///
    /// # Errors
    /// No tokens, or a sequence longer than `max_seq_len`; labels of another shape; an id or label
    /// outside the vocabulary.
    pub fn forward(&self, ids: &Tensor, labels: Option<&Tensor>) -> Result<Output> {
        check_ids(&self.config, ids, labels)?;
        let (batch, seq) = ids.dims2()?;
        let logits = self.graph(&self.weights, ids)?;
        let loss = labels
            .map(|labels| cross_entropy(&logits, labels))
            .transpose()?;
        let logits = logits.reshape((batch, seq, self.config.vocab_size))?;
        Ok(Output { logits, loss })
    }

    /// Logits (batch, seq, vocab) without a graph. Arguments and errors as in [`Self::forward`].
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        check_ids(&self.config, ids, None)?;
        let (batch, seq) = ids.dims2()?;
        let weights = self.weights.map(Tensor::detach);
        let logits = if self.device().is_cpu() {
            let ids = to_ids(ids)?;
            let hidden = self.on_cpu(seq, |network| network.hidden(&ids));
            let shape = (batch * seq, self.config.hidden_size);
            Tensor::from_vec(hidden, shape, self.device())?.matmul(&weights.lm_head().t()?)?
        } else {
            self.graph(&weights, ids)?
        };
        Ok(logits.reshape((batch, seq, self.config.vocab_size))?)
    }

    /// Mean cross-entropy in nats, without a graph. Arguments and errors as in [`Self::forward`].
    pub fn loss(&self, ids: &Tensor, labels: &Tensor) -> Result<f64> {
        check_ids(&self.config, ids, Some(labels))?;
        if self.device().is_cpu() {
            let (seq, ids, labels) = (ids.dim(1)?, to_ids(ids)?, to_ids(labels)?);
            return Ok(self.on_cpu(seq, |network| network.loss(&ids, &labels)));
        }
        let logits = self.graph(&self.weights.map(Tensor::detach), ids)?;
        Ok(cross_entropy(&logits, labels)?.to_scalar::<f32>()? as f64)
    }

    /// Mean cross-entropy in nats, and the gradient of `scale` times it by every weight, in the
    /// order of [`Self::parameters`]. Arguments and errors as in [`Self::forward`].
    pub fn loss_and_gradients(
        &self,
        ids: &Tensor,
        labels: &Tensor,
        scale: f64,
    ) -> Result<(f64, Vec<Tensor>)> {
        check_ids(&self.config, ids, Some(labels))?;
        let parameters = self.parameters.iter();
        if self.device().is_cpu() {
            let (seq, ids, labels) = (ids.dim(1)?, to_ids(ids)?, to_ids(labels)?);
            let (loss, gradients) = self.on_cpu(seq, |network| {
                network.loss_and_gradients(&ids, &labels, scale as f32)
            });
            let gradients = parameters
                .zip(gradients.into_values())
                .map(|(p, values)| Ok(Tensor::from_vec(values, p.var.shape(), self.device())?))
                .collect::<Result<_>>()?;
            return Ok((loss, gradients));
        }
        let loss = cross_entropy(&self.graph(&self.weights, ids)?, labels)?;
        let mut store = (&loss * scale)?.backward()?;
        let gradients = parameters
            .map(|p| {
                let missing = || Error::training(format!("no gradient reached {}", p.name));
                store.remove(&p.var).ok_or_else(missing)
            })
            .collect::<Result<_>>()?;
        Ok((loss.to_scalar::<f32>()? as f64, gradients))
    }

    /// The network in candle operations: ids (batch, seq) u32 -> logits (batch * seq, vocab).
    fn graph(&self, weights: &Weights<Tensor>, ids: &Tensor) -> candle_core::Result<Tensor> {
        let decoder = Decoder::new(
            &self.config,
            weights.embed_tokens.clone(),
            weights.layers.iter().map(masters).collect(),
            weights.norm.clone(),
            weights.lm_head().clone(),
            self.rope.clone(),
        );
        decoder.logits(&decoder.hidden(ids, None)?)
    }

    /// Runs `pass` over sequences of `seq` tokens with the weights borrowed.
    fn on_cpu<T>(&self, seq: usize, pass: impl FnOnce(cpu::Network) -> T) -> T {
        let read = self.weights.map(Tensor::storage_and_layout);
        let (cos, sin) = (
            self.rope.cos.storage_and_layout(),
            self.rope.sin.storage_and_layout(),
        );
        pass(cpu::Network {
            weights: read.map(f32_slice),
            heads: Heads::of(&self.config),
            activation: self.config.activation,
            eps: self.config.rms_norm_eps as f32,
            seq,
            cos: f32_slice(&cos),
            sin: f32_slice(&sin),
        })
    }
}

/// Master weights that share their input, quantised as they are used.
struct Masters(Vec<Tensor>);

fn masters(w: &LayerWeights<Tensor>) -> Layer<Masters> {
    let masters = |parts: &[&Tensor]| Masters(parts.iter().map(|&part| part.clone()).collect());
    Layer {
        input_layernorm: w.input_layernorm.clone(),
        qkv: masters(&[&w.q_proj, &w.k_proj, &w.v_proj]),
        attn_sub_norm: w.attn_sub_norm.clone(),
        o: masters(&[&w.o_proj]),
        post_attention_layernorm: w.post_attention_layernorm.clone(),
        gate_up: masters(&[&w.gate_proj, &w.up_proj]),
        ffn_sub_norm: w.ffn_sub_norm.clone(),
        down: masters(&[&w.down_proj]),
    }
}

impl BitLinear for Masters {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::bit_linear(x, &self.0.iter().collect::<Vec<_>>())
    }
}

/// Errors as in [`BitNetTransformer::forward`].
fn check_ids(config: &BitNetConfig, ids: &Tensor, labels: Option<&Tensor>) -> Result<()> {
    let (batch, seq) = ids.dims2()?;
    let max = config.max_seq_len;
    if seq > max {
        return Err(Error::usage(format!(
            "a sequence of {seq} tokens exceeds model.max_seq_len ({max})"
        )));
    }
    if batch * seq == 0 {
        return Err(Error::usage(format!(
            "no tokens in ids of shape ({batch}, {seq})"
        )));
    }
    if let Some(labels) = labels
        && labels.dims() != ids.dims()
    {
        return Err(Error::usage(format!(
            "labels of shape {:?} do not match ids of shape {:?}",
            labels.dims(),
            ids.dims()
        )));
    }
    let vocab = config.vocab_size;
    for tensor in [Some(ids), labels].into_iter().flatten() {
        let largest = to_ids(tensor)?.into_iter().max();
        if let Some(id) = largest.filter(|id| *id as usize >= vocab) {
            return Err(Error::usage(format!(
                "token id {id} is outside the vocabulary of {vocab}"
            )));
        }
    }
    Ok(())
}

fn to_ids(tensor: &Tensor) -> candle_core::Result<Vec<u32>> {
    tensor.flatten_all()?.to_vec1()
}

fn cross_entropy(logits: &Tensor, labels: &Tensor) -> candle_core::Result<Tensor> {
    candle_nn::loss::cross_entropy(logits, &labels.flatten_all()?)
}

/// The values of a tensor on the CPU that this module made.
fn f32_slice<'a>((storage, layout): &'a (StorageRef<'_>, &Layout)) -> &'a [f32] {
    match (&**storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => &values[start..end],
        _ => unreachable!("weights and tables are contiguous f32 tensors"),
    }
}
