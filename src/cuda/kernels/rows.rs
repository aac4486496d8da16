//! Kernels that walk over rows of features, on as many blocks as serve the device's memory best.

use super::{Argument, Kernel, Module};
use crate::Result;

/// Widest row.
pub const MAX_FEATURES: usize = 16384;

/// How a kernel spreads a row, as its comment says.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub threads: usize,
    pub shared_bytes: usize,
    /// Shared memory in use on a multiprocessor beyond which more blocks only get in each other's
    /// way.
    pub target_bytes: usize,
}

impl Spread {
    /// A block a row of `features`, so many of them a thread and so many bytes staged for each
    /// thread.
    pub fn block(
        features: usize,
        by_thread: usize,
        bytes_by_thread: usize,
        target_bytes: usize,
    ) -> Self {
        let threads = features.div_ceil(by_thread).next_multiple_of(32);
        Self {
            threads,
            shared_bytes: bytes_by_thread * threads,
            target_bytes,
        }
    }
}

/// A kernel for rows of one width.
pub struct RowKernel {
    kernel: Kernel,
    threads: usize,
    pub blocks: usize,
}

impl RowKernel {
    /// # Errors
    /// `Tensor` if the driver refuses the kernel.
    pub fn load(module: &Module, name: &str, spread: Spread) -> Result<Self> {
        let kernel = module.kernel(name, spread.shared_bytes)?;
        let processors = kernel.processors()?;
        let wanted = spread.target_bytes.div_ceil(spread.shared_bytes);
        Ok(Self {
            blocks: kernel
                .resident_blocks(spread.threads)?
                .min(wanted * processors),
            kernel,
            threads: spread.threads,
        })
    }

    /// # Safety
    /// As [`Kernel::launch`].
    ///
    /// # Errors
    /// As [`Kernel::launch`].
    pub unsafe fn launch(&self, blocks: usize, arguments: &[&dyn Argument]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.kernel.launch([blocks, 1, 1], self.threads, arguments) }
    }
}
