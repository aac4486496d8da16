//! Launchers of `kernels/attention_*.cu`: causal grouped-query attention over qkv (batch, seq,
//! (heads + 2 kv_heads) head_dim), queries and keys rotated. Both versions exist for heads of up to
//! 64 features and of up to 128.

use candle_core::CudaDevice;
use half::bf16;

use super::tensor_map::{Element, TensorMap};
use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::network::Batch;
use crate::cuda::workspace::{AttentionScratch, head_stride};
use crate::model::BitNetConfig;

/// Head dimensions there is an instance for: multiples of 4 up to 112, and 120 and 128.
pub fn takes_head_dim(head_dim: usize) -> bool {
    head_dim.is_multiple_of(4) && (head_dim <= 112 || head_dim == 120 || head_dim == 128)
}

/// Heads of a model.
#[derive(Clone, Copy, Debug)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

pub struct Attention {
    heads: Heads,
    version: Version,
}

enum Version {
    Portable(Portable),
    Hopper(Hopper),
}

/// One layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct Attended {
    /// (batch, seq, heads + 2 kv_heads, head_dim).
    pub qkv: DevicePtr<bf16>,
    /// (batch, seq, heads, head_dim).
    pub out: DevicePtr<bf16>,
    /// (batch, heads, seq).
    pub log_sum_exp: DevicePtr<f32>,
    pub scratch: AttentionScratch,
}

/// Of `out` and of `qkv`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionGradient {
    pub dout: DevicePtr<bf16>,
    pub dqkv: DevicePtr<bf16>,
}

impl Attention {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice, config: &BitNetConfig, hopper: bool) -> Result<Self> {
        let heads = Heads {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim(),
        };
        let version = match hopper {
            true => Version::Hopper(Hopper::load(device, heads)?),
            false => Version::Portable(Portable::load(device, heads)?),
        };
        Ok(Self { heads, version })
    }

    /// `out` and `log_sum_exp` of `qkv`.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn forward(&self, of: &Attended, batch: Batch) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.version {
                Version::Portable(kernels) => kernels.forward(self.heads, of, batch),
                Version::Hopper(kernels) => kernels.forward(self.heads, of, batch),
            }
        }
    }

    /// Every value of `gradient.dqkv`, after [`Self::forward`].
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses a launch.
    pub unsafe fn backward(
        &self,
        of: &Attended,
        gradient: AttentionGradient,
        batch: Batch,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.version {
                Version::Portable(kernels) => kernels.backward(self.heads, of, gradient, batch),
                Version::Hopper(kernels) => kernels.backward(self.heads, of, gradient, batch),
            }
        }
    }
}

impl Heads {
    /// batch, seq, heads, kv_heads, head_dim.
    fn sizes(&self, batch: Batch) -> [i32; 5] {
        [
            batch.rows,
            batch.seq,
            self.heads,
            self.kv_heads,
            self.head_dim,
        ]
        .map(|size| size as i32)
    }

    fn is_narrow(&self) -> bool {
        self.head_dim <= 64
    }
}

/// mma.sync: any chip.
struct Portable {
    forward: Kernel,
    delta: Kernel,
    keys: Kernel,
    queries: Kernel,
    /// Queries that a block of `forward` and one of `queries` handle.
    block_queries: [usize; 2],
}

impl Portable {
    const THREADS: usize = 128;
    const BLOCK_KEYS: usize = 64;

    fn load(device: &CudaDevice, heads: Heads) -> Result<Self> {
        let forward = Module::load(device, fatbin!("attention_forward"))?;
        let backward = Module::load(device, fatbin!("attention_backward"))?;
        let vectors = heads.head_dim.is_multiple_of(8);
        let (width, block_queries, forward_bytes, keys_bytes) = match heads.head_dim {
            ..=64 if vectors => (64, [128, 128], 32768, 33792),
            ..=112 => (112, [128, 64], 65536, 33280),
            _ => (128, [64, 64], 32768, 33280),
        };
        let name = |name| format!("attention_{name}_{width}");
        Ok(Self {
            forward: forward.kernel(&name("forward"), forward_bytes)?,
            delta: backward.kernel("attention_delta", 0)?,
            keys: backward.kernel(&name("backward_kv"), keys_bytes)?,
            queries: backward.kernel(&name("backward_q"), 32768)?,
            block_queries,
        })
    }

    unsafe fn forward(&self, model: Heads, of: &Attended, batch: Batch) -> Result<()> {
        let [rows, seq, heads, kv_heads, head_dim] = &model.sizes(batch);
        let blocks = batch.seq.div_ceil(self.block_queries[0]);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.forward.launch(
                [model.heads, batch.rows, blocks],
                Self::THREADS,
                &[
                    &of.qkv,
                    &of.out,
                    &of.log_sum_exp,
                    rows,
                    seq,
                    heads,
                    kv_heads,
                    head_dim,
                ],
            )
        }
    }

    unsafe fn backward(
        &self,
        model: Heads,
        of: &Attended,
        gradient: AttentionGradient,
        batch: Batch,
    ) -> Result<()> {
        const DELTA_TOKENS: usize = 32;
        const DELTA_THREADS: usize = 256;
        let [rows, seq, heads, kv_heads, head_dim] = &model.sizes(batch);
        let delta = of.scratch.statistics;
        let key_blocks = batch.seq.div_ceil(Self::BLOCK_KEYS);
        let query_blocks = batch.seq.div_ceil(self.block_queries[1]);
        // SAFETY: the arguments are those of the kernels; each writes its own part of dqkv.
        unsafe {
            self.delta.launch(
                [batch.seq.div_ceil(DELTA_TOKENS), batch.rows, 1],
                DELTA_THREADS,
                &[&of.out, &gradient.dout, &delta, seq, heads, head_dim],
            )?;
            for (kernel, first, blocks) in [
                (&self.keys, model.kv_heads, key_blocks),
                (&self.queries, model.heads, query_blocks),
            ] {
                kernel.launch(
                    [first, batch.rows, blocks],
                    Self::THREADS,
                    &[
                        &of.qkv,
                        &gradient.dout,
                        &of.log_sum_exp,
                        &delta,
                        &gradient.dqkv,
                        rows,
                        seq,
                        heads,
                        kv_heads,
                        head_dim,
                    ],
                )?;
            }
        }
        Ok(())
    }
}

/// wgmma and TMA.
struct Hopper {
    /// Makes the copies of which the others read heads that do not begin on 16 bytes.
    align: Kernel,
    forward: Kernel,
    statistics: Kernel,
    keys: Kernel,
    queries: Kernel,
    processors: usize,
    /// Of `forward` and `queries`.
    threads: usize,
}

impl Hopper {
    /// Tokens that a block of `statistics` or `keys` handles.
    const BLOCK_TOKENS: usize = 128;

    fn load(device: &CudaDevice, heads: Heads) -> Result<Self> {
        let forward = Module::load(device, fatbin!("attention_forward_hopper"))?;
        let backward = Module::load(device, fatbin!("attention_backward_hopper"))?;
        let (width, threads, bytes) = match heads.is_narrow() {
            true => (64, 512, [147_584, 150_632, 157_296]),
            false => (128, 384, [180_320, 181_816, 181_328]),
        };
        let name = |name| format!("attention_{name}_hopper_{width}");
        let forward = forward.kernel(&name("forward"), bytes[0])?;
        Ok(Self {
            align: Module::load(device, fatbin!("align_heads"))?.kernel("align_heads", 0)?,
            statistics: backward.kernel("attention_statistics_hopper", 0)?,
            keys: backward.kernel(&name("key_gradients"), bytes[1])?,
            queries: backward.kernel(&name("query_gradients"), bytes[2])?,
            processors: forward.processors()?,
            forward,
            threads,
        })
    }

    /// Heads of each token, by way of `copy` if they do not begin on 16 bytes.
    ///
    /// # Safety
    /// `values` must hold as many heads, `copy` as many of [`head_stride`] features.
    unsafe fn map(
        &self,
        values: DevicePtr<bf16>,
        copy: DevicePtr<bf16>,
        (heads, head_dim): (usize, usize),
        batch: Batch,
    ) -> Result<TensorMap> {
        const ALIGN_THREADS: usize = 256;
        let stride = head_stride(head_dim);
        let mut address = values.address();
        if stride != head_dim {
            let (heads, head_dim) = (heads as i32, head_dim as i32);
            // SAFETY: the arguments are those of the kernel.
            unsafe {
                self.align.launch(
                    [batch.tokens(), 1, 1],
                    ALIGN_THREADS,
                    &[&values, &copy, &heads, &head_dim],
                )?;
            }
            address = copy.address();
        }
        let features = heads * stride;
        let bytes = features * size_of::<bf16>();
        TensorMap::new(
            Element::Bf16,
            address,
            [features, batch.seq, batch.rows],
            &[bytes, bytes * batch.seq],
            [64, 64, 1],
        )
    }

    /// # Safety
    /// As [`Self::map`].
    unsafe fn map_qkv(&self, model: Heads, of: &Attended, batch: Batch) -> Result<TensorMap> {
        let heads = (model.heads + 2 * model.kv_heads, model.head_dim);
        // SAFETY: the caller's promise.
        unsafe { self.map(of.qkv, of.scratch.qkv, heads, batch) }
    }

    unsafe fn forward(&self, model: Heads, of: &Attended, batch: Batch) -> Result<()> {
        let [rows, seq, heads, kv_heads, head_dim] = &model.sizes(batch);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            let qkv = self.map_qkv(model, of, batch)?;
            self.forward.launch(
                [self.processors, 1, 1],
                self.threads,
                &[
                    &qkv,
                    &of.out,
                    &of.log_sum_exp,
                    rows,
                    seq,
                    heads,
                    kv_heads,
                    head_dim,
                ],
            )
        }
    }

    unsafe fn backward(
        &self,
        model: Heads,
        of: &Attended,
        gradient: AttentionGradient,
        batch: Batch,
    ) -> Result<()> {
        const STATISTICS_THREADS: usize = 256;
        const KEY_THREADS: usize = 384;
        let [rows, seq, heads, kv_heads, head_dim] = &model.sizes(batch);
        let AttentionGradient { dout, dqkv } = gradient;
        let statistics = of.scratch.statistics;
        let blocks = batch.seq.div_ceil(Self::BLOCK_TOKENS);
        // SAFETY: the arguments are those of the kernels; each writes its own part of dqkv.
        unsafe {
            let qkv_map = self.map_qkv(model, of, batch)?;
            let dout_heads = (model.heads, model.head_dim);
            let dout_map = self.map(dout, of.scratch.dout, dout_heads, batch)?;
            self.statistics.launch(
                [blocks, model.heads, batch.rows],
                STATISTICS_THREADS,
                &[
                    &of.out,
                    &dout,
                    &of.log_sum_exp,
                    &statistics,
                    seq,
                    heads,
                    head_dim,
                ],
            )?;
            self.keys.launch(
                [blocks, model.kv_heads, batch.rows],
                KEY_THREADS,
                &[
                    &qkv_map,
                    &dout_map,
                    &statistics,
                    &dqkv,
                    seq,
                    heads,
                    kv_heads,
                    head_dim,
                ],
            )?;
            self.queries.launch(
                [self.processors, 1, 1],
                self.threads,
                &[
                    &qkv_map,
                    &dout_map,
                    &statistics,
                    &dqkv,
                    rows,
                    seq,
                    heads,
                    kv_heads,
                    head_dim,
                ],
            )
        }
    }
}
