//! A slice of numbers that is owned, or lies in a memory-mapped file.

use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

/// Numbers that any bytes are: no padding, no invalid pattern. In files they are little-endian, like
/// the processors that this crate compiles for (`quant::packing` sees to it).
pub trait Plain: Copy + Send + Sync + 'static {}

impl Plain for u8 {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for f16 {}
impl Plain for bf16 {}

/// The numbers as files have them.
pub(crate) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers are bytes without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Numbers that nobody changes any more; a clone of mapped ones costs nothing.
#[derive(Clone, Debug)]
pub enum Values<T> {
    Owned(Vec<T>),
    Mapped(Mapped<T>),
}

/// A part of a mapped file.
#[derive(Clone, Debug)]
pub struct Mapped<T> {
    file: Arc<Mmap>,
    bytes: Range<usize>,
    numbers: PhantomData<T>,
}

impl<T: Plain> Values<T> {
    /// The numbers in `bytes` of `file`; copied where they do not lie as numbers of their type must.
    ///
    /// # Panics
    /// If the range is not inside the file or holds part of a number.
    pub fn mapped(file: &Arc<Mmap>, bytes: Range<usize>) -> Self {
        let part = &file[bytes.clone()];
        assert!(part.len().is_multiple_of(size_of::<T>()));
        let first = part.as_ptr().cast::<T>();
        if first.is_aligned() {
            return Self::Mapped(Mapped {
                file: Arc::clone(file),
                bytes,
                numbers: PhantomData,
            });
        }
        // SAFETY: so many numbers lie there, of which any bytes are one.
        let number = |i| unsafe { first.add(i).read_unaligned() };
        Self::Owned((0..part.len() / size_of::<T>()).map(number).collect())
    }
}

impl<T: Plain> From<Vec<T>> for Values<T> {
    fn from(values: Vec<T>) -> Self {
        Self::Owned(values)
    }
}

impl<T: Plain> Deref for Values<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(values) => values,
            Self::Mapped(part) => {
                let bytes = &part.file[part.bytes.clone()];
                let len = bytes.len() / size_of::<T>();
                // SAFETY: `mapped` saw that `len` aligned numbers lie there.
                unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), len) }
            }
        }
    }
}
