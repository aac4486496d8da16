//! The steps of a layer's backward pass that depend on `precision.backward`: the two products of a
//! projection, and the kernels before them that write their operands.
//!
//! bf16: dX = dY . (wq * b) and dW = dY^T . (codes * scale), by cuBLASLt.
//!
//! fp8: the kernel that computes dY also quantises it, twice and with a scale a token (values apart
//! from queries and keys, whose gradients may be a thousandth of theirs). dX is the forward's exact
//! product, of int8 codes of dY * b with the transposed ternary codes. dW multiplies dY in e4m3 with
//! the inputs in e4m3, both transposed: in int8, features with small gradients would have none.

use half::bf16;

use super::arena::DevicePtr;
use super::kernels::bit_linear::Projection;
use super::kernels::gemm::{Layout, Operand};
use super::kernels::rms_norm::{NormGradients, Normed};
use super::network::{Batch, Gradient, Network, replace};
use super::profile::Stage;
use super::workspace::{Operands, padded_tokens};
use crate::Result;

/// One projection in the backward pass.
pub(super) struct Linear<'a> {
    pub projection: &'a Projection,
    /// Of the codes it multiplied.
    pub input_scale: DevicePtr<f32>,
    /// Gradient by its output, (tokens, n); unused in fp8, which has codes of it.
    pub dy: DevicePtr<bf16>,
    /// Gradients of fused projections follow each other, (n, k) together.
    pub dweight: Gradient,
}

/// A norm in the backward pass.
pub(super) struct NormBackward {
    /// Gradient by its output, (tokens, hidden).
    pub dn: DevicePtr<bf16>,
    /// Where that by its input goes; `dresidual`, unless null, is added.
    pub dx: DevicePtr<bf16>,
    pub dresidual: DevicePtr<bf16>,
    pub dweight: Gradient,
    /// A projection multiplied its output, and needs it again for dW.
    pub is_input: bool,
}

impl Network {
    /// `workspace.dn` = dY . (wq * b).
    pub(super) fn input_gradient(&self, linear: &Linear, batch: Batch) -> Result<()> {
        let &Projection { n, k, .. } = linear.projection;
        let (dn, tokens) = (self.workspace.dn, batch.tokens());
        // SAFETY: dY is (tokens, n), the weight (n, k), and dn holds the widest input.
        unsafe {
            match self.workspace.operands {
                Operands::Bf16 { weight, .. } => {
                    let ternary_weights = &self.model.ternary_weights;
                    self.stage(Stage::ExpandWeights { weights: n * k })?;
                    ternary_weights.dequantize(linear.projection, weight)?;
                    self.stage(Stage::InputGradient { weights: n * k })?;
                    self.gemm.multiply(
                        Layout::NN,
                        [tokens, k, n],
                        Operand::bf16(linear.dy, n),
                        Operand::bf16(weight, k),
                        replace(dn, k),
                    )
                }
                Operands::Fp8(fp8) => {
                    let (transpose, weight) = (&self.transpose, fp8.weight_transposed);
                    let mut sum = DevicePtr::NULL;
                    for ((_, part), dy) in linear.projection.parts().zip([fp8.dy, fp8.dvalues]) {
                        let sizes = [tokens, part.n, k];
                        let weights = part.n * k;
                        // Anew in every micro-batch: to keep it would take a byte a weight.
                        self.stage(Stage::Transpose { bytes: weights })?;
                        transpose.weight(part.codes, weight, [part.n, k])?;
                        self.stage(Stage::InputGradient { weights })?;
                        self.bit_linear
                            .input_gradient(&dy, weight, sum, dn, sizes)?;
                        sum = dn;
                        // Before the next gradient takes the codes' place.
                        self.stage(Stage::Transpose {
                            bytes: tokens * part.n,
                        })?;
                        transpose.gradient(&part, linear.input_scale, &dy, tokens)?;
                    }
                    Ok(())
                }
            }
        }
    }

    /// dweight += dY^T . (codes * scale), = in a step's first micro-batch.
    pub(super) fn weight_gradient(&self, linear: &Linear, batch: Batch) -> Result<()> {
        let &Projection { n, k, .. } = linear.projection;
        let tokens = batch.tokens();
        let output = |first| linear.dweight.output(first, k, !self.first);
        // SAFETY: dY is (tokens, n), the inputs (tokens, k), or the other way around.
        unsafe {
            match self.workspace.operands {
                Operands::Bf16 { inputs, .. } => {
                    self.stage(Stage::WeightGradient { weights: n * k })?;
                    self.gemm.multiply(
                        Layout::TN,
                        [n, k, tokens],
                        Operand::bf16(linear.dy, n),
                        Operand::bf16(inputs, k),
                        output(0),
                    )
                }
                Operands::Fp8(fp8) => {
                    let (codes, inputs) = (self.workspace.codes, fp8.inputs_transposed);
                    let padded = padded_tokens(tokens);
                    for ((first, part), dy) in linear.projection.parts().zip([fp8.dy, fp8.dvalues])
                    {
                        self.stage(Stage::Transpose { bytes: tokens * k })?;
                        self.transpose
                            .inputs(codes, dy.factors, inputs, [tokens, k])?;
                        self.stage(Stage::WeightGradient {
                            weights: part.n * k,
                        })?;
                        self.gemm.multiply(
                            Layout::NT,
                            [part.n, k, padded],
                            Operand::fp8(dy.transposed, padded, Some(dy.undo)),
                            Operand::fp8(inputs, padded, None),
                            output(first),
                        )?;
                    }
                    Ok(())
                }
            }
        }
    }

    /// The gradients by a norm's input and weight; and the operands made of its output, and of dx as
    /// the output gradient of `next`.
    pub(super) fn norm_backward(
        &self,
        norm: &Normed,
        of: &NormBackward,
        next: Option<&Projection>,
        batch: Batch,
    ) -> Result<()> {
        let (ws, tokens) = (&self.workspace, batch.tokens());
        let to = NormGradients {
            dx: of.dx,
            dresidual: of.dresidual,
            dweight: of.dweight.norm(),
            parts: ws.norm_parts,
        };
        // dn, x, dx and dresidual in bf16.
        let bytes = if of.dresidual.is_null() { 6 } else { 8 };
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            match ws.operands {
                Operands::Bf16 { inputs, .. } => {
                    let (inputs, written) = match of.is_input {
                        true => (inputs, 2),
                        false => (DevicePtr::NULL, 0),
                    };
                    let bytes = bytes + written;
                    self.stage(Stage::NormBackward { bytes })?;
                    self.norm.backward(norm, of.dn, &to, inputs, tokens)
                }
                Operands::Fp8(fp8) => {
                    let (codes, written) = match of.is_input {
                        true => (ws.codes, 1),
                        false => (DevicePtr::NULL, 0),
                    };
                    let bytes = bytes + written + if next.is_some() { 2 } else { 0 };
                    self.stage(Stage::NormBackward { bytes })?;
                    let next = next.map(|next| (next, fp8.dy));
                    self.norm
                        .backward_quantize(norm, of.dn, &to, codes, next, tokens)
                }
            }
        }
    }

    /// From `workspace.dn`, the gradients by gate and up, by the norm's weight, and the operands
    /// made of the norm's output.
    pub(super) fn gate_backward(
        &self,
        norm: &Normed,
        gate_up: &Linear,
        dweight: Gradient,
        batch: Batch,
    ) -> Result<()> {
        let ws = &self.workspace;
        let (dweight, parts, tokens) = (dweight.norm(), ws.norm_parts, batch.tokens());
        self.stage(Stage::GateBackward)?;
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            match ws.operands {
                Operands::Bf16 { inputs, .. } => {
                    let to = (gate_up.dy, inputs);
                    self.gate.backward(norm, ws.dn, dweight, parts, to, tokens)
                }
                Operands::Fp8(fp8) => {
                    let to = (gate_up.projection, fp8.dy, ws.codes);
                    self.gate
                        .backward_quantize(norm, ws.dn, dweight, parts, to, tokens)
                }
            }
        }
    }

    /// Turns the gradients by queries and keys back.
    pub(super) fn rope_backward(&self, qkv: &Linear, batch: Batch) -> Result<()> {
        self.stage(Stage::RopeBackward)?;
        // SAFETY: buffers are those of the workspace, made for these shapes.
        unsafe {
            match self.workspace.operands {
                Operands::Bf16 { .. } => self.rope.rotate(qkv.dy, batch, true),
                Operands::Fp8(fp8) => {
                    let to = [fp8.dy, fp8.dvalues];
                    self.rope
                        .rotate_back_quantize(qkv.dy, qkv.projection, to, batch)
                }
            }
        }
    }
}
