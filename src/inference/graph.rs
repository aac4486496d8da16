//! The network in candle operations with a cache of keys and values, on any device.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::weights::{PackedLayer, PackedWeights, Projections, Table, TableValues};
use crate::Result;
use crate::model::ops::Rope;
use crate::model::{BitLinear, BitNetConfig, Cache, Decoder, Layer};
use crate::quant::{Backend, PackedBitLinear};

pub struct Network {
    config: BitNetConfig,
    device: Device,
    decoder: Decoder<PackedBitLinear>,
}

impl Network {
    pub fn new(config: &BitNetConfig, weights: &PackedWeights, device: &Device) -> Result<Self> {
        let backend = Backend::new(device)?;
        let vector = |x: &Vec<f32>| Tensor::new(x.as_slice(), device);
        let linear = |p: &Projections| backend.load(p.packed.clone(), p.scales.clone());
        let layer = |w: &PackedLayer| {
            Ok(Layer {
                input_layernorm: vector(&w.input_layernorm)?,
                qkv: linear(&w.qkv)?,
                attn_sub_norm: vector(&w.attn_sub_norm)?,
                o: linear(&w.o)?,
                post_attention_layernorm: vector(&w.post_attention_layernorm)?,
                gate_up: linear(&w.gate_up)?,
                ffn_sub_norm: vector(&w.ffn_sub_norm)?,
                down: linear(&w.down)?,
            })
        };
        let layers = weights.layers.iter().map(layer).collect::<Result<_>>()?;
        let embed_tokens = to_tensor(&weights.embed_tokens, device)?;
        let lm_head = match &weights.lm_head {
            Some(head) => to_tensor(head, device)?,
            None => embed_tokens.clone(),
        };
        let rope = Rope::new(
            config.head_dim(),
            config.max_seq_len,
            config.rope_theta,
            device,
        )?;
        let norm = vector(&weights.norm)?;
        Ok(Self {
            config: config.clone(),
            device: device.clone(),
            decoder: Decoder::new(config, embed_tokens, layers, norm, lm_head, rope),
        })
    }
}

impl BitLinear for PackedBitLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.forward(x)
    }
}

fn to_tensor(table: &Table, device: &Device) -> Result<Tensor> {
    let shape = (table.rows(), table.cols());
    Ok(match table.values() {
        TableValues::F32(values) => Tensor::from_slice(values, shape, device)?,
        TableValues::F16(values) => {
            Tensor::from_slice(values, shape, device)?.to_dtype(DType::F32)?
        }
    })
}

pub struct Pass<'a> {
    network: &'a Network,
    cache: Cache,
    /// (1, tokens last fed, hidden)
    hidden: Option<Tensor>,
}

impl<'a> Pass<'a> {
    pub fn new(network: &'a Network) -> Self {
        Self {
            network,
            cache: Cache::new(network.config.layers, network.config.max_seq_len),
            hidden: None,
        }
    }
}

impl super::model::Pass for Pass<'_> {
    fn feed(&mut self, ids: &[u32]) -> Result<()> {
        let ids = Tensor::new(ids, &self.network.device)?.unsqueeze(0)?;
        let hidden = self.network.decoder.hidden(&ids, Some(&mut self.cache))?;
        self.hidden = Some(hidden);
        Ok(())
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<Vec<f32>> {
        let Some(hidden) = &self.hidden else {
            return Ok(Vec::new());
        };
        let hidden = hidden.narrow(1, rows.start, rows.len())?;
        let logits = self.network.decoder.logits(&hidden)?;
        Ok(logits.flatten_all()?.to_vec1()?)
    }

    fn truncate(&mut self, len: usize) {
        self.cache.truncate(len);
    }
}
