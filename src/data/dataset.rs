//! A data set: the windows of one or several token files.

use std::path::{Path, PathBuf};

use super::bin_format::{TokenDtype, TokenFile};
use super::tokenize::vocabulary::tokenizer_hash;
use crate::error::IoContext;
use crate::files::directory_of;
use crate::{Error, Result};

/// Rows of consecutive tokens and, for each, the token that follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Index of the first row among all samples.
    pub first: u64,
    /// Token ids, row-major, `rows * seq_len` of them.
    pub inputs: Vec<u32>,
    /// `targets[i]` is the token after `inputs[i]`; same shape.
    pub targets: Vec<u32>,
    pub rows: usize,
    pub seq_len: usize,
}

/// One or several token files (shards), seen as windows of `seq_len + 1` tokens that start every
/// `seq_len` tokens: each token but a shard's first is a target once. No window crosses from one
/// shard into the next.
#[derive(Debug)]
pub struct TokenSet {
    shards: Vec<TokenFile>,
}

impl TokenSet {
    /// Opens `paths` in the order given. Each is a token file, a directory (every `.bin` in it, by
    /// name) or the name that shards share: `train.bin` stands for `train_000.bin`,
    /// `train_001.bin`, ... when there is no `train.bin`. `headerless` is as in
    /// [`TokenFile::open`].
    ///
    /// # Errors
    /// `Usage` when there are no paths, no files where a path points, or files of different
    /// tokenizers; otherwise as [`TokenFile::open`].
    pub fn open(paths: &[impl AsRef<Path>], headerless: Option<TokenDtype>) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::usage("a data set needs at least one token file"));
        }
        let mut shards = Vec::new();
        for path in paths {
            for file in shard_paths(path.as_ref())? {
                shards.push(TokenFile::open(file, headerless)?);
            }
        }
        let set = Self { shards };
        set.check_same_tokenizer(&set)?;
        Ok(set)
    }

    pub fn shards(&self) -> &[TokenFile] {
        &self.shards
    }

    /// Tokens in all shards.
    pub fn tokens(&self) -> u64 {
        self.shards.iter().map(TokenFile::len).sum()
    }

    /// Number of windows in all shards; always at least one.
    ///
    /// # Errors
    /// `Usage` when `seq_len` is zero or no shard is longer than `seq_len` tokens.
    pub fn windows(&self, seq_len: usize) -> Result<u64> {
        if seq_len == 0 {
            return Err(Error::usage("the sequence length must be at least 1"));
        }
        let windows = self.shards.iter().map(|s| shard_windows(s, seq_len)).sum();
        if windows == 0 {
            let longest = self.shards.iter().max_by_key(|shard| shard.len());
            let (tokens, path) = longest.map_or((0, Path::new("")), |s| (s.len(), s.path()));
            return Err(Error::usage(format!(
                "a sequence length of {seq_len} needs {} tokens in a row, but {} has only {tokens}: \
                 use a shorter sequence or more data",
                seq_len + 1,
                path.display(),
            )));
        }
        Ok(windows)
    }

    /// Refuses the tokenizer at `path` when it is not the one that the set was made with, as far as
    /// sidecars tell.
    pub fn check_tokenizer(&self, path: &Path) -> Result<()> {
        match self.made_with_another(&tokenizer_hash(path)?) {
            None => Ok(()),
            Some(shard) => Err(Error::usage(format!(
                "data.tokenizer {} is not the tokenizer that {} was made with: give that one, or \
                 null to train without samples",
                path.display(),
                shard.path().display()
            ))),
        }
    }

    /// The first shard whose sidecar names another tokenizer than the one of this hash.
    pub fn made_with_another(&self, tokenizer_hash: &str) -> Option<&TokenFile> {
        let differs = |shard: &&TokenFile| {
            let sidecar = shard.sidecar();
            sidecar.is_some_and(|sidecar| sidecar.tokenizer_hash != tokenizer_hash)
        };
        self.shards.iter().find(differs)
    }

    /// Refuses a set that shares a file with this one: held-out data must not be trained on.
    pub fn check_apart(&self, other: &Self) -> Result<()> {
        let canonical = |shard: &TokenFile| shard.path().canonicalize().at("find", shard.path());
        for shard in &self.shards {
            for held_out in &other.shards {
                if canonical(shard)? == canonical(held_out)? {
                    return Err(Error::usage(format!(
                        "{} is in data.train and is data.val as well: name the training files, \
                         not their directory, or put them apart",
                        held_out.path().display()
                    )));
                }
            }
        }
        Ok(())
    }

    /// Refuses to mix token files whose sidecars name different tokenizers: their ids mean
    /// different things.
    pub fn check_same_tokenizer(&self, other: &Self) -> Result<()> {
        let known = self
            .shards
            .iter()
            .find_map(|shard| Some((shard.path(), &shard.sidecar()?.tokenizer_hash)));
        let Some((path, hash)) = known else {
            return Ok(());
        };
        for shard in &other.shards {
            if let Some(sidecar) = shard.sidecar()
                && sidecar.tokenizer_hash != *hash
            {
                return Err(Error::usage(format!(
                    "{} and {} were made with different tokenizers ({hash} and {}): tokenise both \
                     with the same one",
                    path.display(),
                    shard.path().display(),
                    sidecar.tokenizer_hash
                )));
            }
        }
        Ok(())
    }

    /// Refuses a set whose sidecars state a larger vocabulary than the model's.
    ///
    /// # Errors
    /// `Usage`, naming the file.
    pub fn check_vocab(&self, vocab_size: u32) -> Result<()> {
        for shard in &self.shards {
            if let Some(sidecar) = shard.sidecar()
                && sidecar.vocab_size > vocab_size
            {
                return Err(Error::usage(format!(
                    "{} was tokenised with a vocabulary of {}, but the model's vocab_size is \
                     {vocab_size}: raise vocab_size or tokenise with a smaller vocabulary",
                    shard.path().display(),
                    sidecar.vocab_size
                )));
            }
        }
        Ok(())
    }

    /// Reads windows, given by their numbers, into a batch whose first sample is `first`.
    ///
    /// # Errors
    /// `Format` when an id is not below `vocab_size`, naming the file and the position.
    pub fn batch(
        &self,
        windows: impl IntoIterator<Item = u64>,
        first: u64,
        seq_len: usize,
        vocab_size: u32,
    ) -> Result<Batch> {
        let mut batch = Batch::empty(first, seq_len);
        for window in windows {
            self.push_window(window, vocab_size, &mut batch)?;
        }
        Ok(batch)
    }

    /// Batches of `rows` windows in file order, for validation: at most `max_batches` of them,
    /// the last one smaller when the windows run out.
    ///
    /// # Errors
    /// `Usage` when `rows` is zero, and as [`TokenSet::windows`]; each batch as
    /// [`TokenSet::batch`].
    pub fn sequential_batches(
        &self,
        seq_len: usize,
        rows: usize,
        max_batches: usize,
        vocab_size: u32,
    ) -> Result<impl Iterator<Item = Result<Batch>> + '_> {
        if rows == 0 {
            return Err(Error::usage("a batch needs at least one row"));
        }
        let windows = self.windows(seq_len)?;
        Ok((0..windows)
            .step_by(rows)
            .take(max_batches)
            .map(move |first| {
                let end = windows.min(first + rows as u64);
                self.batch(first..end, first, seq_len, vocab_size)
            }))
    }

    /// Appends window number `window` to the batch as one more row.
    pub(super) fn push_window(
        &self,
        mut window: u64,
        vocab_size: u32,
        batch: &mut Batch,
    ) -> Result<()> {
        let seq_len = batch.seq_len;
        let mut shards = self.shards.iter();
        let shard = loop {
            let Some(shard) = shards.next() else {
                unreachable!("window numbers come from `windows`, which counts the same shards");
            };
            let windows = shard_windows(shard, seq_len);
            if window < windows {
                break shard;
            }
            window -= windows;
        };
        let start = window * seq_len as u64;
        let row = batch.inputs.len();
        shard.read_for(
            start..start + seq_len as u64 + 1,
            vocab_size,
            &mut batch.inputs,
        )?;
        batch.targets.extend_from_slice(&batch.inputs[row + 1..]);
        batch.inputs.pop();
        batch.rows += 1;
        Ok(())
    }
}

impl Batch {
    pub(super) fn empty(first: u64, seq_len: usize) -> Self {
        Self {
            first,
            inputs: Vec::new(),
            targets: Vec::new(),
            rows: 0,
            seq_len,
        }
    }
}

fn shard_windows(shard: &TokenFile, seq_len: usize) -> u64 {
    shard.len().saturating_sub(1) / seq_len as u64
}

fn shard_paths(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_dir() {
        let found = bin_files(path, |_| true)?;
        if found.is_empty() {
            return Err(Error::usage(format!(
                "no .bin files in {}: make one with `titanbit tokenize`",
                path.display()
            )));
        }
        return Ok(found);
    }
    if !path.exists() && path.extension().is_some_and(|extension| extension == "bin") {
        let shards = files_of_name(path)?;
        if shards.is_empty() {
            return Err(Error::usage(format!(
                "no token file {}: make it with `titanbit tokenize`",
                path.display()
            )));
        }
        return Ok(shards);
    }
    Ok(vec![path.to_path_buf()])
}

/// What exists of the token file `NAME.bin` and its shards `NAME_000.bin`, `NAME_001.bin`, ...
pub(super) fn files_of_name(path: &Path) -> Result<Vec<PathBuf>> {
    let directory = directory_of(path);
    let Some(name) = path.file_stem().filter(|_| directory.is_dir()) else {
        return Ok(Vec::new());
    };
    let name = name.to_string_lossy();
    let prefix = format!("{name}_");
    bin_files(directory, |stem| {
        stem == name || is_shard_name(stem, &prefix)
    })
}

/// `PREFIX` followed by digits.
fn is_shard_name(stem: &str, prefix: &str) -> bool {
    stem.strip_prefix(prefix)
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// The `.bin` files of a directory whose stem is wanted, shorter names first, then by name (so
/// that shard 1000 comes after shard 999).
pub(super) fn bin_files(directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).at("list", directory)? {
        let path = entry.at("list", directory)?.path();
        if path.extension().is_some_and(|extension| extension == "bin")
            && path
                .file_stem()
                .is_some_and(|stem| wanted(&stem.to_string_lossy()))
        {
            found.push(path);
        }
    }
    found.sort_by_cached_key(|path| (path.as_os_str().len(), path.clone()));
    Ok(found)
}
