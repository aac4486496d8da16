//! A token file.

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cli::format;
use crate::data::{TokenDtype, TokenFile};
use crate::{Error, Result};

#[derive(Serialize)]
pub struct Report {
    path: PathBuf,
    bytes: u64,
    tokens: u64,
    dtype: TokenDtype,
    /// None in a file without tokens.
    largest_id: Option<u32>,
    /// The tokens are those that the sidecar's checksum was taken of.
    checksum_verified: bool,
    /// What only a sidecar can tell.
    sidecar: Option<FromSidecar>,
}

#[derive(Serialize)]
struct FromSidecar {
    documents: u64,
    vocab_size: u32,
    eos_id: u32,
    /// UTF-8 bytes of text that a token stands for, on average.
    bytes_per_token: f64,
    tokenizer: String,
    checksum: String,
    command: String,
}

impl Report {
    /// Reads the whole file.
    ///
    /// # Errors
    /// A file that is no token file, is cut short, differs from its checksum, or holds an id
    /// outside its vocabulary.
    pub fn of(path: &Path, headerless: Option<TokenDtype>) -> Result<Self> {
        if !path.exists() {
            return Err(Error::usage(format!(
                "--data {} does not exist: give a token file that `titanbit tokenize` wrote",
                path.display()
            )));
        }
        let file = TokenFile::open(path, headerless)?;
        let checksum_verified = file.verify_checksum()?;
        let largest = file.max_id();
        if let (Some((id, position)), Some(sidecar)) = (largest, file.sidecar())
            && id >= sidecar.vocab_size
        {
            return Err(Error::format(
                path,
                format!(
                    "token {position} is {id}, outside the vocabulary of {}: make the file again \
                     with `titanbit tokenize`",
                    sidecar.vocab_size
                ),
            ));
        }
        Ok(Self {
            path: path.to_path_buf(),
            bytes: file.len() * file.dtype().bytes() as u64,
            tokens: file.len(),
            dtype: file.dtype(),
            largest_id: largest.map(|(id, _)| id),
            checksum_verified,
            sidecar: file.sidecar().map(|sidecar| FromSidecar {
                documents: sidecar.documents,
                vocab_size: sidecar.vocab_size,
                eos_id: sidecar.eos_id,
                bytes_per_token: sidecar.source_bytes as f64 / sidecar.tokens.max(1) as f64,
                tokenizer: sidecar.tokenizer.clone(),
                checksum: sidecar.checksum.clone(),
                command: sidecar.command.clone(),
            }),
        })
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let dtype = match self.dtype {
            TokenDtype::U16 => "u16",
            TokenDtype::U32 => "u32",
        };
        writeln!(f, "file          {}", self.path.display())?;
        writeln!(
            f,
            "tokens        {} ({dtype}, {})",
            format::count(self.tokens),
            format::bytes(self.bytes)
        )?;
        if let Some(id) = self.largest_id {
            writeln!(f, "largest id    {id}")?;
        }
        let Some(sidecar) = &self.sidecar else {
            return writeln!(
                f,
                "sidecar       none: documents, vocabulary and checksum are not known"
            );
        };
        writeln!(f, "documents     {}", format::count(sidecar.documents))?;
        writeln!(
            f,
            "vocabulary    {} ({}; {} ends a document)",
            sidecar.vocab_size, sidecar.tokenizer, sidecar.eos_id
        )?;
        writeln!(
            f,
            "text          {:.2} bytes a token",
            sidecar.bytes_per_token
        )?;
        writeln!(f, "checksum      {}, correct", sidecar.checksum)?;
        writeln!(f, "made by       {}", sidecar.command)
    }
}
