//! Checkpoints: `checkpoints/step_0010000/` with `model.safetensors` (names as in
//! `transformers`), `optimizer.safetensors` (`m.NAME`, `v.NAME`) and `state.json`, which holds
//! the checksums of the others and of itself. A checkpoint appears whole, by a rename, or not at
//! all; `latest` and `best` are text files that hold a directory's name.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Shape, Tensor};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::learner::Learner;
use super::optimizer::{AdamW, Moment, Moments};
use super::stability::StabilityState;
use crate::config::Config;
use crate::data::bin_format::hex;
use crate::error::IoContext;
use crate::files::{
    Temporary, remove_dir, remove_file, replace_file, sync_dir, sync_file, write_tensors,
};
use crate::model::{BitNetTransformer, Parameter, Parameters};
use crate::{Error, Result};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// How far a run has come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Updates applied.
    pub step: u64,
    /// Tokens those updates have seen.
    pub tokens: u64,
    /// Index of the next sample: with `config.train.seed`, the data's and the sampler's whole
    /// state, as sampling is stateless.
    pub position: u64,
    /// Training loss of the last step, in nats; none before the first.
    pub loss: Option<f64>,
    /// Newest validation loss, and the lowest, in nats.
    pub val_loss: Option<f64>,
    pub best_val_loss: Option<f64>,
    pub stability: StabilityState,
}

/// `state.json`: everything beside the tensors that a run needs to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    #[serde(flatten)]
    pub progress: Progress,
    pub config: Config,
    /// xxh3 of each file beside this one, in hex.
    files: BTreeMap<String, String>,
    /// xxh3 of this file as it is with an empty checksum.
    checksum: String,
}

/// The checkpoints of one run.
#[derive(Clone, Debug)]
pub struct CheckpointDir {
    root: PathBuf,
}

impl CheckpointDir {
    pub fn new(run_dir: &Path) -> Self {
        Self {
            root: run_dir.join("checkpoints"),
        }
    }

    /// Writes a checkpoint, whole or not at all, and points `latest` at it.
    ///
    /// # Errors
    /// What the operating system refused (a full disk, say); earlier checkpoints are untouched.
    pub fn save(&self, progress: Progress, config: &Config, learner: &Learner) -> Result<PathBuf> {
        fs::create_dir_all(&self.root).at("create", &self.root)?;
        let name = format!("step_{:07}", progress.step);
        let temporary = Temporary::directory(self.root.join(format!(".{name}.partial")))?;
        write_files(temporary.path(), progress, config, learner)?;
        let target = self.root.join(&name);
        temporary.publish(&target)?;
        self.point("latest", &target)?;
        Ok(target)
    }

    /// Makes `latest` or `best` name a checkpoint.
    ///
    /// # Errors
    /// What the operating system refused, here and below.
    pub fn point(&self, pointer: &str, target: &Path) -> Result<()> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        replace_file(&self.root.join(pointer), name.as_bytes())
    }

    /// Checkpoints by step, oldest first; not yet verified.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            Err(e) => return Err(e).at("read", &self.root),
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry.at("read", &self.root)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if let Some(step) = name.strip_prefix("step_").and_then(|s| s.parse().ok()) {
                all.push((step, path));
            }
        }
        all.sort();
        Ok(all)
    }

    /// The newest checkpoint that is whole, among those whose step `accept` takes; every broken one
    /// on the way is warned about.
    ///
    /// # Errors
    /// A file that is there and cannot be read: its checkpoint may well be whole.
    pub fn newest_valid(&self, accept: impl Fn(u64) -> bool) -> Result<Option<(PathBuf, State)>> {
        for (step, path) in self.list()?.into_iter().rev() {
            if !accept(step) {
                continue;
            }
            match verify(&path) {
                Ok(state) => return Ok(Some((path, state))),
                Err(Error::Io { source, .. }) if source.kind() != ErrorKind::NotFound => {
                    return Err(source).at("read the checkpoint", &path);
                }
                Err(error) => tracing::warn!("{error}; trying the checkpoint before it"),
            }
        }
        Ok(None)
    }

    /// Deletes what is not kept: all but the newest `keep_last`, every `keep_every`-th, what
    /// `best` points at, and those `protect` accepts.
    pub fn prune(
        &self,
        keep_last: usize,
        keep_every: u64,
        protect: impl Fn(u64) -> bool,
    ) -> Result<()> {
        let best = resolve(&self.root.join("best")).ok();
        let all = self.list()?;
        let old = all.len().saturating_sub(keep_last);
        for (step, path) in &all[..old] {
            let milestone = keep_every > 0 && step % keep_every == 0;
            if !milestone && best.as_ref() != Some(path) && !protect(*step) {
                remove_dir(path)?;
            }
        }
        Ok(())
    }

    /// Deletes the checkpoints after `step`, newest first, and `best` if it named one of them.
    pub fn discard_after(&self, step: u64) -> Result<()> {
        let later = self.list()?.into_iter().rev();
        for (_, path) in later.take_while(|(other, _)| *other > step) {
            remove_dir(&path)?;
        }
        if !self.has_best() {
            remove_file(&self.root.join("best"))?;
        }
        Ok(())
    }

    /// Whether `best` names a checkpoint that is there.
    pub fn has_best(&self) -> bool {
        resolve(&self.root.join("best")).is_ok()
    }

    /// Whether `checkpoint` is one of this run's.
    pub fn holds(&self, checkpoint: &Path) -> bool {
        let parent = checkpoint.parent().map(fs::canonicalize);
        matches!((parent, fs::canonicalize(&self.root)), (Some(Ok(a)), Ok(b)) if a == b)
    }

    /// Replaces a checkpoint's state, tensors untouched, and makes it the latest.
    pub fn rewrite_state(&self, dir: &Path, state: &mut State) -> Result<()> {
        state.write(dir)?;
        self.point("latest", dir)
    }
}

/// The directory that `path` names: itself, or what the pointer file `latest` or `best` holds.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let target = if path.is_file() {
        // A pointer is one short name; any other file is looked at no further.
        let mut start = [0u8; 256];
        let mut file = File::open(path).at("open", path)?;
        let read = file.read(&mut start).at("read", path)?;
        path.with_file_name(String::from_utf8_lossy(&start[..read]).trim())
    } else {
        path.to_path_buf()
    };
    if !target.join(STATE).is_file() {
        return Err(Error::usage(format!(
            "{} is not a checkpoint: give a directory like runs/NAME/checkpoints/step_0001000, or \
             runs/NAME/checkpoints/latest",
            path.display()
        )));
    }
    Ok(target)
}

/// Reads a checkpoint's state and compares every checksum.
///
/// # Errors
/// `Format` naming the file that is torn or changed; `Io` for one that is missing or unreadable.
pub fn verify(dir: &Path) -> Result<State> {
    verify_files(dir, |_| true)
}

/// [`verify`] without the optimizer, the larger part, for those who only want the model.
///
/// # Errors
/// As [`verify`].
pub fn verify_model(dir: &Path) -> Result<State> {
    verify_files(dir, |name| name != OPTIMIZER)
}

fn verify_files(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<State> {
    let path = dir.join(STATE);
    let text = fs::read(&path).at("read", &path)?;
    let state: State = serde_json::from_slice(&text)
        .map_err(|e| Error::format(&path, format!("torn or changed ({e})")))?;
    // Of the bytes as they are: a later version may write more keys, or other ones.
    let text = String::from_utf8_lossy(&text);
    let (filled, empty) = (checksum_field(&state.checksum), checksum_field(""));
    if state.checksum != hex(xxh3_64(text.replacen(&filled, &empty, 1).as_bytes())) {
        return Err(Error::format(
            &path,
            "its checksum does not match: the file was changed",
        ));
    }
    for (name, stored) in state.files.iter().filter(|(name, _)| wanted(name)) {
        let path = dir.join(name);
        if *stored != file_checksum(&path)? {
            return Err(Error::format(
                path,
                "its checksum does not match: the file was cut short or changed",
            ));
        }
    }
    Ok(state)
}

/// The weights of a checkpoint.
///
/// # Errors
/// A checkpoint of another shape, by the name of the first tensor that differs.
pub fn load_model(dir: &Path, config: &Config, device: &Device) -> Result<BitNetTransformer> {
    let parameters = Parameters::load(&config.model, &dir.join(MODEL), device)?;
    BitNetTransformer::with_parameters(&config.model, parameters)
}

/// The optimizer of a checkpoint.
///
/// # Errors
/// As [`load_model`].
pub fn load_optimizer(dir: &Path, config: &Config, parameters: &Parameters) -> Result<AdamW> {
    let path = dir.join(OPTIMIZER);
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
        .map_err(|e| Error::format(&path, format!("not a readable safetensors file ({e})")))?;
    let read = |kind: &str, p: &Parameter| {
        Moment::build(p, config, |is_maxima, shape, dtype| {
            let name = moment_name(kind, is_maxima, p);
            let tensor = stored(&tensors, &name, &shape, dtype);
            let tensor = tensor.map_err(|e| Error::format(&path, e))?;
            Ok(tensor.to_device(p.var.device())?)
        })
    };
    let moments = parameters
        .iter()
        .map(|p| {
            Ok(Moments {
                m: read("m", p)?,
                v: read("v", p)?,
            })
        })
        .collect::<Result<_>>()?;
    Ok(AdamW::with_moments(&config.optimizer, moments))
}

/// `m.NAME`, `v.NAME`, and for 8-bit moments `m_max.NAME`, `v_max.NAME`.
fn moment_name(kind: &str, is_maxima: bool, parameter: &Parameter) -> String {
    let suffix = if is_maxima { "_max" } else { "" };
    format!("{kind}{suffix}.{}", parameter.name)
}

/// The tensor called `name`, if it has the shape and format that it must have.
fn stored(
    tensors: &HashMap<String, Tensor>,
    name: &str,
    shape: &Shape,
    dtype: DType,
) -> Result<Tensor> {
    let tensor = tensors.get(name).ok_or_else(|| {
        Error::usage(format!(
            "tensor `{name}` is missing: another model's file, or another precision.optimizer_state?"
        ))
    })?;
    if tensor.shape() != shape {
        return Err(Error::usage(format!(
            "tensor `{name}` has shape {:?}, the model needs {:?}: check the model section",
            tensor.dims(),
            shape.dims()
        )));
    }
    if tensor.dtype() != dtype {
        return Err(Error::usage(format!(
            "tensor `{name}` holds {:?}, and {dtype:?} is wanted: go on with the \
             precision.optimizer_state that the run began with, on the same kind of device",
            tensor.dtype()
        )));
    }
    Ok(tensor.clone())
}

/// The line of `state.json` with its own checksum, as [`State::to_json`] writes it.
fn checksum_field(checksum: &str) -> String {
    format!("\n  \"checksum\": \"{checksum}\"\n")
}

impl State {
    fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self).map_err(Error::training)
    }

    /// Writes `state.json`, checksum filled in, atomically.
    fn write(&mut self, dir: &Path) -> Result<()> {
        self.checksum.clear();
        self.checksum = hex(xxh3_64(&self.to_json()?));
        replace_file(&dir.join(STATE), &self.to_json()?)
    }
}

fn write_files(dir: &Path, progress: Progress, config: &Config, learner: &Learner) -> Result<()> {
    let parameters = learner.model().parameters();
    let weights = parameters
        .iter()
        .map(|p| (p.name.clone(), p.var.as_detached_tensor()));
    write_tensors(&dir.join(MODEL), weights, None)?;
    let moments = (parameters.iter().zip(learner.optimizer().moments())).flat_map(|(p, both)| {
        [("m", &both.m), ("v", &both.v)]
            .into_iter()
            .flat_map(move |(kind, moment)| {
                let tensors = [
                    (false, Some(&moment.values)),
                    (true, moment.maxima.as_ref()),
                ];
                (tensors.into_iter())
                    .filter_map(|(is_maxima, tensor)| Some((is_maxima, tensor?.clone())))
                    .map(move |(is_maxima, tensor)| (moment_name(kind, is_maxima, p), tensor))
            })
    });
    write_tensors(&dir.join(OPTIMIZER), moments, None)?;
    let mut names = vec![MODEL, OPTIMIZER];
    if let Some(tokenizer) = config.data.tokenizer.as_ref().filter(|path| path.is_file()) {
        let copy = dir.join(TOKENIZER);
        fs::copy(tokenizer, &copy).at("copy the tokenizer to", &copy)?;
        sync_file(&copy)?;
        names.push(TOKENIZER);
    }
    let files = names
        .into_iter()
        .map(|name| Ok((name.to_string(), file_checksum(&dir.join(name))?)))
        .collect::<Result<_>>()?;
    let mut state = State {
        progress,
        config: config.clone(),
        files,
        checksum: String::new(),
    };
    state.write(dir)?;
    sync_dir(dir)
}

fn file_checksum(path: &Path) -> Result<String> {
    let mut file = File::open(path).at("open", path)?;
    let mut hasher = Xxh3::new();
    std::io::copy(&mut file, &mut hasher).at("read", path)?;
    Ok(hex(hasher.digest()))
}
