//! Launcher of `kernels/prompt_attention.cu`: attention of many tokens over a cache.

use candle_core::CudaDevice;
use half::bf16;

use super::cached_attention::LayerCache;
use super::{Kernel, Module, attention, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::model::ops::Heads;

const THREADS: usize = 128;
/// Queries of a block.
const QUERIES: usize = 64;
/// Tiles hold vectors of so many features.
const VECTOR: usize = 8;

pub struct PromptAttention {
    pairs: Kernel,
    attend: Kernel,
    heads: Heads,
    capacity: usize,
}

/// Tokens after those of the cache.
#[derive(Clone, Copy, Debug)]
pub struct Prompt {
    /// (tokens, qkv_features)
    pub qkv: DevicePtr<f32>,
    pub tokens: usize,
    /// Tokens of the cache.
    pub before: usize,
    /// Of rotations, each (max_seq_len, head_dim / 2).
    pub cos: u64,
    pub sin: u64,
}

impl PromptAttention {
    /// `None` for a head dimension without a kernel.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice, heads: Heads, capacity: usize) -> Result<Option<Self>> {
        if !attention::takes_head_dim(heads.head_dim) {
            return Ok(None);
        }
        let module = Module::load(device, fatbin!("prompt_attention"))?;
        let (depth, shared_bytes) = match heads.head_dim {
            ..=64 => (64, 32768),
            65..=112 => (112, 65536),
            _ => (128, 65536),
        };
        Ok(Some(Self {
            pairs: module.kernel("prompt_pairs", 0)?,
            attend: module.kernel(&format!("prompt_attention_{depth}"), shared_bytes)?,
            heads,
            capacity,
        }))
    }

    /// Values of scratch that `tokens` tokens take.
    pub fn scratch(&self, tokens: usize) -> usize {
        let Heads {
            heads,
            kv_heads,
            head_dim,
        } = self.heads;
        let places = tokens * heads + 2 * kv_heads * self.capacity;
        2 * places * head_dim.next_multiple_of(VECTOR)
    }

    /// The cache takes in the prompt -> out (tokens, heads * head_dim).
    ///
    /// # Safety
    /// The addresses must hold what the shapes say, `scratch` what [`Self::scratch`] does, and the
    /// cache have room.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses a launch.
    pub unsafe fn run(
        &self,
        prompt: Prompt,
        cache: LayerCache,
        scratch: DevicePtr<bf16>,
        out: DevicePtr<f32>,
    ) -> Result<()> {
        let model = self.heads;
        let [before, tokens] = [prompt.before, prompt.tokens].map(|count| count as i32);
        let [heads, kv_heads, head_dim, capacity] =
            [model.heads, model.kv_heads, model.head_dim, self.capacity].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernels; the rest is the caller's promise.
        unsafe {
            self.pairs.launch(
                [prompt.before + prompt.tokens, 1, 1],
                THREADS,
                &[
                    &prompt.qkv,
                    &prompt.cos,
                    &prompt.sin,
                    &cache.keys,
                    &cache.values,
                    &scratch,
                    &before,
                    &tokens,
                    &heads,
                    &kv_heads,
                    &head_dim,
                    &capacity,
                ],
            )?;
            self.attend.launch(
                [model.heads, prompt.tokens.div_ceil(QUERIES), 1],
                THREADS,
                &[
                    &scratch, &out, &before, &tokens, &heads, &kv_heads, &head_dim, &capacity,
                ],
            )
        }
    }
}
