//! The YAML configuration of a training run: `configs/default.yaml` documents every key.

mod load;
mod sections;

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::model::BitNetConfig;
use crate::{Error, Result};

pub use sections::MAX_THREADS;
pub use sections::{
    BackwardDtype, Checkpoint, Data, Eval, GradientDtype, Hardware, Kernels, Logging, Optimizer,
    Precision, Prepare, Recompute, Schedule, ScheduleKind, Source, Stability, StateDtype, Train,
};

/// Everything that determines a run. The default is the 1.3B model tuned for an L20 48 GB.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub model: BitNetConfig,
    pub train: Train,
    pub precision: Precision,
    pub data: Data,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub stability: Stability,
    pub eval: Eval,
    pub checkpoint: Checkpoint,
    pub logging: Logging,
    pub hardware: Hardware,
}

impl Config {
    /// Reads a YAML file, applies `section.key=value` overrides, and checks every value.
    ///
    /// # Errors
    /// An unreadable file, malformed YAML, an unknown key (the nearest known one is named), a
    /// value of the wrong type or outside its range.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        load::from_file(path, overrides)
    }

    /// The same from text; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`Config::load`], but for reading.
    pub fn parse(text: &str, origin: &Path, overrides: &[String]) -> Result<Self> {
        load::from_text(text, origin, overrides)
    }

    /// The configuration as YAML, every key written out.
    ///
    /// # Errors
    /// `Usage` when a value has no form in YAML, such as a path that is not UTF-8.
    pub fn to_yaml(&self) -> Result<String> {
        serde_yaml::to_string(self).map_err(Error::usage)
    }

    /// Samples (rows of `seq_len` tokens) in one optimizer step.
    pub fn samples_per_step(&self) -> u64 {
        self.train.micro_batch as u64 * self.train.grad_accum as u64
    }

    pub fn tokens_per_step(&self) -> u64 {
        self.samples_per_step() * self.train.seq_len as u64
    }

    /// # Errors
    /// The first value that cannot be: its key, the value, and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.train.validate()?;
        if self.train.seq_len > self.model.max_seq_len {
            return Err(Error::usage(format!(
                "train.seq_len is {}: must not exceed model.max_seq_len ({})",
                self.train.seq_len, self.model.max_seq_len
            )));
        }
        self.data.validate()?;
        if let Some(prepare) = &self.data.prepare
            && prepare.train_vocab > self.model.vocab_size
        {
            return Err(Error::usage(format!(
                "data.prepare.train_vocab is {}: must not exceed model.vocab_size ({})",
                prepare.train_vocab, self.model.vocab_size
            )));
        }
        self.optimizer.validate()?;
        self.schedule.validate(self.train.steps)?;
        if self.schedule.min_lr > self.optimizer.lr {
            return Err(Error::usage(format!(
                "schedule.min_lr is {}: must not exceed optimizer.lr ({})",
                self.schedule.min_lr, self.optimizer.lr
            )));
        }
        self.stability.validate()?;
        self.eval.validate()?;
        self.checkpoint.validate()?;
        self.logging.validate()?;
        self.hardware.validate()
    }
}
