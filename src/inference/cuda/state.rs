//! What one sequence has in device memory: keys and values, and the activations of a pass.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, PinnedHostSlice};
use half::bf16;

use super::Network;
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::kernels::address;
use crate::cuda::kernels::cached_attention::{AttentionState, LayerCache};
use crate::cuda::kernels::ternary_tiles::K_STEP;
use crate::cuda::kernels::token_norm::TokenCodes;

/// Tokens of a long prompt that go through the network together.
pub const CHUNK: usize = 2048;

pub struct State {
    /// Keys, then values, of each layer: (layers, 2, kv_heads, max_seq_len, head_dim).
    cache: CudaSlice<f32>,
    /// Values of a layer's keys.
    layer_keys: usize,
    /// Tokens before those of the pass, and the ids of these.
    pub input: CudaSlice<u32>,
    /// The residual stream, (tokens, hidden), and what a product adds to it.
    pub x: CudaSlice<f32>,
    pub y: CudaSlice<f32>,
    pub attention: CudaSlice<f32>,
    /// Queries, keys and values, or gate and up: the wider of both.
    pub wide: CudaSlice<f32>,
    pub codes: CudaSlice<i8>,
    pub scales: CudaSlice<f32>,
    parts: CudaSlice<f32>,
    pairs: CudaSlice<bf16>,
    done: CudaSlice<u32>,
    /// Of one token: normalised final activations and logits, and where the host reads these.
    pub hidden: CudaSlice<f32>,
    pub logits: CudaSlice<f32>,
    pub host_logits: PinnedHostSlice<f32>,
}

impl State {
    /// # Errors
    /// `Tensor` if memory runs out.
    pub fn new(network: &Network) -> Result<Self> {
        let config = &network.config;
        let stream = network.device.cuda_stream();
        let tokens = CHUNK.min(config.max_seq_len);
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let kv = config.kv_heads * config.head_dim();
        let layer_keys = kv * config.max_seq_len;
        let wide = (hidden + 2 * kv).max(2 * intermediate);
        let stride = hidden.max(intermediate).next_multiple_of(K_STEP);
        let scratch = network.attention.scratch(tokens);
        // SAFETY: kernels write what they read before; the cache they read up to its last token.
        let f32s = |len| unsafe { stream.alloc::<f32>(len) }.w();
        Ok(Self {
            cache: f32s(2 * layer_keys * config.layers)?,
            layer_keys,
            input: stream.alloc_zeros(1 + tokens).w()?,
            x: f32s(tokens * hidden)?,
            y: f32s(tokens * hidden)?,
            attention: f32s(tokens * hidden)?,
            wide: f32s(tokens * wide)?,
            // SAFETY: as above.
            codes: unsafe { stream.alloc(tokens * stride) }.w()?,
            scales: f32s(tokens)?,
            parts: f32s(scratch.parts)?,
            // SAFETY: as above.
            pairs: unsafe { stream.alloc(scratch.pairs) }.w()?,
            done: stream.alloc_zeros(scratch.done).w()?,
            hidden: f32s(hidden)?,
            logits: f32s(config.vocab_size)?,
            // SAFETY: read after a copy only.
            host_logits: unsafe {
                let context = stream.context();
                context.alloc_pinned_with_flags(config.vocab_size, 0)
            }
            .w()?,
        })
    }

    pub fn ids(&self) -> DevicePtr<u32> {
        DevicePtr::new(address(&self.input)).offset(1)
    }

    pub fn layer_cache(&self, layer: usize) -> LayerCache {
        let keys = DevicePtr::new(address(&self.cache)).offset(2 * layer * self.layer_keys);
        LayerCache {
            keys,
            values: keys.offset(self.layer_keys),
        }
    }

    pub fn attention_state(&self) -> AttentionState {
        AttentionState {
            position: DevicePtr::new(address(&self.input)),
            parts: DevicePtr::new(address(&self.parts)),
            pairs: DevicePtr::new(address(&self.pairs)),
            done: DevicePtr::new(address(&self.done)),
        }
    }

    /// Codes of the input of a projection with `stride` columns.
    pub fn token_codes(&self, stride: usize) -> TokenCodes {
        TokenCodes {
            codes: DevicePtr::new(address(&self.codes)),
            scales: DevicePtr::new(address(&self.scales)),
            stride,
        }
    }
}
