//! The sections of the configuration, their defaults and the range of every value.

use std::fmt::Display;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::data::TokenDtype;
use crate::{Error, Result};

/// `key is value: must be allowed`, unless `ok`.
fn require(ok: bool, key: &str, value: impl Display, allowed: &str) -> Result<()> {
    match ok {
        true => Ok(()),
        false => Err(Error::usage(format!("{key} is {value}: must be {allowed}"))),
    }
}

fn positive(key: &str, value: f64) -> Result<()> {
    require(
        value.is_finite() && value > 0.0,
        key,
        value,
        "a finite number above 0",
    )
}

fn not_negative(key: &str, value: f64) -> Result<()> {
    require(
        value.is_finite() && value >= 0.0,
        key,
        value,
        "a finite number, 0 or more",
    )
}

fn at_least_one(key: &str, value: u64) -> Result<()> {
    require(value >= 1, key, value, "at least 1")
}

fn at_most(key: &str, value: u64, limit: u64) -> Result<()> {
    require(value <= limit, key, value, &format!("at most {limit}"))
}

/// Bounds far beyond any use, which keep every sum and product of counts within 64 bits: a run is
/// at most 2^30 steps of 2^32 tokens.
const MAX_STEPS: u64 = 1 << 30;
const MAX_TOKENS_PER_STEP: u64 = 1 << 32;
const MAX_COUNT: u64 = 1 << 20;

/// Each thread takes memory of its own, and the system refuses some number of them.
pub const MAX_THREADS: u64 = 1024;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// Optimizer steps in all.
    pub steps: u64,
    /// Tokens of one sample.
    pub seq_len: usize,
    /// Samples that go through the model at once.
    pub micro_batch: usize,
    /// Micro-batches whose gradients are averaged into one step.
    pub grad_accum: usize,
    /// Seeds the initial weights and the order of the data.
    pub seed: u64,
    /// Activations that a GPU computes anew in the backward pass instead of keeping them.
    pub recompute: Recompute,
    /// The layers it does so for; `None` for all.
    pub recompute_layers: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing: the fastest.
    None,
    /// The gate and up projections, about half of what a layer keeps.
    Selective,
    /// Everything but each layer's input.
    Full,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            steps: 100_000,
            seq_len: 2048,
            micro_batch: 1,
            grad_accum: 256,
            seed: 42,
            recompute: Recompute::None,
            recompute_layers: None,
        }
    }
}

impl Train {
    /// What the backward pass of layer `index` computes anew.
    pub fn recompute_of(&self, index: usize) -> Recompute {
        match self.recompute_layers {
            Some(layers) if index >= layers => Recompute::None,
            _ => self.recompute,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        let [seq_len, micro_batch, grad_accum] =
            [self.seq_len, self.micro_batch, self.grad_accum].map(|count| count as u64);
        for (key, value, limit) in [
            ("train.steps", self.steps, MAX_STEPS),
            ("train.seq_len", seq_len, MAX_COUNT),
            ("train.micro_batch", micro_batch, MAX_COUNT),
            ("train.grad_accum", grad_accum, MAX_COUNT),
        ] {
            at_least_one(key, value)?;
            at_most(key, value, limit)?;
        }
        at_most(
            "train.micro_batch x train.grad_accum x train.seq_len, the tokens of a step,",
            micro_batch * grad_accum * seq_len,
            MAX_TOKENS_PER_STEP,
        )
    }
}

/// One training data set: a token file, a directory of shards, or the name shards share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    pub path: PathBuf,
    /// Share of the samples, relative to the other sources.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// How to make the token files when they are not there yet, as `titanbit tokenize` would.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepare {
    /// Files, directories or patterns; `~`, `*`, `${VAR}` and `${VAR:-default}` are expanded.
    pub input: Vec<String>,
    /// File name extensions to take from directories; empty takes all text.
    #[serde(default)]
    pub ext: Vec<String>,
    /// Take a deterministic sample of about this many megabytes instead of everything.
    #[serde(default)]
    pub sample_mb: Option<u64>,
    /// Vocabulary to train when `data.tokenizer` does not exist; at most `model.vocab_size`.
    pub train_vocab: usize,
    /// Share of the documents held out for validation: above 0 and below 1 with `data.val`, 0
    /// without.
    pub val_fraction: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    pub train: Vec<Source>,
    /// Held-out token file; without one, validation is skipped.
    pub val: Option<PathBuf>,
    /// `tokenizer.json`, to print samples and to travel with the checkpoints.
    pub tokenizer: Option<PathBuf>,
    /// Token width of header-less (nanoGPT) files.
    pub dtype: Option<TokenDtype>,
    pub prepare: Option<Prepare>,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            train: vec![Source {
                path: "data/train.bin".into(),
                weight: 1.0,
            }],
            val: Some("data/val.bin".into()),
            tokenizer: Some("data/tokenizer.json".into()),
            dtype: None,
            prepare: None,
        }
    }
}

impl Data {
    pub(super) fn validate(&self) -> Result<()> {
        require(
            !self.train.is_empty(),
            "data.train",
            "empty",
            "a list of token files",
        )?;
        for source in &self.train {
            positive("the weight of a data.train entry", source.weight)?;
        }
        if let Some(prepare) = &self.prepare {
            let inputs = prepare.input.len();
            require(
                inputs > 0,
                "data.prepare.input",
                "empty",
                "a list of files or directories",
            )?;
            let fraction = prepare.val_fraction;
            let (ok, allowed) = match &self.val {
                Some(_) => (
                    fraction > 0.0 && fraction < 1.0,
                    "above 0 and below 1, as data.val is set",
                ),
                None => (fraction == 0.0, "0, as data.val is null"),
            };
            require(ok, "data.prepare.val_fraction", fraction, allowed)?;
            require(
                self.train.len() == 1,
                "data.train",
                format!("{} entries", self.train.len()),
                "one file when data.prepare makes it",
            )?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// Peak learning rate.
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Largest global gradient norm.
    pub grad_clip: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            lr: 1.2e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            grad_clip: 1.0,
        }
    }
}

impl Optimizer {
    pub(super) fn validate(&self) -> Result<()> {
        positive("optimizer.lr", self.lr)?;
        for (key, value) in [
            ("optimizer.beta1", self.beta1),
            ("optimizer.beta2", self.beta2),
        ] {
            require((0.0..1.0).contains(&value), key, value, "from 0 to below 1")?;
        }
        positive("optimizer.eps", self.eps)?;
        not_negative("optimizer.weight_decay", self.weight_decay)?;
        positive("optimizer.grad_clip", self.grad_clip)
    }
}

/// Number formats of a GPU's training; a CPU computes and keeps everything in f32. The forward
/// products are exact in all of them, and weights stay f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Precision {
    /// Operands of the backward products, dX and dW.
    pub backward: BackwardDtype,
    /// Weight gradients summed over the micro-batches.
    pub gradients: GradientDtype,
    /// AdamW's two moments.
    pub optimizer_state: StateDtype,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackwardDtype {
    /// Exact mode: the straight-through estimator's formulas in bf16.
    Bf16,
    /// One byte a value, from sm_89 on: output gradients as int8 codes with a scale a token, in dW
    /// rounded to e4m3.
    Fp8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientDtype {
    F32,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateDtype {
    F32,
    Bf16,
    /// One byte a value on a non-linear scale, with an f32 maximum for every block.
    Int8,
}

impl Default for Precision {
    fn default() -> Self {
        Self {
            backward: BackwardDtype::Bf16,
            gradients: GradientDtype::F32,
            optimizer_state: StateDtype::Bf16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// First half: peak rate and weight decay; then a linear decay from `stage2_lr` to `min_lr`
    /// without weight decay (The Era of 1-bit LLMs: Training Tips, Code and FAQ).
    TwoStage,
    Cosine,
    /// Warm-up, stable, decay: linear over the last `decay_fraction` of the steps.
    Wsd,
    Linear,
    Constant,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    pub kind: ScheduleKind,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Second peak of `two_stage`.
    pub stage2_lr: f64,
    /// Rate at the last step of every decaying schedule.
    pub min_lr: f64,
    /// Share of the steps that `wsd` decays over.
    pub decay_fraction: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::TwoStage,
            warmup_steps: 375,
            stage2_lr: 8e-4,
            min_lr: 0.0,
            decay_fraction: 0.2,
        }
    }
}

impl Schedule {
    pub(super) fn validate(&self, steps: u64) -> Result<()> {
        require(
            self.warmup_steps < steps,
            "schedule.warmup_steps",
            self.warmup_steps,
            &format!("below train.steps ({steps})"),
        )?;
        positive("schedule.stage2_lr", self.stage2_lr)?;
        not_negative("schedule.min_lr", self.min_lr)?;
        require(
            self.decay_fraction > 0.0 && self.decay_fraction <= 1.0,
            "schedule.decay_fraction",
            self.decay_fraction,
            "above 0, at most 1",
        )
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stability {
    /// A loss above this multiple of its moving average is a spike.
    pub spike_threshold: f64,
    /// Decay of the loss's exponential moving average.
    pub ema_decay: f64,
    /// Steps the average must have seen before a spike can be told.
    pub ema_warmup: u64,
    /// Steps a checkpoint must outlive to count as stable.
    pub settle_steps: u64,
    /// Factor on the learning rate after a rollback.
    pub lr_factor: f64,
    /// Steps over which the learning rate eases back; 0 keeps the rate as it is after a rollback,
    /// whatever `lr_factor` says.
    pub recovery_steps: u64,
    /// Rollbacks after which training stops; 0 stops at the first anomaly.
    pub max_rollbacks: u32,
}

impl Default for Stability {
    fn default() -> Self {
        Self {
            spike_threshold: 5.0,
            ema_decay: 0.98,
            ema_warmup: 20,
            settle_steps: 100,
            lr_factor: 0.5,
            recovery_steps: 500,
            max_rollbacks: 8,
        }
    }
}

impl Stability {
    pub(super) fn validate(&self) -> Result<()> {
        require(
            self.spike_threshold.is_finite() && self.spike_threshold > 1.0,
            "stability.spike_threshold",
            self.spike_threshold,
            "a finite number above 1",
        )?;
        require(
            (0.0..1.0).contains(&self.ema_decay),
            "stability.ema_decay",
            self.ema_decay,
            "from 0 to below 1",
        )?;
        require(
            self.lr_factor > 0.0 && self.lr_factor <= 1.0,
            "stability.lr_factor",
            self.lr_factor,
            "above 0, at most 1",
        )?;
        at_most("stability.ema_warmup", self.ema_warmup, MAX_STEPS)?;
        at_most("stability.settle_steps", self.settle_steps, MAX_STEPS)?;
        at_most("stability.recovery_steps", self.recovery_steps, MAX_STEPS)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// Steps between validations and text samples; 0 for only at the end.
    pub every: u64,
    /// Micro-batches of one validation, from the start of `data.val`.
    pub batches: usize,
    /// Start of the text samples; empty for none.
    pub sample_prompt: String,
    pub sample_tokens: usize,
    /// Softmax temperature of the text samples; 0 takes the likeliest token.
    pub sample_temperature: f64,
}

impl Default for Eval {
    fn default() -> Self {
        Self {
            every: 1000,
            batches: 50,
            sample_prompt: "The".into(),
            sample_tokens: 64,
            sample_temperature: 0.8,
        }
    }
}

impl Eval {
    pub(super) fn validate(&self) -> Result<()> {
        at_most("eval.every", self.every, MAX_STEPS)?;
        at_least_one("eval.batches", self.batches as u64)?;
        at_most("eval.batches", self.batches as u64, MAX_COUNT)?;
        at_most("eval.sample_tokens", self.sample_tokens as u64, MAX_COUNT)?;
        not_negative("eval.sample_temperature", self.sample_temperature)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Steps between checkpoints; 0 for only at the end.
    pub every: u64,
    /// Newest checkpoints kept.
    pub keep_last: usize,
    /// Checkpoints of steps divisible by this are kept for good; 0 for none.
    pub keep_every: u64,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            every: 1000,
            keep_last: 3,
            keep_every: 20_000,
        }
    }
}

impl Checkpoint {
    pub(super) fn validate(&self) -> Result<()> {
        at_most("checkpoint.every", self.every, MAX_STEPS)?;
        at_most("checkpoint.keep_every", self.keep_every, MAX_STEPS)?;
        at_least_one("checkpoint.keep_last", self.keep_last as u64)?;
        at_most("checkpoint.keep_last", self.keep_last as u64, MAX_COUNT)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Logging {
    /// Steps between progress lines; `metrics.jsonl` has every step.
    pub every: u64,
    pub tensorboard: bool,
}

impl Default for Logging {
    fn default() -> Self {
        Self {
            every: 10,
            tensorboard: true,
        }
    }
}

impl Logging {
    pub(super) fn validate(&self) -> Result<()> {
        at_least_one("logging.every", self.every)?;
        at_most("logging.every", self.every, MAX_STEPS)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hardware {
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Dense bf16 peak for MFU; unset takes the device's own from the table.
    pub peak_tflops: Option<f64>,
    /// CPU threads; unset takes all cores.
    pub threads: Option<usize>,
    /// Which of our CUDA kernels run.
    pub kernels: Kernels,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kernels {
    /// The ones made for the GPU at hand.
    Auto,
    /// Those for every GPU from sm_80 on.
    Portable,
}

impl Default for Hardware {
    fn default() -> Self {
        Self {
            device: "auto".into(),
            peak_tflops: None,
            threads: None,
            kernels: Kernels::Auto,
        }
    }
}

impl Hardware {
    pub(super) fn validate(&self) -> Result<()> {
        if let Some(threads) = self.threads {
            at_least_one("hardware.threads", threads as u64)?;
            at_most("hardware.threads", threads as u64, MAX_THREADS)?;
        }
        self.peak_tflops
            .map_or(Ok(()), |peak| positive("hardware.peak_tflops", peak))
    }
}
