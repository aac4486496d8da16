//! Launcher of `kernels/quantize_tokens.cu`: int8 codes of activations.

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaViewMut, DevicePtrMut};
use half::bf16;

use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;

const THREADS: usize = 256;

pub struct QuantizeTokens {
    device: CudaDevice,
    f32: Kernel,
    bf16: Kernel,
}

/// Activations of either type.
#[derive(Clone, Copy, Debug)]
pub enum Activations {
    F32(DevicePtr<f32>),
    Bf16(DevicePtr<bf16>),
}

impl QuantizeTokens {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("quantize_tokens"))?;
        Ok(Self {
            device: device.clone(),
            f32: module.kernel("quantize_tokens_f32", 0)?,
            bf16: module.kernel("quantize_tokens_bf16", 0)?,
        })
    }

    /// codes (tokens, stride) = round(x (tokens, k) / scale), zeros from k on, with a scale
    /// max(absmax, 1e-5) / 127 for each token; `stride` is a multiple of 4, at least k.
    ///
    /// # Safety
    /// `x` must hold tokens * k values.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn quantize(
        &self,
        x: Activations,
        codes: &mut CudaViewMut<i8>,
        scales: &mut CudaViewMut<f32>,
        [tokens, k, stride]: [usize; 3],
    ) -> Result<()> {
        assert!(codes.len() >= tokens * stride && scales.len() >= tokens && stride >= k);
        let stream = self.device.cuda_stream();
        let ((codes, _codes), (scales, _scales)) = (
            codes.device_ptr_mut(&stream),
            scales.device_ptr_mut(&stream),
        );
        let (k, stride) = (k as i32, stride as i32);
        let (kernel, x) = match x {
            Activations::F32(x) => (&self.f32, x.address()),
            Activations::Bf16(x) => (&self.bf16, x.address()),
        };
        // SAFETY: the arguments are those of the kernels; the lengths were checked, or promised.
        unsafe { kernel.launch([tokens, 1, 1], THREADS, &[&x, &codes, &scales, &k, &stride]) }
    }
}
