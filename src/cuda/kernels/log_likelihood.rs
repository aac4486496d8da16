//! Launcher of `kernels/log_likelihood.cu`.

use candle_core::CudaDevice;

use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;

const THREADS: usize = 512;

pub struct LogLikelihood {
    kernel: Kernel,
}

/// Logits (rows, stride), of which the first `vocab` columns count.
#[derive(Clone, Copy, Debug)]
pub struct Logits {
    pub values: DevicePtr<f32>,
    pub rows: usize,
    pub stride: usize,
    pub vocab: usize,
}

impl LogLikelihood {
    /// # Errors
    /// `Tensor` if the driver refuses the kernel.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("log_likelihood"))?;
        let kernel = module.kernel("log_likelihoods", 0)?;
        Ok(Self { kernel })
    }

    /// out (rows,) = natural log of the probability of `targets` (rows,); NaN if a logit is NaN or
    /// +inf.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say, targets columns below `vocab`.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn run(
        &self,
        logits: Logits,
        targets: DevicePtr<u32>,
        out: DevicePtr<f32>,
    ) -> Result<()> {
        let [vocab, stride] = [logits.vocab, logits.stride].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.kernel.launch(
                [logits.rows, 1, 1],
                THREADS,
                &[&logits.values, &targets, &out, &vocab, &stride],
            )
        }
    }
}
