//! Whole files, read by `gguf` and run by llama.cpp.

use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::json;
use titanbit::export::gguf::{self, TernaryType};
use titanbit::inference::Model;
use titanbit::model::{BitNetConfig, BitNetTransformer};
use titanbit::train::Trainer;

use super::common::*;
use super::files::{config, random_model};
use super::{python, vocabularies};

/// Writes masters and configuration for the script to make codes of.
fn write_source(dir: &Path, model: &BitNetTransformer) {
    let tensors = model.parameters().iter();
    let tensors: Vec<_> = tensors
        .map(|p| (&p.name, p.var.as_detached_tensor()))
        .collect();
    safetensors::serialize_to_file(tensors, None, &dir.join("masters.safetensors")).unwrap();
    let config = serde_json::to_string(model.config()).unwrap();
    fs::write(dir.join("config.json"), config).unwrap();
}

#[test]
fn gguf_reads_the_codes_and_scales_of_the_masters() {
    let Some(python) = python::with(&["gguf", "numpy"]) else {
        return;
    };
    let odd = BitNetConfig {
        hidden_size: 96,
        intermediate_size: 256,
        ..config()
    };
    for config in [config(), odd] {
        let dir = tempfile::tempdir().unwrap();
        let model = random_model(&config);
        write_source(dir.path(), &model);
        let tokenizer = vocabularies::byte_level(290).to_string();
        for ternary in [TernaryType::Tq2_0, TernaryType::Tq1_0] {
            let path = dir.path().join("model.gguf");
            gguf::write(&path, &model, Some(&tokenizer), ternary, "a model").unwrap();
            let name = ternary.to_string();
            python::check(&python, &["tensors", dir.path().to_str().unwrap(), &name]);
        }
    }
}

/// A model that counts to 50 again and again.
fn trained_model(dir: &Path, intermediate_size: usize) -> BitNetTransformer {
    let intermediate_size = format!("model.intermediate_size={intermediate_size}");
    let overrides = [
        "model.vocab_size=300",
        "model.hidden_size=256",
        "model.max_seq_len=128",
        "model.tie_embeddings=true",
        "train.seq_len=64",
        "optimizer.lr=0.003",
        &intermediate_size,
    ];
    let config = load_config(dir, &overrides);
    let mut trainer = Trainer::new(&config, &dir.join("run"), &Device::Cpu).unwrap();
    for _ in 0..60 {
        trainer.step().unwrap();
    }
    trainer.model().clone()
}

/// The likeliest tokens after `prompt`, by the training model.
fn continuation(model: &BitNetTransformer, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let batch = Tensor::new(&ids[..], &Device::Cpu).unwrap();
        let logits = model.logits(&batch.unsqueeze(0).unwrap()).unwrap();
        let best = logits.argmax(2).unwrap().flatten_all().unwrap();
        ids.push(*best.to_vec1::<u32>().unwrap().last().unwrap());
    }
    ids.split_off(prompt.len())
}

/// llama.cpp rounds activations to 8 bits in blocks of 256 features, BitNet in whole tokens. Where
/// rows have 256 features, that is the same, and so are the logits but for their last bits. Rows of
/// 288 are Q4_0, for which blocks have 32 features.
#[test]
fn llama_cpp_gives_the_logits_and_the_greedy_tokens() {
    let Some(python) = python::with(&["llama_cpp", "numpy"]) else {
        return;
    };
    for (intermediate_size, tolerance) in [(256, 5e-4), (512, 2e-2), (288, 2e-2)] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let model = trained_model(dir, intermediate_size);
        let prompts: [Vec<u32>; 2] = [(7..27).collect(), (40..50).chain(0..9).collect()];
        let continuations = prompts
            .each_ref()
            .map(|prompt| continuation(&model, prompt, 60));
        let counted: Vec<u32> = (27..50).chain(0..37).collect();
        assert_eq!(continuations[0], counted, "it has learnt");

        let ids: Vec<u32> = (0..60).map(|i| i * i * 7 % 50).collect();
        let tokenizer = vocabularies::byte_level(290).to_string();
        for ternary in [TernaryType::Tq2_0, TernaryType::Tq1_0] {
            let path = dir.join("model.gguf");
            gguf::write(&path, &model, Some(&tokenizer), ternary, "").unwrap();
            // By the weights in the file, with the embedding in 16 bits.
            let (config, weights) = gguf::read(&path).unwrap();
            let read = Model::new(&config, weights, &Device::Cpu).unwrap();
            let logits = read.session().logits(&ids).unwrap();
            let expected = json!({
                "ids": ids,
                "logits": logits.chunks(config.vocab_size).collect::<Vec<_>>(),
                "tolerance": tolerance,
                "prompts": prompts,
                "continuations": continuations,
            });
            fs::write(dir.join("expected.json"), expected.to_string()).unwrap();
            python::check(&python, &["model", dir.to_str().unwrap()]);
        }
    }
}
