//! One model in training: takes steps, judges them, rolls back, saves and resumes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;

use super::checkpoint::{CheckpointDir, Progress, State};
use super::learner::Learner;
use super::optimizer::UpdateScale;
use super::schedule::LrSchedule;
use super::stability::{Anomaly, Monitor, StabilityState};
use crate::config::Config;
use crate::data::{Loader, Mixture, TokenSet};
use crate::model::BitNetTransformer;
use crate::{Error, Result, device};

/// What became of a step.
#[derive(Clone, Debug)]
pub enum StepOutcome {
    /// The update was applied.
    Applied {
        loss: f64,
        lr: f64,
        weight_decay: f64,
        grad_norm: f64,
        seconds: f64,
    },
    /// The update was refused and the run went back.
    RolledBack {
        anomaly: Anomaly,
        /// The step that failed, counted from 1.
        failed_step: u64,
        /// Updates applied in the state gone back to.
        step: u64,
        /// Samples never to be seen again.
        skipped: std::ops::Range<u64>,
        /// Factor on the learning rate from here.
        lr_scale: f64,
    },
}

/// A model, its optimizer and its place in the data.
pub struct Trainer {
    config: Config,
    device: Device,
    learner: Learner,
    schedule: LrSchedule,
    monitor: Monitor,
    loader: Loader,
    validation: Option<TokenSet>,
    checkpoints: CheckpointDir,
    peak_flops: Option<f64>,
    step: u64,
    tokens: u64,
    loss: Option<f64>,
    val_loss: Option<f64>,
    best_val_loss: Option<f64>,
    /// Step whose weights `val_loss` is of, while it is known.
    validated: Option<u64>,
}

impl Trainer {
    /// A new run in `run_dir`, which holds nothing yet.
    ///
    /// # Errors
    /// Token files that cannot be read, or do not fit the model or the sequence length.
    pub fn new(config: &Config, run_dir: &Path, device: &Device) -> Result<Self> {
        Self::assemble(config, run_dir, Learner::new(config, device)?)
    }

    /// Goes on from the checkpoint in `dir`, whose verified state is `state`, as `config` says.
    ///
    /// # Errors
    /// As [`Self::new`]; a checkpoint of a model of another shape.
    pub fn resume(
        config: &Config,
        run_dir: &Path,
        device: &Device,
        dir: &Path,
        state: State,
    ) -> Result<Self> {
        let learner = Learner::load(config, device, dir)?;
        let mut trainer = Self::assemble(config, run_dir, learner)?;
        trainer.adopt(state.progress)?;
        Ok(trainer)
    }

    fn assemble(config: &Config, run_dir: &Path, learner: Learner) -> Result<Self> {
        let vocab_size = config.model.vocab_size as u32;
        let sets = config
            .data
            .train
            .iter()
            .map(|source| {
                Ok((
                    TokenSet::open(&[&source.path], config.data.dtype)?,
                    source.weight,
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        let tokenizer = config
            .data
            .tokenizer
            .as_deref()
            .filter(|path| path.is_file());
        if let Some(path) = tokenizer {
            sets.iter()
                .try_for_each(|(set, _)| set.check_tokenizer(path))?;
        }
        let validation = config
            .data
            .val
            .as_ref()
            .map(|path| TokenSet::open(&[path], config.data.dtype))
            .transpose()?;
        let seq_len = config.train.seq_len;
        if let Some(held_out) = &validation {
            held_out.check_vocab(vocab_size)?;
            tokenizer.map_or(Ok(()), |path| held_out.check_tokenizer(path))?;
            for (set, _) in &sets {
                set.check_apart(held_out)?;
                set.check_same_tokenizer(held_out)?;
            }
            // A wrong id should stop the run now, not at its first validation.
            let (rows, batches) = (config.train.micro_batch, config.eval.batches);
            held_out
                .sequential_batches(seq_len, rows, batches, vocab_size)?
                .try_for_each(|batch| batch.map(drop))?;
        }
        let mixture = Mixture::new(sets, seq_len, vocab_size, config.train.seed)?;
        let device = learner.model().device().clone();
        let peak_flops = config
            .hardware
            .peak_tflops
            .or_else(|| device::peak_bf16_tflops(&device))
            .map(|tflops| tflops * 1e12);
        Ok(Self {
            loader: Loader::new(Arc::new(mixture), 0, config.train.micro_batch)?,
            schedule: LrSchedule::new(config),
            monitor: Monitor::new(config.stability.clone(), StabilityState::default()),
            checkpoints: CheckpointDir::new(run_dir),
            config: config.clone(),
            device,
            learner,
            validation,
            peak_flops,
            step: 0,
            tokens: 0,
            loss: None,
            val_loss: None,
            best_val_loss: None,
            validated: None,
        })
    }

    fn adopt(&mut self, progress: Progress) -> Result<()> {
        self.step = progress.step;
        self.tokens = progress.tokens;
        self.loss = progress.loss;
        self.val_loss = progress.val_loss;
        self.best_val_loss = progress.best_val_loss;
        self.validated = None;
        self.monitor.state = progress.stability;
        self.loader.seek(progress.position)
    }

    /// Makes this step the run's newest: deletes the checkpoints after it.
    pub fn discard_later_checkpoints(&mut self) -> Result<()> {
        self.checkpoints.discard_after(self.step)?;
        if !self.checkpoints.has_best() {
            self.best_val_loss = None;
        }
        Ok(())
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn model(&self) -> &BitNetTransformer {
        self.learner.model()
    }

    /// The logits after the last of `ids`, of which the newest that fit are read.
    ///
    /// # Errors
    /// `Tensor` if the device refuses.
    pub fn next_logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.learner.next_logits(ids)
    }

    /// Updates applied so far.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// Tokens those updates have seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Model FLOPs utilisation at a rate of tokens per second; unknown without a known peak.
    pub fn mfu(&self, tokens_per_s: f64) -> Option<f64> {
        let per_token = self
            .config
            .model
            .train_flops_per_token(self.config.train.seq_len);
        self.peak_flops.map(|peak| per_token * tokens_per_s / peak)
    }

    /// Takes one step: forward and backward of every micro-batch, then either the update or,
    /// when the loss or the gradient is out of order, a rollback.
    ///
    /// # Errors
    /// Unreadable data; more rollbacks than `stability.max_rollbacks`.
    pub fn step(&mut self) -> Result<StepOutcome> {
        let started = Instant::now();
        if self.schedule.jumps_at(self.step) {
            self.monitor.restart_ema();
        }
        let samples = self.config.samples_per_step();
        let start = self.loader.position();
        let allowed = self.monitor.state.next_position(start, samples);
        if allowed != start {
            self.loader.seek(allowed)?;
        }
        let window = allowed..allowed + samples;

        let accum = self.config.train.grad_accum;
        for _ in 0..accum {
            let batch = self.loader.next()?;
            self.learner.accumulate(&batch, 1.0 / accum as f64)?;
        }
        let (loss, norm) = self.learner.loss_and_grad_norm()?;
        if let Err(anomaly) = self.monitor.observe(loss, norm) {
            return self.roll_back(anomaly, window);
        }
        let lr = self.schedule.lr(self.step) * self.monitor.lr_scale(self.step);
        let weight_decay = self.schedule.weight_decay(self.step);
        let scale = UpdateScale {
            gradient: self.learner.optimizer().clip_coefficient(norm),
            lr,
            weight_decay,
        };
        self.learner.update(scale, self.step + 1)?;
        self.step += 1;
        self.tokens += self.config.tokens_per_step();
        self.loss = Some(loss);
        self.device.synchronize()?;
        Ok(StepOutcome::Applied {
            loss,
            lr,
            weight_decay,
            grad_norm: norm,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// Back to the last stable checkpoint, or to the initial weights when there is none yet.
    fn roll_back(&mut self, anomaly: Anomaly, window: std::ops::Range<u64>) -> Result<StepOutcome> {
        let failed_step = self.step;
        if !self.monitor.may_roll_back() {
            return Err(Error::training(format!(
                "step {}: {anomaly}, after {} rollbacks; lower optimizer.lr or check the data, \
                 then raise stability.max_rollbacks and go on with --resume latest",
                failed_step + 1,
                self.monitor.state.rollbacks
            )));
        }
        let stable = self
            .checkpoints
            .newest_valid(|saved| self.monitor.is_stable(saved, failed_step))?;
        let recovered = |restored: StabilityState, step| {
            self.monitor
                .after_rollback(restored, step, failed_step, window.clone())
        };
        // Later checkpoints go before the state is rewritten, so that a run killed in between
        // repeats this rollback.
        match stable {
            Some((dir, mut state)) => {
                let step = state.progress.step;
                state.progress.stability = recovered(state.progress.stability, step);
                self.checkpoints.discard_after(step)?;
                self.checkpoints.rewrite_state(&dir, &mut state)?;
                self.learner.restore(&self.config, Some(&dir))?;
                self.adopt(state.progress)?;
                self.discard_later_checkpoints()?;
            }
            None if self.monitor.state.origin > 0 => {
                return Err(Error::training(format!(
                    "step {}: {anomaly}, and no whole checkpoint is left to go back to",
                    failed_step + 1
                )));
            }
            None => {
                self.monitor.state = recovered(StabilityState::default(), 0);
                self.checkpoints.discard_after(0)?;
                self.learner.restore(&self.config, None)?;
                self.step = 0;
                self.tokens = 0;
                self.loss = None;
                self.val_loss = None;
                self.best_val_loss = None;
                self.loader.seek(0)?;
                self.save()?;
            }
        }
        Ok(StepOutcome::RolledBack {
            anomaly,
            failed_step: failed_step + 1,
            step: self.step,
            skipped: window,
            lr_scale: self.monitor.lr_scale(self.step),
        })
    }

    /// Mean loss in nats over the first `eval.batches` micro-batches of the held-out data; `None`
    /// without such data, and once `stop` says so.
    ///
    /// # Errors
    /// Unreadable data.
    pub fn validate(&mut self, stop: impl Fn() -> bool) -> Result<Option<f64>> {
        let Some(validation) = &self.validation else {
            return Ok(None);
        };
        let batches = validation.sequential_batches(
            self.config.train.seq_len,
            self.config.train.micro_batch,
            self.config.eval.batches,
            self.config.model.vocab_size as u32,
        )?;
        let (mut sum, mut rows) = (0f64, 0usize);
        for batch in batches {
            if stop() {
                return Ok(None);
            }
            let batch = batch?;
            sum += self.learner.evaluate(&batch)? * batch.rows as f64;
            rows += batch.rows;
        }
        let loss = sum / rows as f64;
        if loss.is_finite() {
            self.val_loss = Some(loss);
            self.validated = Some(self.step);
        }
        Ok(Some(loss))
    }

    /// Writes a checkpoint, points `latest` and, when these very weights were validated and their
    /// loss is the lowest so far, `best` at it, and deletes those no longer kept.
    ///
    /// # Errors
    /// What the operating system refused; earlier checkpoints are untouched.
    pub fn save(&mut self) -> Result<PathBuf> {
        let lowest = match (self.val_loss, self.best_val_loss) {
            (Some(loss), Some(best)) => loss < best,
            (loss, None) => loss.is_some(),
            _ => false,
        };
        let is_best = lowest && self.validated == Some(self.step);
        if is_best {
            self.best_val_loss = self.val_loss;
        }
        let progress = Progress {
            step: self.step,
            tokens: self.tokens,
            position: self.loader.position(),
            loss: self.loss,
            val_loss: self.val_loss,
            best_val_loss: self.best_val_loss,
            stability: self.monitor.state.clone(),
        };
        let path = self
            .checkpoints
            .save(progress, &self.config, &self.learner)?;
        if is_best {
            self.checkpoints.point("best", &path)?;
        }
        let kept = &self.config.checkpoint;
        // A rollback needs the newest stable one, and those after it are to become stable.
        let newest_stable = self.newest_stable_step()?;
        self.checkpoints
            .prune(kept.keep_last, kept.keep_every, |step| {
                Some(step) >= newest_stable
            })?;
        Ok(path)
    }

    /// The checkpoint that a rollback would go back to now.
    fn newest_stable_step(&self) -> Result<Option<u64>> {
        let all = self.checkpoints.list()?;
        let stable = all
            .iter()
            .rev()
            .find(|(step, _)| self.monitor.is_stable(*step, self.step));
        Ok(stable.map(|(step, _)| *step))
    }
}
