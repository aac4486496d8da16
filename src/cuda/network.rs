//! The network on an NVIDIA GPU: explicit forward and backward passes made of fused kernels.
//! Activations are bf16, sums f32 or exact int32, master weights f32. Reductions run in a fixed
//! order, so that the same step gives the same bits. [`crate::model::cpu`] holds the same passes
//! in f32, [`crate::model::ops`] the formulas in candle operations.

use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::result::memcpy_dtoh_async;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;

use super::arena::{Arena, DevicePtr};
use super::backward::NormBackward;
use super::input::{DeviceBatch, Input};
use super::kernels::address;
use super::kernels::attention::Attention;
use super::kernels::bit_linear::{BitLinear, Projection};
use super::kernels::cross_entropy::{CrossEntropy, Logits};
use super::kernels::embedding::Embedding;
use super::kernels::gated_activation::GatedActivation;
use super::kernels::gemm::{Float, Gemm, Layout, Operand, Output};
use super::kernels::rms_norm::{Normed, RmsNorm};
use super::kernels::rope::Rope;
use super::kernels::ternary_weights::TernaryWeights;
use super::kernels::transpose::Transpose;
use super::profile::{Profiler, Stage};
use super::replay::Replay;
use super::workspace::{NormStatistics, Sizes, Workspace};
use crate::Result;
use crate::config::{Config, Train};
use crate::model::weights::Weights;

/// A weight's gradient in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Gradient {
    pub address: u64,
    pub dtype: Float,
}

impl Gradient {
    /// Of a norm: those are f32.
    pub(super) fn norm(self) -> DevicePtr<f32> {
        DevicePtr::new(self.address)
    }

    /// From row `first` on, as where a product goes, in rows of so many values.
    pub(super) fn output(self, first: usize, stride: usize, add: bool) -> Output {
        let bytes = match self.dtype {
            Float::F32 => size_of::<f32>(),
            Float::Bf16 => size_of::<bf16>(),
        };
        Output {
            address: self.address + (first * stride * bytes) as u64,
            stride,
            dtype: self.dtype,
            add,
        }
    }
}

/// A layer's ternary codes, fused where projections share their input.
#[derive(Clone, Copy, Debug)]
pub struct LayerProjections {
    pub qkv: Projection,
    pub o: Projection,
    pub gate_up: Projection,
    pub down: Projection,
}

/// What the passes read and write beside the activations.
pub struct Model {
    pub weights: Weights<DevicePtr<f32>>,
    /// Those of q, k and v_proj follow each other, and so do those of gate and up_proj.
    pub gradients: Weights<Gradient>,
    pub projections: Vec<LayerProjections>,
    /// The LM head in bf16, (vocab, hidden).
    pub lm_head: DevicePtr<bf16>,
    pub ternary_weights: TernaryWeights,
}

/// Sequences that go through the network together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Batch {
    pub rows: usize,
    pub seq: usize,
}

impl Batch {
    pub fn tokens(&self) -> usize {
        self.rows * self.seq
    }
}

/// What the launches of a forward and backward pass depend on, in one network.
#[derive(PartialEq, Eq, Hash)]
struct PassKey {
    batch: Batch,
    /// Bits of the loss's scale.
    scale: u64,
    first: bool,
}

pub struct Network {
    pub(super) sizes: Sizes,
    pub(super) train: Train,
    pub(super) model: Model,
    pub(super) workspace: Workspace,
    pub(super) norm: RmsNorm,
    pub(super) bit_linear: BitLinear,
    pub(super) rope: Rope,
    pub(super) attention: Attention,
    pub(super) gate: GatedActivation,
    pub(super) gemm: Gemm,
    pub(super) transpose: Transpose,
    /// Products replace the gradients of matrices instead of adding to them: this is a step's
    /// first micro-batch.
    pub(super) first: bool,
    /// What the gradients are yet to be multiplied by.
    pub(super) gradient_scale: f32,
    /// Told of every stage of a step that is profiled.
    pub(super) profiler: Option<Profiler>,
    embedding: Embedding,
    cross_entropy: CrossEntropy,
    input: Input,
    replay: Replay<PassKey>,
    stream: Arc<CudaStream>,
    /// Sum of the micro-batches' losses.
    loss: CudaSlice<f64>,
    max_seq_len: usize,
    /// What `workspace` lies in.
    _memory: CudaSlice<u8>,
}

impl Network {
    /// For micro-batches as `config` says, with the kernels made for Hopper or without.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses, as when memory runs out.
    pub fn new(config: &Config, model: Model, device: &CudaDevice, hopper: bool) -> Result<Self> {
        let stream = device.cuda_stream();
        let shape = &config.model;
        let sizes = Sizes::new(config);
        let mut measure = Arena::at(0);
        Workspace::lay_out(config, &mut measure);
        // SAFETY: every kernel's outputs are written before another one reads them.
        let memory = unsafe { stream.alloc::<u8>(measure.bytes() as usize) }.w()?;
        let workspace = Workspace::lay_out(config, &mut Arena::at(address(&memory)));
        Ok(Self {
            norm: RmsNorm::load(device, shape.hidden_size, shape.rms_norm_eps as f32)?,
            bit_linear: BitLinear::load(device, hopper)?,
            rope: Rope::load(device, shape)?,
            attention: Attention::load(device, shape, hopper)?,
            gate: GatedActivation::load(device, shape)?,
            gemm: Gemm::new(Arc::clone(&stream))?,
            transpose: Transpose::load(device)?,
            embedding: Embedding::load(device, shape.hidden_size)?,
            cross_entropy: CrossEntropy::load(device)?,
            input: Input::new(device, sizes.tokens, sizes.vocab)?,
            replay: Replay::new(Arc::clone(&stream)),
            loss: stream.alloc_zeros(1).w()?,
            first: true,
            gradient_scale: 1.0,
            profiler: None,
            sizes,
            train: config.train.clone(),
            model,
            workspace,
            stream,
            max_seq_len: shape.max_seq_len,
            _memory: memory,
        })
    }

    /// What is launched from here on belongs to `stage`.
    pub(super) fn stage(&self, stage: Stage) -> Result<()> {
        match &self.profiler {
            Some(profiler) => profiler.begin(stage),
            None => Ok(()),
        }
    }

    /// Longest sequence that a pass can take: what the workspace holds and the rotary tables reach.
    pub fn max_context(&self) -> usize {
        self.sizes.tokens.min(self.max_seq_len)
    }

    /// Adds the mean cross-entropy times `scale` to the loss, and its gradients to the gradients.
    /// Micro-batches of one step have the same scale and number of tokens.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn accumulate(
        &mut self,
        ids: &[u32],
        labels: &[u32],
        batch: Batch,
        scale: f64,
    ) -> Result<()> {
        let input = self.input.send(ids, labels)?;
        let scale = scale / batch.tokens() as f64;
        // The gradient starts with the power of two below the scale, which bf16 holds exactly.
        let power = scale.log2().floor().exp2();
        self.gradient_scale = (scale / power) as f32;
        let pass = || self.forward_and_backward(&input, batch, scale, power as f32);
        let key = PassKey {
            batch,
            scale: scale.to_bits(),
            first: self.first,
        };
        match self.profiler {
            // Its events are not to be replayed.
            Some(_) => pass()?,
            None => self.replay.run(key, pass)?,
        }
        self.first = false;
        Ok(())
    }

    /// Adds `scale` times the sum of the losses to the loss, and `gradient_scale` times that sum's
    /// gradients to the gradients.
    fn forward_and_backward(
        &self,
        input: &DeviceBatch,
        batch: Batch,
        scale: f64,
        gradient_scale: f32,
    ) -> Result<()> {
        self.forward(input, batch)?;
        self.head(input, batch, scale, Some(gradient_scale))?;
        let ws = &self.workspace;
        let of = NormBackward {
            dn: ws.last_hidden,
            dx: ws.dx,
            dresidual: DevicePtr::NULL,
            dweight: self.model.gradients.norm,
            is_input: false,
        };
        let below = self.model.projections.last().map(|layer| &layer.down);
        self.norm_backward(&self.final_norm(), &of, below, batch)?;
        for index in (0..self.sizes.layers).rev() {
            self.layer_backward(index, batch)?;
        }
        let gradient = self.model.gradients.embed_tokens;
        self.stage(Stage::EmbedBackward)?;
        // SAFETY: dx is (tokens, hidden), the tables are those of this batch.
        unsafe {
            self.embedding
                .backward(ws.dx, &input.groups, gradient, ws.embedding_parts)?
        };
        self.stage(Stage::Other)
    }

    /// Mean cross-entropy of a batch in nats; waits for it.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn evaluate(&mut self, ids: &[u32], labels: &[u32], batch: Batch) -> Result<f64> {
        let input = self.input.send(ids, labels)?;
        self.forward(&input, batch)?;
        let scale = 1.0 / batch.tokens() as f64;
        self.head(&input, batch, scale, None)?;
        self.take_loss()
    }

    /// Logits after the last of `ids`, which are one sequence.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn next_logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let batch = Batch {
            rows: 1,
            seq: ids.len(),
        };
        let input = self.input.send(ids, ids)?;
        self.forward(&input, batch)?;
        self.logits(ids.len() - 1, 1)?;
        let mut logits = vec![bf16::ZERO; self.sizes.vocab];
        let from = self.workspace.logits.address();
        // SAFETY: there are `vocab` logits at least; the copy ends before `logits` goes.
        unsafe { memcpy_dtoh_async(&mut logits, from, self.stream.cu_stream()) }.w()?;
        self.stream.synchronize().w()?;
        Ok(logits.into_iter().map(f32::from).collect())
    }

    /// The loss summed up since the last call; waits for the GPU.
    ///
    /// # Errors
    /// `Tensor` if a kernel failed.
    pub fn take_loss(&mut self) -> Result<f64> {
        let mut loss = [0f64];
        self.stream.memcpy_dtoh(&self.loss, &mut loss).w()?;
        self.stream.memset_zeros(&mut self.loss).w()?;
        self.stream.synchronize().w()?;
        Ok(loss[0])
    }

    fn final_norm(&self) -> Normed {
        Normed {
            x: self.workspace.y,
            weight: self.model.weights.norm,
            kept: NormStatistics {
                scale: DevicePtr::NULL,
                rstd: self.workspace.final_rstd,
            },
        }
    }

    /// Runs a batch through all layers and the final norm, into `workspace.last_hidden`.
    fn forward(&self, input: &DeviceBatch, batch: Batch) -> Result<()> {
        let ws = &self.workspace;
        let table = self.model.weights.embed_tokens;
        self.stage(Stage::Embed)?;
        // SAFETY: the first layer's x is (tokens, hidden), and ids were checked to be in the table.
        unsafe {
            self.embedding
                .forward(input.ids, table, ws.layers[0].x, batch.tokens())?
        };
        for index in 0..self.sizes.layers {
            let y = ws.layers.get(index + 1).map_or(ws.y, |next| next.x);
            self.layer_forward(index, y, batch)?;
        }
        self.stage(Stage::FinalNorm)?;
        // SAFETY: y and last_hidden are (tokens, hidden).
        unsafe {
            self.norm
                .forward(&self.final_norm(), ws.last_hidden, batch.tokens())
        }
    }

    /// `scale` times the sum of all losses of `last_hidden`, a chunk of logits at a time; and the
    /// gradient of `backward` times that sum, which takes the place of `last_hidden`.
    fn head(
        &self,
        input: &DeviceBatch,
        batch: Batch,
        scale: f64,
        backward: Option<f32>,
    ) -> Result<()> {
        let ws = &self.workspace;
        let (tokens, stride) = (batch.tokens(), self.sizes.logit_stride());
        let (hidden, vocab) = (self.sizes.hidden, self.sizes.vocab);
        for first in (0..tokens).step_by(self.sizes.logit_rows()) {
            let rows = (tokens - first).min(self.sizes.logit_rows());
            self.logits(first, rows)?;
            self.stage(Stage::CrossEntropy { tokens: rows })?;
            let (labels, losses) = (input.labels.offset(first), ws.losses.offset(first));
            let logits = Logits {
                values: ws.logits,
                rows,
                vocab,
                stride,
            };
            let Some(gradient_scale) = backward else {
                // SAFETY: losses and labels are (tokens,), and labels were checked.
                unsafe { self.cross_entropy.forward(logits, labels, losses)? };
                continue;
            };
            let gradients = &self.model.gradients;
            let gradient = gradients.lm_head.unwrap_or(gradients.embed_tokens);
            let chunk = ws.last_hidden.offset(first * hidden);
            let add = !self.first || first > 0;
            // SAFETY: logits are (rows, stride), hidden activations (rows, hidden), the head and
            // its gradient (vocab, hidden).
            unsafe {
                self.cross_entropy
                    .backward(logits, labels, losses, gradient_scale)?;
                self.stage(Stage::LmHead { tokens: rows })?;
                self.gemm.multiply(
                    Layout::TN,
                    [vocab, hidden, rows],
                    Operand::bf16(ws.logits, stride),
                    Operand::bf16(chunk, hidden),
                    gradient.output(0, hidden, add),
                )?;
                self.stage(Stage::LmHead { tokens: rows })?;
                self.gemm.multiply(
                    Layout::NN,
                    [rows, hidden, vocab],
                    Operand::bf16(ws.logits, stride),
                    Operand::bf16(self.model.lm_head, hidden),
                    replace(chunk, hidden),
                )?;
            }
        }
        let total = DevicePtr::new(address(&self.loss));
        self.stage(Stage::Other)?;
        // SAFETY: losses are (tokens,).
        unsafe { self.cross_entropy.sum(ws.losses, total, tokens, scale) }
    }

    /// `workspace.logits` of tokens `first .. first + rows`.
    fn logits(&self, first: usize, rows: usize) -> Result<()> {
        let ws = &self.workspace;
        let (hidden, vocab) = (self.sizes.hidden, self.sizes.vocab);
        let chunk = ws.last_hidden.offset(first * hidden);
        self.stage(Stage::LmHead { tokens: rows })?;
        // SAFETY: hidden activations are (rows, hidden), the head (vocab, hidden), and the logits
        // hold `logit_rows` rows.
        unsafe {
            self.gemm.multiply(
                Layout::NT,
                [rows, vocab, hidden],
                Operand::bf16(chunk, hidden),
                Operand::bf16(self.model.lm_head, hidden),
                replace(ws.logits, self.sizes.logit_stride()),
            )
        }
    }
}

/// A bf16 result that replaces what was there.
pub(super) fn replace(values: DevicePtr<bf16>, stride: usize) -> Output {
    Output {
        address: values.address(),
        stride,
        dtype: Float::Bf16,
        add: false,
    }
}
