//! `titanbit export`: what each format holds, read by an independent reader and run by titanbit itself;
//! targets that exist, checkpoints and models that cannot be exported.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use candle_core::{Device, Tensor};
use common::{assert_refused, files, save_checkpoint, titanbit};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;
use titanbit::config::Config;
use titanbit::data::tokenize::vocabulary::Vocabulary;
use titanbit::inference::{self, Model, PackedWeights};
use titanbit::model::{Activation, BitNetConfig, BitNetTransformer, Parameter, tensor_shapes};
use titanbit::quant::ternary::{absmean, ternary_codes};
use titanbit::train::checkpoint::load_model;

const FORMATS: [&str; 3] = ["hf", "hf-packed", "packed"];
const VOCAB: usize = 300;

fn config(tie_embeddings: bool) -> Config {
    let mut config = Config {
        model: BitNetConfig {
            vocab_size: VOCAB,
            hidden_size: 32,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            // No multiple of the 16 codes of a word.
            intermediate_size: 52,
            max_seq_len: 48,
            rope_theta: 5000.0,
            activation: match tie_embeddings {
                true => Activation::Relu2,
                false => Activation::Silu,
            },
            tie_embeddings,
            ..BitNetConfig::default()
        },
        ..Config::default()
    };
    config.train.seq_len = 48;
    config.data.tokenizer = None;
    config
}

/// Every tensor is of another size, so that none can be taken for another.
fn distinguish(parameter: &Parameter) {
    let name = parameter.name.bytes().map(u32::from).sum::<u32>();
    let factor = 1.0 + f64::from(name % 97) / 97.0;
    let weight = (parameter.var.as_tensor() * factor).unwrap();
    parameter.var.set(&weight).unwrap();
}

fn write_tokenizer(dir: &Path, size: usize) -> PathBuf {
    let text: String = (0..2000).map(|i| format!("{} ", i * i)).collect();
    let vocabulary = Vocabulary::train(size, [text].into_iter()).unwrap();
    assert_eq!(vocabulary.size as usize, size);
    let path = dir.join(format!("tokenizer_{size}.json"));
    fs::write(&path, vocabulary.json).unwrap();
    path
}

/// A run below `dir` with one checkpoint.
fn checkpoint(dir: &Path, tie_embeddings: bool) -> PathBuf {
    let mut config = config(tie_embeddings);
    config.data.tokenizer = Some(write_tokenizer(dir, VOCAB));
    save_checkpoint(&dir.join("run"), &config, distinguish)
}

fn export(checkpoint: &Path, format: &str, output: &Path, more: &[&str]) -> Output {
    let mut command = titanbit();
    command.args(["export", "--format", format, "--checkpoint"]);
    command.arg(checkpoint).arg("--output").arg(output);
    command.args(more).output().unwrap()
}

#[track_caller]
fn exported(checkpoint: &Path, format: &str, output: &Path, more: &[&str]) -> String {
    let outcome = export(checkpoint, format, output, more);
    let stderr = String::from_utf8(outcome.stderr).unwrap();
    assert!(outcome.status.success(), "{stderr}");
    assert_eq!(stderr, "");
    String::from_utf8(outcome.stdout).unwrap()
}

/// Every file at `path` and its bytes.
fn sizes(path: &Path) -> Vec<(PathBuf, usize)> {
    let files = files(path).into_iter();
    files.map(|(path, bytes)| (path, bytes.len())).collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn model_of(checkpoint: &Path, tie_embeddings: bool) -> BitNetTransformer {
    load_model(checkpoint, &config(tie_embeddings), &Device::Cpu).unwrap()
}

fn values(model: &BitNetTransformer, name: &str) -> Vec<f32> {
    let weight = model.parameters().get(name).unwrap();
    weight.flatten_all().unwrap().to_vec1().unwrap()
}

/// ||a - b|| / ||b||
fn error(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn titanbit_runs_what_it_exported() {
    for tie_embeddings in [false, true] {
        let dir = TempDir::new().unwrap();
        let checkpoint = checkpoint(dir.path(), tie_embeddings);
        let model = model_of(&checkpoint, tie_embeddings);
        let original = PackedWeights::read(model.config(), &model).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| i * i * 7 % VOCAB as u32).collect();
        let batch = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap();
        let expected = model.logits(&batch.unsqueeze(0).unwrap()).unwrap();
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        let parameters = model.config().parameter_count();
        for format in FORMATS {
            let output = dir.path().join("deep/er").join(format);
            let summary = exported(&checkpoint, format, &output, &[]);
            let codes = format!(
                "{:.2} k codes and 14 scales",
                parameters.ternary as f64 / 1e3
            );
            assert!(summary.contains(&codes), "{summary}");
            assert!(summary.contains("step 7"), "{summary}");

            let loaded = inference::load(&output).unwrap();
            assert_eq!(loaded.config, *model.config(), "{format}");
            let tokenizer = fs::read_to_string(checkpoint.join("tokenizer.json")).unwrap();
            assert_eq!(loaded.tokenizer, Some(tokenizer));
            let layers = loaded.weights.layers.iter().zip(&original.layers);
            for ((_, a), (_, b)) in
                layers.flat_map(|(a, b)| a.projections().into_iter().zip(b.projections()))
            {
                assert_eq!(a.packed, b.packed, "{format}");
                assert!(error(&a.scales, &b.scales) <= f32::EPSILON, "{format}");
            }
            let model = Model::new(&loaded.config, loaded.weights, &Device::Cpu).unwrap();
            let error = error(&model.session().logits(&ids).unwrap(), &expected);
            println!("{format}: logits differ by {error:.1e}");
            assert!(error < 0.02, "{format}: {error}");
        }
        assert_eq!(
            names_in(&dir.path().join("deep/er")),
            ["hf", "hf-packed", "packed"]
        );
    }
}

/// A safetensors file by a reader of its own.
struct Weights(Vec<u8>);

impl Weights {
    fn read(path: &Path) -> Self {
        Self(fs::read(path).unwrap())
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    fn types(&self) -> HashMap<String, (Dtype, Vec<usize>)> {
        let tensors = self.tensors();
        let tensors = tensors.iter();
        tensors
            .map(|(name, view)| (name.to_string(), (view.dtype(), view.shape().to_vec())))
            .collect()
    }

    fn numbers(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).unwrap();
        let bytes = view.data();
        match view.dtype() {
            Dtype::F32 => (bytes.chunks_exact(4))
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            Dtype::BF16 => (bytes.chunks_exact(2))
                .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            Dtype::F16 => (bytes.chunks_exact(2))
                .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                .collect(),
            Dtype::U8 => bytes.iter().map(|b| f32::from(*b)).collect(),
            other => panic!("{other:?}"),
        }
    }
}

fn json_in(dir: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap()
}

#[test]
fn hf_has_the_names_types_and_values_that_transformers_expects() {
    for tie_embeddings in [false, true] {
        let dir = TempDir::new().unwrap();
        let checkpoint = checkpoint(dir.path(), tie_embeddings);
        let model = model_of(&checkpoint, tie_embeddings);
        let hf = dir.path().join("hf");
        exported(&dir.path().join("run"), "hf", &hf, &[]);

        let weights = Weights::read(&hf.join("model.safetensors"));
        let expected = tensor_shapes(model.config()).map(|(name, shape)| {
            let dtype = if shape.len() == 1 {
                Dtype::F32
            } else {
                Dtype::BF16
            };
            (name, (dtype, shape))
        });
        assert_eq!(weights.types(), expected.collect());
        let (_, header) = SafeTensors::read_metadata(&weights.0).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        for parameter in model.parameters().iter() {
            let (master, written) = (
                values(&model, &parameter.name),
                weights.numbers(&parameter.name),
            );
            if parameter.name.contains("_proj") {
                let b = absmean(&master);
                assert_eq!(absmean(&written), b);
                assert_eq!(ternary_codes(&written, b), ternary_codes(&master, b));
            }
            assert!(error(&written, &master) < 1.0 / 128.0);
        }

        assert_eq!(
            json_in(&hf, "config.json"),
            json!({
                "architectures": ["BitNetForCausalLM"],
                "dtype": "bfloat16",
                "bos_token_id": 0,
                "eos_token_id": 0,
                "rope_theta": 5000.0,
                "model_type": "bitnet",
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 52,
                "max_position_embeddings": 48,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
                "rms_norm_eps": 1e-5,
                "hidden_act": if tie_embeddings { "relu2" } else { "silu" },
                "tie_word_embeddings": tie_embeddings,
                "initializer_range": 0.02,
                "quantization_config": {
                    "quant_method": "bitnet",
                    "linear_class": "autobitlinear",
                    "quantization_mode": "online",
                    "modules_to_not_convert": ["lm_head"],
                },
            })
        );
        let special = json_in(&hf, "special_tokens_map.json");
        assert_eq!(special["eos_token"], "<|endoftext|>");
        assert_eq!(
            json_in(&hf, "tokenizer_config.json")["model_max_length"],
            48
        );
        assert_eq!(json_in(&hf, "generation_config.json")["eos_token_id"], 0);
    }
}

#[test]
fn hf_packed_holds_quarters_of_the_rows_and_the_inverse_scale() {
    let dir = TempDir::new().unwrap();
    let checkpoint = checkpoint(dir.path(), false);
    let model = model_of(&checkpoint, false);
    let packed = dir.path().join("packed");
    exported(&checkpoint, "hf-packed", &packed, &[]);
    let weights = Weights::read(&packed.join("model.safetensors"));
    assert_eq!(weights.types().len(), model.parameters().iter().len() + 14);
    for (name, shape) in tensor_shapes(model.config()) {
        let master = values(&model, &name);
        if !name.contains("_proj") {
            assert!(
                error(&weights.numbers(&name), &master) < 1.0 / 256.0,
                "{name}"
            );
            continue;
        }
        let (quarter, cols) = (shape[0] / 4, shape[1]);
        assert_eq!(weights.types()[&name], (Dtype::U8, vec![quarter, cols]));
        let b = absmean(&master);
        let bytes = weights.numbers(&name);
        for (i, code) in ternary_codes(&master, b).into_iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let byte = bytes[row % quarter * cols + col] as u8;
            let bits = byte >> (2 * (row / quarter)) & 3;
            assert_eq!(bits as i8 - 1, code, "{name} {row} {col}");
        }
        let scale = weights.numbers(&format!("{name}_scale"));
        assert_eq!(scale.len(), 1);
        assert!((scale[0] * b - 1.0).abs() < 2.0 * f32::EPSILON, "{name}");
    }
    let quantization = &json_in(&packed, "config.json")["quantization_config"];
    assert_eq!(quantization["linear_class"], "bitlinear");
    assert_eq!(quantization["quantization_mode"], "offline");
}

#[test]
fn a_target_that_exists_is_replaced_only_by_force() {
    let dir = TempDir::new().unwrap();
    let checkpoint = checkpoint(dir.path(), false);
    for format in FORMATS {
        let output = dir.path().join("exports").join(format);
        exported(&checkpoint, format, &output, &[]);
        let (before, whole) = (files(&output), sizes(&output));
        let refused = export(&checkpoint, format, &output, &[]);
        let name = output.to_str().unwrap();
        assert_refused(&refused, 2, &[name, "exists", "--force"]);
        assert!(files(&output) == before);

        // What was torn is whole again.
        let torn = &before.last().unwrap().0;
        fs::write(torn, "torn").unwrap();
        exported(&checkpoint, format, &output, &["--force"]);
        assert_eq!(sizes(&output), whole);
        inference::load(&output).unwrap();
    }
    assert_eq!(names_in(&dir.path().join("exports")), FORMATS);
}

#[test]
fn force_deletes_nothing_but_exports() {
    let dir = TempDir::new().unwrap();
    let checkpoint = checkpoint(dir.path(), false);
    let precious = dir.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("thesis.tex"), "years").unwrap();
    let refuse = |format: &str, output: &Path, says: &[&str]| {
        let before = files(dir.path());
        assert_refused(&export(&checkpoint, format, output, &["--force"]), 2, says);
        assert!(files(dir.path()) == before);
    };
    refuse("hf", &precious, &["precious", "thesis.tex"]);
    refuse("packed", &precious, &["precious is a directory"]);
    refuse("hf", &precious.join("thesis.tex"), &["is a file"]);
    refuse("hf", &checkpoint, &["state.json"]);
    let inside = checkpoint.join("model.safetensors");
    refuse("packed", &inside, &["inside the checkpoint"]);
    refuse("packed", Path::new(".."), &["has no name of its own"]);
}

/// Whatever goes wrong, the export that was there stays, and nothing else does.
#[test]
fn a_failed_export_leaves_what_was_there() {
    let dir = TempDir::new().unwrap();
    let checkpoint = checkpoint(dir.path(), false);
    let output = dir.path().join("hf");
    exported(&checkpoint, "hf", &output, &[]);
    let before = files(&output);

    // Equal weights have no zero code to correct the mean of bf16 values with.
    let equal = save_checkpoint(&dir.path().join("equal"), &config(false), |parameter| {
        if parameter.name.contains("layers.1.mlp.up_proj") {
            let weight = Tensor::full(0.02f32, parameter.var.shape(), &Device::Cpu);
            parameter.var.set(&weight.unwrap()).unwrap();
        }
    });
    let tokenizer = write_tokenizer(dir.path(), VOCAB);
    let more = ["--force", "--tokenizer", tokenizer.to_str().unwrap()];
    let refused = export(&equal, "hf", &output, &more);
    let says = [
        "scales",
        "model.layers.1.mlp.gate_up_proj",
        "another format",
    ];
    assert_refused(&refused, 1, &says);
    assert!(files(&output) == before);
    exported(&equal, "hf-packed", &dir.path().join("equal-packed"), &more);

    let damaged = checkpoint.join("model.safetensors");
    let mut bytes = fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let refused = export(&checkpoint, "hf", &output, &["--force"]);
    assert_refused(&refused, 1, &["model.safetensors", "checksum"]);
    assert!(files(&output) == before);
    let expected = ["equal", "equal-packed", "hf", "run", "tokenizer_300.json"];
    assert_eq!(names_in(dir.path()), expected);
}

#[test]
fn models_and_tokenizers_that_do_not_fit() {
    let dir = TempDir::new().unwrap();
    let output = dir.path().join("export");
    let tokenizer = write_tokenizer(dir.path(), VOCAB);
    let tokenizer = ["--tokenizer", tokenizer.to_str().unwrap()];

    let mut odd = config(false);
    odd.model.intermediate_size = 50;
    let odd = save_checkpoint(&dir.path().join("odd"), &odd, distinguish);
    let refused = export(&odd, "hf-packed", &output, &tokenizer);
    assert_refused(
        &refused,
        2,
        &["mlp.gate_proj has 50 rows", "4 to a byte", "hf"],
    );
    exported(&odd, "hf", &output, &tokenizer);
    fs::remove_dir_all(&output).unwrap();

    let nan = save_checkpoint(&dir.path().join("nan"), &config(false), |parameter| {
        if parameter.name == "model.layers.0.self_attn.k_proj.weight" {
            let weight = (parameter.var.as_tensor() / 0.0).unwrap();
            parameter.var.set(&weight).unwrap();
        }
    });
    let refused = export(&nan, "packed", &output, &tokenizer);
    assert_refused(
        &refused,
        1,
        &["layers.0.self_attn.k_proj.weight", "not finite"],
    );

    let checkpoint = checkpoint(dir.path(), true);
    let large = write_tokenizer(dir.path(), VOCAB + 1);
    let large = ["--tokenizer", large.to_str().unwrap()];
    let refused = export(&checkpoint, "hf", &output, &large);
    assert_refused(
        &refused,
        2,
        &["tokenizer_301.json", "id 300", "vocabulary of 300"],
    );
    let missing = export(&checkpoint, "hf", &output, &["--tokenizer", "nowhere.json"]);
    assert_refused(&missing, 2, &["nowhere.json does not exist"]);
    let other = checkpoint.join("state.json");
    let other = ["--tokenizer", other.to_str().unwrap()];
    let refused = export(&checkpoint, "hf", &output, &other);
    assert_refused(&refused, 1, &["state.json", "not a tokenizer.json"]);
    assert!(!output.exists());
}

#[test]
fn a_checkpoint_without_a_tokenizer_is_exported_with_a_warning() {
    let dir = TempDir::new().unwrap();
    let checkpoint = save_checkpoint(&dir.path().join("run"), &config(false), distinguish);
    let output = dir.path().join("hf");
    let outcome = export(&checkpoint, "hf", &output, &[]);
    assert!(outcome.status.success());
    let warning = String::from_utf8(outcome.stderr).unwrap();
    assert_eq!(warning.lines().count(), 1, "{warning}");
    assert!(warning.contains("no tokenizer.json") && warning.contains("--tokenizer"));
    let expected = ["config.json", "generation_config.json", "model.safetensors"];
    assert_eq!(names_in(&output), expected);
    assert_eq!(json_in(&output, "config.json")["eos_token_id"], Value::Null);

    let with = dir.path().join("with");
    let tokenizer = write_tokenizer(dir.path(), VOCAB);
    let tokenizer_arg = ["--tokenizer", tokenizer.to_str().unwrap()];
    exported(&checkpoint, "hf", &with, &tokenizer_arg);
    let copy = fs::read(with.join("tokenizer.json")).unwrap();
    assert_eq!(copy, fs::read(tokenizer).unwrap());
}

#[test]
fn wrong_arguments() {
    let dir = TempDir::new().unwrap();
    let checkpoint = checkpoint(dir.path(), false);
    let output = dir.path().join("export");
    let missing = dir.path().join("missing");
    assert_refused(
        &export(&missing, "hf", &output, &[]),
        2,
        &["missing", "not a checkpoint"],
    );
    assert_refused(
        &export(&checkpoint, "onnx", &output, &[]),
        2,
        &["onnx", "hf-packed"],
    );
    let below_a_file = checkpoint.join("state.json/export");
    assert_refused(
        &export(&checkpoint, "hf", &below_a_file, &[]),
        1,
        &["state.json"],
    );
    assert!(!output.exists());
}

/// Directories that are none of ours, or no longer whole.
#[test]
fn a_directory_that_cannot_be_run_is_refused() {
    let dir = TempDir::new().unwrap();
    let checkpoint = checkpoint(dir.path(), false);
    let output = dir.path().join("hf");
    exported(&checkpoint, "hf-packed", &output, &[]);
    let path = output.join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    for (from, to, says) in [
        (
            "\"model_type\": \"bitnet\"",
            "\"model_type\": \"llama\"",
            "model_type is `llama`",
        ),
        (
            "\"rope_type\": \"default\"",
            "\"rope_type\": \"yarn\"",
            "rope_type is `yarn`",
        ),
        (
            "\"bitlinear\"",
            "\"autobitlinear\"",
            "linear_class is `autobitlinear`, offline",
        ),
        (
            "\"hidden_act\": \"silu\"",
            "\"hidden_act\": \"gelu\"",
            "unknown variant `gelu`",
        ),
        (
            "\"num_key_value_heads\": 2",
            "\"num_key_value_heads\": 3",
            "kv_heads is 3",
        ),
        (
            "\"intermediate_size\": 52",
            "\"intermediate_size\": 50",
            "gate_proj has 50 rows",
        ),
        (
            "\"intermediate_size\": 52",
            "\"intermediate_size\": 48",
            "shape [12, 32]",
        ),
        (
            "\"num_hidden_layers\": 2",
            "\"num_hidden_layers\": 3",
            "layers.2",
        ),
    ] {
        assert!(config.contains(from), "{from}");
        fs::write(&path, config.replace(from, to)).unwrap();
        let message = inference::load(&output).err().unwrap().to_string();
        assert!(message.contains(says), "`{says}` in: {message}");
        assert!(message.starts_with(output.to_str().unwrap()), "{message}");
    }
    fs::write(&path, config).unwrap();

    let path = output.join("model.safetensors");
    let mut weights = fs::read(&path).unwrap();
    // The bytes of codes come last.
    *weights.last_mut().unwrap() |= 0b11;
    fs::write(&path, &weights).unwrap();
    let message = inference::load(&output).err().unwrap().to_string();
    assert!(message.contains("no ternary code"), "{message}");
    fs::write(&path, &weights[..weights.len() - 1]).unwrap();
    let message = inference::load(&output).err().unwrap().to_string();
    assert!(
        message.contains("a safetensors file that was cut short"),
        "{message}"
    );
}
