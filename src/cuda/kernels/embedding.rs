//! Launcher of `kernels/embedding.cu`, and the tables its backward pass reads.

use candle_core::CudaDevice;
use half::bf16;

use super::gemm::Float;
use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::network::Gradient;
use crate::cuda::token_groups::TokenGroups;

const THREADS: usize = 256;
const FINISH_THREADS: usize = 512;
const TOKENS_BY_BLOCK: usize = 8;

pub struct Embedding {
    forward: Kernel,
    backward_f32: [Kernel; 2],
    backward_bf16: [Kernel; 2],
    /// Blocks of the two passes.
    blocks: [usize; 2],
    hidden: usize,
}

impl Embedding {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice, hidden: usize) -> Result<Self> {
        let module = Module::load(device, fatbin!("embedding"))?;
        let forward = module.kernel("embed", 0)?;
        let processors = forward.processors()?;
        let kernel = |name| module.kernel(name, 0);
        Ok(Self {
            forward,
            backward_f32: [
                kernel("embed_backward_f32")?,
                kernel("embed_backward_finish_f32")?,
            ],
            backward_bf16: [
                kernel("embed_backward_bf16")?,
                kernel("embed_backward_finish_bf16")?,
            ],
            blocks: [16 * processors, 2 * processors],
            hidden,
        })
    }

    /// x (tokens, hidden) = rows `ids` of an f32 table, rounded.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say, ids rows of the table.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn forward(
        &self,
        ids: DevicePtr<u32>,
        table: DevicePtr<f32>,
        x: DevicePtr<bf16>,
        tokens: usize,
    ) -> Result<()> {
        let blocks = tokens.div_ceil(TOKENS_BY_BLOCK);
        let (tokens, hidden) = (tokens as i32, self.hidden as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.forward.launch(
                [blocks, 1, 1],
                THREADS,
                &[&ids, &table, &x, &tokens, &hidden],
            )
        }
    }

    /// Adds dx (tokens, hidden) to the rows of the table's gradient that `groups` names.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses a launch.
    pub unsafe fn backward(
        &self,
        dx: DevicePtr<bf16>,
        groups: &TokenGroups<DevicePtr<u32>>,
        gradient: Gradient,
        partials: DevicePtr<f32>,
    ) -> Result<()> {
        let [pieces, finish] = match gradient.dtype {
            Float::F32 => &self.backward_f32,
            Float::Bf16 => &self.backward_bf16,
        };
        let (table, hidden) = (gradient.address, self.hidden as i32);
        let [blocks, finish_blocks] = self.blocks;
        // SAFETY: the arguments are those of the kernels.
        unsafe {
            pieces.launch(
                [blocks, 1, 1],
                THREADS,
                &[
                    &dx,
                    &groups.order,
                    &groups.pieces,
                    &groups.counts,
                    &table,
                    &partials,
                    &hidden,
                ],
            )?;
            finish.launch(
                [finish_blocks, 1, 1],
                FINISH_THREADS,
                &[&groups.split, &groups.counts, &partials, &table, &hidden],
            )
        }
    }
}
