//! Launcher of `kernels/cross_entropy.cu`.

use candle_core::CudaDevice;
use half::bf16;

use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;

/// Logits: the first `vocab` of each `stride` columns.
#[derive(Clone, Copy, Debug)]
pub struct Logits {
    pub values: DevicePtr<bf16>,
    pub rows: usize,
    pub vocab: usize,
    pub stride: usize,
}

pub struct CrossEntropy {
    forward: Kernel,
    backward: Kernel,
    sum: Kernel,
}

impl CrossEntropy {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("cross_entropy"))?;
        Ok(Self {
            forward: module.kernel("cross_entropy", 0)?,
            backward: module.kernel("cross_entropy_backward", 0)?,
            sum: module.kernel("sum_losses", 0)?,
        })
    }

    /// losses (rows,) = logsumexp(logits) - logits[label].
    ///
    /// # Safety
    /// The addresses must hold what the shapes say, labels below vocab.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn forward(
        &self,
        logits: Logits,
        labels: DevicePtr<u32>,
        losses: DevicePtr<f32>,
    ) -> Result<()> {
        let Logits {
            values,
            rows,
            vocab,
            stride,
        } = logits;
        let sizes = [rows, vocab, stride].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.forward.launch(
                [rows, 1, 1],
                threads(stride),
                &[&values, &labels, &losses, &sizes[0], &sizes[1], &sizes[2]],
            )
        }
    }

    /// The same, and the logits become (softmax - onehot(label)) * scale. A scale that is no power of
    /// two would be rounded to bf16, the same way in every label's entry.
    ///
    /// # Safety
    /// As [`Self::forward`].
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub unsafe fn backward(
        &self,
        logits: Logits,
        labels: DevicePtr<u32>,
        losses: DevicePtr<f32>,
        scale: f32,
    ) -> Result<()> {
        let Logits {
            values,
            rows,
            vocab,
            stride,
        } = logits;
        let sizes = [rows, vocab, stride].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.backward.launch(
                [rows, 1, 1],
                threads(stride),
                &[
                    &values, &labels, &losses, &sizes[0], &sizes[1], &sizes[2], &scale,
                ],
            )
        }
    }

    /// total += scale * sum of losses (rows,).
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn sum(
        &self,
        losses: DevicePtr<f32>,
        total: DevicePtr<f64>,
        rows: usize,
        scale: f64,
    ) -> Result<()> {
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.sum
                .launch([1, 1, 1], 1024, &[&losses, &total, &(rows as i32), &scale])
        }
    }
}

/// What the kernel's comment recommends.
fn threads(stride: usize) -> usize {
    match stride {
        ..=65536 => stride.div_ceil(64).next_multiple_of(32).min(512),
        _ => 1024,
    }
}
