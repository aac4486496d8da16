//! A model's shape and what it costs to store and to train.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::Args;
use crate::Result;
use crate::cli::format;
use crate::config::Config;
use crate::model::{BitNetConfig, MemoryEstimate, ModelBytes, ParameterCount, tensor_shapes};
use crate::train::gpu_stats::list_gpus;

/// The card that the presets are tuned for.
const L20: (&str, u64) = ("NVIDIA L20 (48 GB)", 48_000_000_000);

/// Device memory left to the CUDA context, cuBLAS, and what allocation rounds up.
const RESERVED: u64 = 5 << 28;

#[derive(Serialize)]
pub struct Report {
    name: String,
    model: BitNetConfig,
    /// Tensors of one layer, then those outside the layers.
    layer: Vec<TensorShape>,
    outside: Vec<TensorShape>,
    parameters: Parameters,
    bytes: ModelBytes,
    training: Training,
    /// The GPUs of this machine, or an L20 where there is none.
    fits: Vec<Fit>,
}

#[derive(Serialize)]
struct TensorShape {
    name: String,
    shape: Vec<usize>,
    ternary: bool,
}

#[derive(Serialize)]
struct Parameters {
    total: usize,
    #[serde(flatten)]
    by_class: ParameterCount,
}

#[derive(Serialize)]
struct Training {
    micro_batch: usize,
    seq_len: usize,
    grad_accum: usize,
    flops_per_token: f64,
    memory: MemoryEstimate,
    memory_total: u64,
}

#[derive(Serialize)]
struct Fit {
    device: String,
    memory: u64,
    fits: bool,
    /// At this sequence length; 0 when not even one row fits.
    largest_micro_batch: usize,
}

impl Report {
    pub fn of(args: &Args) -> Result<Self> {
        let (name, mut config) = match (&args.config, &args.model_size) {
            (Some(path), _) => (path.display().to_string(), Config::load(path, &args.set)?),
            (None, size) => {
                let size = size.as_deref().unwrap_or_default();
                let mut model = BitNetConfig::preset(size)?;
                model.max_seq_len = model.max_seq_len.max(args.seq_len.unwrap_or_default());
                let mut config = Config {
                    model,
                    ..Config::default()
                };
                // How many micro-batches a step has makes no difference here.
                config.train.grad_accum = 1;
                (size.to_uppercase(), config)
            }
        };
        config.train.micro_batch = args.micro_batch.unwrap_or(config.train.micro_batch);
        config.train.seq_len = args.seq_len.unwrap_or(config.train.seq_len);
        config.validate()?;
        Ok(Self::of_config(name, config))
    }

    fn of_config(name: String, config: Config) -> Self {
        let memory_of = |micro_batch| {
            let mut config = config.clone();
            config.train.micro_batch = micro_batch;
            MemoryEstimate::of_training(&config)
        };
        let memory = memory_of(config.train.micro_batch);
        let mut devices: Vec<(String, u64)> = list_gpus()
            .into_iter()
            .map(|gpu| (gpu.name, gpu.total_memory))
            .collect();
        if devices.is_empty() {
            devices.push((L20.0.into(), L20.1));
        }
        let fits = devices.into_iter().map(|(device, available)| {
            let fits =
                |needed: MemoryEstimate| needed.total().saturating_add(RESERVED) <= available;
            Fit {
                device,
                memory: available,
                fits: fits(memory),
                largest_micro_batch: largest(|micro_batch| fits(memory_of(micro_batch))),
            }
        });
        let fits = fits.collect();
        let Config { model, train, .. } = config;
        let parameters = model.parameter_count();
        let (layer, outside) = shapes(&model);
        Self {
            layer,
            outside,
            parameters: Parameters {
                total: parameters.total(),
                by_class: parameters,
            },
            bytes: ModelBytes::of(&model),
            training: Training {
                micro_batch: train.micro_batch,
                seq_len: train.seq_len,
                grad_accum: train.grad_accum,
                flops_per_token: model.train_flops_per_token(train.seq_len),
                memory,
                memory_total: memory.total(),
            },
            fits,
            name,
            model,
        }
    }
}

/// The largest number, below a million, that `fits`; every smaller one does too.
fn largest(fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, 1 << 20);
    while high - low > 1 {
        let middle = (low + high) / 2;
        match fits(middle) {
            true => low = middle,
            false => high = middle,
        }
    }
    low
}

fn shapes(model: &BitNetConfig) -> (Vec<TensorShape>, Vec<TensorShape>) {
    const FIRST_LAYER: &str = "model.layers.0.";
    let projections = model.projections().map(|projection| projection.name);
    let mut layer = Vec::new();
    let mut outside = Vec::new();
    for (name, shape) in tensor_shapes(model) {
        let tensor = |name: &str| {
            let name = name.trim_end_matches(".weight").to_string();
            TensorShape {
                ternary: projections.contains(&name.as_str()),
                name,
                shape: shape.clone(),
            }
        };
        match name.strip_prefix(FIRST_LAYER) {
            Some(name) => layer.push(tensor(name)),
            None if name.starts_with("model.layers.") => {}
            None => outside.push(tensor(&name)),
        }
    }
    (layer, outside)
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let model = &self.model;
        let count = |n: usize| format::count(n as u64);
        writeln!(
            f,
            "{}: {} layers, hidden {}, {} heads ({} kv) of {}, vocabulary {}\n",
            self.name,
            model.layers,
            model.hidden_size,
            model.heads,
            model.kv_heads,
            model.head_dim(),
            model.vocab_size
        )?;
        writeln!(f, "each layer")?;
        self.layer.iter().try_for_each(|tensor| tensor.fmt(f))?;
        writeln!(f, "outside the layers")?;
        self.outside.iter().try_for_each(|tensor| tensor.fmt(f))?;

        let by_class = &self.parameters.by_class;
        let saved = self.bytes.bf16 as f64 / self.bytes.packed as f64;
        writeln!(
            f,
            "\nparameters          {:>12}",
            count(self.parameters.total)
        )?;
        writeln!(f, "  ternary           {:>12}", count(by_class.ternary))?;
        writeln!(
            f,
            "  full precision    {:>12}",
            count(by_class.full_precision)
        )?;
        writeln!(
            f,
            "size in bf16        {:>12}",
            format::bytes(self.bytes.bf16)
        )?;
        writeln!(
            f,
            "size packed, 2 bits {:>12}  {saved:.1}x smaller; embedding, head and norms stay bf16",
            format::bytes(self.bytes.packed)
        )?;

        let Training {
            micro_batch,
            seq_len,
            flops_per_token,
            memory,
            ..
        } = &self.training;
        writeln!(
            f,
            "\ntraining, micro-batch {micro_batch} x {seq_len} tokens"
        )?;
        writeln!(
            f,
            "  compute per token {:>12}",
            format::flops(*flops_per_token)
        )?;
        for (part, bytes) in [
            ("weights", memory.weights),
            ("quantized weights", memory.quantized),
            ("gradients", memory.gradients),
            ("optimizer", memory.optimizer),
            ("activations", memory.activations),
            ("GPU memory", memory.total()),
        ] {
            writeln!(f, "  {part:<17} {:>12}", format::bytes(bytes))?;
        }
        for fit in &self.fits {
            let verdict = match (fit.fits, fit.largest_micro_batch) {
                (true, largest) => format!("fits, up to micro-batch {largest}"),
                (false, 0) => "does not fit, at any micro-batch".into(),
                (false, largest) => format!("does not fit; micro-batch {largest} would"),
            };
            writeln!(
                f,
                "  {}, {}: {verdict}",
                fit.device,
                format::bytes(fit.memory)
            )?;
        }
        Ok(())
    }
}

impl Display for TensorShape {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let shape = self.shape.iter().map(usize::to_string);
        let shape = shape.collect::<Vec<_>>().join(" x ");
        let class = match self.ternary {
            true => "ternary",
            false => "full precision",
        };
        writeln!(f, "  {:<26} {shape:>14}  {class}", self.name)
    }
}
