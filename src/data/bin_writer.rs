//! Writing token files: streamed to a temporary name, then published under the final one together
//! with the sidecar, so that a run that dies leaves nothing half-written under a final name.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3Default;

use super::bin_format::{HEADER_BYTES, MAX_FILE_TOKENS, Sidecar, TokenDtype, hex};
use crate::error::IoContext;
use crate::{Error, Result};

/// A token file being written, under a temporary name.
pub struct TokenWriter {
    file: BufWriter<File>,
    temporary: TemporaryFile,
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
        let temporary = TemporaryFile(temporary);
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEADER_BYTES])
            .at("write", &temporary.0)?;
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
                &self.temporary.0,
                format!("id {id} does not fit the vocabulary of {}", self.vocab_size),
            ));
        }
        self.tokens += ids.len() as u64;
        if self.tokens > MAX_FILE_TOKENS {
            return Err(Error::format(
                &self.temporary.0,
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
            .at("write", &self.temporary.0)
    }

    /// Writes the header and makes the file durable, still under its temporary name.
    ///
    /// # Errors
    /// `Io` when the disk refuses; the temporary file is removed.
    pub fn finish(mut self) -> Result<FinishedTokens> {
        let (magic, version) = self.dtype.magic_and_version();
        let path = &self.temporary.0;
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
    temporary: TemporaryFile,
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
        self.temporary.rename(path)
    }
}

/// Writes `bytes` to `path` so that the old file or the whole new one is there, whatever happens.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = TemporaryFile(temporary_name(path));
    let mut file = File::create(&temporary.0).at("create", &temporary.0)?;
    file.write_all(bytes).at("write", &temporary.0)?;
    file.sync_all().at("write", &temporary.0)?;
    drop(file);
    temporary.rename(path)
}

/// Makes the names in a directory last through a power cut, as far as its file system can.
#[cfg(unix)]
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    use std::io::ErrorKind;

    let directory = File::open(path).at("open", path)?;
    match directory.sync_all() {
        // Some network file systems know no such thing, which is no reason to stop.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::InvalidInput | ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        outcome => outcome.at("write", path),
    }
}

/// Only Unix opens a directory like a file; elsewhere the system alone decides when a name lasts.
#[cfg(not(unix))]
pub(crate) fn sync_dir(_path: &Path) -> Result<()> {
    Ok(())
}

/// The directory that `path` lies in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// `NAME.tmp` beside `NAME`.
pub(super) fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Removes its file when dropped, unless it was renamed.
struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn rename(self, path: &Path) -> Result<()> {
        fs::rename(&self.0, path).at("replace", path)?;
        sync_dir(directory_of(path))
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // After a rename there is nothing left under this name, and on a failure path the first
        // error is the one to report.
        let _ = fs::remove_file(&self.0);
    }
}
