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
use super::kernels::attention::AttentionGradient;
use super::kernels::bit_linear::Projection;
use super::kernels::gemm::Layout;
use super::kernels::rms_norm::{NormGradients, Normed};
use super::network::{Batch, Gradient, Network, operand, replace};
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
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            self.gate.quantize(&norm, codes, batch.tokens())?;
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
            self.rope.rotate(saved.qkv, batch, false)?;
            self.attention
                .forward(saved.qkv, saved.attention, saved.log_sum_exp, batch)?;
        }
        self.normed_bit_linear(&sub, &projections.o, saved.x, saved.h, batch)
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
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            self.norm.quantize(norm, codes, tokens)?;
            self.bit_linear
                .forward(codes, norm.kept.scale, projection, residual, y, tokens)
        }
    }

    /// Turns `workspace.dx`, the gradient of the layer's output, into that of its input.
    pub(super) fn layer_backward(&self, index: usize, batch: Batch) -> Result<()> {
        match self.recompute {
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
        let (tokens, none) = (batch.tokens(), DevicePtr::NULL);

        self.input_gradient(&projections.down, ws.dx, batch)?;
        let dweight = DevicePtr::new(g.ffn_sub_norm.address);
        let (gate_norm, parts) = (self.gate_norm(index), ws.norm_parts);
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            self.gate
                .backward(&gate_norm, ws.dn, dweight, parts, ws.inputs, tokens)?;
        }
        self.weight_gradient(&projections.down, ws.dx, g.down_proj, batch)?;

        // The gradient of gate and up has taken their place.
        self.input_gradient(&projections.gate_up, saved.gate_up, batch)?;
        let (dx, gradient) = (ws.dx, g.post_attention_layernorm);
        self.norm_backward(&post, ws.dn, dx, dx, ws.inputs, gradient, batch)?;
        self.weight_gradient(&projections.gate_up, saved.gate_up, g.gate_proj, batch)?;

        self.input_gradient(&projections.o, ws.dx, batch)?;
        let (dattention, gradient) = (ws.dattention, g.attn_sub_norm);
        self.norm_backward(&sub, ws.dn, none, dattention, ws.inputs, gradient, batch)?;
        self.weight_gradient(&projections.o, ws.dx, g.o_proj, batch)?;

        let attention = AttentionGradient {
            qkv: saved.qkv,
            out: saved.attention,
            log_sum_exp: saved.log_sum_exp,
            dout: dattention,
            dqkv: ws.dqkv,
            statistics: ws.attention_statistics,
        };
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            self.attention.backward(&attention, batch)?;
            self.rope.rotate(ws.dqkv, batch, true)?;
        }
        self.input_gradient(&projections.qkv, ws.dqkv, batch)?;
        let gradient = g.input_layernorm;
        self.norm_backward(&input, ws.dn, dx, dx, ws.inputs, gradient, batch)?;
        self.weight_gradient(&projections.qkv, ws.dqkv, g.q_proj, batch)
    }

    /// dx = dresidual + the gradient by the norm's input, given dn, that by its output; adds the
    /// gradient by its weight; writes the inputs of the projection after it unless `inputs` is null.
    #[allow(clippy::too_many_arguments)] // those of the formula
    pub(super) fn norm_backward(
        &self,
        norm: &Normed,
        dn: DevicePtr<bf16>,
        dresidual: DevicePtr<bf16>,
        dx: DevicePtr<bf16>,
        inputs: DevicePtr<bf16>,
        gradient: Gradient,
        batch: Batch,
    ) -> Result<()> {
        let to = NormGradients {
            dx,
            dresidual,
            dweight: DevicePtr::new(gradient.address),
            parts: self.workspace.norm_parts,
            inputs,
        };
        // SAFETY: buffers are those of the workspace, made for these shapes; gradients of norms
        // are f32.
        unsafe { self.norm.backward(norm, dn, &to, batch.tokens()) }
    }

    /// `workspace.dn` = dy . (wq * b).
    fn input_gradient(
        &self,
        projection: &Projection,
        dy: DevicePtr<bf16>,
        batch: Batch,
    ) -> Result<()> {
        let &Projection { n, k, .. } = projection;
        let (weight, dn) = (self.workspace.weight, self.workspace.dn);
        // SAFETY: dy is (tokens, n), the weight (n, k), and dn holds the widest input.
        unsafe {
            self.model.ternary_weights.dequantize(projection, weight)?;
            self.gemm.multiply(
                Layout::NN,
                [batch.tokens(), k, n],
                operand(dy, n),
                operand(weight, k),
                replace(dn, k),
            )
        }
    }

    /// gradient += dy^T . `workspace.inputs`.
    fn weight_gradient(
        &self,
        projection: &Projection,
        dy: DevicePtr<bf16>,
        gradient: Gradient,
        batch: Batch,
    ) -> Result<()> {
        let &Projection { n, k, .. } = projection;
        let (dy, inputs) = (operand(dy, n), operand(self.workspace.inputs, k));
        let sizes = [n, k, batch.tokens()];
        // SAFETY: dy is (tokens, n), the inputs (tokens, k); the gradients of fused projections
        // follow each other, (n, k) together.
        unsafe { self.product_gradient(dy, inputs, sizes, gradient, !self.first) }
    }
}
