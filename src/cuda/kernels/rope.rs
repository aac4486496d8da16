//! Launcher of `kernels/rope.cu`: rotary position embedding in place.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::bf16;

use super::bit_linear::Projection;
use super::{Kernel, Module, address, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::network::Batch;
use crate::cuda::workspace::QuantizedGradient;
use crate::model::BitNetConfig;
use crate::model::ops::rope_tables;

const THREADS: usize = 128;
/// More blocks on a multiprocessor only get in each other's way.
const BLOCKS_A_PROCESSOR: usize = 4;

pub struct Rope {
    kernel: Kernel,
    blocks: usize,
    back_quantize: Kernel,
    back_threads: usize,
    back_blocks: usize,
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
        // Other head dimensions go through shared memory, a row at a time, two rows deep.
        let shared_bytes = match head_dim.is_power_of_two() && (16..=256).contains(&head_dim) {
            true => 0,
            false => 32 * (rotated_heads * head_dim).div_ceil(8),
        };
        let kernel = module.kernel("rope", shared_bytes)?;
        let heads = config.heads + 2 * config.kv_heads;
        let qkv_features = heads * head_dim;
        let (back_threads, back_bytes) = match head_dim.is_multiple_of(16) {
            true => (qkv_features / 16, 0),
            false => (head_dim / 4 * heads.div_ceil(4), 2 * qkv_features),
        };
        let back_threads = back_threads.next_multiple_of(32);
        let back_quantize = module.kernel("rope_backward_quantize", back_bytes)?;
        let wanted = BLOCKS_A_PROCESSOR * kernel.processors()?;
        Ok(Self {
            blocks: kernel.resident_blocks(THREADS)?.min(wanted),
            kernel,
            back_blocks: back_quantize.resident_blocks(back_threads)?,
            back_quantize,
            back_threads,
            cos: stream.clone_htod(&cos).w()?,
            sin: stream.clone_htod(&sin).w()?,
            rotated_heads,
            qkv_features,
            head_dim,
        })
    }

    /// The gradients dqkv (rows * seq, qkv_features) by rotated queries and keys turned back, all of
    /// them times the b of `projection`, in int8 codes and in e4m3: of queries and keys, and of values.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn rotate_back_quantize(
        &self,
        dqkv: DevicePtr<bf16>,
        projection: &Projection,
        [queries_keys, values]: [QuantizedGradient; 2],
        batch: Batch,
    ) -> Result<()> {
        let cos = DevicePtr::<f32>::new(address(&self.cos));
        let sin = DevicePtr::<f32>::new(address(&self.sin));
        let [q_features, k_end] = projection.ends;
        let [rows, seq, q, kv, head_dim] = [
            batch.tokens(),
            batch.seq,
            q_features,
            k_end - q_features,
            self.head_dim,
        ]
        .map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.back_quantize.launch(
                [self.back_blocks, 1, 1],
                self.back_threads,
                &[
                    &dqkv,
                    &cos,
                    &sin,
                    &queries_keys.codes,
                    &queries_keys.fp8,
                    &queries_keys.scale,
                    &values.codes,
                    &values.fp8,
                    &values.scale,
                    &projection.scales,
                    &rows,
                    &seq,
                    &q,
                    &kv,
                    &head_dim,
                ],
            )
        }
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
