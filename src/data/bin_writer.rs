//! Writing token files: streamed to a temporary name, then published under the final one together
//! with the sidecar, so that a run that dies leaves nothing half-written under a final name.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3Default;

use super::bin_format::{HEADER_BYTES, MAX_FILE_TOKENS, Sidecar, TokenDtype, hex};
use crate::error::IoContext;
use crate::files::{Temporary, replace_file};
use crate::{Error, Result};

/// A token file being written, under a temporary name.
pub struct TokenWriter {
    file: BufWriter<File>,
    temporary: Temporary,
    vocab_size: u32,
    dtype: TokenDtype,
    tokens: u64,
    hash: Xxh3Default,
    encoded: Vec<u8>,
}

impl TokenWriter {
    /// Starts a file at `temporary`, replacing what an earlier run that died may have left there.
    /// `vocab_size` decides the token type, and every id is checked against it.
    ///
    /// # Errors
    /// `Io` when the file cannot be created or written.
    pub fn create(temporary: impl Into<PathBuf>, vocab_size: u32) -> Result<Self> {
        let temporary = temporary.into();
        let file = File::create(&temporary).at("create", &temporary)?;
        let temporary = Temporary::new(temporary);
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEADER_BYTES])
            .at("write", temporary.path())?;
        Ok(Self {
            file,
            temporary,
            vocab_size,
            dtype: TokenDtype::for_vocab(vocab_size),
            tokens: 0,
            hash: Xxh3Default::new(),
            encoded: Vec::new(),
        })
    }

    /// Tokens written so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Appends ids.
    ///
    /// # Errors
    /// `Format` when an id is not below the vocabulary size or the header cannot count so many
    /// tokens; `Io` when the disk refuses.
    pub fn write(&mut self, ids: &[u32]) -> Result<()> {
        if let Some(id) = ids.iter().find(|&&id| id >= self.vocab_size) {
            return Err(Error::format(
                self.temporary.path(),
                format!("id {id} does not fit the vocabulary of {}", self.vocab_size),
            ));
        }
        self.tokens += ids.len() as u64;
        if self.tokens > MAX_FILE_TOKENS {
            return Err(Error::format(
                self.temporary.path(),
                format!("more than {MAX_FILE_TOKENS} tokens in one file: write shards"),
            ));
        }
        self.encoded.clear();
        match self.dtype {
            TokenDtype::U16 => self
                .encoded
                .extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
            TokenDtype::U32 => self
                .encoded
                .extend(ids.iter().flat_map(|id| id.to_le_bytes())),
        }
        self.hash.update(&self.encoded);
        self.file
            .write_all(&self.encoded)
            .at("write", self.temporary.path())
    }

    /// Writes the header and makes the file durable, still under its temporary name.
    ///
    /// # Errors
    /// `Io` when the disk refuses; the temporary file is removed.
    pub fn finish(mut self) -> Result<FinishedTokens> {
        let (magic, version) = self.dtype.magic_and_version();
        let path = self.temporary.path();
        self.file.seek(SeekFrom::Start(0)).at("write", path)?;
        for field in [magic, version, self.tokens as i32] {
            self.file
                .write_all(&field.to_le_bytes())
                .at("write", path)?;
        }
        self.file.flush().at("write", path)?;
        self.file.get_ref().sync_all().at("write", path)?;
        Ok(FinishedTokens {
            temporary: self.temporary,
            tokens: self.tokens,
            checksum: hex(self.hash.digest()),
        })
    }
}

/// A complete token file that still has its temporary name.
pub struct FinishedTokens {
    temporary: Temporary,
    tokens: u64,
    checksum: String,
}

impl FinishedTokens {
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// xxh3-64 of the token bytes, for the sidecar.
    pub fn checksum(&self) -> &str {
        &self.checksum
    }

    /// Gives the file its final name, after its sidecar has one: a token file that can be seen
    /// has its sidecar.
    ///
    /// # Errors
    /// `Io` when either cannot be written or renamed. The sidecar may then be the new one while
    /// the token file is the old one or missing: [`super::TokenFile::open`] refuses the pair when
    /// their numbers of tokens differ.
    pub fn publish(self, path: &Path, sidecar: &Sidecar) -> Result<()> {
        let mut json = serde_json::to_vec_pretty(sidecar).map_err(std::io::Error::from);
        if let Ok(json) = &mut json {
            json.push(b'\n');
        }
        let sidecar_path = Sidecar::path_for(path);
        replace_file(&sidecar_path, &json.at("write", &sidecar_path)?)?;
        self.temporary.publish(path)
    }
}
