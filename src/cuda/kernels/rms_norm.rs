//! Launcher of `kernels/rms_norm.cu`.

use candle_core::CudaDevice;
use half::bf16;

use super::bit_linear::Projection;
use super::rows::{RowKernel, Spread};
use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::workspace::{NORM_PARTS, NormStatistics, QuantizedGradient};

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
    backward_quantize: RowKernel,
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
}

impl RmsNorm {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice, features: usize, eps: f32) -> Result<Self> {
        let module = Module::load(device, fatbin!("rms_norm"))?;
        let block = |bytes_by_thread, target_kib: usize| {
            Spread::block(features, 16, bytes_by_thread, target_kib << 10)
        };
        let load = |name, spread| RowKernel::load(&module, name, spread);
        Ok(Self {
            // Narrow rows are better off with a warp each.
            quantize: match features {
                ..=768 => load(
                    "rms_norm_quantize_warp",
                    Spread {
                        threads: 256,
                        shared_bytes: 12288,
                        target_bytes: 48 << 10,
                    },
                )?,
                _ => load("rms_norm_quantize", block(32, 48))?,
            },
            forward: load("rms_norm", block(32, 24))?,
            backward: load("rms_norm_backward", block(96, 64))?,
            backward_quantize: load("rms_norm_backward_quantize", block(96, 96))?,
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

    /// From dn, the gradient by the normalised rows. `to.dx` may be `to.dresidual` or dn. Unless
    /// null, inputs (rows, features) = code * scale.
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
        inputs: DevicePtr<bf16>,
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
                    &inputs,
                    &to.parts,
                    &rows,
                    &features,
                ],
            )?;
            self.column_sums
                .add(to.parts, to.dweight, blocks, self.features)
        }
    }

    /// [`Self::backward`] with int8 codes for bf16 values: those of the normalised rows, unless
    /// null, and those of dx times the b of `next`, the projection whose output gradient it is, which
    /// comes in e4m3 too.
    ///
    /// # Safety
    /// As [`Self::quantize`].
    ///
    /// # Errors
    /// As [`Self::quantize`].
    pub unsafe fn backward_quantize(
        &self,
        norm: &Normed,
        dn: DevicePtr<bf16>,
        to: &NormGradients,
        codes: DevicePtr<i8>,
        next: Option<(&Projection, QuantizedGradient)>,
        rows: usize,
    ) -> Result<()> {
        let (rows, features) = (rows as i32, self.features as i32);
        let blocks = self.backward_quantize.blocks.min(NORM_PARTS);
        let [dcodes, dfp8, dscale, b] = match next {
            Some((next, dy)) => [
                dy.codes.address(),
                dy.fp8.address(),
                dy.scale.address(),
                next.scales.address(),
            ],
            None => [0; 4],
        };
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
                    &to.dresidual,
                    &to.dx,
                    &codes,
                    &to.parts,
                    &dcodes,
                    &dfp8,
                    &dscale,
                    &b,
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
