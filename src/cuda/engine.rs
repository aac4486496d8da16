//! Whole training steps on an NVIDIA GPU: weights and moments live in candle tensors, which
//! checkpoints read and write; everything else is here.

use std::collections::HashMap;

use candle_core::cuda_backend::cudarc::driver::result::memcpy_dtoh_async;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, DType, Device, Storage, Tensor};
use half::bf16;

use super::arena::{Arena, DevicePtr};
use super::kernels::address;
use super::kernels::attention::takes_head_dim;
use super::kernels::bit_linear::Projection;
use super::kernels::gemm::Float;
use super::kernels::optimizer::{AdamWStep, Optimizer, OptimizerTensor};
use super::kernels::rows::MAX_FEATURES;
use super::kernels::ternary_weights::{TernaryTensor, TernaryWeights};
use super::kernels::to_bf16::ToBf16;
use super::network::{Batch, Gradient, LayerProjections, Model, Network};
use super::profile::{Group, Profiler, Stage};
use crate::config::{BackwardDtype, Config, GradientDtype, Kernels, StateDtype};
use crate::data;
use crate::model::weights::Weights;
use crate::model::{BitNetConfig, Parameter, Parameters};
use crate::train::{Moments, Update};
use crate::{Error, Result};

pub struct Engine {
    network: Network,
    optimizer: Optimizer,
    to_bf16: ToBf16,
    codes: DevicePtr<i8>,
    scales: DevicePtr<f32>,
    lm_head_weights: usize,
    gradient_places: Vec<Gradient>,
    device: CudaDevice,
    /// Weights and moments that the kernels write.
    parameters: Parameters,
    _moments: Vec<Moments>,
    _gradients: CudaSlice<u8>,
    /// Ternary codes, their scales, and the LM head in bf16.
    _quantized: CudaSlice<u8>,
}

impl Engine {
    /// Takes over `parameters` and `moments`, which must not be used elsewhere while it works.
    ///
    /// # Errors
    /// `Usage` for a chip or a model that the kernels are not made for, `Tensor` when memory runs
    /// out.
    pub fn new(
        config: &Config,
        device: &CudaDevice,
        parameters: &Parameters,
        moments: &[Moments],
    ) -> Result<Self> {
        let chip = check_chip(device, config.precision.backward)?;
        let hopper = chip == 9 && config.hardware.kernels == Kernels::Auto;
        check_shape(&config.model, config.precision.backward)?;
        let stream = device.cuda_stream();
        let dtype = match config.precision.gradients {
            GradientDtype::F32 => Float::F32,
            GradientDtype::Bf16 => Float::Bf16,
        };
        let lay_out = |arena: &mut Arena| -> Vec<Gradient> {
            let place = |p: &Parameter| gradient_place(p, dtype, arena);
            parameters.iter().map(place).collect()
        };
        let mut measure = Arena::at(0);
        lay_out(&mut measure);
        let gradients = stream.alloc_zeros::<u8>(measure.bytes() as usize).w()?;
        let gradient_places = lay_out(&mut Arena::at(address(&gradients)));

        let counts = config.model.parameter_count();
        let head = config.model.lm_head_weights();
        let projections = 7 * config.model.layers;
        let lay_out = |mut arena: Arena| {
            let codes = arena.take::<i8>(counts.ternary);
            let scales = arena.take::<f32>(projections);
            let lm_head = arena.take::<bf16>(head);
            (codes, scales, lm_head, arena.bytes())
        };
        let (.., bytes) = lay_out(Arena::at(0));
        let quantized = stream.alloc_zeros::<u8>(bytes as usize).w()?;
        let (codes, scales, lm_head, _) = lay_out(Arena::at(address(&quantized)));

        let places = parameters.by_place(&config.model)?;
        let weights = places.map(pointer::<f32>);
        let by_address: HashMap<u64, Gradient> = parameters
            .iter()
            .zip(&gradient_places)
            .map(|(p, gradient)| (pointer::<f32>(&p.var).address(), *gradient))
            .collect();
        let model = Model {
            gradients: weights.map(|weight| by_address[&weight.address()]),
            projections: layer_projections(&config.model, codes, scales),
            ternary_weights: TernaryWeights::load(
                device,
                &ternary_tensors(&config.model, &weights),
            )?,
            lm_head,
            weights,
        };
        let tensors = optimizer_tensors(config, parameters, moments, &gradient_places);
        let mut engine = Self {
            optimizer: Optimizer::load(device, &tensors, config.precision.optimizer_state)?,
            to_bf16: ToBf16::load(device)?,
            network: Network::new(config, model, device, hopper)?,
            codes,
            scales,
            lm_head_weights: head,
            gradient_places,
            device: device.clone(),
            parameters: parameters.clone(),
            _moments: moments.to_vec(),
            _gradients: gradients,
            _quantized: quantized,
        };
        engine.quantize()?;
        Ok(engine)
    }

    /// Adds `scale` times a micro-batch's mean loss and its gradient to this step's.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn accumulate(&mut self, batch: &data::Batch, scale: f64) -> Result<()> {
        let (ids, labels) = (&batch.inputs, &batch.targets);
        self.network.accumulate(ids, labels, shape(batch), scale)
    }

    /// This step's loss in nats, and the global norm of its gradient; waits for the GPU.
    ///
    /// # Errors
    /// `Tensor` if a kernel failed.
    pub fn loss_and_grad_norm(&mut self) -> Result<(f64, f64)> {
        self.network.stage(Stage::GradNorm)?;
        // SAFETY: the table's tensors belong to this engine.
        let norm = unsafe { self.optimizer.grad_norm()? };
        self.network.stage(Stage::Other)?;
        let loss = self.network.take_loss()?;
        Ok((loss, norm * f64::from(self.network.gradient_scale)))
    }

    /// Updates the weights, quantises them anew, and starts the next step without gradients.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn update(&mut self, update: &Update, t: u64) -> Result<()> {
        let step = AdamWStep {
            lr: update.lr as f32,
            weight_decay: update.weight_decay as f32,
            correction1: update.correction1 as f32,
            correction2: update.correction2 as f32,
            factor: update.gradient as f32 * self.network.gradient_scale,
            beta1: update.beta1 as f32,
            beta2: update.beta2 as f32,
            eps: update.eps as f32,
            seed: t as u32,
        };
        self.network.stage(Stage::AdamW)?;
        // SAFETY: the table's tensors belong to this engine.
        unsafe { self.optimizer.adamw(step)? };
        self.network.first = true;
        self.quantize()
    }

    /// Mean loss of a batch in nats; not to be called between `accumulate` and `update`.
    ///
    /// # Errors
    /// `Tensor` if a kernel failed.
    pub fn evaluate(&mut self, batch: &data::Batch) -> Result<f64> {
        let (ids, labels) = (&batch.inputs, &batch.targets);
        self.network.evaluate(ids, labels, shape(batch))
    }

    /// The logits after the last of `ids`, of which the newest that fit are read.
    ///
    /// # Errors
    /// `Tensor` if a kernel failed.
    pub fn next_logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let first = ids.len().saturating_sub(self.network.max_context());
        self.network.next_logits(&ids[first..])
    }

    /// Times every stage from here on; `config` is the one that the engine was made for.
    pub fn start_profile(&mut self, config: &Config) {
        self.network.profiler = Some(Profiler::new(config, self.device.cuda_stream()));
    }

    /// The stages since [`Self::start_profile`]; waits for the GPU.
    ///
    /// # Errors
    /// `Tensor` if a kernel failed.
    pub fn take_profile(&mut self) -> Result<Vec<Group>> {
        match self.network.profiler.take() {
            Some(profiler) => profiler.finish(),
            None => Ok(Vec::new()),
        }
    }

    /// This step's gradients so far as f32 on the CPU, in the order of the parameters.
    ///
    /// # Errors
    /// `Tensor` if a kernel failed.
    pub fn gradients(&self) -> Result<Vec<Tensor>> {
        let read = |(p, gradient): (&Parameter, &Gradient)| {
            let shape = p.var.shape();
            let count = shape.elem_count();
            let sums = match gradient.dtype {
                Float::F32 => {
                    let values = self.read::<f32>(gradient.address, count)?;
                    Tensor::from_vec(values, shape, &Device::Cpu)?
                }
                Float::Bf16 => {
                    let values = self.read::<bf16>(gradient.address, count)?;
                    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F32)?
                }
            };
            Ok((sums * f64::from(self.network.gradient_scale))?)
        };
        (self.parameters.iter().zip(&self.gradient_places))
            .map(read)
            .collect()
    }

    fn read<T: DeviceRepr + Default + Clone>(&self, from: u64, count: usize) -> Result<Vec<T>> {
        let stream = self.device.cuda_stream();
        let mut values = vec![T::default(); count];
        // SAFETY: a gradient has as many values as its weight; the copy ends before this returns.
        unsafe { memcpy_dtoh_async(&mut values, from, stream.cu_stream()) }.w()?;
        stream.synchronize().w()?;
        Ok(values)
    }

    /// Everything that is kept of the master weights for products.
    fn quantize(&mut self) -> Result<()> {
        self.network.stage(Stage::QuantizeWeights)?;
        let model = &self.network.model;
        // SAFETY: the outputs were laid out for this model.
        unsafe {
            model.ternary_weights.quantize(self.scales, self.codes)?;
            let head = *model.weights.lm_head();
            self.to_bf16
                .convert(head, model.lm_head, self.lm_head_weights)
        }
    }
}

fn shape(batch: &data::Batch) -> Batch {
    Batch {
        rows: batch.rows,
        seq: batch.seq_len,
    }
}

/// The major compute capability, if it is one that the kernels run on and that has the formats of
/// the backward products.
fn check_chip(device: &CudaDevice, backward: BackwardDtype) -> Result<i32> {
    let stream = device.cuda_stream();
    let attribute = |which| stream.context().attribute(which).w();
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if major < 8 {
        return Err(Error::usage(format!(
            "this GPU is sm_{major}{minor}: training needs sm_80 (A100, RTX 30xx) or newer; use \
             --device cpu"
        )));
    }
    if backward == BackwardDtype::Fp8 && (major, minor) < (8, 9) {
        return Err(Error::usage(format!(
            "precision.backward is fp8: this GPU is sm_{major}{minor}, and fp8 needs sm_89 (L20, \
             RTX 40xx) or newer; use precision.backward=bf16"
        )));
    }
    Ok(major)
}

/// Rows are read in 16-byte vectors, and attention holds a head's features in registers.
fn check_shape(model: &BitNetConfig, backward: BackwardDtype) -> Result<()> {
    let head_dim = model.head_dim();
    for (key, value) in [
        ("hidden_size", model.hidden_size),
        ("intermediate_size", model.intermediate_size),
        ("kv_heads x the head dimension", model.kv_heads * head_dim),
    ] {
        if !value.is_multiple_of(16) || value > MAX_FEATURES {
            return Err(Error::usage(format!(
                "model.{key} is {value}: on a GPU it must be a multiple of 16, at most \
                 {MAX_FEATURES}; change it, or use --device cpu"
            )));
        }
    }
    let qkv = model.hidden_size + 2 * model.kv_heads * head_dim;
    if backward == BackwardDtype::Fp8 && qkv > MAX_FEATURES {
        return Err(Error::usage(format!(
            "precision.backward is fp8: queries, keys and values together must be at most \
             {MAX_FEATURES} features, and are {qkv}; use precision.backward=bf16"
        )));
    }
    if !takes_head_dim(head_dim) {
        return Err(Error::usage(format!(
            "model.heads is {}: on a GPU hidden_size / heads ({head_dim}) must be a multiple of 4 up \
             to 112, or 120 or 128; change it, or use --device cpu",
            model.heads
        )));
    }
    Ok(())
}

/// Gradients of norms stay f32: they are small, and sums of many tokens.
fn gradient_place(parameter: &Parameter, dtype: Float, arena: &mut Arena) -> Gradient {
    let count = parameter.var.elem_count();
    let dtype = match parameter.var.rank() {
        1 => Float::F32,
        _ => dtype,
    };
    let address = match dtype {
        Float::F32 => arena.take::<f32>(count).address(),
        Float::Bf16 => arena.take::<bf16>(count).address(),
    };
    Gradient { address, dtype }
}

/// Where a weight or moment lies: contiguous tensors of format `T` on the engine's GPU.
fn pointer<T: CudaDType>(tensor: &Tensor) -> DevicePtr<T> {
    let (storage, _) = tensor.storage_and_layout();
    let slice = match &*storage {
        Storage::Cuda(storage) => storage.as_cuda_slice::<T>().ok(),
        _ => None,
    };
    // `Parameters` and `AdamW` make them so.
    DevicePtr::new(address(slice.expect("on a GPU, as the configuration says")))
}

fn ternary_tensors(config: &BitNetConfig, weights: &Weights<DevicePtr<f32>>) -> Vec<TernaryTensor> {
    let mut codes = 0;
    let mut tensors = Vec::new();
    for layer in &weights.layers {
        let projections = [
            layer.q_proj,
            layer.k_proj,
            layer.v_proj,
            layer.o_proj,
            layer.gate_proj,
            layer.up_proj,
            layer.down_proj,
        ];
        for (weights, projection) in projections.into_iter().zip(config.projections()) {
            let count = projection.rows * projection.cols;
            tensors.push(TernaryTensor {
                weights,
                count,
                codes,
            });
            codes += count;
        }
    }
    tensors
}

fn layer_projections(
    config: &BitNetConfig,
    mut codes: DevicePtr<i8>,
    mut scales: DevicePtr<f32>,
) -> Vec<LayerProjections> {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let kv = config.kv_heads * config.head_dim();
    let mut next = |rows: &[usize], k: usize| {
        let n = rows.iter().sum();
        let end = |count: usize| rows.iter().take(count).sum();
        let projection = Projection {
            codes,
            scales,
            n,
            k,
            ends: [end(1), end(2)],
        };
        codes = codes.offset(n * k);
        scales = scales.offset(rows.len());
        projection
    };
    let layer = |_| LayerProjections {
        qkv: next(&[hidden, kv, kv], hidden),
        o: next(&[hidden], hidden),
        gate_up: next(&[ffn, ffn], hidden),
        down: next(&[hidden], ffn),
    };
    (0..config.layers).map(layer).collect()
}

fn optimizer_tensors(
    config: &Config,
    parameters: &Parameters,
    moments: &[Moments],
    gradients: &[Gradient],
) -> Vec<OptimizerTensor> {
    let values = |tensor: &Tensor| match config.precision.optimizer_state {
        StateDtype::F32 => pointer::<f32>(tensor).address(),
        StateDtype::Bf16 => pointer::<bf16>(tensor).address(),
        StateDtype::Int8 => pointer::<u8>(tensor).address(),
    };
    let maxima = |tensor: &Option<Tensor>| tensor.as_ref().map_or(DevicePtr::NULL, pointer);
    let row = |((p, moments), gradient): ((&Parameter, &Moments), &Gradient)| {
        // Rows of an embedding that a step does not see, and norms, are added to; a tied
        // embedding's gradient begins with the LM head's product.
        let is_embedding = p.name == "model.embed_tokens.weight";
        let added_to = p.var.rank() == 1 || (is_embedding && !config.model.tie_embeddings);
        OptimizerTensor {
            weights: pointer(&p.var),
            gradient: gradient.address,
            gradient_dtype: gradient.dtype,
            moments: [values(&moments.m.values), values(&moments.v.values)],
            maxima: [maxima(&moments.m.maxima), maxima(&moments.v.maxima)],
            count: p.var.elem_count(),
            decay: p.decay,
            keep_gradient: !added_to,
        }
    };
    parameters
        .iter()
        .zip(moments)
        .zip(gradients)
        .map(row)
        .collect()
}
