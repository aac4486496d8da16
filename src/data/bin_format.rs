//! Reading token files: llm.c's `.bin` (a header of 256 int32, then the tokens) and nanoGPT's
//! header-less ones. All numbers are little-endian. A sidecar `NAME.json` beside `NAME.bin` says
//! where the tokens came from; files that others wrote have none and load all the same.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::IoContext;
use crate::{Error, Result};

/// Bytes of the llm.c header: 256 int32, of which the first three are used
/// (magic, version, number of tokens).
pub const HEADER_BYTES: usize = 1024;

/// The largest number of tokens an llm.c header can state.
pub const MAX_FILE_TOKENS: u64 = i32::MAX as u64;

/// How a token is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenDtype {
    U16,
    U32,
}

impl TokenDtype {
    /// The smallest type that holds every id below `vocab_size`.
    pub fn for_vocab(vocab_size: u32) -> Self {
        if vocab_size <= 1 << 16 {
            Self::U16
        } else {
            Self::U32
        }
    }

    /// Bytes a token takes.
    pub fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }

    /// llm.c's magic number and version: GPT-2 files hold u16, Llama 3 files u32.
    pub(super) fn magic_and_version(self) -> (i32, i32) {
        match self {
            Self::U16 => (20240520, 1),
            Self::U32 => (20240801, 7),
        }
    }
}

/// What `titanbit tokenize` records beside a token file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Name of the tokenizer file, which lies in the same directory.
    pub tokenizer: String,
    /// xxh3-64 of the tokenizer file, in hexadecimal.
    pub tokenizer_hash: String,
    /// Every id is below this.
    pub vocab_size: u32,
    /// The id that ends each document.
    pub eos_id: u32,
    pub tokens: u64,
    /// Documents that end in this file.
    pub documents: u64,
    /// UTF-8 bytes of text that the tokens stand for.
    pub source_bytes: u64,
    /// xxh3-64 of the token bytes (the header is not part of it), in hexadecimal.
    pub checksum: String,
    /// The command that made the file.
    pub command: String,
}

impl Sidecar {
    /// `NAME.json` for `NAME.bin`.
    pub fn path_for(bin: &Path) -> PathBuf {
        bin.with_extension("json")
    }

    pub(super) fn read_beside(bin: &Path) -> Result<Option<Self>> {
        let path = Self::path_for(bin);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("read", &path),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| {
            Error::format(
                &path,
                format!(
                    "not the sidecar of {} ({error}); make both again with `titanbit tokenize`, \
                     or move this file away if it is something else",
                    bin.display()
                ),
            )
        })
    }
}

/// xxh3-64 in the form that sidecars hold.
pub(crate) fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

/// A memory-mapped token file. Tokens are decoded as they are read; nothing is copied at open.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    map: Mmap,
    /// Where the tokens start: after the header, if there is one.
    offset: usize,
    dtype: TokenDtype,
    sidecar: Option<Sidecar>,
}

impl TokenFile {
    /// Opens a token file. `headerless` says how to read a file without an llm.c header (nanoGPT
    /// writes u16); a file with a header says so itself.
    ///
    /// # Errors
    /// `Io` when the file cannot be read; `Format` when it is empty, cut short, of an unknown
    /// magic number or version, or when its sidecar disagrees with it.
    pub fn open(path: impl AsRef<Path>, headerless: Option<TokenDtype>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).at("open", path)?;
        let metadata = file.metadata().at("inspect", path)?;
        if !metadata.is_file() {
            return Err(Error::format(
                path,
                "not a token file: not a regular file; of a directory, name one .bin",
            ));
        }
        if metadata.len() == 0 {
            return Err(Error::format(path, "the file is empty: make it again"));
        }
        // SAFETY: the map is only read, as plain bytes. Another process that shortens the file
        // while it is mapped makes reads fault; our own writer replaces files by rename, which
        // leaves an open map intact.
        let map = unsafe { Mmap::map(&file) }.at("map", path)?;
        let (offset, dtype) = layout(path, &map, headerless)?;
        let sidecar = Sidecar::read_beside(path)?;
        let file = Self {
            path: path.to_path_buf(),
            map,
            offset,
            dtype,
            sidecar,
        };
        if let Some(sidecar) = &file.sidecar
            && sidecar.tokens != file.len()
        {
            return Err(Error::format(
                path,
                format!(
                    "holds {} tokens, but its sidecar {} says {}; make both again with \
                     `titanbit tokenize`",
                    file.len(),
                    Sidecar::path_for(path).display(),
                    sidecar.tokens
                ),
            ));
        }
        Ok(file)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn dtype(&self) -> TokenDtype {
        self.dtype
    }

    /// What the sidecar says, if there is one.
    pub fn sidecar(&self) -> Option<&Sidecar> {
        self.sidecar.as_ref()
    }

    /// Number of tokens.
    pub fn len(&self) -> u64 {
        (self.token_bytes().len() / self.dtype.bytes()) as u64
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens as they lie in the file: little-endian, `dtype().bytes()` each.
    pub fn token_bytes(&self) -> &[u8] {
        &self.map[self.offset..]
    }

    /// Appends tokens `range` to `ids`. Panics when the range is outside the file.
    pub fn read(&self, range: Range<u64>, ids: &mut Vec<u32>) {
        let width = self.dtype.bytes();
        let bytes = &self.token_bytes()[range.start as usize * width..range.end as usize * width];
        match self.dtype {
            TokenDtype::U16 => {
                let (tokens, _) = bytes.as_chunks::<2>();
                ids.extend(tokens.iter().map(|&t| u32::from(u16::from_le_bytes(t))));
            }
            TokenDtype::U32 => {
                let (tokens, _) = bytes.as_chunks::<4>();
                ids.extend(tokens.iter().map(|&t| u32::from_le_bytes(t)));
            }
        }
    }

    /// As [`Self::read`], for a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// `Format` when an id is not below `vocab_size`, naming the file and the position.
    pub fn read_for(&self, range: Range<u64>, vocab_size: u32, ids: &mut Vec<u32>) -> Result<()> {
        let (position, first) = (range.start, ids.len());
        self.read(range, ids);
        match (position..)
            .zip(&ids[first..])
            .find(|(_, id)| **id >= vocab_size)
        {
            None => Ok(()),
            Some((position, id)) => Err(Error::format(
                &self.path,
                format!(
                    "token {position} is id {id}, but the model's vocab_size is {vocab_size}: use \
                     the vocabulary that the data was tokenised with"
                ),
            )),
        }
    }

    /// The largest id in the file, and its position. Reads the whole file.
    pub fn max_id(&self) -> Option<(u32, u64)> {
        const BLOCK: u64 = 1 << 16;
        let mut max: Option<(u32, u64)> = None;
        let mut ids = Vec::new();
        for start in (0..self.len()).step_by(BLOCK as usize) {
            ids.clear();
            self.read(start..self.len().min(start + BLOCK), &mut ids);
            for (id, position) in ids.iter().zip(start..) {
                if max.is_none_or(|(largest, _)| *id > largest) {
                    max = Some((*id, position));
                }
            }
        }
        max
    }

    /// Compares the tokens with the sidecar's checksum; `false` when there is no sidecar to
    /// compare with. Reads the whole file.
    ///
    /// # Errors
    /// `Format` when they differ.
    pub fn verify_checksum(&self) -> Result<bool> {
        let Some(sidecar) = &self.sidecar else {
            return Ok(false);
        };
        let found = hex(xxh3_64(self.token_bytes()));
        if found != sidecar.checksum {
            return Err(Error::format(
                &self.path,
                format!(
                    "the checksum of its tokens is {found}, but the sidecar says {}: the file is \
                     damaged; copy it again or make it again with `titanbit tokenize`",
                    sidecar.checksum
                ),
            ));
        }
        Ok(true)
    }
}

/// Where the tokens start and how they are stored, checked against the file's length.
fn layout(
    path: &Path,
    bytes: &[u8],
    headerless: Option<TokenDtype>,
) -> Result<(usize, TokenDtype)> {
    let header = |field: usize| {
        let at = field * 4;
        let word = bytes.get(at..at + 4)?;
        Some(i32::from_le_bytes([word[0], word[1], word[2], word[3]]))
    };
    let with_header = [TokenDtype::U16, TokenDtype::U32]
        .into_iter()
        .find(|dtype| header(0) == Some(dtype.magic_and_version().0));
    let Some(dtype) = with_header else {
        return headerless_layout(path, bytes, header(0), headerless);
    };
    if bytes.len() < HEADER_BYTES {
        return Err(Error::format(
            path,
            format!(
                "cut short inside the header: {} bytes of {HEADER_BYTES}; copy it or make it again",
                bytes.len()
            ),
        ));
    }
    let (_, expected_version) = dtype.magic_and_version();
    let version = header(1).unwrap_or_default();
    if version != expected_version {
        return Err(Error::format(
            path,
            format!(
                "llm.c token file of version {version}; version {expected_version} is what this \
                 program reads, make the file again"
            ),
        ));
    }
    let stated = header(2).unwrap_or_default();
    let Ok(tokens) = u64::try_from(stated) else {
        return Err(Error::format(
            path,
            format!("its header says {stated} tokens: the file is damaged, make it again"),
        ));
    };
    let expected = HEADER_BYTES as u64 + tokens * dtype.bytes() as u64;
    let found = bytes.len() as u64;
    if found != expected {
        let what = if found < expected {
            "cut short"
        } else {
            "too long"
        };
        return Err(Error::format(
            path,
            format!(
                "{what}: its header says {tokens} tokens, which takes {expected} bytes, but the \
                 file has {found}; copy it or make it again"
            ),
        ));
    }
    Ok((HEADER_BYTES, dtype))
}

fn headerless_layout(
    path: &Path,
    bytes: &[u8],
    magic: Option<i32>,
    dtype: Option<TokenDtype>,
) -> Result<(usize, TokenDtype)> {
    let Some(dtype) = dtype else {
        let found = magic.map_or("too short for one".to_string(), |m| m.to_string());
        return Err(Error::format(
            path,
            format!(
                "not an llm.c token file (magic number {found}, expected 20240520 or 20240801); \
                 for a nanoGPT file without a header set data.dtype, or --dtype, to u16 or u32"
            ),
        ));
    };
    if !bytes.len().is_multiple_of(dtype.bytes()) {
        return Err(Error::format(
            path,
            format!(
                "{} bytes is not a whole number of tokens of {} bytes: the file is cut short, or \
                 `dtype` is wrong",
                bytes.len(),
                dtype.bytes()
            ),
        ));
    }
    Ok((0, dtype))
}
