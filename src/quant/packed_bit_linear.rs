//! A BitLinear layer over packed weights, as a candle operation for inference on any device.

use std::fmt;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};

use super::PackedTernary;
use super::activation::quantize_tokens;
use super::matmul::{TernaryMatmul, Threads};
use super::ternary::{absmean, ternary_codes};
#[cfg(feature = "cuda")]
use crate::cuda::bit_linear::{CudaBackend, CudaBitLinear};
use crate::{Error, Result};

/// How a device multiplies: one for all layers of a model.
pub enum Backend {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<CudaBackend>),
}

/// One BitLinear, or several that share their input side by side: x (..., K) -> (..., N), with int8
/// codes of x a token, ternary weights of 2 bits and exact sums. It has no gradient.
pub struct PackedBitLinear {
    weights: Weights,
}

enum Weights {
    Cpu {
        packed: PackedTernary,
        scales: Vec<f32>,
    },
    #[cfg(feature = "cuda")]
    Cuda(CudaBitLinear),
}

impl Backend {
    /// # Errors
    /// `Tensor` if a GPU refuses the kernels; `Usage` on a device that is neither a CPU nor a GPU of
    /// NVIDIA.
    pub fn new(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(CudaBackend::new(device)?.into())),
            _ => Err(Error::usage(
                "packed weights run on a CPU or an NVIDIA GPU only",
            )),
        }
    }

    /// Quantises master weights (N_i, K) as BitLinear does, and packs them.
    ///
    /// # Errors
    /// `Tensor` on weights that are no f32 matrices of one width, or if memory runs out.
    pub fn quantize(&self, masters: &[&Tensor]) -> Result<PackedBitLinear> {
        let (mut codes, mut scales, mut k) = (Vec::new(), Vec::new(), 0);
        for master in masters {
            let (rows, columns) = master.dims2()?;
            let values = master.flatten_all()?.to_vec1::<f32>()?;
            let b = absmean(&values);
            codes.extend(ternary_codes(&values, b));
            scales.extend(std::iter::repeat_n(b, rows));
            k = columns;
        }
        self.load(PackedTernary::pack(&codes, scales.len(), k)?, scales)
    }

    /// Packed weights (N, K) with a scale for each row, as an operation on the device.
    ///
    /// # Errors
    /// `Usage` if there is not one scale a row; `Tensor` if memory runs out.
    pub fn load(&self, packed: PackedTernary, scales: Vec<f32>) -> Result<PackedBitLinear> {
        if scales.len() != packed.rows() {
            return Err(Error::usage(format!(
                "{} weight scales do not fit {} weight rows",
                scales.len(),
                packed.rows()
            )));
        }
        let weights = match self {
            Self::Cpu => Weights::Cpu { packed, scales },
            #[cfg(feature = "cuda")]
            Self::Cuda(backend) => Weights::Cuda(CudaBitLinear::new(backend, &packed, &scales)?),
        };
        Ok(PackedBitLinear { weights })
    }
}

impl PackedBitLinear {
    /// x (..., K) -> (..., N), f32, on a GPU also bf16.
    ///
    /// # Errors
    /// Another type, another width or another device than the weights'.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.contiguous()?.apply_op1_no_bwd(self)
    }
}

/// Tokens of x (..., k), which must have no gaps, and the shape (..., n) of the result.
pub(crate) fn output_shape(x: &Layout, k: usize, n: usize) -> candle_core::Result<(usize, Shape)> {
    if !x.is_contiguous() {
        candle_core::bail!("activations of shape {:?} are not contiguous", x.dims());
    }
    let mut dims = x.dims().to_vec();
    match dims.last_mut() {
        Some(last) if *last == k => *last = n,
        _ => candle_core::bail!(
            "activations of shape {:?} do not end in {k} features",
            x.dims()
        ),
    }
    Ok((x.shape().elem_count() / k, Shape::from(dims)))
}

impl CustomOp1 for PackedBitLinear {
    fn name(&self) -> &'static str {
        "packed-bit-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (packed, scales) = match &self.weights {
            Weights::Cpu { packed, scales } => (packed, scales),
            #[cfg(feature = "cuda")]
            Weights::Cuda(_) => {
                candle_core::bail!("the weights are on a GPU, the activations are not")
            }
        };
        let (tokens, shape) = output_shape(layout, packed.cols(), packed.rows())?;
        let x = &x.as_slice::<f32>()?[layout.start_offset()..][..tokens * packed.cols()];
        let (codes, token_scales) = quantize_tokens(x, packed.cols());
        let mut y = vec![0f32; tokens * packed.rows()];
        TernaryMatmul::new(Threads::All)
            .scaled(&mut y, &codes, &token_scales, packed, scales)
            .map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(y), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        match &self.weights {
            Weights::Cuda(weights) => weights.forward(x, layout).map_err(candle_core::Error::wrap),
            Weights::Cpu { .. } => {
                candle_core::bail!("the activations are on a GPU, the weights are not")
            }
        }
    }
}

impl fmt::Debug for PackedBitLinear {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("PackedBitLinear")
    }
}
