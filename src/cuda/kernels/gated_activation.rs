//! Launcher of `kernels/gated_activation.cu`: gate, norm and quantiser before the down projection.

use candle_core::CudaDevice;
use half::bf16;

use super::bit_linear::Projection;
use super::rms_norm::{ColumnSums, Normed};
use super::rows::{RowKernel, Spread};
use super::{Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::workspace::{NORM_PARTS, QuantizedGradient};
use crate::model::{Activation, BitNetConfig};

/// act(gate) * up and its RMSNorm, over rows of 2 * intermediate features.
pub struct GatedActivation {
    quantize: RowKernel,
    backward: RowKernel,
    backward_quantize: RowKernel,
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
        let load = |pass, spread| RowKernel::load(&module, &format!("{name}_{pass}"), spread);
        let norms = Module::load(device, fatbin!("rms_norm"))?;
        Ok(Self {
            quantize: load("quantize", Spread::block(features, 16, 64, 48 << 10))?,
            backward: load("backward", Spread::block(features, 32, 192, 96 << 10))?,
            backward_quantize: match features {
                // Of the other kernel a multiprocessor holds one block only.
                8193..=9216 => load(
                    "backward_quantize_wide",
                    Spread::block(features, 24, 144, 96 << 10),
                )?,
                _ => load(
                    "backward_quantize",
                    Spread::block(features, 16, 96, 64 << 10),
                )?,
            },
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

    /// From dn, the gradient by the normalised rows: dgate_up (rows, 2 intermediate), which may be
    /// `norm.x`; dweight += the norm's; inputs = code * scale. parts is scratch of (NORM_PARTS,
    /// intermediate).
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
        (dgate_up, inputs): (DevicePtr<bf16>, DevicePtr<bf16>),
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
                    &dgate_up,
                    &inputs,
                    &parts,
                    &rows,
                    &features,
                ],
            )?;
            self.column_sums.add(parts, dweight, blocks, self.features)
        }
    }

    /// [`Self::backward`] with int8 codes for bf16 values: those of the normalised rows, and those
    /// of the gradient by gate and up, times their b, which comes in e4m3 too.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses a launch.
    pub unsafe fn backward_quantize(
        &self,
        norm: &Normed,
        dn: DevicePtr<bf16>,
        dweight: DevicePtr<f32>,
        parts: DevicePtr<f32>,
        (gate_up, dy, codes): (&Projection, QuantizedGradient, DevicePtr<i8>),
        rows: usize,
    ) -> Result<()> {
        let (rows, features) = (rows as i32, self.features as i32);
        let blocks = self.backward_quantize.blocks.min(NORM_PARTS);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.backward_quantize.launch(
                blocks,
                &[
                    &dn,
                    &norm.x,
                    &norm.weight,
                    &norm.kept.rstd,
                    &norm.kept.scale,
                    &codes,
                    &dy.codes,
                    &dy.fp8,
                    &dy.scale,
                    &gate_up.scales,
                    &parts,
                    &rows,
                    &features,
                ],
            )?;
            self.column_sums.add(parts, dweight, blocks, self.features)
        }
    }
}
