//! Launcher of `kernels/transpose.cu`: the transposed operands of fp8 backward products.

use candle_core::CudaDevice;

use super::bit_linear::Projection;
use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::workspace::{QuantizedGradient, padded_tokens};

/// Of rows and columns, as in the kernels.
const TILE: usize = 128;
const THREADS: usize = 256;
const FACTORS_THREADS: usize = 1024;

pub struct Transpose {
    bytes: Kernel,
    inputs: Kernel,
    factors: Kernel,
}

impl Transpose {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("transpose"))?;
        Ok(Self {
            bytes: module.kernel("transpose_bytes", 0)?,
            inputs: module.kernel("transpose_inputs", 0)?,
            factors: module.kernel("token_factors", 0)?,
        })
    }

    /// out (k, n) = codes (n, k) of a weight.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn weight(
        &self,
        codes: DevicePtr<i8>,
        out: DevicePtr<i8>,
        [n, k]: [usize; 2],
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.bytes(codes.address(), out.address(), [n, n, k]) }
    }

    /// `dy.transposed` of `dy.fp8`; and `dy.factors` and `dy.undo` for inputs of such a scale.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses a launch.
    pub unsafe fn gradient(
        &self,
        projection: &Projection,
        input_scale: DevicePtr<f32>,
        dy: &QuantizedGradient,
        tokens: usize,
    ) -> Result<()> {
        let &Projection {
            scales, n, ends, ..
        } = projection;
        let weights = 1 + ends.iter().filter(|end| **end < n).count() as i32;
        let count = tokens as i32;
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.factors.launch(
                [1, 1, 1],
                FACTORS_THREADS,
                &[
                    &dy.scale,
                    &input_scale,
                    &scales,
                    &weights,
                    &dy.factors,
                    &dy.undo,
                    &count,
                ],
            )?;
            let (fp8, transposed) = (dy.fp8.address(), dy.transposed.address());
            self.bytes(fp8, transposed, [tokens, padded_tokens(tokens), n])
        }
    }

    /// out (k, padded tokens) = codes (tokens, k) * factors (tokens,) in e4m3.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn inputs(
        &self,
        codes: DevicePtr<i8>,
        factors: DevicePtr<f32>,
        out: DevicePtr<u8>,
        [tokens, k]: [usize; 2],
    ) -> Result<()> {
        let padded = padded_tokens(tokens);
        let grid = [padded.div_ceil(TILE), k.div_ceil(TILE), 1];
        let [tokens, padded, k] = [tokens, padded, k].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.inputs.launch(
                grid,
                THREADS,
                &[&codes, &factors, &out, &tokens, &padded, &k],
            )
        }
    }

    unsafe fn bytes(&self, from: u64, to: u64, [rows, padded, columns]: [usize; 3]) -> Result<()> {
        let grid = [padded.div_ceil(TILE), columns.div_ceil(TILE), 1];
        let [rows, padded, columns] = [rows, padded, columns].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.bytes
                .launch(grid, THREADS, &[&from, &to, &rows, &padded, &columns])
        }
    }
}
