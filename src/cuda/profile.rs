//! Where the time of a step goes. The passes name each stage before they launch it; a profiler
//! records a CUDA event there, and from one event to the next is a stage's time. What a stage
//! computes or moves follows from the shapes, in [`Stage::work`]. Without CUDA support nothing runs
//! this; the formulas and their test are the same.

#[cfg(feature = "cuda")]
use std::{cell::RefCell, sync::Arc};

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::{
    WrapErr,
    cudarc::driver::{CudaEvent, CudaStream, sys::CUevent_flags},
};

#[cfg(feature = "cuda")]
use crate::Result;
use crate::config::{BackwardDtype, Config, GradientDtype, StateDtype};

/// What the passes launch next, and of its size what the configuration does not tell.
#[derive(Clone, Copy, Debug)]
pub enum Stage {
    Embed,
    EmbedBackward,
    /// RMSNorm and int8 codes.
    QuantizeNorm,
    /// The last norm, to bf16.
    FinalNorm,
    /// So many bytes read and written for each of (tokens, hidden) values.
    NormBackward {
        bytes: usize,
    },
    /// Gate, RMSNorm and int8 codes.
    QuantizeGate,
    GateBackward,
    Rope,
    RopeBackward,
    AttentionForward,
    AttentionBackward,
    /// Products with so many ternary weights, or by so many of their gradients.
    Forward {
        weights: usize,
    },
    InputGradient {
        weights: usize,
    },
    WeightGradient {
        weights: usize,
    },
    ExpandWeights {
        weights: usize,
    },
    /// Of so many bytes.
    Transpose {
        bytes: usize,
    },
    /// One of the three products of some tokens.
    LmHead {
        tokens: usize,
    },
    CrossEntropy {
        tokens: usize,
    },
    GradNorm,
    AdamW,
    /// Master weights to ternary codes, and the LM head to bf16.
    QuantizeWeights,
    /// Sums, copies, and waiting for the host.
    Other,
}

/// What work is counted in, which says what limits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bf16Flop,
    /// int8 or fp8.
    EightBitFlop,
    Byte,
}

impl Stage {
    /// The group it belongs to, and the least that it must compute, or read and write: statistics
    /// of rows, norms' weights and rotary tables are too few bytes to count.
    #[rustfmt::skip] // a formula a line
    fn work(self, config: &Config) -> (&'static str, Unit, usize) {
        use Unit::{Bf16Flop, Byte, EightBitFlop};
        let (model, train) = (&config.model, &config.train);
        let (hidden, intermediate) = (model.hidden_size, model.intermediate_size);
        let (vocab, head) = (model.vocab_size, model.lm_head_weights());
        let kv = model.kv_heads * model.head_dim();
        let rotated = hidden + kv;
        let count = model.parameter_count();
        let (all, ternary) = (count.total(), count.ternary);
        let (seq, tokens) = (train.seq_len, train.micro_batch * train.seq_len);
        let gradient = match config.precision.gradients {
            GradientDtype::F32 => 4,
            GradientDtype::Bf16 => 2,
        };
        let moment = match config.precision.optimizer_state {
            StateDtype::F32 => 4,
            StateDtype::Bf16 => 2,
            StateDtype::Int8 => 1,
        };
        let is_fp8 = config.precision.backward == BackwardDtype::Fp8;
        let backward_flop = if is_fp8 { EightBitFlop } else { Bf16Flop };
        // A causal query sees (seq + 1) / 2 keys on average: a product of it is so many FLOPs.
        let attention = hidden * tokens * (seq + 1);
        let norm_forward = "norms and gate, forward";
        let norm_backward = "norms and gate, backward";
        match self {
            Self::Forward { weights } => ("forward products", EightBitFlop, 2 * tokens * weights),
            Self::InputGradient { weights } => ("dX products", backward_flop, 2 * tokens * weights),
            Self::WeightGradient { weights } => ("dW products", backward_flop, 2 * tokens * weights),
            Self::LmHead { tokens } => ("LM head", Bf16Flop, 2 * tokens * head),
            Self::AttentionForward => ("attention forward", Bf16Flop, 2 * attention),
            Self::AttentionBackward => ("attention backward", Bf16Flop, 5 * attention),
            Self::QuantizeNorm => (norm_forward, Byte, tokens * hidden * (2 + 1)),
            Self::FinalNorm => (norm_forward, Byte, tokens * hidden * (2 + 2)),
            Self::QuantizeGate => (norm_forward, Byte, tokens * intermediate * (4 + 1)),
            Self::NormBackward { bytes } => (norm_backward, Byte, tokens * hidden * bytes),
            // dn, gate and up; their gradients (bf16, or int8 and e4m3), and the inputs of dW.
            Self::GateBackward if is_fp8 => (norm_backward, Byte, tokens * intermediate * (2 + 4 + 4 + 1)),
            Self::GateBackward => (norm_backward, Byte, tokens * intermediate * (2 + 4 + 4 + 2)),
            Self::Rope => ("rotary embedding", Byte, tokens * rotated * (2 + 2)),
            Self::RopeBackward if is_fp8 => ("rotary embedding", Byte, tokens * (rotated + kv) * (2 + 2)),
            Self::RopeBackward => ("rotary embedding", Byte, tokens * rotated * (2 + 2)),
            Self::Transpose { bytes } => ("transposes", Byte, 2 * bytes),
            Self::ExpandWeights { weights } => ("weights expanded", Byte, weights * (1 + 2)),
            Self::CrossEntropy { tokens } => ("cross-entropy", Byte, tokens * vocab * (2 + 2)),
            Self::Embed => ("embedding", Byte, tokens * hidden * (4 + 2)),
            // The rows it adds to depend on the ids: those of frequent ones are few.
            Self::EmbedBackward => ("embedding", Byte, tokens * hidden * 2),
            Self::GradNorm => ("gradient norm", Byte, all * gradient),
            Self::AdamW => ("AdamW", Byte, all * (2 * 4 + gradient + 2 * 2 * moment)),
            // Once for the scales and once for the codes; and the LM head to bf16.
            Self::QuantizeWeights => ("requantisation", Byte, ternary * (2 * 4 + 1) + head * 6),
            Self::Other => ("other", Byte, 0),
        }
    }
}

/// The stages of a step that share a row of the table.
#[derive(Clone, Debug)]
pub struct Group {
    pub name: &'static str,
    pub seconds: f64,
    pub calls: usize,
    pub unit: Unit,
    pub work: usize,
}

impl Group {
    /// Adds the stages up, the group that takes longest first.
    fn of(stages: impl IntoIterator<Item = (Stage, f64)>, config: &Config) -> Vec<Self> {
        let mut groups: Vec<Self> = Vec::new();
        for (stage, seconds) in stages {
            let (name, unit, work) = stage.work(config);
            let at = groups.iter().position(|group| group.name == name);
            let at = at.unwrap_or_else(|| {
                groups.push(Self {
                    name,
                    seconds: 0.0,
                    calls: 0,
                    unit,
                    work: 0,
                });
                groups.len() - 1
            });
            groups[at].seconds += seconds;
            groups[at].calls += 1;
            groups[at].work += work;
        }
        groups.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        groups
    }
}

/// Records when each stage begins on the stream.
#[cfg(feature = "cuda")]
pub struct Profiler {
    config: Config,
    stream: Arc<CudaStream>,
    begun: RefCell<Vec<(Stage, CudaEvent)>>,
}

#[cfg(feature = "cuda")]
impl Profiler {
    /// Of the passes of an engine that trains as `config` says.
    pub fn new(config: &Config, stream: Arc<CudaStream>) -> Self {
        Self {
            config: config.clone(),
            stream,
            begun: RefCell::default(),
        }
    }

    /// What is launched from here on belongs to `stage`.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn begin(&self, stage: Stage) -> Result<()> {
        let flags = Some(CUevent_flags::CU_EVENT_DEFAULT); // with a time
        let event = self.stream.record_event(flags).w()?;
        self.begun.borrow_mut().push((stage, event));
        Ok(())
    }

    /// The stages so far by group; waits for the GPU.
    ///
    /// # Errors
    /// `Tensor` if a kernel failed.
    pub fn finish(self) -> Result<Vec<Group>> {
        self.begin(Stage::Other)?;
        let begun = self.begun.into_inner();
        let stages = begun
            .iter()
            .zip(&begun[1..])
            .map(|((stage, start), (_, end))| {
                let ms = start.elapsed_ms(end).w()?;
                Ok((*stage, f64::from(ms) / 1e3))
            });
        let stages = stages.collect::<Result<Vec<_>>>()?;
        Ok(Group::of(stages, &self.config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_s_work_is_that_of_its_shapes() {
        let mut config = Config::default();
        (config.train.micro_batch, config.train.seq_len) = (2, 5);
        let (model, tokens) = (&config.model, 10);
        let weights = model.parameter_count().ternary;
        let products = [
            Stage::Forward { weights },
            Stage::InputGradient { weights },
            Stage::WeightGradient { weights },
            Stage::LmHead { tokens: 4 },
            Stage::LmHead { tokens: 6 },
            Stage::LmHead { tokens },
            Stage::LmHead { tokens },
        ];
        let groups = Group::of(products.map(|stage| (stage, 0.5)), &config);
        let flops: usize = groups.iter().map(|group| group.work).sum();
        // As MFU counts them, attention aside.
        let expected = tokens as f64 * model.train_flops_per_token(0);
        assert!((flops as f64 / expected - 1.0).abs() < 1e-12, "{flops}");
        // The longest first.
        assert_eq!((groups[0].name, groups[0].calls), ("LM head", 4));

        // Two products of each query with every key that it sees.
        let (_, _, forward) = Stage::AttentionForward.work(&config);
        let pairs: usize = 2 * (1..=5).sum::<usize>();
        assert_eq!(forward, 2 * 2 * pairs * config.model.hidden_size);
    }
}
