//! What several tests need: a tiny predictable language to train on in a second or two, and what
//! a refusal must be.
#![allow(dead_code)] // each test binary uses its own part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::Device;
use serde_json::Value;
use titanbit::config::Config;
use titanbit::model::{Activation, BitNetConfig, Parameter};
use titanbit::train::Learner;
use titanbit::train::checkpoint::{CheckpointDir, Progress};

/// Tokens 0..50 in a row, again and again: a model can learn it perfectly.
pub fn counting(tokens: usize) -> Vec<u16> {
    (0..tokens).map(|i| (i % 50) as u16).collect()
}

/// The shape of a model that a Python script under `tests/reference` stored with its weights.
pub fn reference_config(path: &Path) -> BitNetConfig {
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let info = metadata.metadata().clone().unwrap();
    let number = |key: &str| info[key].parse().unwrap();
    BitNetConfig {
        vocab_size: number("vocab_size"),
        hidden_size: number("hidden_size"),
        layers: number("layers"),
        heads: number("heads"),
        kv_heads: number("kv_heads"),
        intermediate_size: number("intermediate_size"),
        max_seq_len: number("seq"),
        activation: match info["activation"].as_str() {
            "relu2" => Activation::Relu2,
            _ => Activation::Silu,
        },
        tie_embeddings: info["tie_embeddings"].eq_ignore_ascii_case("true"),
        ..BitNetConfig::default()
    }
}

/// Writes an llm.c token file byte by byte.
pub fn write_bin(path: &Path, tokens: &[u16]) {
    let mut header = [0i32; 256];
    header[..3].copy_from_slice(&[20240520, 1, tokens.len() as i32]);
    let mut bytes: Vec<u8> = header.iter().flat_map(|x| x.to_le_bytes()).collect();
    bytes.extend(tokens.iter().flat_map(|x| x.to_le_bytes()));
    std::fs::write(path, bytes).unwrap();
}

pub const STEPS: u64 = 120;

/// A configuration in `dir` over token files there, for a model of 26 thousand parameters.
pub fn write_config(dir: &Path) -> PathBuf {
    write_bin(&dir.join("train.bin"), &counting(16 * 1000 + 1));
    write_bin(&dir.join("val.bin"), &counting(16 * 20 + 1));
    let config = format!(
        "model: {{vocab_size: 64, hidden_size: 32, layers: 2, heads: 4, kv_heads: 2, \
                  intermediate_size: 48, max_seq_len: 16}}\n\
         train: {{steps: {STEPS}, seq_len: 16, micro_batch: 4, grad_accum: 2, seed: 3}}\n\
         data: {{train: [{{path: {0}/train.bin}}], val: {0}/val.bin, tokenizer: null}}\n\
         optimizer: {{lr: 0.01}}\n\
         schedule: {{kind: constant, warmup_steps: 5}}\n\
         stability: {{ema_decay: 0.9, ema_warmup: 10, settle_steps: 20, recovery_steps: 20}}\n\
         eval: {{every: 40, batches: 5}}\n\
         checkpoint: {{every: 10, keep_last: 3, keep_every: 0}}\n\
         logging: {{every: 10}}\n\
         hardware: {{device: cpu}}\n",
        dir.display()
    );
    let path = dir.join("tiny.yaml");
    std::fs::write(&path, config).unwrap();
    path
}

pub fn load_config(dir: &Path, overrides: &[&str]) -> Config {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    Config::load(&write_config(dir), &overrides).unwrap()
}

/// A checkpoint of step 7 below `run_dir`, with weights as `edit` leaves them.
pub fn save_checkpoint(run_dir: &Path, config: &Config, edit: impl Fn(&Parameter)) -> PathBuf {
    let learner = Learner::new(config, &Device::Cpu).unwrap();
    learner.model().parameters().iter().for_each(edit);
    let progress = Progress {
        step: 7,
        tokens: 123_456,
        position: 9,
        loss: Some(2.5),
        val_loss: Some(3.0),
        best_val_loss: Some(2.75),
        stability: Default::default(),
    };
    CheckpointDir::new(run_dir)
        .save(progress, config, &learner)
        .unwrap()
}

/// The CPU, and a GPU where there is one.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    match titanbit::device::select("cuda") {
        Ok(device) => devices.push(device),
        Err(error) => eprintln!("without a GPU: {error}"),
    }
    devices
}

/// The binary under test, away from the user's settings.
pub fn titanbit() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_titanbit"));
    command.env_remove("RUST_LOG");
    command
}

pub fn metrics(run_dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

/// Loss and gradient norm of every step, to the bit, in the order recorded.
pub fn losses(run_dir: &Path) -> Vec<(u64, f64, f64)> {
    metrics(run_dir)
        .iter()
        .filter(|line| line["event"].is_null())
        .map(|line| {
            let number = |key: &str| line[key].as_f64().unwrap();
            (
                line["step"].as_u64().unwrap(),
                number("loss"),
                number("grad_norm"),
            )
        })
        .collect()
}

/// Every file below `dir` with its content.
pub fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = walkdir::WalkDir::new(dir)
        .into_iter()
        .map(|entry| entry.unwrap().into_path())
        .filter(|path| path.is_file())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

/// Checks that a command failed with `code` and one line of error that has `says`.
#[track_caller]
pub fn assert_refused(output: &Output, code: i32, says: &[&str]) {
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert_eq!(error.lines().count(), 1, "one line: {error}");
    assert!(error.starts_with("error: "), "{error}");
    for part in says {
        assert!(error.contains(part), "`{part}` in: {error}");
    }
}

/// The definition: y[i][j] = sum over l of x[i][l] * w[j][l], in i64.
pub fn exact_product(x: &[i8], w: &[i8], k: usize) -> Vec<i64> {
    x.chunks_exact(k)
        .flat_map(|x| {
            w.chunks_exact(k).map(move |w| {
                let products = x.iter().zip(w).map(|(&x, &w)| i64::from(x) * i64::from(w));
                products.sum()
            })
        })
        .collect()
}

/// Checks that differences are those of sums in f32, but for a few: an activation near a tie gets the
/// other code when a sum is added in another order, which moves all that follows from it.
#[track_caller]
pub fn assert_close(differences: &[f64], by_rounding: f64, by_a_code: f64) {
    let moved = differences.iter().filter(|d| d.abs() > by_rounding).count();
    assert!(moved * 10 <= differences.len(), "{differences:?}");
    assert!(
        differences.iter().all(|d| d.abs() < by_a_code),
        "{differences:?}"
    );
}
