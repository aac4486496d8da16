//! `titanbit tokenize`: text files to token files.

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

use super::console;
use crate::data::tokenize::{self, TokenizeOptions, Validation, VocabularySource};
use crate::{Error, Result};

/// Turn text into token files for training.
///
/// Reads text files, .jsonl and .parquet (text and .jsonl also as .gz or .zst), trains a
/// vocabulary unless one is given, and writes token files in llm.c's format with a sidecar .json,
/// and tokenizer.json beside them. A document is a file, a JSON line or a row; an end-of-text
/// token follows each.
#[derive(clap::Args)]
pub struct Args {
    /// Files and directories to read; directories are walked in order of name
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    input: Vec<String>,

    /// The token file to write
    #[arg(long, value_name = "NAME.bin")]
    output: PathBuf,

    /// Use this tokenizer.json of Hugging Face's `tokenizers`
    #[arg(long, value_name = "FILE", conflicts_with = "train_vocab")]
    tokenizer: Option<PathBuf>,

    /// Train a byte-level BPE vocabulary of this size
    #[arg(long, value_name = "N", default_value_t = 32000)]
    train_vocab: usize,

    /// The token that ends a document, if the tokenizer calls it by an unusual name
    #[arg(long, value_name = "TOKEN", requires = "tokenizer")]
    eos_token: Option<String>,

    /// Share of the documents to hold out for validation, chosen by their hash
    #[arg(long, value_name = "F", requires = "val_output")]
    val_fraction: Option<f64>,

    /// The token file for the held-out documents
    #[arg(long, value_name = "NAME.bin", requires = "val_fraction")]
    val_output: Option<PathBuf>,

    /// Field of a JSON line, or column of a Parquet file, that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    text_field: String,

    /// Endings to read from directories [default: txt,md,jsonl,parquet]
    #[arg(long, value_name = "EXT,...", value_delimiter = ',')]
    ext: Option<Vec<String>>,

    /// Encoding threads [default: one for each core]; the output does not depend on it
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Write shards NAME_000.bin, NAME_001.bin, ... of at most N tokens each
    #[arg(long, value_name = "N")]
    max_shard_tokens: Option<u64>,

    /// Read only a sample of whole files, always the same, of about this many megabytes
    #[arg(long, value_name = "MB")]
    sample_mb: Option<u64>,

    /// Stop at a document that is not UTF-8 instead of skipping it
    #[arg(long)]
    strict: bool,
}

pub fn run(args: Args) -> Result<()> {
    let options = TokenizeOptions {
        inputs: args.input,
        output: args.output,
        vocabulary: match args.tokenizer {
            Some(path) => VocabularySource::File(path),
            None => VocabularySource::Train(args.train_vocab),
        },
        eos_token: args.eos_token,
        validation: args
            .val_fraction
            .zip(args.val_output)
            .map(|(fraction, output)| Validation { fraction, output }),
        text_field: args.text_field,
        extensions: args.ext,
        threads: args.threads,
        max_shard_tokens: args.max_shard_tokens,
        sample_bytes: args.sample_mb.map(|mb| mb.saturating_mul(1_000_000)),
        strict: args.strict,
        command: std::env::args().collect::<Vec<_>>().join(" "),
    };
    let progress = progress_bar()?;
    let summary = tokenize::run(&options, &progress)?;
    console::answer(summary)
}

/// A bar with rate and time left; it hides itself when standard error is not a terminal.
pub fn progress_bar() -> Result<ProgressBar> {
    let style = ProgressStyle::with_template(
        "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} ETA {eta}",
    )
    .map_err(|error| Error::usage(format!("progress bar: {error}")))?;
    Ok(ProgressBar::new(0).with_style(style))
}
