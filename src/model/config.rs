//! Shape of a BitNet b1.58 decoder, its presets, and what follows from the shape alone:
//! parameter counts and FLOPs.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The gate of the feed-forward block: `act(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `x * sigmoid(x)`: SwiGLU (Shazeer, arXiv 2002.05202).
    Silu,
    /// `max(x, 0)^2`, as in BitNet b1.58 2B4T (arXiv 2504.12285).
    Relu2,
}

/// Shape and constants of the network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BitNetConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub layers: usize,
    pub heads: usize,
    /// Key/value heads of grouped-query attention; divides `heads`.
    pub kv_heads: usize,
    pub intermediate_size: usize,
    /// Longest sequence the rotary tables are made for.
    pub max_seq_len: usize,
    pub rope_theta: f64,
    pub rms_norm_eps: f64,
    pub activation: Activation,
    /// The LM head shares the embedding matrix.
    pub tie_embeddings: bool,
    /// Standard deviation of the normal initialisation.
    pub init_std: f64,
}

impl Default for BitNetConfig {
    /// The 1.3B preset.
    fn default() -> Self {
        Self {
            vocab_size: 32000,
            hidden_size: 2048,
            layers: 24,
            heads: 32,
            kv_heads: 8,
            intermediate_size: 6144,
            max_seq_len: 2048,
            rope_theta: 10000.0,
            rms_norm_eps: 1e-5,
            activation: Activation::Silu,
            tie_embeddings: false,
            init_std: 0.02,
        }
    }
}

/// Weights by storage class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ParameterCount {
    /// Weights of the seven projections, 2 bits each when packed.
    pub ternary: usize,
    /// Embedding, LM head and norms.
    pub full_precision: usize,
}

impl ParameterCount {
    pub fn total(&self) -> usize {
        self.ternary + self.full_precision
    }
}

/// One projection of a layer: output and input features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Name inside the layer, as in `transformers`: `self_attn.q_proj`.
    pub name: &'static str,
    pub rows: usize,
    pub cols: usize,
}

impl BitNetConfig {
    pub const PRESETS: [&'static str; 5] = ["125M", "350M", "700M", "1.3B", "3B"];

    /// One of the published sizes, vocabulary 32000, untied.
    ///
    /// # Errors
    /// An unknown name: the message lists the presets.
    pub fn preset(name: &str) -> Result<Self> {
        let (hidden_size, layers, heads, kv_heads, intermediate_size) =
            match name.to_ascii_uppercase().as_str() {
                "125M" => (768, 12, 12, 4, 2048),
                "350M" => (1024, 24, 16, 4, 3072),
                "700M" => (1536, 24, 24, 6, 4096),
                "1.3B" => (2048, 24, 32, 8, 6144),
                "3B" => (3200, 26, 32, 8, 8640),
                _ => {
                    return Err(Error::usage(format!(
                        "unknown model size `{name}`: choose one of {}",
                        Self::PRESETS.join(", ")
                    )));
                }
            };
        Ok(Self {
            hidden_size,
            layers,
            heads,
            kv_heads,
            intermediate_size,
            ..Self::default()
        })
    }

    /// Features of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.heads
    }

    /// # Errors
    /// The first value that cannot be: its key, the value, and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let bad = |key: &str, value: &dyn std::fmt::Display, allowed: &str| {
            Err(Error::usage(format!(
                "model.{key} is {value}: must be {allowed}"
            )))
        };
        // Features stay below 2^17, where the integer sums of a BitLinear are exact in f32; the
        // other bounds keep every count of weights and FLOPs within 64 bits.
        let (features, count) = ((1 << 17) - 1, 1 << 20);
        for (key, value, limit) in [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, features),
            ("layers", self.layers, count),
            ("heads", self.heads, count),
            ("kv_heads", self.kv_heads, count),
            ("intermediate_size", self.intermediate_size, features),
            ("max_seq_len", self.max_seq_len, count),
        ] {
            if value == 0 {
                return bad(key, &value, "at least 1");
            }
            if value > limit {
                return bad(key, &value, &format!("at most {limit}"));
            }
        }
        if !self.hidden_size.is_multiple_of(self.heads) {
            return bad(
                "hidden_size",
                &self.hidden_size,
                &format!("a multiple of model.heads ({})", self.heads),
            );
        }
        if !self.head_dim().is_multiple_of(2) {
            return bad(
                "heads",
                &self.heads,
                &format!(
                    "such that hidden_size / heads ({}) is even: rotary embeddings turn pairs",
                    self.head_dim()
                ),
            );
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return bad(
                "kv_heads",
                &self.kv_heads,
                &format!("a divisor of model.heads ({})", self.heads),
            );
        }
        for (key, value) in [
            ("rope_theta", self.rope_theta),
            ("rms_norm_eps", self.rms_norm_eps),
            ("init_std", self.init_std),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return bad(key, &value, "a finite number above 0");
            }
        }
        Ok(())
    }

    /// The seven BitLinear projections of one layer, in order of use.
    pub fn projections(&self) -> [Projection; 7] {
        let (hidden, kv) = (self.hidden_size, self.kv_heads * self.head_dim());
        let ffn = self.intermediate_size;
        [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", ffn, hidden),
            ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ]
        .map(|(name, rows, cols)| Projection { name, rows, cols })
    }

    /// Weights of the LM head; a tied head reads the embedding's.
    pub fn lm_head_weights(&self) -> usize {
        self.vocab_size * self.hidden_size
    }

    /// Weights of the embedding and, if it has its own, of the LM head.
    pub fn embedding_weights(&self) -> usize {
        self.lm_head_weights() * if self.tie_embeddings { 1 } else { 2 }
    }

    pub fn parameter_count(&self) -> ParameterCount {
        let per_layer: usize = self.projections().iter().map(|p| p.rows * p.cols).sum();
        let norms_per_layer = 3 * self.hidden_size + self.intermediate_size;
        let norms = self.layers * norms_per_layer + self.hidden_size;
        ParameterCount {
            ternary: self.layers * per_layer,
            full_precision: self.embedding_weights() + norms,
        }
    }

    /// FLOPs to train on one token at sequence length `seq_len`, for MFU: 6 per projection and
    /// LM-head weight, plus 12 x layers x hidden x seq_len for attention, not halved for
    /// causality; the embedding look-up is free (PaLM, arXiv 2204.02311, appendix B).
    pub fn train_flops_per_token(&self, seq_len: usize) -> f64 {
        let weights = self.parameter_count().ternary + self.lm_head_weights();
        6.0 * weights as f64 + 12.0 * (self.layers * self.hidden_size * seq_len) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The design's table of published sizes (millions of parameters).
    #[test]
    fn presets_have_the_published_parameter_counts() {
        for (name, millions) in [
            ("125M", 124.7),
            ("350M", 354.9),
            ("700M", 692.9),
            ("1.3B", 1288.8),
            ("3B", 3027.0),
        ] {
            let config = BitNetConfig::preset(name).unwrap();
            config.validate().unwrap();
            let total = config.parameter_count().total() as f64 / 1e6;
            assert!((total - millions).abs() < 0.5, "{name}: {total} M");
        }
    }

    #[test]
    fn flops_per_token_match_the_design_for_1_3b() {
        let config = BitNetConfig::preset("1.3B").unwrap();
        // Projections 6.95 GFLOP, LM head 0.39, attention 12 x 24 x 2048 x 2048 = 1.21.
        let flops = config.train_flops_per_token(2048);
        assert!(
            (flops - (6.95e9 + 0.39e9 + 1.208e9)).abs() < 0.01e9,
            "{flops}"
        );
    }

    #[test]
    fn impossible_shapes_are_refused_by_key() {
        let base = BitNetConfig::preset("125M").unwrap();
        let message = |config: BitNetConfig| config.validate().unwrap_err().to_string();
        let kv = message(BitNetConfig {
            kv_heads: 5,
            ..base.clone()
        });
        assert_eq!(
            kv,
            "model.kv_heads is 5: must be a divisor of model.heads (12)"
        );
        let hidden = message(BitNetConfig {
            hidden_size: 770,
            ..base.clone()
        });
        assert!(hidden.contains("model.hidden_size is 770"), "{hidden}");
        let nan = message(BitNetConfig {
            rms_norm_eps: f64::NAN,
            ..base
        });
        assert!(nan.contains("model.rms_norm_eps is NaN"), "{nan}");
    }
}
