//! A whole training run: steps, validation, samples, checkpoints and records in a run directory.

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde_json::json;

use super::checkpoint::{self, CheckpointDir};
use super::gpu_stats::GpuMonitor;
use super::memory::{check_memory, explain};
use super::metrics::{Metrics, StepRecord, truncate_beyond};
use super::sample::Sampler;
use super::trainer::{StepOutcome, Trainer};
use crate::config::Config;
use crate::error::IoContext;
use crate::files::replace_file;
use crate::{Error, Result, device};

/// Where a run lives and how it starts and ends.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The run directory: `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`.
    pub out: PathBuf,
    /// Go on from a checkpoint instead of starting anew.
    pub resume: Option<Resume>,
    /// Stop once this many updates are applied, whatever `train.steps` plans.
    pub max_steps: Option<u64>,
}

#[derive(Clone, Debug)]
pub enum Resume {
    /// The newest whole checkpoint of the run directory.
    Latest,
    /// A checkpoint directory, or the pointer `latest` or `best` beside it.
    Path(PathBuf),
}

impl RunOptions {
    /// Whether a run can start as it says, as far as the directories tell.
    ///
    /// # Errors
    /// A run directory that holds another run, or later checkpoints than the one to go on from;
    /// nothing to resume from.
    pub fn check(&self) -> Result<()> {
        let checkpoints = CheckpointDir::new(&self.out);
        match &self.resume {
            None => refuse_used_directory(&self.out),
            Some(Resume::Latest) if checkpoints.list()?.is_empty() => Err(nothing_in(&self.out)),
            Some(Resume::Latest) => Ok(()),
            Some(Resume::Path(path)) => {
                let dir = checkpoint::resolve(path)?;
                if !checkpoints.holds(&dir) {
                    return refuse_used_directory(&self.out);
                }
                match checkpoints.list()?.last() {
                    Some((_, newest)) if newest.file_name() != dir.file_name() => {
                        Err(Error::usage(format!(
                            "{} is not the newest checkpoint: {} would be lost; go on with \
                             --resume latest, or choose another --out",
                            path.display(),
                            newest.display()
                        )))
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// The step after which the run ends.
    fn end(&self, config: &Config) -> u64 {
        let planned = config.train.steps;
        self.max_steps.map_or(planned, |max| max.min(planned))
    }
}

/// What a run tells while it goes, and how it is asked to stop.
pub trait Observer {
    /// The model, the data and the place to start from are known; the run is to end after step
    /// `end`.
    fn started(&mut self, trainer: &Trainer, device: &Device, end: u64);
    fn step(&mut self, record: &StepRecord);
    /// Evaluations on the way; those at the end are in the [`Summary`].
    fn validated(&mut self, step: u64, loss: f64);
    fn sampled(&mut self, step: u64, text: &str);
    /// Asked before every step: whether to save and stop.
    fn should_stop(&self) -> bool;
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Summary {
    pub step: u64,
    pub tokens: u64,
    /// It was asked to stop before its last step.
    pub interrupted: bool,
    /// Validation loss in nats, at the end.
    pub val_loss: Option<f64>,
    pub sample: Option<String>,
    pub checkpoint: PathBuf,
}

/// Trains as `config` says.
///
/// # Errors
/// What [`RunOptions::check`] and [`Trainer`] refuse; a tokenizer that did not make the data.
pub fn run(
    config: &Config,
    options: &RunOptions,
    device: &Device,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    run_whole(config, options, device, observer).map_err(|error| explain(error, config))
}

fn run_whole(
    config: &Config,
    options: &RunOptions,
    device: &Device,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    options.check()?;
    check_memory(config, device)?;
    let out = &options.out;
    let (mut trainer, start) = match &options.resume {
        Some(from) => resume(config, out, device, from)?,
        None => (Trainer::new(config, out, device)?, Start::New),
    };
    let sampler = match &config.data.tokenizer {
        Some(path) if path.is_file() && !config.eval.sample_prompt.is_empty() => {
            Some(Sampler::new(path, &config.eval, config.model.vocab_size)?)
        }
        Some(path) if !path.is_file() => {
            return Err(Error::usage(format!(
                "data.tokenizer {} does not exist: correct the path, or give null to train \
                 without samples",
                path.display()
            )));
        }
        _ => None,
    };
    std::fs::create_dir_all(out).at("create the run directory", out)?;
    let saved = match start {
        Start::New => None,
        Start::Fork => Some(trainer.save()?),
        Start::Resumed { dir, rollbacks } => {
            // What the killed run did after this checkpoint happens again.
            trainer.discard_later_checkpoints()?;
            truncate_beyond(out, trainer.step_count(), rollbacks)?;
            Some(dir)
        }
    };
    let config_path = out.join("config.yaml");
    replace_file(&config_path, config.to_yaml()?.as_bytes())?;
    let gpu = device::pci_bus_id(device).and_then(|id| GpuMonitor::new(&id));
    let end = options.end(config);
    if let Some(checkpoint) = saved.as_ref().filter(|_| trainer.step_count() >= end) {
        tracing::info!(
            "step {} is there already: raise --max-steps or train.steps to go on",
            trainer.step_count()
        );
        return Ok(Summary {
            step: trainer.step_count(),
            tokens: trainer.tokens(),
            interrupted: false,
            val_loss: None,
            sample: None,
            checkpoint: checkpoint.clone(),
        });
    }
    let metrics = Metrics::open(out, config.logging.tensorboard, gpu)?;
    observer.started(&trainer, device, end);
    Session {
        config,
        metrics,
        sampler,
        observer,
        saved: saved.map(|path| (trainer.step_count(), path)),
    }
    .train(&mut trainer, options)
}

/// Where a run's first state comes from.
enum Start {
    New,
    /// A checkpoint of another run.
    Fork,
    /// The checkpoint `dir` of the same run, which had seen so many rollbacks.
    Resumed {
        dir: PathBuf,
        rollbacks: u32,
    },
}

fn refuse_used_directory(out: &Path) -> Result<()> {
    // A run that failed before its first step left empty metrics, and nothing to lose.
    let out_name = out.display();
    let recorded = std::fs::metadata(out.join("metrics.jsonl")).is_ok_and(|file| file.len() > 0);
    if !CheckpointDir::new(out).list()?.is_empty() {
        return Err(Error::usage(format!(
            "{out_name} already holds a run: go on with --resume latest, or choose another --out"
        )));
    }
    if recorded {
        return Err(Error::usage(format!(
            "{out_name} holds the records of a run that saved no checkpoint: delete it, or choose \
             another --out"
        )));
    }
    Ok(())
}

fn nothing_in(out: &Path) -> Error {
    Error::usage(format!(
        "no whole checkpoint in {}: nothing to resume, start without --resume in a new --out",
        out.join("checkpoints").display()
    ))
}

fn resume(config: &Config, out: &Path, device: &Device, from: &Resume) -> Result<(Trainer, Start)> {
    let checkpoints = CheckpointDir::new(out);
    let (dir, mut state) = match from {
        Resume::Path(path) => {
            let dir = checkpoint::resolve(path)?;
            let state = checkpoint::verify(&dir)?;
            (dir, state)
        }
        Resume::Latest => checkpoints
            .newest_valid(|_| true)?
            .ok_or_else(|| nothing_in(out))?,
    };
    let fork = !checkpoints.holds(&dir);
    if fork {
        state.progress.best_val_loss = None;
        state.progress.stability.origin = state.progress.step;
    }
    let rollbacks = state.progress.stability.rollbacks;
    let then = state.config.clone();
    let trainer = Trainer::resume(config, out, device, &dir, state)?;
    tracing::info!("resuming from {}", dir.display());
    warn_of_changes(config, &then)?;
    let start = match fork {
        true => Start::Fork,
        false => Start::Resumed { dir, rollbacks },
    };
    Ok((trainer, start))
}

/// A resumed run repeats the original bit by bit only with the same settings.
fn warn_of_changes(now: &Config, then: &Config) -> Result<()> {
    let tree = |config| serde_json::to_value(config).map_err(Error::training);
    let (now, then) = (tree(now)?, tree(then)?);
    for section in [
        "model",
        "train",
        "data",
        "optimizer",
        "schedule",
        "stability",
    ] {
        for (key, value) in now[section].as_object().into_iter().flatten() {
            let before = &then[section][key];
            if value != before {
                tracing::warn!("{section}.{key} was {before} in the checkpoint and is {value} now");
            }
        }
    }
    Ok(())
}

/// The loop's companions.
struct Session<'a> {
    config: &'a Config,
    metrics: Metrics,
    sampler: Option<Sampler>,
    observer: &'a mut dyn Observer,
    /// Step and path of the newest checkpoint of this session.
    saved: Option<(u64, PathBuf)>,
}

impl Session<'_> {
    fn train(mut self, trainer: &mut Trainer, options: &RunOptions) -> Result<Summary> {
        let end = options.end(self.config);
        self.metrics.restart_from(trainer.step_count())?;
        while trainer.step_count() < end && !self.observer.should_stop() {
            if !self.step(trainer)? {
                continue;
            }
            let step = trainer.step_count();
            let due = |every: u64| every > 0 && step.is_multiple_of(every);
            if due(self.config.eval.every) && step < end {
                if let Some(loss) = self.validate(trainer)? {
                    self.observer.validated(step, loss);
                }
                if let Some(text) = self.sample(trainer)? {
                    self.observer.sampled(step, &text);
                }
            }
            if due(self.config.checkpoint.every) && step < end {
                self.save(trainer)?;
            }
        }
        let interrupted = trainer.step_count() < end;
        let val_loss = match interrupted {
            true => None,
            false => self.validate(trainer)?,
        };
        let checkpoint = match self.saved.take() {
            Some((step, path)) if step == trainer.step_count() => path,
            _ => self.save(trainer)?,
        };
        let sample = match interrupted {
            true => None,
            false => self.sample(trainer)?,
        };
        self.metrics.flush()?;
        Ok(Summary {
            step: trainer.step_count(),
            tokens: trainer.tokens(),
            interrupted,
            val_loss,
            sample,
            checkpoint,
        })
    }

    /// One step and its record; false after a rollback.
    fn step(&mut self, trainer: &mut Trainer) -> Result<bool> {
        match trainer.step()? {
            StepOutcome::Applied {
                loss,
                lr,
                weight_decay,
                grad_norm,
                seconds,
            } => {
                let tokens_per_s = self.config.tokens_per_step() as f64 / seconds;
                let record = StepRecord {
                    step: trainer.step_count(),
                    tokens: trainer.tokens(),
                    loss,
                    lr,
                    wd: weight_decay,
                    grad_norm,
                    tokens_per_s,
                    mfu: trainer.mfu(tokens_per_s),
                    step_ms: seconds * 1e3,
                    gpu: self.metrics.gpu_stats(),
                };
                self.metrics.step(&record)?;
                self.observer.step(&record);
                Ok(true)
            }
            StepOutcome::RolledBack {
                anomaly,
                failed_step,
                step,
                skipped,
                lr_scale,
            } => {
                tracing::warn!(
                    "step {failed_step}: {anomaly}; back to step {step}, samples {}..{} skipped, \
                     learning rate x {lr_scale}",
                    skipped.start,
                    skipped.end
                );
                let details = json!({
                    "reason": anomaly.to_string(),
                    "back_to_step": step,
                    "skipped_samples": [skipped.start, skipped.end],
                    "lr_scale": lr_scale,
                });
                self.metrics.event(failed_step, "rollback", details)?;
                self.metrics.restart_from(step)?;
                self.saved = None;
                Ok(false)
            }
        }
    }

    fn validate(&mut self, trainer: &mut Trainer) -> Result<Option<f64>> {
        let loss = trainer.validate(|| self.observer.should_stop())?;
        if let Some(loss) = loss {
            self.metrics.validation(trainer.step_count(), loss)?;
        }
        Ok(loss)
    }

    fn sample(&mut self, trainer: &mut Trainer) -> Result<Option<String>> {
        let Some(sampler) = &self.sampler else {
            return Ok(None);
        };
        let stop = || self.observer.should_stop();
        let next_logits = |ids: &[u32]| trainer.next_logits(ids);
        let text = sampler.text(next_logits, self.config.train.seed, stop)?;
        self.metrics.sample(trainer.step_count(), &text)?;
        Ok(Some(text))
    }

    fn save(&mut self, trainer: &mut Trainer) -> Result<PathBuf> {
        let path = trainer.save()?;
        let step = trainer.step_count();
        self.metrics
            .event(step, "checkpoint", json!({ "path": path }))?;
        self.metrics.flush()?;
        self.saved = Some((step, path.clone()));
        Ok(path)
    }
}
