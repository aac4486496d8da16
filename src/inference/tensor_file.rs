//! A safetensors file that is mapped, not read; and the tensors of one to write.

use std::borrow::Cow;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, View};

use crate::error::IoContext;
use crate::values::{Plain, Values, bytes_of};
use crate::{Error, Result};

pub struct TensorFile {
    path: PathBuf,
    file: Arc<Mmap>,
    metadata: Metadata,
    /// Where the tensors begin.
    data: usize,
}

impl TensorFile {
    /// Maps the file at `path`, or says `None` if it is no safetensors file.
    ///
    /// # Errors
    /// `Io` when it cannot be read, `Format` when it was cut short.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let file = File::open(path).at("open", path)?;
        // SAFETY: as with every mapped file, nobody may shorten it while it is in use.
        let file = Arc::new(unsafe { Mmap::map(&file) }.at("map", path)?);
        let (header, metadata) = match SafeTensors::read_metadata(&file) {
            Ok(read) => read,
            Err(SafeTensorError::MetadataIncompleteBuffer) => {
                return Err(Error::format(path, "a safetensors file that was cut short"));
            }
            Err(_) => return Ok(None),
        };
        Ok(Some(Self {
            path: path.to_path_buf(),
            file,
            metadata,
            data: header + size_of::<u64>(),
        }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the header says of the file itself.
    pub fn text(&self, key: &str) -> Option<&str> {
        let texts = self.metadata.metadata().as_ref()?;
        texts.get(key).map(String::as_str)
    }

    /// The numbers of a tensor.
    ///
    /// # Errors
    /// `Format` if there is none of that name, type and shape.
    pub fn values<T: Plain>(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Values<T>> {
        let info = (self.metadata.info(name))
            .ok_or_else(|| Error::format(&self.path, format!("tensor `{name}` is missing")))?;
        if info.dtype != dtype || info.shape != shape {
            return Err(Error::format(
                &self.path,
                format!(
                    "tensor `{name}` is {:?} of shape {:?}, its configuration needs {dtype:?} of \
                     shape {shape:?}",
                    info.dtype, info.shape
                ),
            ));
        }
        let (start, end) = info.data_offsets;
        Ok(Values::mapped(
            &self.file,
            self.data + start..self.data + end,
        ))
    }
}

/// One tensor to write.
pub struct NewTensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl<'a> NewTensor<'a> {
    /// Over `values`, which are of the type that `dtype` says.
    pub fn over<T: Plain>(dtype: Dtype, shape: &[usize], values: &'a [T]) -> Self {
        Self {
            dtype,
            shape: shape.to_vec(),
            bytes: bytes_of(values).into(),
        }
    }

    pub fn vector(values: &'a [f32]) -> Self {
        Self::over(Dtype::F32, &[values.len()], values)
    }

    /// With the numbers copied.
    pub fn into_owned(self) -> NewTensor<'static> {
        NewTensor {
            bytes: self.bytes.into_owned().into(),
            dtype: self.dtype,
            shape: self.shape,
        }
    }
}

impl View for NewTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
