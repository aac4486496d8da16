//! What a forward and backward pass keeps in device memory: one allocation, laid out before the
//! first step and used by every one. Also compiled without CUDA support: `titanbit info` measures
//! the same layout.

use half::bf16;

use super::arena::{Arena, DevicePtr};
use super::token_groups::TokenGroups;
use crate::config::{BackwardDtype, Config, Recompute};

/// Rows of logits that exist at once.
pub const LOGIT_ROWS: usize = 8192;

/// Blocks that sum a norm's weight gradient; each keeps a row of partial sums.
pub const NORM_PARTS: usize = 1584;

/// Sizes that the layout is made of.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Sequences of a micro-batch, and tokens of each.
    pub rows: usize,
    pub seq: usize,
    pub tokens: usize,
    pub layers: usize,
    pub hidden: usize,
    /// Features of queries, keys and values together, and of values.
    pub qkv: usize,
    pub kv: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub vocab: usize,
}

impl Sizes {
    pub fn new(config: &Config) -> Self {
        let (rows, seq) = (config.train.micro_batch, config.train.seq_len);
        let config = &config.model;
        let kv = config.kv_heads * config.head_dim();
        Self {
            rows,
            seq,
            tokens: rows.saturating_mul(seq),
            layers: config.layers,
            hidden: config.hidden_size,
            qkv: config.hidden_size + 2 * kv,
            kv,
            head_dim: config.head_dim(),
            intermediate: config.intermediate_size,
            heads: config.heads,
            vocab: config.vocab_size,
        }
    }

    /// The wider of the two inputs that norms and projections take.
    fn widest(&self) -> usize {
        self.hidden.max(self.intermediate)
    }

    /// The widest output of fused projections.
    fn widest_output(&self) -> usize {
        (2 * self.intermediate).max(self.qkv)
    }

    /// Distance between rows of logits: cuBLASLt and vector loads want 16 bytes.
    pub fn logit_stride(&self) -> usize {
        self.vocab.next_multiple_of(8)
    }

    /// Log-sum-exp and delta of every query, in the blocks of 128 that the Hopper kernels read; the
    /// portable ones need less.
    pub fn attention_statistics(&self) -> usize {
        self.rows * self.heads * self.seq.div_ceil(128) * 2 * 128
    }

    /// Width of the copy of so many features that the Hopper attention reads, if it needs one.
    pub fn aligned_heads(&self, features: usize) -> usize {
        match head_stride(self.head_dim) {
            stride if stride == self.head_dim => 0,
            stride => features / self.head_dim * stride,
        }
    }

    pub fn logit_rows(&self) -> usize {
        self.tokens.min(LOGIT_ROWS)
    }
}

/// Distance between heads as the Hopper attention reads them: its bulk copies start on 16 bytes.
pub fn head_stride(head_dim: usize) -> usize {
    head_dim.next_multiple_of(8)
}

/// Tokens of a row of a transposed fp8 operand: cuBLASLt wants multiples of 16.
pub fn padded_tokens(tokens: usize) -> usize {
    tokens.next_multiple_of(16)
}

/// What a norm keeps of each row.
#[derive(Clone, Copy, Debug)]
pub struct NormStatistics {
    /// max(absmax, 1e-5) / 127 of the normalised row.
    pub scale: DevicePtr<f32>,
    pub rstd: DevicePtr<f32>,
}

/// One layer's activations for its backward pass. Layers share what is computed anew.
#[derive(Clone, Copy, Debug)]
pub struct SavedLayer {
    /// Input, (tokens, hidden).
    pub x: DevicePtr<bf16>,
    /// (tokens, qkv), queries and keys rotated.
    pub qkv: DevicePtr<bf16>,
    /// (tokens, hidden).
    pub attention: DevicePtr<bf16>,
    /// (batch, heads, seq).
    pub log_sum_exp: DevicePtr<f32>,
    /// Input of the feed-forward half, (tokens, hidden).
    pub h: DevicePtr<bf16>,
    /// (tokens, 2 intermediate).
    pub gate_up: DevicePtr<bf16>,
    /// Of `input_layernorm`, `attn_sub_norm`, `post_attention_layernorm` and `ffn_sub_norm`.
    pub norms: [NormStatistics; 4],
}

#[derive(Debug)]
pub struct Workspace {
    pub layers: Vec<SavedLayer>,
    /// Output of the last layer, (tokens, hidden).
    pub y: DevicePtr<bf16>,
    pub final_rstd: DevicePtr<f32>,
    /// Normalised output, then its gradient, (tokens, hidden).
    pub last_hidden: DevicePtr<bf16>,
    /// (logit_rows, logit_stride), then their gradient.
    pub logits: DevicePtr<bf16>,
    /// Cross-entropy of each token.
    pub losses: DevicePtr<f32>,
    /// Gradient of the residual stream, (tokens, hidden).
    pub dx: DevicePtr<bf16>,
    /// Gradient of a normalised input, (tokens, widest).
    pub dn: DevicePtr<bf16>,
    /// Int8 codes of a normalised input, (tokens, widest).
    pub codes: DevicePtr<i8>,
    pub operands: Operands,
    pub dqkv: DevicePtr<bf16>,
    /// Gradient of the attention's output, (tokens, hidden).
    pub dattention: DevicePtr<bf16>,
    pub attention: AttentionScratch,
    /// (NORM_PARTS, widest).
    pub norm_parts: DevicePtr<f32>,
    /// Partial rows of the embedding's gradient.
    pub embedding_parts: DevicePtr<f32>,
}

/// What attention needs while it runs.
#[derive(Clone, Copy, Debug)]
pub struct AttentionScratch {
    /// [`Sizes::attention_statistics`] values.
    pub statistics: DevicePtr<f32>,
    /// Copies with a distance of [`head_stride`] between heads, where that is not head_dim: of
    /// queries, keys and values, and of the gradient by the output.
    pub qkv: DevicePtr<bf16>,
    pub dout: DevicePtr<bf16>,
}

/// What the backward products of one projection at a time read.
#[derive(Clone, Copy, Debug)]
pub enum Operands {
    Bf16 {
        /// code * scale of a normalised input, (tokens, widest).
        inputs: DevicePtr<bf16>,
        /// wq * b, (n, k).
        weight: DevicePtr<bf16>,
    },
    Fp8(Fp8Operands),
}

#[derive(Clone, Copy, Debug)]
pub struct Fp8Operands {
    /// By the output; of three fused projections, by that of the first two.
    pub dy: QuantizedGradient,
    /// By the output of the third: values, whose gradient is of another size than that of queries
    /// and keys.
    pub dvalues: QuantizedGradient,
    /// Input codes in e4m3, times a factor a token, (k, padded tokens).
    pub inputs_transposed: DevicePtr<u8>,
    /// Ternary codes, (k, n).
    pub weight_transposed: DevicePtr<i8>,
}

/// The gradient by a projection's output, dY.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedGradient {
    /// dY * b in int8 codes, (tokens, n).
    pub codes: DevicePtr<i8>,
    /// Of each token: what a code stands for.
    pub scale: DevicePtr<f32>,
    /// dY in e4m3, multiplied by 3.5 min(b) / scale, (tokens, n); the same transposed, (n, padded
    /// tokens).
    pub fp8: DevicePtr<u8>,
    pub transposed: DevicePtr<u8>,
    /// What each token's inputs are to be multiplied by, as dY is of another scale; and what
    /// products of the two are to be multiplied by.
    pub factors: DevicePtr<f32>,
    pub undo: DevicePtr<f32>,
}

impl QuantizedGradient {
    fn lay_out(tokens: usize, features: usize, arena: &mut Arena) -> Self {
        Self {
            codes: arena.take(tokens * features),
            scale: arena.take(tokens),
            fp8: arena.take(tokens * features),
            transposed: arena.take(padded_tokens(tokens) * features),
            factors: arena.take(tokens),
            undo: arena.take(1),
        }
    }
}

impl Workspace {
    pub fn lay_out(config: &Config, arena: &mut Arena) -> Self {
        let sizes = &Sizes::new(config);
        let &Sizes {
            tokens,
            hidden,
            qkv,
            intermediate,
            heads,
            ..
        } = sizes;
        let widest = sizes.widest();
        let statistics = |arena: &mut Arena| NormStatistics {
            scale: arena.take(tokens),
            rstd: arena.take(tokens),
        };
        let layer = |arena: &mut Arena, shared_gate_up: Option<_>| SavedLayer {
            x: arena.take(tokens * hidden),
            qkv: arena.take(tokens * qkv),
            attention: arena.take(tokens * hidden),
            log_sum_exp: arena.take(tokens * heads),
            h: arena.take(tokens * hidden),
            gate_up: shared_gate_up.unwrap_or_else(|| arena.take(tokens * 2 * intermediate)),
            norms: std::array::from_fn(|_| statistics(arena)),
        };
        let first = layer(arena, None);
        let layers = (0..sizes.layers).map(|index| match config.train.recompute_of(index) {
            _ if index == 0 => first,
            Recompute::None => layer(arena, None),
            Recompute::Selective => layer(arena, Some(first.gate_up)),
            Recompute::Full => {
                let [input, sub, post, _] = first.norms;
                SavedLayer {
                    x: arena.take(tokens * hidden),
                    norms: [input, sub, post, statistics(arena)],
                    ..first
                }
            }
        });
        Self {
            layers: layers.collect(),
            y: arena.take(tokens * hidden),
            final_rstd: arena.take(tokens),
            last_hidden: arena.take(tokens * hidden),
            logits: arena.take(sizes.logit_rows() * sizes.logit_stride()),
            losses: arena.take(tokens),
            dx: arena.take(tokens * hidden),
            dn: arena.take(tokens * widest),
            codes: arena.take(tokens * widest),
            operands: Operands::lay_out(sizes, config.precision.backward, arena),
            dqkv: arena.take(tokens * qkv),
            dattention: arena.take(tokens * hidden),
            attention: AttentionScratch {
                statistics: arena.take(sizes.attention_statistics()),
                qkv: arena.take(tokens * sizes.aligned_heads(qkv)),
                dout: arena.take(tokens * sizes.aligned_heads(hidden)),
            },
            norm_parts: arena.take(NORM_PARTS * widest),
            embedding_parts: arena.take(TokenGroups::partial_rows(tokens) * hidden),
        }
    }
}

impl Operands {
    fn lay_out(sizes: &Sizes, backward: BackwardDtype, arena: &mut Arena) -> Self {
        let (tokens, weights) = (sizes.tokens, sizes.hidden * sizes.widest_output());
        match backward {
            BackwardDtype::Bf16 => Self::Bf16 {
                inputs: arena.take(tokens * sizes.widest()),
                weight: arena.take(weights),
            },
            BackwardDtype::Fp8 => Self::Fp8(Fp8Operands {
                dy: QuantizedGradient::lay_out(tokens, sizes.widest_output(), arena),
                dvalues: QuantizedGradient::lay_out(tokens, sizes.kv, arena),
                inputs_transposed: arena.take(padded_tokens(tokens) * sizes.widest()),
                weight_transposed: arena.take(weights),
            }),
        }
    }
}
