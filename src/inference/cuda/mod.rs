//! The network on an NVIDIA GPU, on kernels of our own: f32 between int8 products over packed
//! weights, as on the CPU. One token is a single CUDA graph, bound by reading the weights.

mod pass;
mod scorer;
mod state;

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

pub use self::pass::Pass;
use super::weights::{PackedLayer, PackedWeights, Projections};
use crate::Result;
use crate::config::Kernels;
use crate::cuda::DevicePtr;
use crate::cuda::kernels::cached_attention::{CachedAttention, takes_head_dim};
use crate::cuda::kernels::rows::MAX_FEATURES;
use crate::cuda::kernels::ternary_tiles::K_STEP;
use crate::cuda::kernels::token_linear::{GATE_STEP, NormedLinear, TokenLinear};
use crate::cuda::kernels::token_norm::TokenNorm;
use crate::cuda::kernels::vocabulary::{COLUMN_STEP, CudaTable, Vocabulary};
use crate::cuda::kernels::{CudaPackedTernary, TernaryMatmul, TernaryTiles, address};
use crate::model::BitNetConfig;

/// Whether the kernels are made for models of this shape; candle operations run the others.
pub fn takes(config: &BitNetConfig) -> bool {
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    takes_head_dim(config.head_dim())
        && hidden.is_multiple_of(COLUMN_STEP)
        && intermediate.is_multiple_of(GATE_STEP)
        && hidden.max(intermediate) <= MAX_FEATURES
}

pub struct Network {
    config: BitNetConfig,
    device: CudaDevice,
    embed_tokens: CudaTable,
    layers: Vec<Layer>,
    norm: CudaSlice<f32>,
    /// `None` where the embedding serves as LM head.
    lm_head: Option<CudaTable>,
    vocabulary: Vocabulary,
    attention: CachedAttention,
    /// For one token.
    linear: TokenLinear,
    /// For several.
    token_norm: TokenNorm,
    matmul: TernaryMatmul,
}

struct Layer {
    qkv: Linear,
    o: Linear,
    gate_up: Linear,
    down: Linear,
}

/// Projections that share their input, and the norm before them.
struct Linear {
    norm: CudaSlice<f32>,
    /// Columns of zeros behind the features, up to what the kernels take.
    weights: CudaPackedTernary,
}

impl Network {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels or memory runs out.
    pub fn new(
        config: &BitNetConfig,
        weights: &PackedWeights,
        device: &CudaDevice,
    ) -> Result<Self> {
        let stream = device.cuda_stream();
        let tiles = TernaryTiles::load(device)?;
        let linear = |norm: &Vec<f32>, projections: &Projections| -> Result<Linear> {
            let packed = &projections.packed;
            let packed = packed.padded(packed.cols().next_multiple_of(K_STEP));
            Ok(Linear {
                norm: stream.clone_htod(norm).w()?,
                weights: tiles.upload(&packed, &projections.scales)?,
            })
        };
        let layer = |w: &PackedLayer| {
            Ok(Layer {
                qkv: linear(&w.input_layernorm, &w.qkv)?,
                o: linear(&w.attn_sub_norm, &w.o)?,
                gate_up: linear(&w.post_attention_layernorm, &w.gate_up)?,
                down: linear(&w.ffn_sub_norm, &w.down)?,
            })
        };
        let eps = config.rms_norm_eps as f32;
        let table = |table| CudaTable::upload(device, table);
        Ok(Self {
            config: config.clone(),
            device: device.clone(),
            embed_tokens: table(&weights.embed_tokens)?,
            layers: weights.layers.iter().map(layer).collect::<Result<_>>()?,
            norm: stream.clone_htod(&weights.norm).w()?,
            lm_head: weights.lm_head.as_ref().map(table).transpose()?,
            vocabulary: Vocabulary::load(device)?,
            attention: CachedAttention::load(device, config)?,
            linear: TokenLinear::load(device, eps, config.activation)?,
            token_norm: TokenNorm::load(device, eps)?,
            matmul: TernaryMatmul::load(device, Kernels::Auto)?,
        })
    }

    fn lm_head(&self) -> &CudaTable {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }
}

impl Linear {
    fn features(&self) -> usize {
        self.norm.len()
    }

    fn norm(&self) -> DevicePtr<f32> {
        DevicePtr::new(address(&self.norm))
    }

    fn normed(&self) -> NormedLinear<'_> {
        NormedLinear {
            norm: self.norm(),
            features: self.features(),
            weights: &self.weights,
        }
    }
}
