//! Launcher of `kernels/cached_attention.cu`: attention over a cache of keys and values. Many tokens
//! at a time go to `prompt_attention`.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::bf16;

use super::prompt_attention::{Prompt, PromptAttention};
use super::{Kernel, Launch, Module, address, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::model::BitNetConfig;
use crate::model::ops::{Heads, rope_tables};

const THREADS: usize = 512;
/// Blocks on a multiprocessor: so many parts is the cache cut into where there are few tokens.
const BLOCKS_A_PROCESSOR: usize = 2;

/// Keys of a part, at least.
const MIN_KEYS: i32 = 64;

/// From so many tokens on, tensor cores take less.
const PROMPT_TOKENS: usize = 64;

/// Heads of so many features have kernels.
pub fn takes_head_dim(head_dim: usize) -> bool {
    head_dim.is_multiple_of(4) && head_dim <= 128
}

pub struct CachedAttention {
    append: Kernel,
    attend: Kernel,
    prompt: Option<PromptAttention>,
    heads: Heads,
    /// Lanes that share a key, and query heads that a block takes.
    lanes: usize,
    query_heads: usize,
    /// Blocks that the device holds.
    blocks: usize,
    capacity: usize,
    /// (max_seq_len, head_dim / 2)
    cos: CudaSlice<f32>,
    sin: CudaSlice<f32>,
    overlapped: bool,
}

/// Keys and values of a layer, each (kv_heads, max_seq_len, head_dim).
#[derive(Clone, Copy, Debug)]
pub struct LayerCache {
    pub keys: DevicePtr<f32>,
    pub values: DevicePtr<f32>,
}

/// What all layers share.
#[derive(Clone, Copy, Debug)]
pub struct AttentionState {
    /// Tokens before, one value.
    pub position: DevicePtr<u32>,
    /// As many values as [`CachedAttention::scratch`] says.
    pub parts: DevicePtr<f32>,
    pub pairs: DevicePtr<bf16>,
    /// As many zeros as it says.
    pub done: DevicePtr<u32>,
}

/// Values of the addresses in [`AttentionState`].
#[derive(Clone, Copy, Debug)]
pub struct ScratchSizes {
    pub parts: usize,
    pub pairs: usize,
    pub done: usize,
}

impl CachedAttention {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels or memory runs out.
    pub fn load(device: &CudaDevice, config: &BitNetConfig) -> Result<Self> {
        let module = Module::load(device, fatbin!("cached_attention"))?;
        let heads = Heads::of(config);
        let lanes = (heads.head_dim / 4).next_power_of_two().max(8);
        let query_heads = (heads.heads / heads.kv_heads).next_power_of_two().min(4);
        let attend = module.kernel(&format!("cached_attention_{lanes}_{query_heads}"), 0)?;
        let [cos, sin] = rope_tables(heads.head_dim, config.max_seq_len, config.rope_theta);
        let stream = device.cuda_stream();
        let (major, _) = stream.context().compute_capability().w()?;
        Ok(Self {
            append: module.kernel("append_to_cache", 0)?,
            blocks: BLOCKS_A_PROCESSOR * attend.processors()?,
            attend,
            prompt: PromptAttention::load(device, heads, config.max_seq_len)?,
            heads,
            lanes,
            query_heads,
            capacity: config.max_seq_len,
            cos: stream.clone_htod(&cos).w()?,
            sin: stream.clone_htod(&sin).w()?,
            overlapped: major >= 9,
        })
    }

    /// For up to `tokens` tokens at a time.
    pub fn scratch(&self, tokens: usize) -> ScratchSizes {
        let (few, pairs) = match &self.prompt {
            Some(prompt) => (tokens.min(PROMPT_TOKENS), prompt.scratch(tokens)),
            None => (tokens, 0),
        };
        let places = few * self.shares();
        ScratchSizes {
            parts: (self.blocks + places) * self.query_heads * (4 * self.lanes + 4),
            pairs,
            done: places,
        }
    }

    /// Blocks that share out the query heads.
    fn shares(&self) -> usize {
        let Heads {
            heads, kv_heads, ..
        } = self.heads;
        kv_heads * (heads / kv_heads).div_ceil(self.query_heads)
    }

    /// qkv (1, qkv_features) of the token after those of the cache, which takes it in
    /// -> out (1, heads * head_dim). May start while earlier kernels still run.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say, and `position` be below max_seq_len.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn token(
        &self,
        qkv: DevicePtr<f32>,
        cache: LayerCache,
        state: AttentionState,
        out: DevicePtr<f32>,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.attend(qkv, cache, state, out, 1, true) }
    }

    /// The same of several tokens after the `before` first, one after the other.
    ///
    /// # Safety
    /// As [`Self::token`], with as many positions as tokens; `position` must hold `before`.
    ///
    /// # Errors
    /// As [`Self::token`].
    pub unsafe fn tokens(
        &self,
        qkv: DevicePtr<f32>,
        cache: LayerCache,
        state: AttentionState,
        out: DevicePtr<f32>,
        [before, tokens]: [usize; 2],
    ) -> Result<()> {
        let (cos, sin) = (address(&self.cos), address(&self.sin));
        let [heads, kv_heads, head_dim, capacity] = self.sizes();
        if let Some(kernels) = &self.prompt
            && tokens >= PROMPT_TOKENS
        {
            let prompt = Prompt {
                qkv,
                tokens,
                before,
                cos,
                sin,
            };
            // SAFETY: the caller's promise.
            return unsafe { kernels.run(prompt, cache, state.pairs, out) };
        }
        // SAFETY: the arguments are those of the kernel; the rest is the caller's promise.
        unsafe {
            self.append.launch(
                [tokens, 1, 1],
                THREADS,
                &[
                    &qkv,
                    &cos,
                    &sin,
                    &cache.keys,
                    &cache.values,
                    &state.position,
                    &heads,
                    &kv_heads,
                    &head_dim,
                    &capacity,
                ],
            )?;
            self.attend(qkv, cache, state, out, tokens, false)
        }
    }

    unsafe fn attend(
        &self,
        qkv: DevicePtr<f32>,
        cache: LayerCache,
        state: AttentionState,
        out: DevicePtr<f32>,
        tokens: usize,
        appends: bool,
    ) -> Result<()> {
        let (cos, sin) = (address(&self.cos), address(&self.sin));
        let [heads, kv_heads, head_dim, capacity] = self.sizes();
        let shares = self.shares();
        let parts = (self.blocks / (tokens * shares)).max(1);
        // SAFETY: the arguments are those of the kernel; the rest is the caller's promise.
        unsafe {
            self.attend.launch_with(
                &Launch {
                    grid: [parts, shares, tokens],
                    threads: THREADS,
                    shared_bytes: 0,
                    cluster: 0,
                    overlapped: self.overlapped && appends,
                },
                &[
                    &qkv,
                    &cos,
                    &sin,
                    &cache.keys,
                    &cache.values,
                    &out,
                    &state.parts,
                    &state.done,
                    &state.position,
                    &heads,
                    &kv_heads,
                    &head_dim,
                    &capacity,
                    &MIN_KEYS,
                    &i32::from(appends),
                ],
            )
        }
    }

    fn sizes(&self) -> [i32; 4] {
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        [heads, kv_heads, head_dim, self.capacity].map(|size| size as i32)
    }
}
