//! One layer on the GPU, forward and backward:
//!
//! ```text
//! h = x + o_proj(attn_sub_norm(attention(q, k, v_proj(input_layernorm(x)))))
//! y = h + down_proj(ffn_sub_norm(act(gate_proj(n)) * up_proj(n))),  n = post_attention_layernorm(h)
//! ```
//!
//! The backward pass computes int8 codes anew: that costs a few bytes beside those of the norm's
//! own gradient, and keeping them would take memory of every layer.

use half::bf16;

use super::arena::DevicePtr;
use super::backward::{Linear, NormBackward};
use super::kernels::attention::{Attended, AttentionGradient};
use super::kernels::bit_linear::Projection;
use super::kernels::rms_norm::Normed;
use super::network::{Batch, Network};
use super::profile::Stage;
use crate::Result;
use crate::config::Recompute;

impl Network {
    /// `workspace.layers[index].x` -> y, (tokens, hidden).
    pub(super) fn layer_forward(
        &self,
        index: usize,
        y: DevicePtr<bf16>,
        batch: Batch,
    ) -> Result<()> {
        self.attention_half(index, batch)?;
        self.gate_up(index, batch)?;
        let (norm, codes) = (self.gate_norm(index), self.workspace.codes);
        let down = &self.model.projections[index].down;
        let h = self.workspace.layers[index].h;
        let weights = down.n * down.k;
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            self.stage(Stage::QuantizeGate)?;
            self.gate.quantize(&norm, codes, batch.tokens())?;
            self.stage(Stage::Forward { weights })?;
            self.bit_linear
                .forward(codes, norm.kept.scale, down, h, y, batch.tokens())
        }
    }

    /// x -> h.
    fn attention_half(&self, index: usize, batch: Batch) -> Result<()> {
        let [input, sub, _] = self.norms(index);
        let saved = &self.workspace.layers[index];
        let projections = &self.model.projections[index];
        self.normed_bit_linear(&input, &projections.qkv, DevicePtr::NULL, saved.qkv, batch)?;
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            self.stage(Stage::Rope)?;
            self.rope.rotate(saved.qkv, batch, false)?;
            self.stage(Stage::AttentionForward)?;
            self.attention.forward(&self.attended(index), batch)?;
        }
        self.normed_bit_linear(&sub, &projections.o, saved.x, saved.h, batch)
    }

    fn attended(&self, index: usize) -> Attended {
        let saved = &self.workspace.layers[index];
        Attended {
            qkv: saved.qkv,
            out: saved.attention,
            log_sum_exp: saved.log_sum_exp,
            scratch: self.workspace.attention,
        }
    }

    /// h -> gate_proj and up_proj of its norm.
    fn gate_up(&self, index: usize, batch: Batch) -> Result<()> {
        let [_, _, post] = self.norms(index);
        let projection = &self.model.projections[index].gate_up;
        let gate_up = self.workspace.layers[index].gate_up;
        self.normed_bit_linear(&post, projection, DevicePtr::NULL, gate_up, batch)
    }

    /// `input_layernorm`, `attn_sub_norm` and `post_attention_layernorm`.
    fn norms(&self, index: usize) -> [Normed; 3] {
        let saved = &self.workspace.layers[index];
        let w = &self.model.weights.layers[index];
        let inputs = [
            (saved.x, w.input_layernorm),
            (saved.attention, w.attn_sub_norm),
            (saved.h, w.post_attention_layernorm),
        ];
        std::array::from_fn(|i| Normed {
            x: inputs[i].0,
            weight: inputs[i].1,
            kept: saved.norms[i],
        })
    }

    /// `ffn_sub_norm` of the gated activation.
    fn gate_norm(&self, index: usize) -> Normed {
        let saved = &self.workspace.layers[index];
        Normed {
            x: saved.gate_up,
            weight: self.model.weights.layers[index].ffn_sub_norm,
            kept: saved.norms[3],
        }
    }

    /// y = residual + projection(norm(x)).
    fn normed_bit_linear(
        &self,
        norm: &Normed,
        projection: &Projection,
        residual: DevicePtr<bf16>,
        y: DevicePtr<bf16>,
        batch: Batch,
    ) -> Result<()> {
        let (codes, tokens) = (self.workspace.codes, batch.tokens());
        let weights = projection.n * projection.k;
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            self.stage(Stage::QuantizeNorm)?;
            self.norm.quantize(norm, codes, tokens)?;
            self.stage(Stage::Forward { weights })?;
            self.bit_linear
                .forward(codes, norm.kept.scale, projection, residual, y, tokens)
        }
    }

    /// Turns `workspace.dx`, the gradient of the layer's output, into that of its input.
    pub(super) fn layer_backward(&self, index: usize, batch: Batch) -> Result<()> {
        match self.train.recompute_of(index) {
            Recompute::None => {}
            Recompute::Selective => self.gate_up(index, batch)?,
            Recompute::Full => {
                self.attention_half(index, batch)?;
                self.gate_up(index, batch)?;
            }
        }
        let ws = &self.workspace;
        let saved = &ws.layers[index];
        let g = &self.model.gradients.layers[index];
        let projections = &self.model.projections[index];
        let [input, sub, post] = self.norms(index);
        let gate = self.gate_norm(index);
        let linear = |projection, norm: &Normed, dy, dweight| Linear {
            projection,
            input_scale: norm.kept.scale,
            dy,
            dweight,
        };
        let down = linear(&projections.down, &gate, ws.dx, g.down_proj);
        // The gradient of gate and up takes their place.
        let gate_up = linear(&projections.gate_up, &post, saved.gate_up, g.gate_proj);
        let o = linear(&projections.o, &sub, ws.dx, g.o_proj);
        let qkv = linear(&projections.qkv, &input, ws.dqkv, g.q_proj);
        // Of a norm whose input is also the residual stream.
        let on_residual = |dweight| NormBackward {
            dn: ws.dn,
            dx: ws.dx,
            dresidual: ws.dx,
            dweight,
            is_input: true,
        };

        self.input_gradient(&down, batch)?;
        self.gate_backward(&gate, &gate_up, g.ffn_sub_norm, batch)?;
        self.weight_gradient(&down, batch)?;

        self.input_gradient(&gate_up, batch)?;
        let of = on_residual(g.post_attention_layernorm);
        self.norm_backward(&post, &of, Some(o.projection), batch)?;
        self.weight_gradient(&gate_up, batch)?;

        self.input_gradient(&o, batch)?;
        let of = NormBackward {
            dx: ws.dattention,
            dresidual: DevicePtr::NULL,
            ..on_residual(g.attn_sub_norm)
        };
        self.norm_backward(&sub, &of, None, batch)?;
        self.weight_gradient(&o, batch)?;

        let gradient = AttentionGradient {
            dout: ws.dattention,
            dqkv: ws.dqkv,
        };
        self.stage(Stage::AttentionBackward)?;
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            self.attention
                .backward(&self.attended(index), gradient, batch)?
        };
        self.rope_backward(&qkv, batch)?;
        self.input_gradient(&qkv, batch)?;
        let below = index
            .checked_sub(1)
            .map(|i| &self.model.projections[i].down);
        self.norm_backward(&input, &on_residual(g.input_layernorm), below, batch)?;
        self.weight_gradient(&qkv, batch)
    }
}
