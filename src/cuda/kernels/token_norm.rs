//! Launcher of `kernels/token_norm.cu`: RMSNorm of f32 rows for inference.

use candle_core::CudaDevice;

use super::rows::MAX_FEATURES;
use super::{Kernel, Launch, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::model::Activation;

/// Most threads of a block; each has up to [`BY_THREAD`] features.
const MAX_THREADS: usize = 1024;
pub(super) const BY_THREAD: usize = MAX_FEATURES / MAX_THREADS;
/// Features that a thread loads at a time.
const VECTOR: usize = 4;

pub struct TokenNorm {
    add_norm_quantize: Kernel,
    gate_norm_quantize: Kernel,
    add_norm: Kernel,
    eps: f32,
}

/// Rows to be normalised.
#[derive(Clone, Copy, Debug)]
pub struct TokenRows {
    pub rows: usize,
    /// A multiple of 4, at most [`MAX_FEATURES`].
    pub features: usize,
    /// Norm weights, (features,).
    pub norm: DevicePtr<f32>,
}

/// Where int8 codes go.
#[derive(Clone, Copy, Debug)]
pub struct TokenCodes {
    /// (rows, stride), zeros behind the features; on 4 bytes.
    pub codes: DevicePtr<i8>,
    /// (rows,)
    pub scales: DevicePtr<f32>,
    /// A multiple of 4.
    pub stride: usize,
}

impl TokenNorm {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice, eps: f32) -> Result<Self> {
        let module = Module::load(device, fatbin!("token_norm"))?;
        let kernel = |name| module.kernel(name, 0);
        Ok(Self {
            add_norm_quantize: kernel("add_norm_quantize")?,
            gate_norm_quantize: kernel("gate_norm_quantize")?,
            add_norm: kernel("add_norm")?,
            eps,
        })
    }

    /// Adds y, unless it is null, to x, both (rows, features); then the codes of x normalised.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn add_norm_quantize(
        &self,
        x: DevicePtr<f32>,
        y: DevicePtr<f32>,
        of: TokenRows,
        to: TokenCodes,
    ) -> Result<()> {
        let [features, stride] = [of.features, to.stride].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.add_norm_quantize.launch(
                [of.rows, 1, 1],
                threads(to.stride),
                &[
                    &x, &y, &of.norm, &to.codes, &to.scales, &features, &stride, &self.eps,
                ],
            )
        }
    }

    /// Codes of `act(gate) * up` normalised: gate_up (rows, 2 features).
    ///
    /// # Safety
    /// As [`Self::add_norm_quantize`].
    ///
    /// # Errors
    /// As [`Self::add_norm_quantize`].
    pub unsafe fn gate_norm_quantize(
        &self,
        gate_up: DevicePtr<f32>,
        activation: Activation,
        of: TokenRows,
        to: TokenCodes,
    ) -> Result<()> {
        let [features, stride] = [of.features, to.stride].map(|size| size as i32);
        let relu2 = i32::from(activation == Activation::Relu2);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.gate_norm_quantize.launch(
                [of.rows, 1, 1],
                threads(to.stride),
                &[
                    &gate_up, &of.norm, &to.codes, &to.scales, &features, &stride, &self.eps,
                    &relu2,
                ],
            )
        }
    }

    /// Adds y, unless it is null, to x; then x normalised, all (rows, features). May be launched
    /// `overlapped`.
    ///
    /// # Safety
    /// As [`Self::add_norm_quantize`].
    ///
    /// # Errors
    /// As [`Self::add_norm_quantize`].
    pub unsafe fn add_norm(
        &self,
        x: DevicePtr<f32>,
        y: DevicePtr<f32>,
        of: TokenRows,
        normed: DevicePtr<f32>,
        overlapped: bool,
    ) -> Result<()> {
        let features = of.features as i32;
        // SAFETY: the arguments are those of the kernel, which waits before it reads x.
        unsafe {
            self.add_norm.launch_with(
                &Launch {
                    grid: [of.rows, 1, 1],
                    threads: threads(of.features),
                    shared_bytes: 0,
                    cluster: 0,
                    overlapped,
                },
                &[&x, &y, &of.norm, &normed, &features, &self.eps],
            )
        }
    }
}

fn threads(features: usize) -> usize {
    let threads = features.div_ceil(VECTOR).next_multiple_of(32);
    threads.min(MAX_THREADS)
}
