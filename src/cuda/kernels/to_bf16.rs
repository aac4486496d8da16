//! Launcher of `kernels/to_bf16.cu`.

use candle_core::CudaDevice;
use half::bf16;

use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;

pub struct ToBf16 {
    kernel: Kernel,
    blocks: usize,
}

impl ToBf16 {
    const THREADS: usize = 256;

    /// # Errors
    /// `Tensor` if the driver refuses the kernel.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let kernel = Module::load(device, fatbin!("to_bf16"))?.kernel("to_bf16", 0)?;
        Ok(Self {
            blocks: kernel.resident_blocks(Self::THREADS)?,
            kernel,
        })
    }

    /// Rounds `count` values, a multiple of 8.
    ///
    /// # Safety
    /// Both addresses must hold `count` values.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn convert(
        &self,
        from: DevicePtr<f32>,
        to: DevicePtr<bf16>,
        count: usize,
    ) -> Result<()> {
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.kernel.launch(
                [self.blocks, 1, 1],
                Self::THREADS,
                &[&from, &to, &(count as i64)],
            )
        }
    }
}
