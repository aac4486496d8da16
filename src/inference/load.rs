//! Models as users have them: a run, a checkpoint, an exported file.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use candle_core::Device;

use super::packed_file::PackedFile;
use super::weights::PackedWeights;
use crate::error::IoContext;
use crate::export::{gguf, hf};
use crate::model::BitNetConfig;
use crate::train::checkpoint::{TOKENIZER, load_model, resolve, verify_model};
use crate::{Error, Result};

/// A model on the host.
pub struct Loaded {
    pub config: BitNetConfig,
    pub weights: PackedWeights,
    /// The `tokenizer.json` that came with it.
    pub tokenizer: Option<String>,
    /// What it is, for people: `checkpoint of step 400`.
    pub kind: String,
}

/// Reads the model at `path`: a checkpoint directory, `latest` or `best` beside it, the directory of
/// a run, or what `titanbit export` wrote (GGUF without its tokenizer).
///
/// # Errors
/// `Usage` if there is nothing there that can be run; `Format` and `Io` as its format says.
pub fn load(path: &Path) -> Result<Loaded> {
    if !path.exists() {
        return Err(unusable(path, "does not exist"));
    }
    if hf::is_model(path) {
        return hf::read(path);
    }
    if path.is_file() && gguf::is_gguf(path)? {
        let (config, weights) = gguf::read(path)?;
        return Ok(Loaded {
            config,
            weights,
            tokenizer: None,
            kind: "GGUF model".into(),
        });
    }
    if path.is_file()
        && let Some(file) = PackedFile::open(path)?
    {
        return Ok(Loaded {
            config: file.config,
            weights: file.weights,
            tokenizer: file.tokenizer,
            kind: "packed model".into(),
        });
    }
    checkpoint(&checkpoint_of(path))
}

fn unusable(path: &Path, why: &str) -> Error {
    Error::usage(format!(
        "{} {why}: give a checkpoint like runs/NAME/checkpoints/latest, or what `titanbit export` \
         wrote",
        path.display()
    ))
}

/// The newest checkpoint where `path` is the directory of a run, otherwise `path` itself.
pub fn checkpoint_of(path: &Path) -> Cow<'_, Path> {
    let latest = path.join("checkpoints").join("latest");
    match latest.is_file() {
        true => latest.into(),
        false => path.into(),
    }
}

fn checkpoint(path: &Path) -> Result<Loaded> {
    let dir = resolve(path).map_err(|error| match error {
        Error::Usage(_) => unusable(path, "is neither a checkpoint nor an exported model"),
        other => other,
    })?;
    let state = verify_model(&dir)?;
    let model = load_model(&dir, &state.config, &Device::Cpu)?;
    let tokenizer = dir.join(TOKENIZER);
    let tokenizer = match tokenizer.is_file() {
        true => Some(fs::read_to_string(&tokenizer).at("read", &tokenizer)?),
        false => None,
    };
    Ok(Loaded {
        weights: PackedWeights::read(model.config(), &model)?,
        config: state.config.model,
        tokenizer,
        kind: format!("checkpoint of step {}", state.progress.step),
    })
}
