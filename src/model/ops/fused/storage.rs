//! Borrowing f32 slices out of candle's CPU storage.

use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, bail};

/// The elements of an operand of a custom op, which the caller made contiguous.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("fused operation on a non-contiguous tensor"),
    }
}

/// A read lock on a contiguous CPU tensor.
pub struct Reader<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Reader<'a> {
    pub fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub fn slice(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => slice(storage, self.layout),
            _ => bail!("fused operation on a tensor that is not on the CPU"),
        }
    }
}
