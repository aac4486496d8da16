//! The network on the CPU: explicit forward and backward passes over f32 slices, threaded and
//! vectorised, without autograd. [`super::ops`] holds the same formulas in candle primitives.
//! Sums over rows are cut into blocks whose number does not depend on the thread count, so that
//! a run repeats itself to the bit.

pub mod attention;
pub mod gated_activation;
mod gemm;
pub mod lm_loss;
pub mod normed_bit_linear;
pub mod rms_norm;

pub use gemm::{Mat, Write, matmul};

use self::attention::Attention;
use self::normed_bit_linear::NormedBitLinear;
use super::Activation;
use super::ops::Heads;
use super::weights::{LayerWeights, Weights};

/// Rows of activations one task of an elementwise operation handles.
const ROWS_PER_TASK: usize = 128;

/// Rows over which a gradient is summed before the sums are added.
const ROWS_PER_SUM: usize = 32;

/// Rows of activations one task of a matrix product handles: a few tasks a thread, as each task
/// packs the other operand anew. A multiple of [`ROWS_PER_SUM`].
fn rows_per_product(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads())
        .clamp(1, 1024)
        .next_multiple_of(ROWS_PER_SUM)
}

/// Borrowed weights, and sequences of `seq` tokens to run through them.
pub struct Network<'a> {
    pub weights: Weights<&'a [f32]>,
    pub heads: Heads,
    pub activation: Activation,
    pub eps: f32,
    pub seq: usize,
    /// Rotary tables, (at least seq, head_dim / 2).
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

/// A layer's four products; each has its norm before it.
struct Projections<'a> {
    qkv: NormedBitLinear<'a, 3>,
    o: NormedBitLinear<'a, 1>,
    gate_up: NormedBitLinear<'a, 2>,
    down: NormedBitLinear<'a, 1>,
}

/// One layer's activations, kept for its backward pass.
struct SavedLayer {
    /// Input, (tokens, hidden).
    x: Vec<f32>,
    qkv: Vec<f32>,
    attention: Vec<f32>,
    log_sum_exp: Vec<f32>,
    /// Input of the feed-forward half, (tokens, hidden).
    h: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    qkv_proj: normed_bit_linear::Saved,
    o_proj: normed_bit_linear::Saved,
    gate_up_proj: normed_bit_linear::Saved,
    down_proj: normed_bit_linear::Saved,
}

impl Network<'_> {
    fn hidden_size(&self) -> usize {
        self.weights.norm.len()
    }

    fn attention(&self) -> Attention<'_> {
        Attention {
            heads: self.heads,
            seq: self.seq,
            cos: self.cos,
            sin: self.sin,
        }
    }

    /// Rows of the embedding, (tokens, hidden).
    fn embed(&self, ids: &[u32]) -> Vec<f32> {
        let hidden = self.hidden_size();
        let rows = ids
            .iter()
            .map(|id| &self.weights.embed_tokens[*id as usize * hidden..][..hidden]);
        rows.flatten().copied().collect()
    }

    fn projections<'a>(&self, w: &LayerWeights<&'a [f32]>) -> Projections<'a> {
        let eps = self.eps;
        Projections {
            qkv: NormedBitLinear {
                norm: w.input_layernorm,
                weights: [w.q_proj, w.k_proj, w.v_proj],
                eps,
            },
            o: NormedBitLinear {
                norm: w.attn_sub_norm,
                weights: [w.o_proj],
                eps,
            },
            gate_up: NormedBitLinear {
                norm: w.post_attention_layernorm,
                weights: [w.gate_proj, w.up_proj],
                eps,
            },
            down: NormedBitLinear {
                norm: w.ffn_sub_norm,
                weights: [w.down_proj],
                eps,
            },
        }
    }

    fn layer_forward(&self, w: &LayerWeights<&[f32]>, x: Vec<f32>) -> (Vec<f32>, SavedLayer) {
        let projections = self.projections(w);
        let (qkv, qkv_proj) = projections.qkv.forward(&x, None);
        let (attention, log_sum_exp) = self.attention().forward(&qkv);
        let (h, o_proj) = projections.o.forward(&attention, Some(&x));
        let (gate_up, gate_up_proj) = projections.gate_up.forward(&h, None);
        let gated = gated_activation::forward(&gate_up, w.ffn_sub_norm.len(), self.activation);
        let (y, down_proj) = projections.down.forward(&gated, Some(&h));
        let saved = SavedLayer {
            x,
            qkv,
            attention,
            log_sum_exp,
            h,
            gate_up,
            gated,
            qkv_proj,
            o_proj,
            gate_up_proj,
            down_proj,
        };
        (y, saved)
    }

    /// Turns `d`, the gradient of the layer's output, into that of its input.
    fn layer_backward(
        &self,
        w: &LayerWeights<&[f32]>,
        saved: SavedLayer,
        d: &mut [f32],
    ) -> LayerWeights<Vec<f32>> {
        let projections = self.projections(w);
        let mut dgated = vec![0f32; saved.gated.len()];
        let down = (projections.down).backward(
            saved.down_proj,
            &saved.gated,
            d,
            &mut dgated,
            Write::Replace,
        );
        let features = w.ffn_sub_norm.len();
        let dgate_up =
            gated_activation::backward(&saved.gate_up, &dgated, features, self.activation);
        let gate_up =
            (projections.gate_up).backward(saved.gate_up_proj, &saved.h, &dgate_up, d, Write::Add);

        let mut dattention = vec![0f32; saved.attention.len()];
        let o = (projections.o).backward(
            saved.o_proj,
            &saved.attention,
            d,
            &mut dattention,
            Write::Replace,
        );
        let dqkv = self.attention().backward(
            &saved.qkv,
            &saved.attention,
            &dattention,
            &saved.log_sum_exp,
        );
        let qkv = (projections.qkv).backward(saved.qkv_proj, &saved.x, &dqkv, d, Write::Add);

        let [q_proj, k_proj, v_proj] = qkv.weights;
        let [o_proj] = o.weights;
        let [gate_proj, up_proj] = gate_up.weights;
        let [down_proj] = down.weights;
        LayerWeights {
            input_layernorm: qkv.norm,
            attn_sub_norm: o.norm,
            post_attention_layernorm: gate_up.norm,
            ffn_sub_norm: down.norm,
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
        }
    }

    /// Normalised final activations: ids (batch * seq,) below vocab -> (batch * seq, hidden).
    pub fn hidden(&self, ids: &[u32]) -> Vec<f32> {
        let mut x = self.embed(ids);
        for layer in &self.weights.layers {
            x = self.layer_forward(layer, x).0;
        }
        rms_norm::forward(&x, self.weights.norm, self.eps)
    }

    /// Mean cross-entropy in nats: ids and labels (batch * seq,) below vocab.
    pub fn loss(&self, ids: &[u32], labels: &[u32]) -> f64 {
        lm_loss::loss(&self.hidden(ids), self.weights.lm_head(), labels)
    }

    /// The loss, and the gradient of the loss times `scale` by every weight.
    pub fn loss_and_gradients(
        &self,
        ids: &[u32],
        labels: &[u32],
        scale: f32,
    ) -> (f64, Weights<Vec<f32>>) {
        let weights = &self.weights;
        let mut x = self.embed(ids);
        let mut saved = Vec::with_capacity(weights.layers.len());
        for layer in &weights.layers {
            let (y, kept) = self.layer_forward(layer, x);
            saved.push(kept);
            x = y;
        }
        let hidden = rms_norm::forward(&x, weights.norm, self.eps);
        let (loss, head) =
            lm_loss::loss_and_gradients(&hidden, self.weights.lm_head(), labels, scale);

        let mut dhidden = head.hidden;
        let (mut d, norm) = rms_norm::backward(&mut dhidden, &x, weights.norm, self.eps);
        let mut layers: Vec<_> = (weights.layers.iter().zip(saved).rev())
            .map(|(layer, saved)| self.layer_backward(layer, saved, &mut d))
            .collect();
        layers.reverse();
        let (mut embed_tokens, lm_head) = match weights.lm_head {
            Some(_) => (vec![0f32; weights.embed_tokens.len()], Some(head.weight)),
            None => (head.weight, None),
        };
        let hidden = self.hidden_size();
        for (id, d) in ids.iter().zip(d.chunks_exact(hidden)) {
            let row = &mut embed_tokens[*id as usize * hidden..][..hidden];
            row.iter_mut().zip(d).for_each(|(sum, d)| *sum += d);
        }
        let gradients = Weights {
            embed_tokens,
            layers,
            norm,
            lm_head,
        };
        (loss, gradients)
    }
}
