//! The network on the CPU, over slices: threaded, vectorised, nothing allocated that is not used.

mod attention;
mod cache;
mod decode;
mod half_dot;
mod head;
mod projection;
mod team;

use std::ops::Range;

use self::attention::Attention;
use self::cache::LayerCache;
use self::team::Team;
use super::weights::{PackedLayer, PackedWeights};
use crate::Result;
use crate::model::cpu::{gated_activation, rms_norm};
use crate::model::ops::{Heads, rope_tables};
use crate::model::{Activation, BitNetConfig};
use crate::quant::matmul::{TernaryMatmul, Threads};

pub struct Network {
    weights: PackedWeights,
    heads: Heads,
    activation: Activation,
    eps: f32,
    /// Rotary tables, (max_seq_len, head_dim / 2).
    cos: Vec<f32>,
    sin: Vec<f32>,
    team: Team,
    /// For the members of the team.
    matmul: TernaryMatmul,
}

impl Network {
    pub fn new(config: &BitNetConfig, weights: PackedWeights) -> Self {
        let [cos, sin] = rope_tables(config.head_dim(), config.max_seq_len, config.rope_theta);
        Self {
            weights,
            heads: Heads::of(config),
            activation: config.activation,
            eps: config.rms_norm_eps as f32,
            cos,
            sin,
            team: Team::new(),
            matmul: TernaryMatmul::new(Threads::One),
        }
    }

    fn hidden_size(&self) -> usize {
        self.weights.norm.len()
    }

    fn intermediate_size(&self) -> usize {
        self.weights.layers[0].ffn_sub_norm.len()
    }

    fn attention(&self) -> Attention<'_> {
        Attention {
            heads: self.heads,
            cos: &self.cos,
            sin: &self.sin,
        }
    }

    /// x (tokens, hidden), which follow the tokens of the cache -> the layer's output.
    fn layer(&self, w: &PackedLayer, mut x: Vec<f32>, cache: &mut LayerCache) -> Vec<f32> {
        let eps = self.eps;
        let qkv = projection::normed(&x, &w.input_layernorm, eps, &w.qkv);
        let attention = self.attention().forward(&qkv, cache);
        projection::add_normed(&mut x, &attention, &w.attn_sub_norm, eps, &w.o);
        let gate_up = projection::normed(&x, &w.post_attention_layernorm, eps, &w.gate_up);
        let gated = gated_activation::forward(&gate_up, w.ffn_sub_norm.len(), self.activation);
        projection::add_normed(&mut x, &gated, &w.ffn_sub_norm, eps, &w.down);
        x
    }
}

/// One sequence.
pub struct Pass<'a> {
    network: &'a Network,
    cache: Vec<LayerCache>,
    /// Normalised final activations of the tokens last fed, (tokens, hidden).
    hidden: Vec<f32>,
    /// Logits of the token last fed, where it was one.
    logits: Vec<f32>,
}

impl<'a> Pass<'a> {
    pub fn new(network: &'a Network) -> Self {
        let layer = || LayerCache::new(network.heads);
        Self {
            network,
            cache: network.weights.layers.iter().map(|_| layer()).collect(),
            hidden: Vec::new(),
            logits: Vec::new(),
        }
    }
}

impl super::model::Pass for Pass<'_> {
    fn feed(&mut self, ids: &[u32]) -> Result<()> {
        let network = self.network;
        if let [id] = ids {
            (self.hidden, self.logits) = decode::token(network, &mut self.cache, *id);
            return Ok(());
        }
        self.logits.clear();
        let hidden = network.hidden_size();
        let mut x = vec![0f32; ids.len() * hidden];
        for (x, id) in x.chunks_exact_mut(hidden).zip(ids) {
            network.weights.embed_tokens.read_rows(*id as usize, x);
        }
        for (layer, cache) in network.weights.layers.iter().zip(&mut self.cache) {
            x = network.layer(layer, x, cache);
        }
        self.hidden = rms_norm::forward(&x, &network.weights.norm, network.eps);
        Ok(())
    }

    fn logits(&mut self, rows: Range<usize>) -> Result<Vec<f32>> {
        if !self.logits.is_empty() && rows == (0..1) {
            return Ok(std::mem::take(&mut self.logits));
        }
        let hidden = self.network.hidden_size();
        let rows = &self.hidden[rows.start * hidden..rows.end * hidden];
        Ok(head::logits(rows, self.network.weights.lm_head()))
    }

    fn truncate(&mut self, len: usize) {
        self.cache.iter_mut().for_each(|layer| layer.truncate(len));
    }
}
