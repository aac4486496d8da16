//! A checkpoint: where training stood, and what became of the weights.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use candle_core::Device;
use rayon::prelude::*;
use serde::Serialize;

use crate::cli::format;
use crate::config::Config;
use crate::error::IoContext;
use crate::model::{BitNetTransformer, ParameterCount};
use crate::quant::ternary::{absmean, ternary_codes};
use crate::train::checkpoint::{load_model, resolve, verify};
use crate::{Error, Result};

#[derive(Serialize)]
pub struct Report {
    path: PathBuf,
    step: u64,
    tokens: u64,
    loss: Option<f64>,
    val_loss: Option<f64>,
    best_val_loss: Option<f64>,
    rollbacks: u32,
    /// Always true: a checkpoint that differs from its checksums is an error.
    checksums_verified: bool,
    bytes: u64,
    age_seconds: u64,
    parameters: ParameterCount,
    config: Config,
    projections: Vec<Projection>,
}

/// How the codes of one projection are spread, over the layers.
#[derive(Serialize)]
struct Projection {
    name: &'static str,
    minus_one: Share,
    zero: Share,
    plus_one: Share,
}

/// A share from 0 to 1 in each layer.
#[derive(Serialize)]
struct Share {
    mean: f64,
    min: f64,
    max: f64,
}

impl Report {
    /// Reads every file of the checkpoint and compares its checksum.
    pub fn of(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::usage(format!(
                "--checkpoint {} does not exist: give a directory like \
                 runs/NAME/checkpoints/step_0001000, or runs/NAME/checkpoints/latest",
                path.display()
            )));
        }
        let dir = resolve(path)?;
        let state = verify(&dir)?;
        let model = load_model(&dir, &state.config, &Device::Cpu)?;
        let (bytes, written) = size_and_time(&dir)?;
        let age = SystemTime::now()
            .duration_since(written)
            .unwrap_or_default();
        Ok(Self {
            path: dir,
            step: state.progress.step,
            tokens: state.progress.tokens,
            loss: state.progress.loss,
            val_loss: state.progress.val_loss,
            best_val_loss: state.progress.best_val_loss,
            rollbacks: state.progress.stability.rollbacks,
            checksums_verified: true,
            bytes,
            age_seconds: age.as_secs(),
            parameters: model.config().parameter_count(),
            projections: projections(&model)?,
            config: state.config,
        })
    }
}

/// Bytes of all files, and when the newest was written.
fn size_and_time(dir: &Path) -> Result<(u64, SystemTime)> {
    let mut total = (0, SystemTime::UNIX_EPOCH);
    for entry in fs::read_dir(dir).at("read", dir)? {
        let path = entry.at("read", dir)?.path();
        let metadata = fs::metadata(&path).at("inspect", &path)?;
        let written = metadata.modified().at("inspect", &path)?;
        total = (total.0 + metadata.len(), total.1.max(written));
    }
    Ok(total)
}

fn projections(model: &BitNetTransformer) -> Result<Vec<Projection>> {
    let of_projection = |name: &'static str| {
        let suffix = format!(".{name}.weight");
        let layers = model
            .parameters()
            .iter()
            .filter(|parameter| parameter.name.ends_with(&suffix))
            .map(|parameter| Ok(code_shares(&parameter.var.flatten_all()?.to_vec1()?)))
            .collect::<Result<Vec<_>>>()?;
        let share = |code: usize| Share::over(layers.iter().map(|shares| shares[code]));
        Ok(Projection {
            name,
            minus_one: share(0),
            zero: share(1),
            plus_one: share(2),
        })
    };
    let names = model.config().projections().map(|p| p.name);
    names.into_par_iter().map(of_projection).collect()
}

/// Shares of -1, 0 and +1.
fn code_shares(weight: &[f32]) -> [f64; 3] {
    let mut counts = [0u64; 3];
    for code in ternary_codes(weight, absmean(weight)) {
        counts[(code + 1) as usize] += 1;
    }
    counts.map(|count| count as f64 / weight.len() as f64)
}

impl Share {
    fn over(layers: impl ExactSizeIterator<Item = f64> + Clone) -> Self {
        Self {
            mean: layers.clone().sum::<f64>() / layers.len() as f64,
            min: layers.clone().fold(f64::INFINITY, f64::min),
            max: layers.fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let loss = |loss: Option<f64>| match loss {
            Some(loss) => format!("{loss:.4} (perplexity {:.2})", loss.exp()),
            None => "none yet".into(),
        };
        let Config { model, train, .. } = &self.config;
        let age = format::duration(Duration::from_secs(self.age_seconds));
        writeln!(f, "checkpoint        {}", self.path.display())?;
        writeln!(
            f,
            "written           {age} ago, {}, checksums correct",
            format::bytes(self.bytes)
        )?;
        writeln!(f, "step              {} of {}", self.step, train.steps)?;
        writeln!(f, "tokens            {}", format::count(self.tokens))?;
        writeln!(f, "loss              {}", loss(self.loss))?;
        writeln!(f, "validation loss   {}", loss(self.val_loss))?;
        if self.best_val_loss != self.val_loss {
            writeln!(f, "  best so far     {}", loss(self.best_val_loss))?;
        }
        if self.rollbacks > 0 {
            writeln!(f, "rollbacks         {}", self.rollbacks)?;
        }
        writeln!(
            f,
            "model             {} parameters, {} ternary: {} layers, hidden {}, {} heads ({} kv), \
             vocabulary {}",
            format::count(self.parameters.total() as u64),
            format::count(self.parameters.ternary as u64),
            model.layers,
            model.hidden_size,
            model.heads,
            model.kv_heads,
            model.vocab_size
        )?;
        writeln!(
            f,
            "training          {} x {} x {} tokens a step, lr {:e}, seed {}",
            train.micro_batch,
            train.grad_accum,
            train.seq_len,
            self.config.optimizer.lr,
            train.seed
        )?;
        writeln!(
            f,
            "\n{:<18} {:^22} {:^22} {:^22}",
            "codes, in percent", "-1", "0", "+1"
        )?;
        for projection in &self.projections {
            writeln!(
                f,
                "  {:<16} {:^22} {:^22} {:^22}",
                projection.name,
                projection.minus_one.to_string(),
                projection.zero.to_string(),
                projection.plus_one.to_string()
            )?;
        }
        Ok(())
    }
}

/// In percent, `33.1 (32.0 - 34.5)`: the mean, and the range over the layers.
impl Display for Share {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let percent = |share: f64| 100.0 * share;
        write!(
            f,
            "{:.1} ({:.1} - {:.1})",
            percent(self.mean),
            percent(self.min),
            percent(self.max)
        )
    }
}
