//! How many bytes a model takes, stored and in training, from the shape alone.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::BitNetConfig;
use crate::config::{Config, GradientDtype, StateDtype};
use crate::cuda::{Arena, Workspace};
use crate::quant::packing::VALUES_PER_WORD;
use crate::train::STATE_BLOCK;

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

/// Bytes on a GPU at the peak of a training step. Not counted: the CUDA context and loaded
/// kernels, cuBLAS, and what the allocator rounds up (`benches/results/gpu.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// f32 master weights.
    pub weights: u64,
    /// What the products read: int8 ternary codes, and the LM head in bf16.
    pub quantized: u64,
    /// Sums over the micro-batches of a step.
    pub gradients: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
    /// Everything else, sized for one micro-batch.
    pub activations: u64,
}

impl MemoryEstimate {
    /// Of training as `config` says.
    pub fn of_training(config: &Config) -> Self {
        let model = &config.model;
        let parameters = model.parameter_count();
        let total = parameters.total() as u64;
        let norms = total - (parameters.ternary + model.embedding_weights()) as u64;
        let mut workspace = Arena::at(0);
        Workspace::lay_out(config, &mut workspace);
        Self {
            weights: 4 * total,
            quantized: (parameters.ternary + 2 * model.lm_head_weights()) as u64,
            gradients: match config.precision.gradients {
                GradientDtype::F32 => 4 * total,
                // Those of norms stay f32.
                GradientDtype::Bf16 => 2 * total + 2 * norms,
            },
            optimizer: match config.precision.optimizer_state {
                StateDtype::F32 => 8 * total,
                StateDtype::Bf16 => 4 * total,
                StateDtype::Int8 => 2 * (total + 4 * total.div_ceil(STATE_BLOCK as u64)),
            },
            activations: workspace.bytes(),
        }
    }

    /// Bytes that training takes on the CPU but for short-lived buffers, 94% of the peak measured:
    /// four numbers a weight, what [`super::cpu`] keeps of each layer, and its dequantised
    /// projections.
    pub fn cpu_training(config: &BitNetConfig, micro_batch: usize, seq_len: usize) -> u64 {
        let kv = config.kv_heads * config.head_dim();
        let features = 7 * config.hidden_size + 2 * kv + 4 * config.intermediate_size;
        let tokens = micro_batch as f64 * seq_len as f64;
        let activations = config.layers as f64 * tokens * features as f64;
        let parameters = config.parameter_count();
        let weights = 4.0 * parameters.total() as f64 + parameters.ternary as f64;
        (4.0 * (weights + activations)) as u64
    }

    pub fn total(&self) -> u64 {
        self.weights
            .saturating_add(self.quantized)
            .saturating_add(self.gradients)
            .saturating_add(self.optimizer)
            .saturating_add(self.activations)
    }
}

impl Display for MemoryEstimate {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        write!(
            f,
            "weights {:.1}, quantized {:.1}, gradients {:.1}, optimizer {:.1}, activations {:.1} GiB",
            gib(self.weights),
            gib(self.quantized),
            gib(self.gradients),
            gib(self.optimizer),
            gib(self.activations)
        )
    }
}
