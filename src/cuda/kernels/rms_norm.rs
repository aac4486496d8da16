//! Launcher of `kernels/rms_norm.cu`.

use candle_core::CudaDevice;
use half::bf16;

use super::rows::RowKernel;
use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::workspace::{NORM_PARTS, NormStatistics};

/// A norm over rows: its input (rows, features), its weight (features,), and what it keeps.
#[derive(Clone, Copy, Debug)]
pub struct Normed {
    pub x: DevicePtr<bf16>,
    pub weight: DevicePtr<f32>,
    pub kept: NormStatistics,
}

/// RMSNorm over rows of one width.
pub struct RmsNorm {
    quantize: RowKernel,
    forward: RowKernel,
    backward: RowKernel,
    column_sums: ColumnSums,
    features: usize,
    eps: f32,
}

/// Where a norm's gradients go.
#[derive(Clone, Copy, Debug)]
pub struct NormGradients {
    /// By the input: (rows, features), `dresidual` (or null) added.
    pub dx: DevicePtr<bf16>,
    pub dresidual: DevicePtr<bf16>,
    /// By the weight, f32, added to what is there.
    pub dweight: DevicePtr<f32>,
    /// Scratch, (NORM_PARTS, features).
    pub parts: DevicePtr<f32>,
    /// code * scale of each normalised value, or null where no codes are wanted.
    pub inputs: DevicePtr<bf16>,
}

impl RmsNorm {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice, features: usize, eps: f32) -> Result<Self> {
        let module = Module::load(device, fatbin!("rms_norm"))?;
        let load = |name, inputs| RowKernel::load(&module, name, features, inputs);
        Ok(Self {
            quantize: load("rms_norm_quantize", 1)?,
            forward: load("rms_norm", 1)?,
            backward: load("rms_norm_backward", 3)?,
            column_sums: ColumnSums::load(&module)?,
            features,
            eps,
        })
    }

    /// Int8 codes of the normalised rows; fills `norm.kept`.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn quantize(&self, norm: &Normed, codes: DevicePtr<i8>, rows: usize) -> Result<()> {
        let (rows, features) = (rows as i32, self.features as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.quantize.launch(
                self.quantize.blocks,
                &[
                    &norm.x,
                    &norm.weight,
                    &codes,
                    &norm.kept.scale,
                    &norm.kept.rstd,
                    &rows,
                    &features,
                    &self.eps,
                ],
            )
        }
    }

    /// The normalised rows in bf16; of `norm.kept` it fills only rstd.
    ///
    /// # Safety
    /// As [`Self::quantize`].
    ///
    /// # Errors
    /// As [`Self::quantize`].
    pub unsafe fn forward(&self, norm: &Normed, y: DevicePtr<bf16>, rows: usize) -> Result<()> {
        let (rows, features) = (rows as i32, self.features as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.forward.launch(
                self.forward.blocks,
                &[
                    &norm.x,
                    &norm.weight,
                    &y,
                    &norm.kept.rstd,
                    &rows,
                    &features,
                    &self.eps,
                ],
            )
        }
    }

    /// From dn, the gradient by the normalised rows. `to.dx` may be `to.dresidual` or dn.
    ///
    /// # Safety
    /// As [`Self::quantize`].
    ///
    /// # Errors
    /// As [`Self::quantize`].
    pub unsafe fn backward(
        &self,
        norm: &Normed,
        dn: DevicePtr<bf16>,
        to: &NormGradients,
        rows: usize,
    ) -> Result<()> {
        let (rows, features) = (rows as i32, self.features as i32);
        let blocks = self.backward.blocks.min(NORM_PARTS);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.backward.launch(
                blocks,
                &[
                    &dn,
                    &norm.x,
                    &norm.weight,
                    &norm.kept.rstd,
                    &norm.kept.scale,
                    &to.dresidual,
                    &to.dx,
                    &to.inputs,
                    &to.parts,
                    &rows,
                    &features,
                ],
            )?;
            self.column_sums
                .add(to.parts, to.dweight, blocks, self.features)
        }
    }
}

/// Adds up the partial sums that blocks leave of a norm's weight gradient.
pub struct ColumnSums(Kernel);

impl ColumnSums {
    /// # Errors
    /// `Tensor` if the driver refuses the kernel.
    pub fn load(module: &Module) -> Result<Self> {
        Ok(Self(module.kernel("add_column_sums", 0)?))
    }

    /// sums (features,) += the sum of partials (parts, features).
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn add(
        &self,
        partials: DevicePtr<f32>,
        sums: DevicePtr<f32>,
        parts: usize,
        features: usize,
    ) -> Result<()> {
        let blocks = features.div_ceil(32);
        let (parts, features) = (parts as i32, features as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.0
                .launch([blocks, 1, 1], 1024, &[&partials, &sums, &parts, &features])
        }
    }
}
