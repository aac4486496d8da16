//! Launcher of `kernels/rope.cu`: rotary position embedding in place.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::bf16;

use super::{Kernel, Module, address, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::network::Batch;
use crate::model::BitNetConfig;
use crate::model::ops::rope_tables;

const THREADS: usize = 128;
/// A warp takes a row.
const WARPS: usize = THREADS / 32;

pub struct Rope {
    kernel: Kernel,
    blocks: usize,
    /// (max_seq_len, head_dim / 2).
    cos: CudaSlice<f32>,
    sin: CudaSlice<f32>,
    /// Queries and keys.
    rotated_heads: usize,
    qkv_features: usize,
    head_dim: usize,
}

impl Rope {
    /// # Errors
    /// `Tensor` if the driver refuses the kernel or memory runs out.
    pub fn load(device: &CudaDevice, config: &BitNetConfig) -> Result<Self> {
        let module = Module::load(device, fatbin!("rope"))?;
        let head_dim = config.head_dim();
        let [cos, sin] = rope_tables(head_dim, config.max_seq_len, config.rope_theta);
        let stream = device.cuda_stream();
        let rotated_heads = config.heads + config.kv_heads;
        let row_bytes = 16 * (rotated_heads * head_dim).div_ceil(8);
        let kernel = module.kernel("rope", WARPS * row_bytes)?;
        Ok(Self {
            blocks: kernel.resident_blocks(THREADS)?,
            kernel,
            cos: stream.clone_htod(&cos).w()?,
            sin: stream.clone_htod(&sin).w()?,
            rotated_heads,
            qkv_features: (config.heads + 2 * config.kv_heads) * head_dim,
            head_dim,
        })
    }

    /// Rotates the queries and keys of qkv (rows * seq, qkv_features) by their position, or with
    /// `back` their gradients by its negative.
    ///
    /// # Safety
    /// The address must hold what the shape says.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn rotate(&self, qkv: DevicePtr<bf16>, batch: Batch, back: bool) -> Result<()> {
        let cos = DevicePtr::<f32>::new(address(&self.cos));
        let sin = DevicePtr::<f32>::new(address(&self.sin));
        let direction = if back { -1f32 } else { 1f32 };
        let [rows, seq, heads, features, head_dim] = [
            batch.tokens(),
            batch.seq,
            self.rotated_heads,
            self.qkv_features,
            self.head_dim,
        ]
        .map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.kernel.launch(
                [self.blocks, 1, 1],
                THREADS,
                &[
                    &qkv, &cos, &sin, &rows, &seq, &heads, &features, &head_dim, &direction,
                ],
            )
        }
    }
}
