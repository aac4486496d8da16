//! What a forward and backward pass keeps in device memory: one allocation, laid out before the
//! first step and used by every one. Also compiled without CUDA support: `titanbit info` measures
//! the same layout.

use half::bf16;

use super::arena::{Arena, DevicePtr};
use super::token_groups::TokenGroups;
use crate::config::Recompute;
use crate::model::BitNetConfig;

/// Rows of logits that exist at once.
pub const LOGIT_ROWS: usize = 8192;

/// Blocks that sum a norm's weight gradient; each keeps a row of partial sums.
pub const NORM_PARTS: usize = 528;

/// Sizes that the layout is made of.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Sequences of a micro-batch, and tokens of each.
    pub rows: usize,
    pub seq: usize,
    pub tokens: usize,
    pub layers: usize,
    pub hidden: usize,
    /// Features of queries, keys and values together.
    pub qkv: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub vocab: usize,
}

impl Sizes {
    pub fn new(config: &BitNetConfig, rows: usize, seq: usize) -> Self {
        Self {
            rows,
            seq,
            tokens: rows.saturating_mul(seq),
            layers: config.layers,
            hidden: config.hidden_size,
            qkv: config.hidden_size + 2 * config.kv_heads * config.head_dim(),
            intermediate: config.intermediate_size,
            heads: config.heads,
            vocab: config.vocab_size,
        }
    }

    /// The wider of the two inputs that norms and projections take.
    fn widest(&self) -> usize {
        self.hidden.max(self.intermediate)
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

    pub fn logit_rows(&self) -> usize {
        self.tokens.min(LOGIT_ROWS)
    }
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
    /// Int8 codes of a normalised input, (tokens, widest); in the backward pass the same in bf16.
    pub codes: DevicePtr<i8>,
    pub inputs: DevicePtr<bf16>,
    pub dqkv: DevicePtr<bf16>,
    /// Gradient of the attention's output, (tokens, hidden).
    pub dattention: DevicePtr<bf16>,
    pub attention_statistics: DevicePtr<f32>,
    /// (NORM_PARTS, widest).
    pub norm_parts: DevicePtr<f32>,
    /// Partial rows of the embedding's gradient.
    pub embedding_parts: DevicePtr<f32>,
    /// One projection's dequantised weights.
    pub weight: DevicePtr<bf16>,
}

impl Workspace {
    pub fn lay_out(sizes: &Sizes, recompute: Recompute, arena: &mut Arena) -> Self {
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
        let layer = |arena: &mut Arena| SavedLayer {
            x: arena.take(tokens * hidden),
            qkv: arena.take(tokens * qkv),
            attention: arena.take(tokens * hidden),
            log_sum_exp: arena.take(tokens * heads),
            h: arena.take(tokens * hidden),
            gate_up: arena.take(tokens * 2 * intermediate),
            norms: std::array::from_fn(|_| statistics(arena)),
        };
        let first = layer(arena);
        let layers = (0..sizes.layers).map(|index| match (index, recompute) {
            (0, _) => first,
            (_, Recompute::None) => layer(arena),
            (_, Recompute::Selective) => SavedLayer {
                x: arena.take(tokens * hidden),
                qkv: arena.take(tokens * qkv),
                attention: arena.take(tokens * hidden),
                log_sum_exp: arena.take(tokens * heads),
                h: arena.take(tokens * hidden),
                gate_up: first.gate_up,
                norms: std::array::from_fn(|_| statistics(arena)),
            },
            (_, Recompute::Full) => {
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
            inputs: arena.take(tokens * widest),
            dqkv: arena.take(tokens * qkv),
            dattention: arena.take(tokens * hidden),
            attention_statistics: arena.take(sizes.attention_statistics()),
            norm_parts: arena.take(NORM_PARTS * widest),
            embedding_parts: arena.take(TokenGroups::partial_rows(tokens) * hidden),
            weight: arena.take(hidden * (2 * intermediate).max(qkv)),
        }
    }
}
