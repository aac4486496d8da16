//! `titanbit info` through the binary: every mode in words and in JSON, and every wrong question.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use candle_core::{Device, Tensor};
use common::{assert_refused, save_checkpoint};
use serde_json::Value;
use tempfile::TempDir;
use titanbit::config::Config;
use titanbit::model::BitNetConfig;

fn info(args: &[&str]) -> Output {
    let mut command = Command::cargo_bin("titanbit").unwrap();
    command.arg("info").args(args).output().unwrap()
}

#[track_caller]
fn refused(args: &[&str], code: i32, says: &[&str]) {
    let output = info(args);
    assert_refused(&output, code, says);
    assert!(output.stdout.is_empty(), "{args:?}");
}

fn human(args: &[&str]) -> String {
    let output = info(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {stderr}");
    assert_eq!(stderr, "", "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    let text = human(&[args, &["--json"]].concat());
    serde_json::from_str(&text).unwrap()
}

/// The line of `text` that starts with `label`, words separated by one space.
fn line(text: &str, label: &str) -> String {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text.lines()
        .map(words)
        .find(|line| line.starts_with(label))
        .unwrap_or_else(|| panic!("no line `{label}` in:\n{text}"))
}

#[test]
fn this_machine() {
    let text = human(&[]);
    let threads = std::thread::available_parallelism().unwrap();
    assert!(line(&text, "CPU ").contains(&format!("{threads} threads")));
    assert_eq!(
        line(&text, "CUDA support").contains("yes"),
        cfg!(feature = "cuda")
    );
    let report = json(&[]);
    assert_eq!(report["cuda_support"], cfg!(feature = "cuda"));
    assert_eq!(report["cpu"]["threads"], threads.get());
    let gpus = report["gpus"].as_array().unwrap();
    assert_eq!(gpus.is_empty(), text.contains("none found"));
}

/// Hidden 768, 12 layers, 12 heads of 64 over 4 kv heads, intermediate 2048, vocabulary 32000:
/// a layer has 2 x 768^2 + 2 x 256 x 768 + 3 x 2048 x 768 ternary weights.
#[test]
fn a_published_size() {
    const TERNARY: u64 = 12 * (2 * 768 * 768 + 2 * 256 * 768 + 3 * 2048 * 768);
    const REST: u64 = 2 * 32000 * 768 + 12 * (3 * 768 + 2048) + 768;

    let args = [
        "--model-size",
        "125m",
        "--micro-batch",
        "2",
        "--seq-len",
        "512",
    ];
    let report = json(&args);
    assert_eq!(report["parameters"]["ternary"], TERNARY);
    assert_eq!(report["parameters"]["full_precision"], REST);
    assert_eq!(report["parameters"]["total"], TERNARY + REST);
    // All row lengths are multiples of 16, so 2 bits a weight exactly, and 7 scales a layer.
    assert_eq!(
        report["bytes"]["packed"],
        TERNARY / 4 + 12 * 7 * 4 + 2 * REST
    );
    assert_eq!(report["bytes"]["bf16"], 2 * (TERNARY + REST));
    let flops = 6 * (TERNARY + 32000 * 768) + 12 * 12 * 768 * 512;
    let training = &report["training"];
    assert_eq!(training["flops_per_token"], flops as f64);
    let memory = &training["memory"];
    assert_eq!(memory["weights"], 4 * (TERNARY + REST));
    // Two moments in bf16.
    assert_eq!(memory["optimizer"], 4 * (TERNARY + REST));
    // Int8 codes, and the LM head in bf16.
    assert_eq!(memory["quantized"], TERNARY + 2 * 32000 * 768);
    let parts = [
        "weights",
        "quantized",
        "gradients",
        "optimizer",
        "activations",
    ];
    let sum: u64 = parts
        .iter()
        .map(|part| memory[part].as_u64().unwrap())
        .sum();
    assert_eq!(training["memory_total"], sum);
    let tensors = report["layer"].as_array().unwrap();
    assert_eq!(tensors.len(), 11);
    let k_proj = tensors.iter().find(|t| t["name"] == "self_attn.k_proj");
    assert_eq!(k_proj.unwrap()["shape"], serde_json::json!([256, 768]));
    assert_eq!(k_proj.unwrap()["ternary"], true);
    assert_eq!(tensors.iter().filter(|t| t["ternary"] == true).count(), 7);

    let text = human(&args);
    assert_eq!(line(&text, "parameters"), "parameters 124.70 M");
    assert_eq!(line(&text, "ternary"), "ternary 75.50 M");
    assert_eq!(
        line(&text, "self_attn.k_proj"),
        "self_attn.k_proj 256 x 768 ternary"
    );
    assert_eq!(
        line(&text, "compute per token"),
        "compute per token 657.06 MFLOP"
    );
    assert!(text.contains("micro-batch 2 x 512 tokens"), "{text}");
}

#[test]
fn the_largest_micro_batch_is_the_last_that_fits() {
    let fit = |micro_batch: u64| {
        let micro_batch = micro_batch.to_string();
        let args = [
            "--model-size",
            "125M",
            "--seq-len",
            "64",
            "--micro-batch",
            &micro_batch,
        ];
        json(&args)["fits"][0].clone()
    };
    let largest = fit(1)["largest_micro_batch"].as_u64().unwrap();
    assert_eq!(fit(largest)["fits"], true);
    assert_eq!(fit(largest + 1)["fits"], false);
}

#[test]
fn the_model_of_a_config() {
    let dir = TempDir::new().unwrap();
    let config = dir.path().join("tiny.yaml");
    let text =
        "model: {preset: 125M, layers: 2}\ntrain: {micro_batch: 3, seq_len: 128, grad_accum: 1}\n";
    fs::write(&config, text).unwrap();
    let config = config.to_str().unwrap();

    let report = json(&["--config", config, "--set", "model.vocab_size=4096"]);
    assert_eq!(report["model"]["layers"], 2);
    assert_eq!(report["model"]["vocab_size"], 4096);
    let training = &report["training"];
    assert_eq!(training["micro_batch"], 3);
    assert_eq!(training["seq_len"], 128);
    assert_eq!(
        training["memory"]["gradients"],
        training["memory"]["weights"]
    );
    let formats = ["precision.gradients=bf16", "precision.optimizer_state=int8"];
    let args = ["--config", config, "--set", formats[0], "--set", formats[1]];
    let memory = json(&args)["training"]["memory"].clone();
    // Two bytes a weight for both moments and 4 for every 256 of each; gradients of norms stay f32.
    let weights = memory["weights"].as_u64().unwrap() / 4;
    let norms = 2 * (3 * 768 + 2048) + 768;
    assert_eq!(memory["gradients"], 2 * weights + 2 * norms);
    assert_eq!(
        memory["optimizer"],
        2 * (weights + 4 * weights.div_ceil(256))
    );
    assert_eq!(
        json(&["--config", config, "--seq-len", "64"])["training"]["seq_len"],
        64
    );
    assert!(human(&["--config", config]).contains("2 layers, hidden 768, 12 heads (4 kv) of 64"));

    let long = ["--config", config, "--seq-len", "9999"];
    refused(&long, 2, &["train.seq_len is 9999"]);
    let unknown = ["--config", config, "--set", "model.layer=3"];
    refused(&unknown, 2, &["did you mean `model.layers`"]);
}

#[test]
fn wrong_questions_about_models() {
    refused(&["--model-size", "2B"], 2, &["125M, 350M, 700M, 1.3B, 3B"]);
    refused(
        &["--config", "no/such.yaml"],
        2,
        &["no/such.yaml does not exist"],
    );
    let zero = ["--model-size", "125M", "--micro-batch", "0"];
    refused(&zero, 2, &["train.micro_batch is 0"]);
    let huge = usize::MAX.to_string();
    let rows = ["--model-size", "3B", "--micro-batch", &huge];
    refused(&rows, 2, &["train.micro_batch is", "at most 1048576"]);
    // More memory than any device has is still an answer: it does not fit.
    let report = json(&["--model-size", "3B", "--micro-batch", "30000"]);
    assert_eq!(report["fits"][0]["fits"], false);
    for two in [
        ["--model-size", "3B", "--config", "a.yaml"],
        ["--data", "a.bin", "--checkpoint", "b"],
        ["--data", "a.bin", "--micro-batch", "2"],
        ["--model-size", "3B", "--set", "a.b=c"],
        ["--checkpoint", "b", "--dtype", "u16"],
    ] {
        assert_eq!(info(&two).status.code(), Some(2), "{two:?}");
    }
}

/// Three documents of which one is empty, tokenised by the binary itself.
fn token_file(dir: &Path) -> PathBuf {
    let jsonl = dir.join("docs.jsonl");
    let words = "the quick brown fox jumps over the lazy dog ".repeat(40);
    let lines =
        format!("{{\"text\": \"{words}\"}}\n{{\"text\": \"a fox\"}}\n{{\"text\": \"dog\"}}\n");
    fs::write(&jsonl, lines).unwrap();
    let bin = dir.join("train.bin");
    let output = Command::cargo_bin("titanbit")
        .unwrap()
        .args(["tokenize", "--train-vocab", "300", "--input"])
        .arg(&jsonl)
        .arg("--output")
        .arg(&bin)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    bin
}

#[test]
fn a_token_file_with_its_sidecar() {
    let dir = TempDir::new().unwrap();
    let bin = token_file(dir.path());
    let args = ["--data", bin.to_str().unwrap()];
    let report = json(&args);
    let tokens = (fs::metadata(&bin).unwrap().len() - 1024) / 2;
    assert_eq!(report["tokens"], tokens);
    assert_eq!(report["dtype"], "u16");
    assert_eq!(report["checksum_verified"], true);
    let sidecar = &report["sidecar"];
    assert_eq!(sidecar["documents"], 3);
    let text_bytes = (44 * 40 + "a fox".len() + "dog".len()) as f64;
    assert_eq!(sidecar["bytes_per_token"], text_bytes / tokens as f64);
    let vocabulary = sidecar["vocab_size"].as_u64().unwrap();
    assert!((257..=300).contains(&vocabulary), "{vocabulary}");
    assert!(report["largest_id"].as_u64().unwrap() < vocabulary);

    let text = human(&args);
    assert!(line(&text, "tokens").starts_with(&format!("tokens {tokens} (u16, ")));
    assert_eq!(line(&text, "documents"), "documents 3");
    assert!(line(&text, "vocabulary").contains(&vocabulary.to_string()));
    assert!(line(&text, "checksum").ends_with("correct"));
    assert!(line(&text, "made by").contains("tokenize"));
}

/// An llm.c file as others write it: magic, version and count, then the tokens; no sidecar.
#[test]
fn token_files_that_others_wrote() {
    let dir = TempDir::new().unwrap();
    let ids: [u16; 4] = [7, 50256, 3, 0];
    let tokens: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let mut header = vec![0u8; 1024];
    for (field, value) in [20240520i32, 1, 4].into_iter().enumerate() {
        header[4 * field..4 * field + 4].copy_from_slice(&value.to_le_bytes());
    }
    let llmc = dir.path().join("gpt2.bin");
    fs::write(&llmc, [header, tokens.clone()].concat()).unwrap();
    let report = json(&["--data", llmc.to_str().unwrap()]);
    assert_eq!(report["tokens"], 4);
    assert_eq!(report["largest_id"], 50256);
    assert_eq!(report["checksum_verified"], false);
    assert_eq!(report["sidecar"], Value::Null);
    assert!(human(&["--data", llmc.to_str().unwrap()]).contains("sidecar       none"));

    let nanogpt = dir.path().join("nanogpt.bin");
    fs::write(&nanogpt, tokens).unwrap();
    let nanogpt = nanogpt.to_str().unwrap();
    refused(&["--data", nanogpt], 1, &["dtype"]);
    assert_eq!(json(&["--data", nanogpt, "--dtype", "u16"])["tokens"], 4);
    refused(&["--data", nanogpt, "--dtype", "u8"], 2, &["u16 or u32"]);
}

#[test]
fn damaged_token_files() {
    let dir = TempDir::new().unwrap();
    refused(
        &["--data", "no/such.bin"],
        2,
        &["no/such.bin does not exist"],
    );

    let bin = token_file(dir.path());
    let path = bin.to_str().unwrap();
    let whole = fs::read(&bin).unwrap();
    fs::write(&bin, &whole[..whole.len() - 3]).unwrap();
    refused(&["--data", path], 1, &[path, "cut short"]);

    let mut changed = whole.clone();
    changed[1030] ^= 1;
    fs::write(&bin, changed).unwrap();
    refused(&["--data", path], 1, &["checksum"]);
}

/// A checkpoint at step 7 of a two-layer model. Each projection of layer 0 repeats (1, -1, 0, 0),
/// mean |W| = 1/2, so a quarter of its codes is -1, half 0, a quarter +1; in layer 1 all are +1.
fn checkpoint(run_dir: &Path) -> PathBuf {
    let mut config = Config {
        model: BitNetConfig {
            vocab_size: 32,
            hidden_size: 16,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            intermediate_size: 32,
            max_seq_len: 64,
            ..BitNetConfig::default()
        },
        ..Config::default()
    };
    config.train.seq_len = 64;
    save_checkpoint(run_dir, &config, |parameter| {
        if parameter.name.contains("_proj") {
            let shape = parameter.var.shape();
            let pattern = match parameter.name.contains("layers.0.") {
                true => [1.0, -1.0, 0.0, 0.0],
                false => [0.3f32; 4],
            };
            let values: Vec<f32> = (0..shape.elem_count()).map(|i| pattern[i % 4]).collect();
            let weight = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            parameter.var.set(&weight).unwrap();
        }
    })
}

#[test]
fn a_checkpoint() {
    let dir = TempDir::new().unwrap();
    let checkpoint = checkpoint(dir.path());
    let latest = checkpoint.with_file_name("latest");
    let args = ["--checkpoint", latest.to_str().unwrap()];
    let report = json(&args);
    assert_eq!(report["path"], checkpoint.to_str().unwrap());
    assert_eq!(report["step"], 7);
    assert_eq!(report["tokens"], 123_456);
    assert_eq!(report["loss"], 2.5);
    assert_eq!(report["val_loss"], 3.0);
    assert_eq!(report["checksums_verified"], true);
    assert_eq!(report["config"]["model"]["hidden_size"], 16);
    let projections = report["projections"].as_array().unwrap();
    assert_eq!(projections.len(), 7);
    for projection in projections {
        for (code, mean, min, max) in [
            ("minus_one", 0.125, 0.0, 0.25),
            ("zero", 0.25, 0.0, 0.5),
            ("plus_one", 0.625, 0.25, 1.0),
        ] {
            let share = &projection[code];
            assert_eq!(share["mean"], mean, "{projection} {code}");
            assert_eq!(share["min"], min, "{projection} {code}");
            assert_eq!(share["max"], max, "{projection} {code}");
        }
    }

    let text = human(&args);
    assert_eq!(line(&text, "step"), "step 7 of 100000");
    assert_eq!(
        line(&text, "validation loss"),
        "validation loss 3.0000 (perplexity 20.09)"
    );
    assert_eq!(
        line(&text, "best so far"),
        "best so far 2.7500 (perplexity 15.64)"
    );
    assert!(line(&text, "written").ends_with("checksums correct"));
    assert_eq!(
        line(&text, "mlp.down_proj"),
        "mlp.down_proj 12.5 (0.0 - 25.0) 25.0 (0.0 - 50.0) 62.5 (25.0 - 100.0)"
    );
}

#[test]
fn what_is_no_whole_checkpoint() {
    let dir = TempDir::new().unwrap();
    let missing = ["--checkpoint", "no/such"];
    refused(&missing, 2, &["no/such does not exist"]);
    let empty = ["--checkpoint", dir.path().to_str().unwrap()];
    refused(&empty, 2, &["is not a checkpoint"]);

    let checkpoint = checkpoint(dir.path());
    let weights = checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let torn = ["--checkpoint", checkpoint.to_str().unwrap()];
    refused(&torn, 1, &["model.safetensors", "checksum"]);
}

/// What nobody reads is no error, what cannot be written is.
#[cfg(unix)]
#[test]
fn answers_that_cannot_be_written() {
    let binary = env!("CARGO_BIN_EXE_titanbit");
    let gone = std::process::Command::new(binary)
        .args(["info", "--model-size", "3B"])
        .stdout({
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            writer
        })
        .output()
        .unwrap();
    assert!(gone.status.success() && gone.stderr.is_empty(), "{gone:?}");
    #[cfg(target_os = "linux")]
    {
        let full = std::process::Command::new(binary)
            .arg("info")
            .stdout(fs::File::create("/dev/full").unwrap())
            .output()
            .unwrap();
        assert_refused(&full, 1, &["cannot write", "standard output"]);
        let mute = std::process::Command::new(binary)
            .arg("no-such-command")
            .stderr(fs::File::create("/dev/full").unwrap())
            .status();
        assert_eq!(mute.unwrap().code(), Some(2));
    }
}
