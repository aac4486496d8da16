//! A trained model in the formats that other programs run, and a check that it is still the same.

pub mod bf16_masters;
pub mod gguf;
pub mod hf;
mod tokenizer;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;

pub use tokenizer::{EndOfText, Tokenizer};
pub use verify::{LOGITS_TOLERANCE, Tolerance, Verified, verify};

use self::gguf::TernaryType;
use crate::error::IoContext;
use crate::files::{Temporary, directory_of, temporary_name};
use crate::inference::packed_file::{self, PackedFile};
use crate::inference::{PackedWeights, checkpoint_of};
use crate::model::{BitNetConfig, BitNetTransformer, ParameterCount};
use crate::train::checkpoint::{self, load_model, resolve, verify_model};
use crate::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A directory for transformers: bf16 weights, quantised at each use as in training
    Hf,
    /// A directory for transformers: 2 bits a weight, embedding and head in bf16
    HfPacked,
    /// A file for llama.cpp, of type TQ2_0
    Gguf,
    /// The same of type TQ1_0: smaller, and slower to run
    GgufTq1,
    /// A file for titanbit itself: 2 bits a weight, embedding and head in 16 bits
    Packed,
}

/// What to export, and where to.
pub struct ExportOptions {
    /// A checkpoint, `latest` or `best` beside it, or a run.
    pub checkpoint: PathBuf,
    pub format: Format,
    pub output: PathBuf,
    /// Instead of the checkpoint's own `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    /// Replace an earlier export.
    pub force: bool,
}

/// What was exported.
pub struct Exported {
    pub checkpoint: PathBuf,
    pub step: u64,
    pub parameters: ParameterCount,
    pub output: PathBuf,
    /// Files and their bytes, in order of name.
    pub files: Vec<(PathBuf, u64)>,
    pub verified: Verified,
    /// What is not as one might expect, a line each.
    pub notes: Vec<String>,
}

/// Exports a checkpoint: written under a temporary name, read back and compared, and then renamed.
///
/// # Errors
/// `Usage` on a target that exists, a format that cannot hold the model, a tokenizer that does not
/// fit; `Format` on a damaged checkpoint, and if what was written is not the same model.
pub fn run(options: &ExportOptions) -> Result<Exported> {
    let ExportOptions { format, output, .. } = options;
    let dir = resolve(&checkpoint_of(&options.checkpoint))?;
    check_target(*format, output, options.force, &dir)?;
    let state = verify_model(&dir)?;
    let config = state.config.model.clone();
    format.check(&config)?;
    let tokenizer = find_tokenizer(options, &dir, config.vocab_size)?;
    let model = load_model(&dir, &state.config, &Device::Cpu)?;
    check_finite(&model)?;
    let weights = PackedWeights::read(&config, &model)?;

    let parent = directory_of(output);
    fs::create_dir_all(parent).at("create", parent)?;
    let temporary = format.temporary(output)?;
    let written = temporary.path();
    let name = output.file_stem().unwrap_or_default().to_string_lossy();
    let notes = format.write(written, &model, &weights, tokenizer.as_ref(), &name)?;
    drop(model);
    let read = format.read(written)?;
    let verified = verify(output, (&config, weights), read, format.tolerance())?;
    temporary.publish(output)?;
    Ok(Exported {
        checkpoint: dir,
        step: state.progress.step,
        parameters: config.parameter_count(),
        output: output.clone(),
        files: list_files(output)?,
        verified,
        notes,
    })
}

impl Format {
    fn is_directory(self) -> bool {
        matches!(self, Self::Hf | Self::HfPacked)
    }

    /// # Errors
    /// `Usage` with the reason if the format cannot hold the model.
    fn check(self, config: &BitNetConfig) -> Result<()> {
        match self {
            Self::Hf | Self::Packed => Ok(()),
            Self::HfPacked => hf::check_packed(config),
            Self::Gguf | Self::GgufTq1 => gguf::check(config),
        }
    }

    /// An empty directory or the name of a file, beside `output`.
    fn temporary(self, output: &Path) -> Result<Temporary> {
        if !self.is_directory() {
            return Ok(Temporary::new(temporary_name(output)));
        }
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        Temporary::directory(output.with_file_name(format!(".{name}.partial")))
    }

    /// Returns what a user should know of what was written, a line each.
    fn write(
        self,
        path: &Path,
        model: &BitNetTransformer,
        weights: &PackedWeights,
        tokenizer: Option<&Tokenizer>,
        name: &str,
    ) -> Result<Vec<String>> {
        let config = model.config();
        let json = tokenizer.map(|tokenizer| tokenizer.json.as_str());
        match self {
            Self::Hf => hf::write_masters(path, model, tokenizer)?,
            Self::HfPacked => hf::write_packed(path, config, weights, tokenizer)?,
            Self::Gguf => return gguf::write(path, model, json, TernaryType::Tq2_0, name),
            Self::GgufTq1 => return gguf::write(path, model, json, TernaryType::Tq1_0, name),
            Self::Packed => packed_file::write(path, config, weights, json)?,
        }
        Ok(Vec::new())
    }

    fn read(self, path: &Path) -> Result<(BitNetConfig, PackedWeights)> {
        match self {
            Self::Hf | Self::HfPacked => hf::read(path).map(|read| (read.config, read.weights)),
            Self::Gguf | Self::GgufTq1 => gguf::read(path),
            Self::Packed => {
                let file = PackedFile::open(path)?;
                let file = file.ok_or_else(|| Error::format(path, "not a packed file"))?;
                Ok((file.config, file.weights))
            }
        }
    }

    fn tolerance(self) -> Tolerance {
        Tolerance {
            tables: match self {
                // Half a step: of bf16, of f16.
                Self::Hf | Self::HfPacked => 1.0 / 256.0,
                Self::Packed | Self::Gguf | Self::GgufTq1 => 1.0 / 2048.0,
            },
            logits: LOGITS_TOLERANCE,
        }
    }
}

/// # Errors
/// `Usage` if `output` cannot be written without losing something.
fn check_target(format: Format, output: &Path, force: bool, checkpoint: &Path) -> Result<()> {
    let refuse = |what: &str| {
        let output = output.display();
        Err(Error::usage(format!("--output {output} {what}")))
    };
    if output.file_name().is_none() {
        return refuse("has no name of its own: give one for the export");
    }
    let canonical = |path: &Path| fs::canonicalize(path).ok();
    if canonical(directory_of(output)) == canonical(checkpoint) {
        return refuse("is inside the checkpoint: give a place outside");
    }
    if fs::symlink_metadata(output).is_err() {
        return Ok(());
    }
    if !force {
        return refuse("exists: give another name, or --force to replace it");
    }
    match (output.is_dir(), format.is_directory()) {
        (true, false) => refuse("is a directory, and the export would be a file"),
        (false, true) => refuse("is a file, and the export would be a directory"),
        (false, false) => Ok(()),
        (true, true) => {
            for entry in fs::read_dir(output).at("read", output)? {
                let name = entry.at("read", output)?.file_name();
                let name = name.to_string_lossy();
                if !hf::FILES.contains(&name.as_ref()) {
                    return refuse(&format!(
                        "holds {name}, which is of no export: --force would delete it"
                    ));
                }
            }
            Ok(())
        }
    }
}

/// The tokenizer that was asked for, or the checkpoint's own, if there is one.
fn find_tokenizer(
    options: &ExportOptions,
    checkpoint: &Path,
    vocab_size: usize,
) -> Result<Option<Tokenizer>> {
    let own = checkpoint.join(checkpoint::TOKENIZER);
    let path = match &options.tokenizer {
        Some(path) => path,
        None if own.is_file() => &own,
        None => {
            tracing::warn!(
                "{} has no tokenizer.json, the export will have none: give one with --tokenizer",
                checkpoint.display()
            );
            return Ok(None);
        }
    };
    Tokenizer::load(path, vocab_size).map(Some)
}

/// # Errors
/// `Training` naming a weight that is NaN or infinite, which has no code.
fn check_finite(model: &BitNetTransformer) -> Result<()> {
    for parameter in model.parameters().iter() {
        let values: Vec<f32> = parameter.var.flatten_all()?.to_vec1()?;
        if values.iter().any(|x| !x.is_finite()) {
            return Err(Error::training(format!(
                "{} has values that are not finite: export an earlier checkpoint",
                parameter.name
            )));
        }
    }
    Ok(())
}

/// The files at `output` and their bytes.
fn list_files(output: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let size = |path: PathBuf| {
        let metadata = fs::metadata(&path).at("inspect", &path)?;
        Ok((path, metadata.len()))
    };
    if !output.is_dir() {
        return Ok(vec![size(output.to_path_buf())?]);
    }
    let mut files = fs::read_dir(output)
        .at("read", output)?
        .map(|entry| size(entry.at("read", output)?.path()))
        .collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}
