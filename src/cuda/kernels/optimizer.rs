//! Launchers of `kernels/grad_norm.cu` and `kernels/adamw.cu`, which share a table of all weights.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};

use super::gemm::Float;
use super::{Kernel, Module, address, fatbin};
use crate::Result;
use crate::config::StateDtype;
use crate::cuda::DevicePtr;

const NORM_THREADS: usize = 256;
const ADAMW_THREADS: usize = 128;
/// Elements of one weight that a block handles, as in `kernels/optimizer.cuh`.
const BLOCK: usize = 16384;

/// One weight as the optimizer sees it: addresses in device memory, and `count` values each.
#[derive(Clone, Copy, Debug)]
pub struct OptimizerTensor {
    pub weights: DevicePtr<f32>,
    pub gradient: u64,
    pub gradient_dtype: Float,
    pub moments: [u64; 2],
    /// Maxima of 8-bit moments; null for others.
    pub maxima: [DevicePtr<f32>; 2],
    pub count: usize,
    pub decay: bool,
    /// The next step's first product replaces the gradient, so that it need not be zeroed.
    pub keep_gradient: bool,
}

/// `AdamWStep` of `kernels/adamw.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AdamWStep {
    pub lr: f32,
    pub weight_decay: f32,
    pub correction1: f32,
    pub correction2: f32,
    /// On every gradient, clipping included.
    pub factor: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// Of the rounding of bf16 and 8-bit moments.
    pub seed: u32,
}

// SAFETY: plain numbers in C layout.
unsafe impl DeviceRepr for AdamWStep {}

/// The blocks of tensors that share a gradient format.
struct Group {
    adamw: Kernel,
    first_block: usize,
    blocks: usize,
}

pub struct Optimizer {
    grad_norm: Kernel,
    grad_norm_finish: Kernel,
    groups: Vec<Group>,
    table: CudaSlice<u64>,
    tensor_of_block: CudaSlice<u32>,
    norm_partials: CudaSlice<f32>,
    norm: CudaSlice<f64>,
}

impl Optimizer {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels or memory runs out.
    pub fn load(
        device: &CudaDevice,
        tensors: &[OptimizerTensor],
        state: StateDtype,
    ) -> Result<Self> {
        let adamw = Module::load(device, fatbin!("adamw"))?;
        let norm = Module::load(device, fatbin!("grad_norm"))?;
        let state = match state {
            StateDtype::F32 => "f32",
            StateDtype::Bf16 => "bf16",
            StateDtype::Int8 => "8bit",
        };
        let (mut table, mut tensor_of_block, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        let mut index = 0u32;
        for (dtype, name) in [(Float::F32, "f32"), (Float::Bf16, "bf16")] {
            let first_block = tensor_of_block.len();
            for tensor in tensors.iter().filter(|t| t.gradient_dtype == dtype) {
                table.extend(row(tensor, tensor_of_block.len()));
                let blocks = tensor.count.div_ceil(BLOCK);
                tensor_of_block.extend(std::iter::repeat_n(index, blocks));
                index += 1;
            }
            let blocks = tensor_of_block.len() - first_block;
            if blocks > 0 {
                groups.push(Group {
                    adamw: adamw.kernel(&format!("adamw_{name}_{state}"), 0)?,
                    first_block,
                    blocks,
                });
            }
        }
        let stream = device.cuda_stream();
        Ok(Self {
            grad_norm: norm.kernel("grad_norm", 0)?,
            grad_norm_finish: norm.kernel("grad_norm_finish", 0)?,
            groups,
            table: stream.clone_htod(&table).w()?,
            norm_partials: stream.alloc_zeros(tensor_of_block.len()).w()?,
            norm: stream.alloc_zeros(1).w()?,
            tensor_of_block: stream.clone_htod(&tensor_of_block).w()?,
        })
    }

    /// Norm of all gradients; waits for it.
    ///
    /// # Safety
    /// The tensors given to `load` must still be there.
    ///
    /// # Errors
    /// `Tensor` if a kernel failed.
    pub unsafe fn grad_norm(&self) -> Result<f64> {
        let table = DevicePtr::<u64>::new(address(&self.table));
        let tensor_of_block = DevicePtr::<u32>::new(address(&self.tensor_of_block));
        let partials = DevicePtr::<f32>::new(address(&self.norm_partials));
        let norm = DevicePtr::<f64>::new(address(&self.norm));
        let blocks = self.tensor_of_block.len();
        // SAFETY: the table describes the tensors as the kernels take them.
        unsafe {
            self.grad_norm.launch(
                [blocks, 1, 1],
                NORM_THREADS,
                &[&table, &tensor_of_block, &partials],
            )?;
            self.grad_norm_finish
                .launch([1, 1, 1], 1024, &[&partials, &(blocks as i32), &norm])?;
        }
        let stream = self.norm.stream();
        let mut norm = [0.0];
        stream.memcpy_dtoh(&self.norm, &mut norm).w()?;
        stream.synchronize().w()?;
        Ok(norm[0])
    }

    /// Updates every weight as `step` says and zeroes the gradients.
    ///
    /// # Safety
    /// The tensors given to `load` must still be there.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses a launch.
    pub unsafe fn adamw(&self, step: AdamWStep) -> Result<()> {
        let table = DevicePtr::<u64>::new(address(&self.table));
        let tensor_of_block = DevicePtr::<u32>::new(address(&self.tensor_of_block));
        for group in &self.groups {
            let first_block = group.first_block as i32;
            // SAFETY: the table describes the tensors as the kernel takes them.
            unsafe {
                group.adamw.launch(
                    [group.blocks, 1, 1],
                    ADAMW_THREADS,
                    &[&table, &tensor_of_block, &first_block, &step],
                )?;
            }
        }
        Ok(())
    }
}

/// `OptimizerTensor` of `kernels/optimizer.cuh`.
fn row(tensor: &OptimizerTensor, first_block: usize) -> [u64; 8] {
    const DECAY: u64 = 1;
    const BF16_GRADIENT: u64 = 2;
    const KEEP_GRADIENT: u64 = 4;
    let flag = |set: bool, flag| if set { flag } else { 0 };
    let flags = flag(tensor.decay, DECAY)
        | flag(tensor.gradient_dtype == Float::Bf16, BF16_GRADIENT)
        | flag(tensor.keep_gradient, KEEP_GRADIENT);
    let [m, v] = tensor.moments;
    let [m_max, v_max] = tensor.maxima.map(DevicePtr::address);
    [
        tensor.weights.address(),
        tensor.gradient,
        m,
        v,
        m_max,
        v_max,
        tensor.count as u64,
        first_block as u64 | flags << 32,
    ]
}
