//! What `titanbit export` writes for `transformers`, loaded and run by `transformers` itself, on the
//! CPU: its logits and its greedy continuation against those of the training model.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use common::{load_config, titanbit};
use half::bf16;
use serde_json::Value;
use titanbit::config::Config;
use titanbit::data::tokenize::vocabulary::Vocabulary;
use titanbit::export::{ExportOptions, Format, run};
use titanbit::model::{BitNetTransformer, Parameters};
use titanbit::train::checkpoint::{load_model, resolve};

const TEXT: &str = "Zwölf Boxkämpfer <|endoftext|> 你好, dot .";
const TOKENS: usize = 8;
const CONTINUATION: usize = 7;

/// A model of 300 tokens that has learnt to count, and its tokenizer.
struct Trained {
    config: Config,
    checkpoint: PathBuf,
    tokenizer: Vocabulary,
}

fn train(dir: &Path, activation: &str, tie_embeddings: bool) -> Trained {
    let text: String = (0..2000).map(|i| format!("{} ", i * i)).collect();
    let tokenizer = Vocabulary::train(300, [text].into_iter()).unwrap();
    let tokenizer_path = dir.join("tokenizer.json");
    std::fs::write(&tokenizer_path, &tokenizer.json).unwrap();
    let overrides = [
        "model.vocab_size=300".to_string(),
        format!("model.activation={activation}"),
        format!("model.tie_embeddings={tie_embeddings}"),
        format!("data.tokenizer={}", tokenizer_path.display()),
    ];
    let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
    let config = load_config(dir, &overrides);
    let out = dir.join("run");
    let mut command = titanbit();
    command
        .args(["train", "--config"])
        .arg(dir.join("tiny.yaml"));
    command.arg("--out").arg(&out);
    for value in overrides {
        command.args(["--set", value]);
    }
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    Trained {
        config,
        checkpoint: resolve(&out.join("checkpoints/latest")).unwrap(),
        tokenizer,
    }
}

/// The training model, its embedding and LM head rounded as the export rounds them.
fn rounded(model: &BitNetTransformer) -> BitNetTransformer {
    let round = |weight: &Tensor| {
        let values: Vec<f32> = weight.flatten_all().unwrap().to_vec1().unwrap();
        let values: Vec<f32> = values
            .into_iter()
            .map(|x| bf16::from_f32(x).to_f32())
            .collect();
        Tensor::from_vec(values, weight.shape(), &Device::Cpu).unwrap()
    };
    let tensors = model.parameters().iter().map(|p| {
        let is_table = p.name.contains("embed_tokens") || p.name.contains("lm_head");
        let weight = match is_table {
            true => round(p.var.as_tensor()),
            false => p.var.as_tensor().clone(),
        };
        (p.name.clone(), weight)
    });
    let tensors = tensors.collect();
    let parameters = Parameters::from_tensors(model.config(), &tensors, &Device::Cpu).unwrap();
    BitNetTransformer::with_parameters(model.config(), parameters).unwrap()
}

fn logits(model: &BitNetTransformer, ids: &[u32]) -> Tensor {
    let ids = Tensor::new(ids, &Device::Cpu).unwrap();
    let logits = model.logits(&ids.unsqueeze(0).unwrap()).unwrap();
    logits.squeeze(0).unwrap()
}

fn greedy(model: &BitNetTransformer, ids: &[u32]) -> Vec<u32> {
    let mut ids = ids.to_vec();
    for _ in 0..CONTINUATION {
        let last = logits(model, &ids).get(ids.len() - 1).unwrap();
        ids.push(last.argmax(0).unwrap().to_scalar().unwrap());
    }
    ids.split_off(ids.len() - CONTINUATION)
}

/// What `tests/reference/check_transformers.py` compares with.
fn write_expected(path: &Path, trained: &Trained) {
    let model = load_model(&trained.checkpoint, &trained.config, &Device::Cpu).unwrap();
    let ids: Vec<u32> = (20..20 + TOKENS as u32).collect();
    let exact = rounded(&model);
    let integers = |ids: &[u32]| {
        Tensor::new(ids, &Device::Cpu)
            .unwrap()
            .to_dtype(DType::I64)
            .unwrap()
    };
    let continuation = greedy(&exact, &ids);
    assert_eq!(
        continuation,
        (28..28 + CONTINUATION as u32).collect::<Vec<_>>()
    );
    let mut tensors = vec![
        ("ids".to_string(), integers(&ids)),
        ("logits".to_string(), logits(&exact, &ids)),
        ("greedy".to_string(), integers(&continuation)),
    ];
    let projections = model
        .parameters()
        .iter()
        .filter(|p| p.name.contains("_proj"));
    tensors.extend(projections.map(|p| (format!("master.{}", p.name), p.var.as_detached_tensor())));
    let metadata = [("text".to_string(), TEXT.to_string())].into();
    safetensors::serialize_to_file(tensors, Some(metadata), path).unwrap();
}

/// `TITANBIT_PYTHON`, else `python3`, if it can import what the script needs.
fn python_with_transformers() -> Option<String> {
    let python = std::env::var("TITANBIT_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python)
        .args(["-c", "import torch, transformers, accelerate"])
        .output()
        .is_ok_and(|out| out.status.success());
    found.then_some(python)
}

#[test]
fn transformers_computes_the_same_logits() {
    let Some(python) = python_with_transformers() else {
        return println!(
            "skipped: no python with torch, transformers and accelerate (set TITANBIT_PYTHON to \
             one that has them)"
        );
    };
    let dir = tempfile::tempdir().unwrap();
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/reference/check_transformers.py"
    );
    let mut command = Command::new(&python);
    // Nothing is compiled: it takes longer than all the rest, and gives the same numbers.
    command.arg(script).env("TORCHDYNAMO_DISABLE", "1");
    let mut names = Vec::new();
    let mut text_ids = Vec::new();
    for (activation, tie_embeddings) in [("silu", false), ("relu2", true)] {
        let dir = dir.path().join(activation);
        std::fs::create_dir(&dir).unwrap();
        let trained = train(&dir, activation, tie_embeddings);
        let expected = dir.join("expected.safetensors");
        write_expected(&expected, &trained);
        let encoding = trained.tokenizer.tokenizer.encode(TEXT, false).unwrap();
        for (format, name) in [(Format::Hf, "hf"), (Format::HfPacked, "hf-packed")] {
            let options = ExportOptions {
                checkpoint: trained.checkpoint.clone(),
                format,
                output: dir.join(name),
                tokenizer: None,
                force: false,
            };
            run(&options).unwrap();
            command.arg(dir.join(name)).arg(&expected);
            names.push(format!(
                "{name} of a model with {activation}, tied: {tie_embeddings}"
            ));
            text_ids.push(encoding.get_ids().to_vec());
        }
    }
    let out = command.output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{errors}");
    let stdout = String::from_utf8(out.stdout).unwrap();
    let results: Vec<Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(results.len(), names.len());
    for ((name, result), text_ids) in names.iter().zip(&results).zip(text_ids) {
        println!("{name}: {result}");
        assert_eq!(result["class"], "BitNetForCausalLM");
        assert_eq!(result["codes"], 0, "codes differ: {name}");
        // An f32 mean summed in another order, or an inverse of an inverse.
        assert!(result["scale"].as_f64().unwrap() < 1e-6, "{name}");
        let number = |kind: &str, key: &str| result[kind][key].as_f64().unwrap();
        assert!(number("float32", "median") < 2e-6, "{name}");
        assert!(number("float32", "largest") < 0.05, "{name}");
        // Activations in bf16 have 8 bits, about as many as int8 codes.
        assert!(number("default", "largest") < 0.1, "{name}");
        for kind in ["float32", "default"] {
            assert_eq!(number(kind, "argmax"), 1.0, "{name}, {kind}");
            assert_eq!(result[kind]["greedy"], CONTINUATION, "{name}, {kind}");
        }
        assert_eq!(result["text_ids"], serde_json::json!(text_ids), "{name}");
        assert_eq!(result["text"], TEXT, "{name}");
        assert_eq!(result["eos"], 0, "{name}");
    }
}
