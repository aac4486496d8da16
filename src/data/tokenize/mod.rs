//! Text to token files: `titanbit tokenize`, and what `titanbit train` does when its data set is
//! text.
//!
//! `sources` says which files, `reader` cuts them into batches of documents, `pipeline` encodes
//! the batches on all cores with an `encoder` each, and `output` writes them in order.

mod documents;
pub mod encoder;
mod gpt2;
mod output;
mod parquet;
pub mod paths;
mod pipeline;
mod reader;
pub mod sources;
pub mod vocabulary;

use std::fmt;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use crate::config::MAX_THREADS;
use crate::error::IoContext;
use crate::files::{directory_of, replace_file, temporary_name};
use crate::{Error, Result};
pub use documents::Skipped;
use documents::{Rules, for_each_document};
use output::SplitWriter;
pub use output::Totals;
use pipeline::{Encoding, encode_sources};
use reader::read_sources;
use sources::Source;
use vocabulary::{Vocabulary, tokenizer_hash};

use super::bin_format::Sidecar;
use super::dataset::{bin_files, files_of_name};

/// Name of the tokenizer's file, beside the output.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// A vocabulary is trained on at most this much of the input: more changes it little, and the
/// table of distinct words has to fit in memory.
const VOCABULARY_SAMPLE_BYTES: u64 = 256 << 20;

/// What to tokenise, and how.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// Files and directories; `~`, `${VAR}`, `${VAR:-default}` and `*` are expanded.
    pub inputs: Vec<String>,
    /// The token file to write, `NAME.bin`.
    pub output: PathBuf,
    pub vocabulary: VocabularySource,
    /// The token that ends a document; by default found by its usual names.
    pub eos_token: Option<String>,
    pub validation: Option<Validation>,
    /// Field of a JSON line, or column of a Parquet file, that holds the document.
    pub text_field: String,
    /// Endings of the files to read from a directory.
    pub extensions: Option<Vec<String>>,
    /// Encoding threads; by default one for each core.
    pub threads: Option<usize>,
    /// Writes `NAME_000.bin`, `NAME_001.bin`, ... of at most so many tokens each.
    pub max_shard_tokens: Option<u64>,
    /// Reads only a deterministic sample of whole files, of about so many bytes.
    pub sample_bytes: Option<u64>,
    /// Text that is not UTF-8 is an error instead of skipped.
    pub strict: bool,
    /// The command to record in the sidecars.
    pub command: String,
}

#[derive(Clone, Debug)]
pub enum VocabularySource {
    /// A `tokenizer.json`.
    File(PathBuf),
    /// Byte-level BPE of this size, trained on the training split.
    Train(usize),
}

/// Documents held out for validation, chosen by their hash.
#[derive(Clone, Debug)]
pub struct Validation {
    /// Share of the documents, between 0 and 1.
    pub fraction: f64,
    pub output: PathBuf,
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct TokenizeSummary {
    pub train: Totals,
    pub validation: Option<Totals>,
    pub skipped: Skipped,
    /// The token files written.
    pub files: Vec<PathBuf>,
    pub tokenizer: PathBuf,
    pub vocab_size: u32,
    pub eos_id: u32,
    /// Bytes of text that the vocabulary was trained on, if it was.
    pub trained_on_bytes: Option<u64>,
    /// Time for training the vocabulary, and for reading, encoding and writing.
    pub training_time: Duration,
    pub encoding_time: Duration,
}

/// Tokenises. `progress` counts the bytes of the input files; a hidden bar will do.
///
/// # Errors
/// `Usage` when the options cannot be met, or when the tokenizer of other token files would be
/// replaced; `Format` when an input is not what it should be; `Io` when a file cannot be read or
/// written. Nothing changes under the names of the output until all of it is written under temporary
/// names. Only an `Io` error while those are renamed, one after the other, leaves some of the
/// output new and some old, each file whole: run again.
pub fn run(options: &TokenizeOptions, progress: &ProgressBar) -> Result<TokenizeSummary> {
    options.check()?;
    let threads = options
        .threads
        .unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get));
    let mut sources = sources::find(&options.inputs, options.extensions.as_deref())?;
    if let Some(bytes) = options.sample_bytes {
        sources = sources::sample(sources, bytes);
    }
    let directory = prepare_directories(options)?;
    let total = sources.iter().map(|source| source.bytes).sum();

    let start = Instant::now();
    let (vocabulary, trained_on_bytes) = match &options.vocabulary {
        VocabularySource::File(path) => {
            (Vocabulary::load(path, options.eos_token.as_deref())?, None)
        }
        VocabularySource::Train(size) => {
            progress.set_length(VOCABULARY_SAMPLE_BYTES.min(total));
            progress.set_message("training the vocabulary");
            let (vocabulary, bytes) =
                train_vocabulary(*size, sources.clone(), options, threads, progress)?;
            (vocabulary, Some(bytes))
        }
    };
    check_replaces_no_other_tokenizer(options, &directory, &vocabulary)?;
    let training_time = start.elapsed();

    progress.reset();
    progress.set_length(total);
    progress.set_message("tokenising");
    let mut summary = encode(
        options,
        &sources,
        &vocabulary,
        &directory,
        threads,
        progress,
    )?;
    progress.finish_and_clear();
    summary.trained_on_bytes = trained_on_bytes;
    summary.training_time = training_time;
    Ok(summary)
}

impl TokenizeOptions {
    fn check(&self) -> Result<()> {
        let mut outputs = vec![&self.output];
        if let Some(validation) = &self.validation {
            let fraction = validation.fraction;
            if !(fraction > 0.0 && fraction < 1.0) {
                return Err(Error::usage(format!(
                    "--val-fraction {fraction}: it must lie between 0 and 1"
                )));
            }
            if validation.output == self.output {
                return Err(Error::usage(format!(
                    "--output and --val-output are both {}",
                    self.output.display()
                )));
            }
            outputs.push(&validation.output);
        }
        for output in outputs {
            if output
                .extension()
                .is_none_or(|extension| extension != "bin")
            {
                return Err(Error::usage(format!(
                    "output {}: the name of a token file ends in .bin",
                    output.display()
                )));
            }
            if output.is_dir() {
                return Err(Error::usage(format!(
                    "output {}: there is a directory of that name",
                    output.display()
                )));
            }
            if output.with_extension("json").ends_with(TOKENIZER_FILE) {
                return Err(Error::usage(format!(
                    "output {}: its sidecar would overwrite {TOKENIZER_FILE}, choose another name",
                    output.display()
                )));
            }
        }
        if self.threads == Some(0) || self.max_shard_tokens == Some(0) {
            return Err(Error::usage(
                "--threads and --max-shard-tokens must be at least 1",
            ));
        }
        if let Some(threads) = self.threads
            && threads as u64 > MAX_THREADS
        {
            return Err(Error::usage(format!(
                "--threads {threads}: at most {MAX_THREADS}"
            )));
        }
        if self.sample_bytes == Some(0) {
            return Err(Error::usage(
                "--sample-mb 0 leaves nothing: give at least 1",
            ));
        }
        if let Some(limit) = self.max_shard_tokens
            && limit > super::bin_format::MAX_FILE_TOKENS
        {
            return Err(Error::usage(format!(
                "--max-shard-tokens {limit}: one file holds at most {} tokens",
                super::bin_format::MAX_FILE_TOKENS
            )));
        }
        Ok(())
    }

    fn rules(&self) -> Rules {
        Rules {
            text_field: self.text_field.clone(),
            strict: self.strict,
        }
    }

    /// Whether a document belongs to the validation split: its hash, seen as a number between 0
    /// and 1, is below the fraction.
    fn is_validation(&self, hash: u64) -> bool {
        let fraction = self.validation.as_ref().map_or(0.0, |v| v.fraction);
        ((hash >> 11) as f64) < fraction * (1u64 << 53) as f64
    }
}

/// Makes the output directories and finds out whether they can be written, before hours of work.
/// Returns the one that the tokenizer goes to.
fn prepare_directories(options: &TokenizeOptions) -> Result<PathBuf> {
    let validation = options.validation.as_ref().map(|v| &v.output);
    for output in validation.into_iter().chain([&options.output]) {
        let directory = directory_of(output);
        std::fs::create_dir_all(directory).at("create", directory)?;
        let probe = temporary_name(output);
        std::fs::write(&probe, []).at("write", &probe)?;
        std::fs::remove_file(&probe).at("remove", &probe)?;
    }
    Ok(directory_of(&options.output).to_path_buf())
}

/// Refuses to replace a tokenizer that is not an earlier run's of these very outputs, or that token
/// files of other names beside them were made with.
fn check_replaces_no_other_tokenizer(
    options: &TokenizeOptions,
    directory: &Path,
    vocabulary: &Vocabulary,
) -> Result<()> {
    let tokenizer = directory.join(TOKENIZER_FILE);
    if !tokenizer.exists() {
        return Ok(());
    }
    let replaced = tokenizer_hash(&tokenizer)?;
    if replaced == vocabulary.hash {
        return Ok(());
    }
    // A file whose sidecar cannot be read names no tokenizer.
    let made_with_it = |file: &Path| {
        let sidecar = Sidecar::read_beside(file).ok().flatten();
        sidecar.is_some_and(|sidecar| sidecar.tokenizer_hash == replaced)
    };
    // Both outputs may spell the directory differently.
    let canonical = |path: &PathBuf| path.canonicalize().at("find", path);
    let (mut own, mut ours) = (Vec::new(), false);
    let validation = options.validation.as_ref().map(|v| &v.output);
    for output in validation.into_iter().chain([&options.output]) {
        for file in files_of_name(output)? {
            ours |= made_with_it(&file);
            own.push(canonical(&file)?);
        }
    }
    let mut why = (!ours).then(|| "no earlier output of this name was made with it".to_string());
    for file in bin_files(directory, |_| true)? {
        if made_with_it(&file) && !own.contains(&canonical(&file)?) {
            why = Some(format!("{} was made with it", file.display()));
        }
    }
    match why {
        None => Ok(()),
        Some(why) => Err(Error::usage(format!(
            "{} would be replaced by another tokenizer, but {why}: write to another directory, or \
             tokenise with that file (--tokenizer, or data.tokenizer in a configuration)",
            tokenizer.display()
        ))),
    }
}

/// Trains on the training split of a sample of the sources, as far as the sample's limit. Returns
/// also the bytes of text used.
fn train_vocabulary(
    size: usize,
    sources: Vec<Source>,
    options: &TokenizeOptions,
    threads: usize,
    progress: &ProgressBar,
) -> Result<(Vocabulary, u64)> {
    let sources = sources::sample(sources, VOCABULARY_SAMPLE_BYTES);
    let rules = options.rules();
    let failed = |error| Error::usage(format!("cannot start {threads} threads: {error}"));
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(failed)?;
    let (sender, batches) = sync_channel(4);
    let mut bytes = 0;
    let mut failure = None;
    let trained = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let sender = sender;
            read_sources(&sources, &rules.text_field, &mut |batch| {
                sender.send(batch).is_ok()
            })
        });
        let batches = batches;
        let texts = batches.into_iter().map_while(|batch| {
            if failure.is_some() || bytes >= VOCABULARY_SAMPLE_BYTES {
                return None;
            }
            let mut texts = Vec::new();
            let outcome = for_each_document(&batch, &rules, |document| {
                if !options.is_validation(document.hash) {
                    bytes += document.text.len() as u64;
                    texts.push(document.text.into_owned());
                }
                Ok(())
            });
            failure = outcome.err();
            progress.inc(batch.disk_bytes);
            Some(texts)
        });
        let texts = texts.flatten();
        let trained = pool.install(|| Vocabulary::train(size, texts));
        match reader.join() {
            Ok(outcome) => outcome.and(trained),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    match failure {
        Some(error) => Err(error),
        None => Ok((trained?, bytes)),
    }
}

/// Encodes every source and publishes the files.
fn encode(
    options: &TokenizeOptions,
    sources: &[Source],
    vocabulary: &Vocabulary,
    directory: &Path,
    threads: usize,
    progress: &ProgressBar,
) -> Result<TokenizeSummary> {
    let start = Instant::now();
    let limit = options.max_shard_tokens;
    let mut train = SplitWriter::create(&options.output, vocabulary.size, limit)?;
    let mut validation = match &options.validation {
        Some(it) => Some(SplitWriter::create(&it.output, vocabulary.size, limit)?),
        None => None,
    };
    let mut skipped = Skipped::default();
    let encoding = Encoding {
        tokenizer: &vocabulary.tokenizer,
        eos_id: vocabulary.eos_id,
        rules: &options.rules(),
        is_validation: &|hash| options.is_validation(hash),
    };
    encode_sources(sources, &encoding, threads, |batch| {
        train.write(&batch.train)?;
        if let Some(validation) = &mut validation {
            validation.write(&batch.validation)?;
        }
        skipped.add(batch.skipped);
        progress.inc(batch.disk_bytes);
        Ok(())
    })?;

    let train_totals = train.totals();
    let validation_totals = validation.as_ref().map(SplitWriter::totals);
    check_not_empty(train_totals, validation_totals, skipped)?;
    let train = train.finish()?;
    let validation = validation.map(SplitWriter::finish).transpose()?;
    let tokenizer = directory.join(TOKENIZER_FILE);
    replace_file(&tokenizer, &vocabulary.json)?;
    let mut files = train.publish(vocabulary, &options.command)?;
    if let Some(validation) = validation {
        files.extend(validation.publish(vocabulary, &options.command)?);
    }
    Ok(TokenizeSummary {
        train: train_totals,
        validation: validation_totals,
        skipped,
        files,
        tokenizer,
        vocab_size: vocabulary.size,
        eos_id: vocabulary.eos_id,
        trained_on_bytes: None,
        training_time: Duration::ZERO,
        encoding_time: start.elapsed(),
    })
}

fn check_not_empty(train: Totals, validation: Option<Totals>, skipped: Skipped) -> Result<()> {
    let held_out = validation.map_or(0, |totals| totals.documents);
    if train.documents + held_out == 0 {
        return Err(Error::usage(format!(
            "the input holds no document (skipped: {skipped})"
        )));
    }
    if train.documents == 0 || (validation.is_some() && held_out == 0) {
        let (split, change) = match train.documents {
            0 => ("training", "lower"),
            _ => ("validation", "raise"),
        };
        return Err(Error::usage(format!(
            "none of the {} documents falls into the {split} split: {change} the validation fraction or \
             give more documents",
            train.documents + held_out
        )));
    }
    Ok(())
}

impl fmt::Display for TokenizeSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let split = |f: &mut fmt::Formatter<'_>, name: &str, totals: &Totals| {
            writeln!(
                f,
                "{name:<11} {} documents, {} tokens, {:.2} bytes per token",
                totals.documents,
                totals.tokens,
                totals.source_bytes as f64 / totals.tokens.max(1) as f64
            )
        };
        split(f, "train", &self.train)?;
        if let Some(validation) = &self.validation {
            split(f, "validation", validation)?;
        }
        writeln!(f, "skipped     {}", self.skipped)?;
        write!(f, "vocabulary  {} tokens", self.vocab_size)?;
        if let Some(bytes) = self.trained_on_bytes {
            write!(
                f,
                ", trained on {:.1} MB of the text in {:.1} s",
                bytes as f64 / 1e6,
                self.training_time.as_secs_f64()
            )?;
        }
        let held_out = self.validation.map_or(0, |totals| totals.source_bytes);
        let bytes = (self.train.source_bytes + held_out) as f64;
        let seconds = self.encoding_time.as_secs_f64();
        writeln!(
            f,
            "\nspeed       {:.1} MB in {seconds:.1} s, {:.1} MB/s",
            bytes / 1e6,
            bytes / 1e6 / seconds
        )?;
        for file in &self.files {
            writeln!(f, "wrote       {}", file.display())?;
        }
        write!(f, "            {}", self.tokenizer.display())
    }
}
