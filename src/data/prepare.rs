//! Makes a run's token files from text on first use, as its `data.prepare` section says.

use std::path::Path;

use indicatif::ProgressBar;

use super::bin_format::Sidecar;
use super::dataset::files_of_name;
use super::tokenize::{self, TokenizeOptions, TokenizeSummary, Validation, VocabularySource};
use crate::config::{Data, Prepare};
use crate::{Error, Result};

/// Tokenises when the training file, the validation file or the tokenizer is not there yet; `None`
/// when they are, made from the same section. The token files may be shards.
///
/// # Errors
/// `Usage` when a file of either name was made otherwise, by hand or from a section that has
/// changed since: it is not overwritten. Otherwise as [`tokenize::run`].
pub fn prepare(data: &Data, progress: &ProgressBar) -> Result<Option<TokenizeSummary>> {
    let (Some(prepare), [source]) = (&data.prepare, data.train.as_slice()) else {
        return Ok(None);
    };
    let made_by = description(prepare);
    let mut complete = data.tokenizer.as_ref().is_none_or(|path| path.is_file());
    for path in [Some(&source.path), data.val.as_ref()]
        .into_iter()
        .flatten()
    {
        let files = files_of_name(path)?;
        complete &= !files.is_empty();
        for file in files {
            check_origin(&file, &made_by)?;
        }
    }
    if complete {
        return Ok(None);
    }
    let vocabulary = match &data.tokenizer {
        Some(path) if path.is_file() => VocabularySource::File(path.clone()),
        _ => VocabularySource::Train(prepare.train_vocab),
    };
    let options = TokenizeOptions {
        inputs: prepare.input.clone(),
        output: source.path.clone(),
        vocabulary,
        eos_token: None,
        validation: data.val.clone().map(|output| Validation {
            fraction: prepare.val_fraction,
            output,
        }),
        text_field: "text".into(),
        extensions: (!prepare.ext.is_empty()).then(|| prepare.ext.clone()),
        threads: None,
        max_shard_tokens: None,
        sample_bytes: prepare.sample_mb.map(|mb| mb.saturating_mul(1_000_000)),
        strict: false,
        command: made_by,
    };
    tokenize::run(&options, progress).map(Some)
}

fn check_origin(file: &Path, made_by: &str) -> Result<()> {
    match Sidecar::read_beside(file)? {
        Some(sidecar) if sidecar.command == made_by => Ok(()),
        _ => Err(Error::usage(format!(
            "{} was not made from this config's data.prepare: delete it to make it anew, or drop \
             data.prepare to use it as it is",
            file.display()
        ))),
    }
}

/// What the sidecar records, so that a changed section does not pass for the same data.
fn description(prepare: &Prepare) -> String {
    format!(
        "data.prepare: input {:?}, ext {:?}, sample_mb {:?}, train_vocab {}, val_fraction {}",
        prepare.input, prepare.ext, prepare.sample_mb, prepare.train_vocab, prepare.val_fraction
    )
}
