//! The token files of one split: shards under temporary names, published together at the end.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::pipeline::EncodedDocuments;
use super::vocabulary::Vocabulary;
use crate::Result;
use crate::data::bin_format::{MAX_FILE_TOKENS, Sidecar};
use crate::data::bin_writer::{FinishedTokens, TokenWriter};
use crate::error::IoContext;
use crate::files::{directory_of, temporary_name};

/// Writes documents to `NAME.bin`, or to `NAME_000.bin`, `NAME_001.bin`, ... when a limit is set
/// or one file cannot hold them all.
pub struct SplitWriter {
    output: PathBuf,
    vocab_size: u32,
    limit: Option<u64>,
    shard: OpenShard,
    full: Vec<FullShard>,
    totals: Totals,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub documents: u64,
    pub tokens: u64,
    /// UTF-8 bytes of the documents.
    pub source_bytes: u64,
}

struct OpenShard {
    writer: TokenWriter,
    documents: u64,
    source_bytes: u64,
}

struct FullShard {
    tokens: FinishedTokens,
    documents: u64,
    source_bytes: u64,
}

impl SplitWriter {
    /// Starts the first shard. Temporary files that an earlier run left are replaced or removed.
    pub fn create(output: &Path, vocab_size: u32, limit: Option<u64>) -> Result<Self> {
        remove_stale_temporaries(output)?;
        Ok(Self {
            output: output.to_path_buf(),
            vocab_size,
            limit,
            shard: OpenShard::create(output, 0, vocab_size)?,
            full: Vec::new(),
            totals: Totals::default(),
        })
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Appends documents. A shard is filled to its limit, so a document may go on in the next.
    pub fn write(&mut self, documents: &EncodedDocuments) -> Result<()> {
        let mut start = 0;
        for end in &documents.ends {
            let mut ids = &documents.ids[start..end.ids];
            start = end.ids;
            self.totals.tokens += ids.len() as u64;
            while !ids.is_empty() {
                let room = self.limit.unwrap_or(MAX_FILE_TOKENS) - self.shard.writer.tokens();
                if room == 0 {
                    self.next_shard()?;
                    continue;
                }
                let fits = ids.len().min(usize::try_from(room).unwrap_or(usize::MAX));
                let (now, later) = ids.split_at(fits);
                self.shard.writer.write(now)?;
                ids = later;
            }
            self.shard.documents += u64::from(end.complete);
            self.shard.source_bytes += end.source_bytes;
            self.totals.documents += u64::from(end.complete);
            self.totals.source_bytes += end.source_bytes;
        }
        Ok(())
    }

    fn next_shard(&mut self) -> Result<()> {
        let number = self.full.len() + 1;
        let next = OpenShard::create(&self.output, number, self.vocab_size)?;
        let full = std::mem::replace(&mut self.shard, next);
        self.full.push(full.finish()?);
        Ok(())
    }

    /// Makes every shard durable, still under temporary names.
    pub fn finish(mut self) -> Result<FinishedSplit> {
        self.full.push(self.shard.finish()?);
        let sharded = self.limit.is_some() || self.full.len() > 1;
        Ok(FinishedSplit {
            output: self.output,
            sharded,
            shards: self.full,
        })
    }
}

impl OpenShard {
    fn create(output: &Path, number: usize, vocab_size: u32) -> Result<Self> {
        let temporary = temporary_name(&shard_path(output, number));
        Ok(Self {
            writer: TokenWriter::create(temporary, vocab_size)?,
            documents: 0,
            source_bytes: 0,
        })
    }

    fn finish(self) -> Result<FullShard> {
        Ok(FullShard {
            tokens: self.writer.finish()?,
            documents: self.documents,
            source_bytes: self.source_bytes,
        })
    }
}

/// A split that only has to be given its final names.
pub struct FinishedSplit {
    output: PathBuf,
    sharded: bool,
    shards: Vec<FullShard>,
}

impl FinishedSplit {
    /// Publishes the shards and removes those of an earlier run under the same name that would
    /// otherwise be read together with them. Returns the files.
    pub fn publish(self, vocabulary: &Vocabulary, command: &str) -> Result<Vec<PathBuf>> {
        let mut published = Vec::new();
        for (number, shard) in self.shards.into_iter().enumerate() {
            let path = match self.sharded {
                true => shard_path(&self.output, number),
                false => self.output.clone(),
            };
            let sidecar = Sidecar {
                tokenizer: super::TOKENIZER_FILE.into(),
                tokenizer_hash: vocabulary.hash.clone(),
                vocab_size: vocabulary.size,
                eos_id: vocabulary.eos_id,
                tokens: shard.tokens.tokens(),
                documents: shard.documents,
                source_bytes: shard.source_bytes,
                checksum: shard.tokens.checksum().into(),
                command: command.into(),
            };
            shard.tokens.publish(&path, &sidecar)?;
            published.push(path);
        }
        remove_earlier_run(&self.output, &published)?;
        Ok(published)
    }
}

/// `NAME_000.bin` for `NAME.bin`.
fn shard_path(output: &Path, number: usize) -> PathBuf {
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    output.with_file_name(format!("{stem}_{number:03}.bin"))
}

fn remove_stale_temporaries(output: &Path) -> Result<()> {
    let prefix = format!(
        "{}_",
        output.file_stem().unwrap_or_default().to_string_lossy()
    );
    let is_ours = |name: &str| {
        name.strip_prefix(&prefix)
            .and_then(|rest| rest.strip_suffix(".bin.tmp"))
            .is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit()))
    };
    let directory = directory_of(output);
    for entry in fs::read_dir(directory).at("list", directory)? {
        let entry = entry.at("list", directory)?;
        if is_ours(&entry.file_name().to_string_lossy()) {
            remove_if_there(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes files of this output's names that carry a sidecar and were not published just now.
fn remove_earlier_run(output: &Path, published: &[PathBuf]) -> Result<()> {
    let shards = (0..).map(|number| shard_path(output, number));
    let ours = |path: &PathBuf| path.exists() && Sidecar::path_for(path).exists();
    let mut candidates: Vec<PathBuf> = shards.take_while(ours).collect();
    candidates.extend(Some(output.to_path_buf()).filter(ours));
    for path in candidates.iter().filter(|path| !published.contains(path)) {
        remove_if_there(path)?;
        remove_if_there(&Sidecar::path_for(path))?;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).at("remove", path),
        _ => Ok(()),
    }
}
