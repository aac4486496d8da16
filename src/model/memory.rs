//! How many bytes a model takes, stored and in training, from the shape alone.

use std::iter::Sum;

use serde::Serialize;

use super::{Activation, BitNetConfig};
use crate::quant::packing::VALUES_PER_WORD;

/// Bytes of a model's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ModelBytes {
    /// Projections as 2-bit codes in whole words a row and one f32 scale each, the rest in bf16.
    pub packed: u64,
    /// Everything in bf16.
    pub bf16: u64,
}

impl ModelBytes {
    pub fn of(config: &BitNetConfig) -> Self {
        let words = |cols: usize| cols.div_ceil(VALUES_PER_WORD);
        let projections = config.projections();
        let layer = projections.map(|p| 4 * (p.rows * words(p.cols) + 1));
        let ternary = config.layers * layer.iter().sum::<usize>();
        let parameters = config.parameter_count();
        Self {
            packed: (ternary + 2 * parameters.full_precision) as u64,
            bf16: 2 * parameters.total() as u64,
        }
    }
}

/// Bytes on a GPU at the peak of a training step; on the CPU training takes less.
///
/// It follows the candle operations ([`super::ops`], what runs on CUDA) and candle's autograd
/// tensor by tensor. Not counted: the CUDA context, cuBLAS, loaded kernels and what the
/// allocator rounds up, 0.9 to 1.2 GiB on an H200 (`benches/results/gpu.md`), and the rotary tables
/// (below a MiB).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// f32 master weights.
    pub weights: u64,
    /// f32 gradients: those of the running micro-batch, and their sum over the earlier ones.
    pub gradients: u64,
    /// AdamW's two moments, f32.
    pub optimizer: u64,
    /// Everything else: what the forward pass keeps for the backward pass (quantised copies of
    /// the weights among it) and what the backward pass adds.
    pub activations: u64,
}

impl MemoryEstimate {
    /// For micro-batches of `micro_batch` rows of `seq_len` tokens, `grad_accum` of them a step.
    pub fn of_training(
        config: &BitNetConfig,
        micro_batch: usize,
        seq_len: usize,
        grad_accum: usize,
    ) -> Self {
        let weights = 4 * config.parameter_count().total() as u64;
        let sums = if grad_accum > 1 { 2 } else { 1 };
        let shape = Shape::new(config, micro_batch, seq_len);
        Self {
            weights,
            gradients: sums * weights,
            optimizer: 2 * weights,
            activations: (4.0 * shape.peak()) as u64,
        }
    }

    /// Bytes that training takes on the CPU but for short-lived buffers, 94% of the peak measured:
    /// four numbers a weight, what [`super::cpu`] keeps of each layer, and its dequantised
    /// projections.
    pub fn cpu_training(config: &BitNetConfig, micro_batch: usize, seq_len: usize) -> u64 {
        let shape = Shape::new(config, micro_batch, seq_len);
        let features = 7.0 * shape.hidden + 2.0 * shape.kv + 4.0 * shape.intermediate;
        let activations = shape.layers * shape.tokens * features;
        let parameters = config.parameter_count();
        let weights = 4.0 * parameters.total() as f64 + parameters.ternary as f64;
        (4.0 * (weights + activations)) as u64
    }

    pub fn total(&self) -> u64 {
        self.weights
            .saturating_add(self.gradients)
            .saturating_add(self.optimizer)
            .saturating_add(self.activations)
    }
}

/// Numbers of f32 values that an operation keeps beyond its inputs and weights.
#[derive(Clone, Copy)]
struct Kept {
    /// From the forward pass on, until the loss is dropped: every intermediate tensor.
    forward: f64,
    /// From the backward pass on, until its `GradStore` is dropped. candle makes gradients of
    /// constants too (scales, rotary tables, the mask, detached values), at their broadcast size,
    /// and keeps them with the tensors they were computed from: one for a sum, four for a
    /// product, six for a quotient.
    backward: f64,
}

impl Sum for Kept {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let none = Self {
            forward: 0.0,
            backward: 0.0,
        };
        all.fold(none, |sum, kept| Self {
            forward: sum.forward + kept.forward,
            backward: sum.backward + kept.backward,
        })
    }
}

/// The sizes that the counts are made of. f64, as products of user-given sizes may be huge.
struct Shape {
    tokens: f64,
    seq_len: f64,
    vocab: f64,
    layers: f64,
    hidden: f64,
    /// Features of all keys (or values) of a token.
    kv: f64,
    heads: f64,
    intermediate: f64,
    /// Tensors of the feed-forward width that the gate makes, the product included.
    gate_tensors: f64,
    /// Weights of the embedding, when the LM head does not share it.
    own_embedding: f64,
    parameters: f64,
}

impl Shape {
    fn new(config: &BitNetConfig, micro_batch: usize, seq_len: usize) -> Self {
        Self {
            tokens: micro_batch as f64 * seq_len as f64,
            seq_len: seq_len as f64,
            vocab: config.vocab_size as f64,
            layers: config.layers as f64,
            hidden: config.hidden_size as f64,
            kv: (config.kv_heads * config.head_dim()) as f64,
            heads: config.heads as f64,
            intermediate: config.intermediate_size as f64,
            gate_tensors: match config.activation {
                Activation::Silu => 2.0,
                Activation::Relu2 => 3.0,
            },
            own_embedding: match config.tie_embeddings {
                true => 0.0,
                false => config.lm_head_weights() as f64,
            },
            parameters: config.parameter_count().total() as f64,
        }
    }

    /// Values that live at the peak, without weights and their gradients. The peak is at one of
    /// three moments: in the loss, before any gradient is complete; in the softmax of the first
    /// layer, the last one to be differentiated; or at the very end.
    fn peak(&self) -> f64 {
        let residual = self.tokens * self.hidden;
        let logits = self.tokens * self.vocab;
        let lm_head = self.vocab * self.hidden;
        let Kept { forward, backward } = self.layer();
        let forward = self.layers * forward + self.head();
        let backward = self.layers * backward;

        let in_loss = forward + (7.0 * logits).max(logits + 5.0 * lm_head) - self.parameters;

        let qkv_weights = self.hidden * (self.hidden + 2.0 * self.kv);
        let still_to_come =
            self.qkv_proj().backward + self.rotations().backward + qkv_weights + self.own_embedding;
        let in_softmax = forward + backward - still_to_come + 8.0 * self.scores() + 3.0 * residual;

        let at_end = forward + backward + (lm_head + 2.0 * residual).max(12.0 * residual);

        in_loss.max(in_softmax).max(at_end)
    }

    fn layer(&self) -> Kept {
        let (hidden, ffn) = (self.hidden, self.intermediate);
        let residuals = Kept {
            forward: 2.0 * self.tokens * hidden,
            backward: 0.0,
        };
        [
            self.rms_norm(hidden),
            self.qkv_proj(),
            self.rotations(),
            self.attention(),
            self.rms_norm(hidden),
            self.bit_linear(hidden, &[hidden]),
            self.rms_norm(hidden),
            self.bit_linear(hidden, &[ffn, ffn]),
            Kept {
                forward: self.gate_tensors * self.tokens * ffn,
                backward: 0.0,
            },
            self.rms_norm(ffn),
            self.bit_linear(ffn, &[hidden]),
            residuals,
        ]
        .into_iter()
        .sum()
    }

    /// Embedding, final norm, and the loss: logits, shifted, exponentiated, log-probabilities.
    fn head(&self) -> f64 {
        self.tokens * (self.hidden + 4.0 * self.vocab + 4.0) + self.rms_norm(self.hidden).forward
    }

    /// Square, quotient, product; the mean, scaled, plus eps, and its root.
    fn rms_norm(&self, width: f64) -> Kept {
        Kept {
            forward: self.tokens * (3.0 * width + 4.0),
            backward: 0.0,
        }
    }

    fn qkv_proj(&self) -> Kept {
        self.bit_linear(self.hidden, &[self.hidden, self.kv, self.kv])
    }

    /// Codes of the input and of each weight: scaled, rounded, the straight-through difference
    /// and the sum. Outputs: sums, times b, joined, over s.
    fn bit_linear(&self, inputs: f64, outputs: &[f64]) -> Kept {
        const STRAIGHT_THROUGH: f64 = 2.0;
        let all_outputs: f64 = outputs.iter().sum();
        let joined = if outputs.len() > 1 { 1.0 } else { 0.0 };
        let weights = inputs * all_outputs;
        Kept {
            forward: self.tokens * (4.0 * inputs + 1.0)
                + 4.0 * weights
                + self.tokens * (3.0 + joined) * all_outputs,
            backward: self.tokens * (4.0 + STRAIGHT_THROUGH) * inputs
                + (6.0 + STRAIGHT_THROUGH) * weights
                + self.tokens * (4.0 + 6.0) * all_outputs,
        }
    }

    /// Queries and keys: four products with half a table, two halves of the result, joined.
    fn rotations(&self) -> Kept {
        let rotated = self.tokens * (self.hidden + self.kv);
        Kept {
            forward: 4.0 * rotated,
            backward: 4.0 * 2.0 * rotated,
        }
    }

    /// All (seq, seq) scores of all heads.
    fn scores(&self) -> f64 {
        self.tokens * self.heads * self.seq_len
    }

    /// Queries, keys and values split and laid out by head; transposed keys; scores, scaled,
    /// masked, shifted, exponentiated, normalised (and two numbers a row); the mask; the output
    /// by head and by token.
    fn attention(&self) -> Kept {
        let rows = self.tokens * self.heads;
        Kept {
            forward: 2.0 * self.tokens * (self.hidden + 2.0 * self.kv)
                + self.tokens * self.kv
                + 6.0 * self.scores()
                + 2.0 * rows
                + self.seq_len * self.seq_len
                + 2.0 * self.tokens * self.hidden,
            backward: self.scores(),
        }
    }
}
