//! What a run records: one JSON object a step in `metrics.jsonl`, and TensorBoard curves.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};

use super::gpu_stats::{GpuMonitor, GpuStats};
use super::tensorboard::EventWriter;
use crate::Result;
use crate::error::IoContext;

/// One optimizer step as it went.
#[derive(Clone, Debug, Serialize)]
pub struct StepRecord {
    /// Updates applied, this one included.
    pub step: u64,
    /// Tokens seen, this step's included.
    pub tokens: u64,
    /// Mean cross-entropy, nats.
    pub loss: f64,
    pub lr: f64,
    /// Weight decay.
    pub wd: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    pub tokens_per_s: f64,
    /// Share of the device's dense bf16 peak, 0 to 1, where the peak is known.
    pub mfu: Option<f64>,
    pub step_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuStats>,
}

/// The files a run's records go to.
pub struct Metrics {
    path: PathBuf,
    jsonl: File,
    tensorboard: Option<EventWriter>,
    gpu: Option<GpuMonitor>,
}

impl Metrics {
    /// Appends to the metrics of `run_dir`.
    pub fn open(run_dir: &Path, tensorboard: bool, gpu: Option<GpuMonitor>) -> Result<Self> {
        let path = run_dir.join("metrics.jsonl");
        let jsonl = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .at("open", &path)?;
        let tensorboard = tensorboard
            .then(|| EventWriter::create(run_dir.join("tensorboard")))
            .transpose()?;
        Ok(Self {
            path,
            jsonl,
            tensorboard,
            gpu,
        })
    }

    pub fn gpu_stats(&self) -> Option<GpuStats> {
        self.gpu.as_ref().and_then(GpuMonitor::stats)
    }

    pub fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.line(&json!(record))?;
        let Some(board) = &mut self.tensorboard else {
            return Ok(());
        };
        let step = record.step;
        board.scalar(step, "train/loss", record.loss)?;
        board.scalar(step, "train/lr", record.lr)?;
        board.scalar(step, "train/weight_decay", record.wd)?;
        board.scalar(step, "train/grad_norm", record.grad_norm)?;
        board.scalar(step, "speed/tokens_per_s", record.tokens_per_s)?;
        if let Some(mfu) = record.mfu {
            board.scalar(step, "speed/mfu", mfu)?;
        }
        if let Some(gpu) = &record.gpu {
            board.scalar(
                step,
                "gpu/memory_gib",
                gpu.memory_used as f64 / (1u64 << 30) as f64,
            )?;
            for (tag, value) in [
                ("gpu/utilization", gpu.utilization.map(f64::from)),
                ("gpu/power_w", gpu.power_w),
                ("gpu/temperature_c", gpu.temperature_c.map(f64::from)),
            ] {
                if let Some(value) = value {
                    board.scalar(step, tag, value)?;
                }
            }
        }
        Ok(())
    }

    pub fn validation(&mut self, step: u64, val_loss: f64) -> Result<()> {
        self.event(step, "validation", json!({ "val_loss": val_loss }))?;
        if let Some(board) = &mut self.tensorboard {
            board.scalar(step, "validation/loss", val_loss)?;
            board.flush()?;
        }
        Ok(())
    }

    pub fn sample(&mut self, step: u64, text: &str) -> Result<()> {
        match &mut self.tensorboard {
            Some(board) => board.text(step, "sample", text),
            None => Ok(()),
        }
    }

    /// A line with `step`, `event` and the fields of `details`.
    pub fn event(&mut self, step: u64, event: &str, details: Value) -> Result<()> {
        let mut line = json!({ "step": step, "event": event });
        if let (Value::Object(line), Value::Object(details)) = (&mut line, details) {
            line.extend(details);
        }
        self.line(&line)
    }

    /// Tells TensorBoard that steps from `step + 1` on are taken anew.
    pub fn restart_from(&mut self, step: u64) -> Result<()> {
        match &mut self.tensorboard {
            Some(board) => board.session_start(step + 1),
            None => Ok(()),
        }
    }

    pub fn flush(&mut self) -> Result<()> {
        match &mut self.tensorboard {
            Some(board) => board.flush(),
            None => Ok(()),
        }
    }

    fn line(&mut self, value: &Value) -> Result<()> {
        let mut line = value.to_string();
        line.push('\n');
        self.jsonl
            .write_all(line.as_bytes())
            .at("write", &self.path)
    }
}

/// Drops what a killed run recorded beyond the state it resumes from, `step` updates after
/// `rollbacks` rollbacks, as those steps are taken again; and perhaps half a line.
pub fn truncate_beyond(run_dir: &Path, step: u64, rollbacks: u32) -> Result<()> {
    let path = run_dir.join("metrics.jsonl");
    let Ok(text) = fs::read(&path) else {
        return Ok(());
    };
    let lines: Vec<(usize, Value)> = text
        .split_inclusive(|byte| *byte == b'\n')
        .map(|line| (line.len(), serde_json::from_slice(line).unwrap_or_default()))
        .collect();
    let is_rollback = |line: &Value| line["event"] == "rollback";
    // A rollback may be in the state and not here: recorded by the run this one was forked from,
    // or not recorded yet when the run was killed.
    let recorded = lines.iter().filter(|(_, line)| is_rollback(line)).count();
    let mut rollbacks_left = (rollbacks as usize).min(recorded);
    let mut end = 0;
    for (length, value) in lines {
        let rolled_back = is_rollback(&value);
        let beyond = match value["step"].as_u64() {
            Some(recorded) => rollbacks_left == 0 && (recorded > step || rolled_back),
            None => true,
        };
        if beyond {
            break;
        }
        rollbacks_left -= usize::from(rolled_back);
        end += length;
    }
    let file = OpenOptions::new()
        .write(true)
        .open(&path)
        .at("open", &path)?;
    file.set_len(end as u64).at("truncate", &path)
}
