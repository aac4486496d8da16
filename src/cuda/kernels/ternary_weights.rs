//! Launcher of `kernels/ternary_weights.cu`: master weights to ternary codes and their scales.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::bf16;

use super::bit_linear::Projection;
use super::{Kernel, Module, address, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;

const THREADS: usize = 256;
/// Weights that a block handles, as in the kernel.
const BLOCK_WEIGHTS: usize = 1 << 14;
const EXPANDED_BY_BLOCK: usize = 2048;

/// One f32 weight, and where its codes start in the common buffer.
#[derive(Clone, Copy, Debug)]
pub struct TernaryTensor {
    pub weights: DevicePtr<f32>,
    pub count: usize,
    pub codes: usize,
}

/// The quantiser of all projections of a model.
pub struct TernaryWeights {
    absmean_partial: Kernel,
    absmean_scales: Kernel,
    ternary_codes: Kernel,
    expand_codes: Kernel,
    /// Rows of weights, count, codes, first_block.
    table: CudaSlice<u64>,
    partials: CudaSlice<f64>,
    tensors: usize,
    blocks: usize,
}

impl TernaryWeights {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels or memory runs out.
    pub fn load(device: &CudaDevice, tensors: &[TernaryTensor]) -> Result<Self> {
        let module = Module::load(device, fatbin!("ternary_weights"))?;
        let (mut table, mut blocks) = (Vec::new(), 0);
        for tensor in tensors {
            let (count, codes) = (tensor.count as u64, tensor.codes as u64);
            table.extend([tensor.weights.address(), count, codes, blocks as u64]);
            blocks += tensor.count.div_ceil(BLOCK_WEIGHTS);
        }
        let stream = device.cuda_stream();
        Ok(Self {
            absmean_partial: module.kernel("absmean_partial", 0)?,
            absmean_scales: module.kernel("absmean_scales", 0)?,
            ternary_codes: module.kernel("ternary_codes", 0)?,
            expand_codes: module.kernel("expand_codes", 0)?,
            table: stream.clone_htod(&table).w()?,
            partials: stream.alloc_zeros(blocks).w()?,
            tensors: tensors.len(),
            blocks,
        })
    }

    /// b = max(mean |W|, 1e-5) of every tensor into `scales`, and clamp(round(W / b), -1, 1) into
    /// `codes`.
    ///
    /// # Safety
    /// The tensors given to `load` must still be there, and the outputs hold all of them.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses a launch.
    pub unsafe fn quantize(&self, scales: DevicePtr<f32>, codes: DevicePtr<i8>) -> Result<()> {
        let table = DevicePtr::<u64>::new(address(&self.table));
        let partials = DevicePtr::<f64>::new(address(&self.partials));
        let tensors = self.tensors as i32;
        let blocks = [self.blocks, 1, 1];
        // SAFETY: the table describes the tensors as the kernels take them.
        unsafe {
            self.absmean_partial
                .launch(blocks, THREADS, &[&table, &tensors, &partials])?;
            self.absmean_scales.launch(
                [self.tensors, 1, 1],
                THREADS,
                &[&table, &partials, &scales],
            )?;
            self.ternary_codes
                .launch(blocks, THREADS, &[&table, &tensors, &scales, &codes])
        }
    }

    /// wq * b as bf16, (n, k).
    ///
    /// # Safety
    /// `out` must hold n * k values.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn dequantize(&self, w: &Projection, out: DevicePtr<bf16>) -> Result<()> {
        let blocks = (w.n * w.k).div_ceil(EXPANDED_BY_BLOCK);
        let [end0, end1] = w.ends.map(|end| end as i32);
        let (n, k) = (w.n as i32, w.k as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.expand_codes.launch(
                [blocks, 1, 1],
                THREADS,
                &[&w.codes, &w.scales, &out, &n, &k, &end0, &end1],
            )
        }
    }
}
