//! Launcher of `kernels/gated_activation.cu`: gate, norm and quantiser before the down projection.

use candle_core::CudaDevice;
use half::bf16;

use super::rms_norm::{ColumnSums, Normed};
use super::rows::RowKernel;
use super::{Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::workspace::NORM_PARTS;
use crate::model::{Activation, BitNetConfig};

/// act(gate) * up and its RMSNorm, over rows of 2 * intermediate features.
pub struct GatedActivation {
    quantize: RowKernel,
    backward: RowKernel,
    column_sums: ColumnSums,
    features: usize,
    eps: f32,
}

impl GatedActivation {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice, config: &BitNetConfig) -> Result<Self> {
        let module = Module::load(device, fatbin!("gated_activation"))?;
        let name = match config.activation {
            Activation::Silu => "swiglu",
            Activation::Relu2 => "relu2",
        };
        let features = config.intermediate_size;
        let load =
            |pass, inputs| RowKernel::load(&module, &format!("{name}_{pass}"), features, inputs);
        let norms = Module::load(device, fatbin!("rms_norm"))?;
        Ok(Self {
            quantize: load("quantize", 2)?,
            backward: load("backward", 3)?,
            column_sums: ColumnSums::load(&norms)?,
            features,
            eps: config.rms_norm_eps as f32,
        })
    }

    /// Int8 codes (rows, intermediate) from `norm.x`, gate and up (rows, 2 intermediate); fills
    /// `norm.kept`.
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

    /// The gradient by gate and up takes their place; dweight += the norm's; inputs = code * scale.
    /// dn is the gradient by the normalised rows, parts scratch of (NORM_PARTS, intermediate).
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses a launch.
    pub unsafe fn backward(
        &self,
        norm: &Normed,
        dn: DevicePtr<bf16>,
        dweight: DevicePtr<f32>,
        parts: DevicePtr<f32>,
        inputs: DevicePtr<bf16>,
        rows: usize,
    ) -> Result<()> {
        let (rows, features) = (rows as i32, self.features as i32);
        let blocks = self.backward.blocks.min(NORM_PARTS);
        // SAFETY: the arguments are those of the kernel, which may write where it reads.
        unsafe {
            self.backward.launch(
                blocks,
                &[
                    &dn,
                    &norm.x,
                    &norm.weight,
                    &norm.kept.rstd,
                    &norm.kept.scale,
                    &norm.x,
                    &inputs,
                    &parts,
                    &rows,
                    &features,
                ],
            )?;
            self.column_sums.add(parts, dweight, blocks, self.features)
        }
    }
}
