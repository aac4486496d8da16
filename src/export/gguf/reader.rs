//! Reading GGUF files, as far as `titanbit export` writes them.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::blocks::Encoding;
use super::container::{
    ARRAY, BOOL, F32, I32, MAGIC, STRING, Tensor, U32, VERSION, Value, padding,
};
use crate::error::IoContext;
use crate::values::{Plain, Values};
use crate::{Error, Result};

/// Whether the file begins like a GGUF file.
///
/// # Errors
/// `Io` when it cannot be read.
pub fn is_gguf(path: &Path) -> Result<bool> {
    let mut magic = Vec::new();
    let file = File::open(path).at("open", path)?;
    file.take(4).read_to_end(&mut magic).at("read", path)?;
    Ok(magic == MAGIC)
}

/// A file, mapped.
pub struct Reader {
    path: PathBuf,
    file: Arc<Mmap>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, (Tensor, Range<usize>)>,
}

impl Reader {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// `Io` when it cannot be read; `Format` when it is not GGUF, cut short, or has types that
    /// [`Value`] and [`Encoding`] do not.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).at("open", path)?;
        // SAFETY: as with every mapped file, nobody may shorten it while it is in use.
        let file = unsafe { Mmap::map(&file) }.at("map", path)?;
        let (metadata, tensors) = read_header(&file).map_err(|what| Error::format(path, what))?;
        Ok(Self {
            path: path.to_path_buf(),
            file: Arc::new(file),
            metadata,
            tensors,
        })
    }

    pub fn error(&self, what: String) -> Error {
        Error::format(&self.path, what)
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Encoding and place of a tensor, which must have these dimensions.
    ///
    /// # Errors
    /// `Format` when it is missing or has others.
    pub fn tensor(&self, name: &str, dims: &[usize]) -> Result<(Encoding, Range<usize>)> {
        match self.tensors.get(name) {
            Some((tensor, place)) if tensor.dims == dims => Ok((tensor.encoding, place.clone())),
            Some((tensor, _)) => Err(self.error(format!(
                "tensor `{name}` has dimensions {:?}, the header's configuration needs {dims:?}",
                tensor.dims
            ))),
            None => Err(self.error(format!("tensor `{name}` is missing"))),
        }
    }

    pub fn bytes(&self, place: Range<usize>) -> &[u8] {
        &self.file[place]
    }

    pub fn values<T: Plain>(&self, place: Range<usize>) -> Values<T> {
        Values::mapped(&self.file, place)
    }
}

/// What is wrong with a header.
type Parsed<T> = std::result::Result<T, String>;

type Tensors = HashMap<String, (Tensor, Range<usize>)>;

fn read_header(file: &[u8]) -> Parsed<(HashMap<String, Value>, Tensors)> {
    let mut cursor = Cursor { file, at: 0 };
    if cursor.take(4)? != MAGIC {
        return Err("not a GGUF file".into());
    }
    let version = cursor.u32()?;
    if version != VERSION {
        return Err(format!("version {version} of GGUF, only {VERSION} is read"));
    }
    let (tensor_count, key_count) = (cursor.len()?, cursor.len()?);
    let mut metadata = HashMap::new();
    for _ in 0..key_count {
        let key = cursor.string()?;
        let value = cursor.value(&key)?;
        metadata.insert(key, value);
    }
    let mut offsets = Vec::new();
    for _ in 0..tensor_count {
        offsets.push((cursor.tensor()?, cursor.len()?));
    }
    let data = cursor.at + padding(cursor.at);
    let mut tensors = HashMap::new();
    for (tensor, offset) in offsets {
        let name = tensor.name.clone();
        let bytes = tensor.bytes();
        let bytes = bytes.ok_or_else(|| format!("tensor `{name}` has no whole blocks"))?;
        let start = data.saturating_add(offset);
        let end = start.saturating_add(bytes);
        if end > file.len() {
            return Err(format!("cut short: it ends before tensor `{name}` does"));
        }
        tensors.insert(name, (tensor, start..end));
    }
    Ok((metadata, tensors))
}

/// What of a header has been read.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(count);
        let bytes = end.and_then(|end| self.file.get(self.at..end));
        let bytes = bytes.ok_or("cut short: it ends inside its header")?;
        self.at += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many bytes"))
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn len(&mut self) -> Parsed<usize> {
        let len = u64::from_le_bytes(self.array()?);
        usize::try_from(len).map_err(|_| format!("a length of {len}"))
    }

    fn string(&mut self) -> Parsed<String> {
        let len = self.len()?;
        let text = String::from_utf8(self.take(len)?.to_vec());
        text.map_err(|_| "text in its header is not UTF-8".into())
    }

    fn tensor(&mut self) -> Parsed<Tensor> {
        let name = self.string()?;
        let dims = self.u32()?;
        if !(1..=4).contains(&dims) {
            return Err(format!("tensor `{name}` has {dims} dimensions"));
        }
        let dims = (0..dims).map(|_| self.len()).collect::<Parsed<_>>()?;
        let id = self.u32()?;
        match Encoding::from_id(id) {
            Some(encoding) => Ok(Tensor {
                name,
                dims,
                encoding,
            }),
            None => Err(format!(
                "tensor `{name}` is of ggml's type {id}, which `titanbit export` does not write"
            )),
        }
    }

    fn value(&mut self, key: &str) -> Parsed<Value> {
        let other = |id| {
            Err(format!(
                "key `{key}` is of GGUF's type {id}, which `titanbit export` does not write"
            ))
        };
        Ok(match self.u32()? {
            U32 => Value::U32(self.u32()?),
            F32 => Value::F32(f32::from_le_bytes(self.array()?)),
            BOOL => Value::Bool(self.array::<1>()? != [0]),
            STRING => Value::String(self.string()?),
            ARRAY => {
                let (id, count) = (self.u32()?, self.len()?);
                match id {
                    I32 => Value::I32s(self.numbers(count, i32::from_le_bytes)?),
                    F32 => Value::F32s(self.numbers(count, f32::from_le_bytes)?),
                    STRING => {
                        let texts = (0..count).map(|_| self.string());
                        Value::Strings(texts.collect::<Parsed<_>>()?)
                    }
                    id => return other(id),
                }
            }
            id => return other(id),
        })
    }

    fn numbers<T>(&mut self, count: usize, number: fn([u8; 4]) -> T) -> Parsed<Vec<T>> {
        let bytes = self.take(count.saturating_mul(4))?.chunks_exact(4);
        Ok(bytes
            .map(|bytes| number(bytes.try_into().expect("four bytes")))
            .collect())
    }
}
