//! GGUF files, version 3 (docs/gguf.md of ggml), and writing them: a header of keys with values, a
//! list of tensors, then their data, each aligned. All numbers are little-endian.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::blocks::Encoding;
use crate::Result;
use crate::error::IoContext;

pub(super) const MAGIC: &[u8; 4] = b"GGUF";
pub(super) const VERSION: u32 = 3;

/// Every tensor begins at a multiple of this, counted from the first.
const ALIGNMENT: usize = 32;

/// What a key may have here, of the types there are.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Strings(Vec<String>),
}

/// Their numbers in `enum gguf_type`.
pub(super) const U32: u32 = 4;
pub(super) const I32: u32 = 5;
pub(super) const F32: u32 = 6;
pub(super) const BOOL: u32 = 7;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;

/// Keys with their values, in the order of the file.
pub type Metadata = Vec<(String, Value)>;

/// A tensor of a file.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    /// The length of a row first, as ggml has it.
    pub dims: Vec<usize>,
    pub encoding: Encoding,
}

impl Tensor {
    /// Bytes of its data, if its rows are whole blocks.
    pub(super) fn bytes(&self) -> Option<usize> {
        let mut rows = self.dims[1..].iter();
        rows.try_fold(self.encoding.bytes(self.dims[0])?, |bytes, dim| {
            bytes.checked_mul(*dim)
        })
    }
}

/// A file being written: its header is there, its tensors follow one by one.
pub struct Writer<'a> {
    path: PathBuf,
    file: BufWriter<File>,
    tensors: std::slice::Iter<'a, Tensor>,
}

impl<'a> Writer<'a> {
    /// Creates the file and writes its header.
    ///
    /// # Errors
    /// `Io` when it cannot be created or written, here and below.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &'a [Tensor]) -> Result<Self> {
        let file = File::create(path).at("create", path)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header(metadata, tensors))
            .at("write", path)?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            tensors: tensors.iter(),
        })
    }

    /// Appends the data of the next tensor.
    ///
    /// # Panics
    /// If there is no further tensor, or it has another number of bytes.
    pub fn append(&mut self, data: &[u8]) -> Result<()> {
        let tensor = self.tensors.next().expect("a tensor of the header");
        assert_eq!(Some(data.len()), tensor.bytes(), "{}", tensor.name);
        let padding = &[0; ALIGNMENT][..padding(data.len())];
        self.file.write_all(data).at("write", &self.path)?;
        self.file.write_all(padding).at("write", &self.path)
    }

    /// Makes the file durable.
    ///
    /// # Panics
    /// If tensors are missing.
    pub fn finish(mut self) -> Result<()> {
        assert_eq!(self.tensors.len(), 0, "every tensor was written");
        self.file.flush().at("write", &self.path)?;
        self.file.get_ref().sync_all().at("write", &self.path)
    }
}

/// Bytes from `len` to where a tensor may begin.
pub(super) fn padding(len: usize) -> usize {
    len.next_multiple_of(ALIGNMENT) - len
}

fn header(metadata: &Metadata, tensors: &[Tensor]) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    put_len(&mut header, tensors.len());
    put_len(&mut header, metadata.len());
    for (key, value) in metadata {
        put_string(&mut header, key);
        put_value(&mut header, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        put_string(&mut header, &tensor.name);
        header.extend((tensor.dims.len() as u32).to_le_bytes());
        for dim in &tensor.dims {
            put_len(&mut header, *dim);
        }
        header.extend(tensor.encoding.id().to_le_bytes());
        put_len(&mut header, offset);
        let bytes = tensor.bytes().expect("rows of whole blocks");
        offset += bytes + padding(bytes);
    }
    header.resize(header.len() + padding(header.len()), 0);
    header
}

fn put_len(header: &mut Vec<u8>, len: usize) {
    header.extend((len as u64).to_le_bytes());
}

fn put_string(header: &mut Vec<u8>, text: &str) {
    put_len(header, text.len());
    header.extend(text.as_bytes());
}

fn put_value(header: &mut Vec<u8>, value: &Value) {
    let mut put_type = |types: &[u32]| header.extend(types.iter().flat_map(|x| x.to_le_bytes()));
    match value {
        Value::U32(x) => {
            put_type(&[U32]);
            header.extend(x.to_le_bytes());
        }
        Value::F32(x) => {
            put_type(&[F32]);
            header.extend(x.to_le_bytes());
        }
        Value::Bool(x) => {
            put_type(&[BOOL]);
            header.push(u8::from(*x));
        }
        Value::String(text) => {
            put_type(&[STRING]);
            put_string(header, text);
        }
        Value::I32s(values) => {
            put_type(&[ARRAY, I32]);
            put_len(header, values.len());
            header.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
        Value::F32s(values) => {
            put_type(&[ARRAY, F32]);
            put_len(header, values.len());
            header.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
        Value::Strings(texts) => {
            put_type(&[ARRAY, STRING]);
            put_len(header, texts.len());
            texts.iter().for_each(|text| put_string(header, text));
        }
    }
}
