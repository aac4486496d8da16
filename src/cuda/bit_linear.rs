//! A BitLinear layer over packed weights on a GPU, for inference: codes of the activations, and the
//! product.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Layout, Shape};
use half::bf16;

use super::DevicePtr;
use super::kernels::quantize_tokens::{Activations, QuantizeTokens};
use super::kernels::ternary_matmul::Scaled;
use super::kernels::ternary_tiles::K_STEP;
use super::kernels::{CudaPackedTernary, TernaryMatmul, TernaryTiles, address};
use crate::config::Kernels;
use crate::quant::{PackedTernary, output_shape};
use crate::{Error, Result};

/// The kernels of one GPU.
pub struct CudaBackend {
    device: CudaDevice,
    tiles: TernaryTiles,
    quantize: QuantizeTokens,
    matmul: TernaryMatmul,
}

impl CudaBackend {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            tiles: TernaryTiles::load(device)?,
            quantize: QuantizeTokens::load(device)?,
            matmul: TernaryMatmul::load(device, Kernels::Auto)?,
        })
    }
}

pub struct CudaBitLinear {
    backend: Arc<CudaBackend>,
    weights: CudaPackedTernary,
    /// Features in. The weights have columns of zeros beyond them, up to what the kernels take.
    k: usize,
}

impl CudaBitLinear {
    /// # Errors
    /// `Usage` if the shape is beyond the kernels' limits; `Tensor` if memory runs out.
    pub fn new(backend: &Arc<CudaBackend>, packed: &PackedTernary, scales: &[f32]) -> Result<Self> {
        let k = packed.cols();
        let padded = packed.padded(k.next_multiple_of(K_STEP));
        Ok(Self {
            weights: backend.tiles.upload(&padded, scales)?,
            backend: Arc::clone(backend),
            k,
        })
    }

    /// x (..., k) f32 or bf16, contiguous -> (..., n) of the same type.
    ///
    /// # Errors
    /// Another type or width; `Tensor` if the driver refuses or memory runs out.
    pub fn forward(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (tokens, shape) = output_shape(layout, self.k, self.weights.rows())?;
        let start = layout.start_offset();
        let slice = match &x.slice {
            CudaStorageSlice::F32(x) => {
                let x = Activations::F32(DevicePtr::new(address(x)).offset(start));
                CudaStorageSlice::F32(self.multiply(x, tokens)?)
            }
            CudaStorageSlice::BF16(x) => {
                let x = Activations::Bf16(DevicePtr::<bf16>::new(address(x)).offset(start));
                CudaStorageSlice::BF16(self.multiply(x, tokens)?)
            }
            _ => return Err(Error::usage("a BitLinear takes f32 or bf16 activations")),
        };
        let device = self.backend.device.clone();
        Ok((CudaStorage { slice, device }, shape))
    }

    fn multiply<T: Scaled>(&self, x: Activations, tokens: usize) -> Result<CudaSlice<T>> {
        let (n, stride) = (self.weights.rows(), self.weights.cols());
        let stream = self.backend.device.cuda_stream();
        // SAFETY: the kernels write all of them before anything reads them.
        let (mut codes, mut scales, mut y) = unsafe {
            (
                stream.alloc::<i8>(tokens * stride).w()?,
                stream.alloc::<f32>(tokens).w()?,
                stream.alloc(tokens * n).w()?,
            )
        };
        // SAFETY: x holds the values that its layout says.
        unsafe {
            let (codes, scales) = (&mut codes.as_view_mut(), &mut scales.as_view_mut());
            let shape = [tokens, self.k, stride];
            self.backend.quantize.quantize(x, codes, scales, shape)?
        };
        let (codes, scales) = (codes.as_view(), scales.as_view());
        self.backend
            .matmul
            .scaled(&codes, &scales, tokens, &self.weights, &mut y.as_view_mut())?;
        Ok(y)
    }
}
