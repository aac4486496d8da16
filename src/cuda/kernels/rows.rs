//! Kernels that walk over rows of features, in the instance for a number of features: a warp a
//! row, a block a row, or a wide block.

use super::{Argument, Kernel, Module};
use crate::Result;

/// Widest row.
pub const MAX_FEATURES: usize = 16384;

/// How a row is spread: `kernels/rms_norm.cu` has the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spread {
    Warp,
    Block,
    Wide,
}

impl Spread {
    fn of(features: usize) -> Self {
        match features {
            ..=1024 => Self::Warp,
            1025..=4096 => Self::Block,
            _ => Self::Wide,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Warp => "warp",
            Self::Block => "block",
            Self::Wide => "wide",
        }
    }

    /// Vectors of eight features that a thread holds.
    fn vectors(self) -> usize {
        match self {
            Self::Warp | Self::Wide => 4,
            Self::Block => 2,
        }
    }

    fn threads(self, features: usize) -> usize {
        match self {
            Self::Warp => 256,
            _ => features.div_ceil(8 * self.vectors()).next_multiple_of(32),
        }
    }
}

/// A kernel for rows of one width, on as many blocks as the device holds at a time.
pub struct RowKernel {
    kernel: Kernel,
    threads: usize,
    pub blocks: usize,
}

impl RowKernel {
    /// The instance of `name` for `features`, which stages so many input arrays in shared memory.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the kernel.
    pub fn load(module: &Module, name: &str, features: usize, inputs: usize) -> Result<Self> {
        let spread = Spread::of(features);
        let threads = spread.threads(features);
        let shared_bytes = inputs * spread.vectors() * 16 * threads;
        let name = format!("{name}_{}", spread.name());
        let kernel = module.kernel(&name, shared_bytes)?;
        Ok(Self {
            blocks: kernel.resident_blocks(threads)?,
            kernel,
            threads,
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
