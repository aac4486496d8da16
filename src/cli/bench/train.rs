//! `titanbit bench train`: whole training steps on synthetic tokens.

use std::time::Instant;

use candle_core::Device;
use serde_json::json;

use super::profile::Profile;
use crate::cli::{console, format};
use crate::config::{BackwardDtype, Config, GradientDtype, Kernels, Recompute, StateDtype};
use crate::data::Batch;
use crate::model::{BitNetConfig, MemoryEstimate};
use crate::train::{Learner, UpdateScale, check_memory};
use crate::{Error, Result, device};

/// Time whole training steps: forward, backward, clipping and AdamW, on random tokens.
#[derive(clap::Args)]
pub struct Args {
    /// A published size: 125M, 350M, 700M, 1.3B or 3B
    #[arg(long, value_name = "SIZE", default_value = "125M")]
    model_size: String,

    /// Rows of a micro-batch
    #[arg(long, value_name = "N", default_value_t = 4)]
    micro_batch: usize,

    /// Tokens of a row
    #[arg(long, value_name = "N", default_value_t = 2048)]
    seq_len: usize,

    /// Micro-batches of a step
    #[arg(long, value_name = "N", default_value_t = 4)]
    accum: usize,

    /// Steps to time, after two that warm up
    #[arg(long, value_name = "N", default_value_t = 10)]
    steps: usize,

    /// As train.recompute: none, selective or full
    #[arg(long, value_name = "WHAT", default_value = "none", value_parser = word::<Recompute>)]
    recompute: Recompute,

    /// As train.recompute_layers [default: all]
    #[arg(long, value_name = "N")]
    recompute_layers: Option<usize>,

    /// As precision.backward: bf16 or fp8
    #[arg(long, value_name = "FORMAT", default_value = "bf16", value_parser = word::<BackwardDtype>)]
    backward: BackwardDtype,

    /// As precision.gradients: f32 or bf16
    #[arg(long, value_name = "FORMAT", default_value = "f32", value_parser = word::<GradientDtype>)]
    gradients: GradientDtype,

    /// As precision.optimizer_state: f32, bf16 or int8
    #[arg(long, value_name = "FORMAT", default_value = "f32", value_parser = word::<StateDtype>)]
    optimizer_state: StateDtype,

    /// As hardware.kernels: auto or portable
    #[arg(long, value_name = "WHICH", default_value = "auto", value_parser = word::<Kernels>)]
    kernels: Kernels,

    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,

    /// After the timed steps, run one whose kernels are timed and print where its time goes; the
    /// time stamps make it slower by 1 to 2 us a call. Needs a GPU
    #[arg(long)]
    profile: bool,

    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// A value as the configuration writes it.
pub fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    serde_yaml::from_str(text).map_err(Error::usage)
}

pub fn run(args: &Args) -> Result<()> {
    if args.steps == 0 {
        return Err(Error::usage("--steps 0: at least 1 is needed to time"));
    }
    let config = config(args)?;
    let device = device::select(&args.device)?;
    if args.profile && device.is_cpu() {
        return Err(Error::usage(
            "--profile times the kernels of a GPU and this is the CPU: use --device cuda, or leave \
             out --profile",
        ));
    }
    check_memory(&config, &device)?;
    let free_before = device::free_memory(&device);
    let mut learner = Learner::new(&config, &device)?;
    let mut random = 42u64;
    let mut seconds = Vec::new();
    let mut loss = f64::NAN;
    let steps = args.steps as u64 + 2;
    for t in 1..=steps {
        let batches = random_batches(&config, &mut random);
        let start = Instant::now();
        loss = step(&mut learner, &config, &batches, t)?;
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    // The engine takes all its memory before the first step.
    let used = free_before
        .zip(device::free_memory(&device))
        .map(|(before, after)| before.saturating_sub(after));
    let profile = match args.profile {
        true => {
            let batches = random_batches(&config, &mut random);
            let groups = learner.profile(&config, |learner| {
                step(learner, &config, &batches, steps + 1).map(drop)
            })?;
            // Its memory is wanted to measure what limits the kernels.
            drop(learner);
            Some(Profile::new(groups, &device)?)
        }
        false => None,
    };
    let mut seconds = seconds.split_off(2);
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let tokens_per_s = config.tokens_per_step() as f64 / median;
    let flops = config.model.train_flops_per_token(args.seq_len);
    let peak = device::peak_bf16_tflops(&device).map(|tflops| tflops * 1e12);
    let mfu = peak.map(|peak| flops * tokens_per_s / peak);
    let estimate = match device {
        Device::Cpu => MemoryEstimate::cpu_training(&config.model, args.micro_batch, args.seq_len),
        _ => MemoryEstimate::of_training(&config).total(),
    };
    if args.json {
        let mut report = json!({
            "device": device::describe(&device),
            "model_size": args.model_size,
            "micro_batch": args.micro_batch,
            "seq_len": args.seq_len,
            "accum": args.accum,
            "precision": config.precision,
            "recompute": args.recompute,
            "recompute_layers": args.recompute_layers,
            "steps": args.steps,
            "step_ms": median * 1e3,
            "step_ms_min": seconds[0] * 1e3,
            "step_ms_max": seconds[seconds.len() - 1] * 1e3,
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
            "memory_bytes": used,
            "memory_estimate_bytes": estimate,
            "loss": loss,
        });
        if let Some(profile) = profile {
            report["profile"] = profile.json();
        }
        return console::answer(report);
    }
    let mfu = mfu.map_or("n/a".into(), |mfu| format!("{:.1}%", mfu * 100.0));
    let used = used.map_or("n/a".into(), format::bytes);
    let speed = match tokens_per_s {
        ..1e3 => format!("{tokens_per_s:.1}"),
        _ => format!("{:.1} k", tokens_per_s / 1e3),
    };
    console::answer(format!(
        "{}\n{}, micro-batch {} x {} tokens, {} a step: {} steps\n\n\
         step      {:.1} ms (median; {:.1} to {:.1})\n\
         speed     {speed} tokens/s, MFU {mfu}\n\
         memory    {used} (estimated {})\n\
         loss      {loss:.4} on random tokens (ln {} = {:.4})",
        device::describe(&device),
        args.model_size,
        args.micro_batch,
        args.seq_len,
        args.accum,
        args.steps,
        median * 1e3,
        seconds[0] * 1e3,
        seconds[seconds.len() - 1] * 1e3,
        format::bytes(estimate),
        config.model.vocab_size,
        (config.model.vocab_size as f64).ln(),
    ))?;
    match profile {
        Some(profile) => console::answer(format!("\n{}", profile.table(median))),
        None => Ok(()),
    }
}

/// One whole step, of which it returns the loss.
fn step(learner: &mut Learner, config: &Config, batches: &[Batch], t: u64) -> Result<f64> {
    for batch in batches {
        learner.accumulate(batch, 1.0 / batches.len() as f64)?;
    }
    let (loss, norm) = learner.loss_and_grad_norm()?;
    let scale = UpdateScale {
        gradient: learner.optimizer().clip_coefficient(norm),
        lr: 1e-4,
        weight_decay: config.optimizer.weight_decay,
    };
    learner.update(scale, t)?;
    Ok(loss)
}

fn config(args: &Args) -> Result<Config> {
    let mut config = Config {
        model: BitNetConfig {
            max_seq_len: args.seq_len,
            ..BitNetConfig::preset(&args.model_size)?
        },
        ..Config::default()
    };
    config.train.micro_batch = args.micro_batch;
    config.train.seq_len = args.seq_len;
    config.train.grad_accum = args.accum;
    config.train.recompute = args.recompute;
    config.train.recompute_layers = args.recompute_layers;
    config.precision.backward = args.backward;
    config.precision.gradients = args.gradients;
    config.precision.optimizer_state = args.optimizer_state;
    config.hardware.kernels = args.kernels;
    config.validate()?;
    Ok(config)
}

/// The micro-batches of a step.
fn random_batches(config: &Config, state: &mut u64) -> Vec<Batch> {
    (0..config.train.grad_accum)
        .map(|_| random_batch(config, state))
        .collect()
}

/// Tokens distributed as those of text are: the id of rank r about as often as 1 / r.
fn random_batch(config: &Config, state: &mut u64) -> Batch {
    let (rows, seq_len) = (config.train.micro_batch, config.train.seq_len);
    let vocab = config.model.vocab_size as f64;
    let mut next = || {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let uniform = (*state >> 11) as f64 / (1u64 << 53) as f64;
        (vocab.powf(uniform) as u32).min(config.model.vocab_size as u32) - 1
    };
    let mut ids = || (0..rows * seq_len).map(|_| next()).collect();
    Batch {
        first: 0,
        inputs: ids(),
        targets: ids(),
        rows,
        seq_len,
    }
}
