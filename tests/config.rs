//! Configuration files: what ships loads, and what is wrong is named.

use std::path::{Path, PathBuf};

use serde_yaml::Value;
use titanbit::config::{Config, ScheduleKind};
use titanbit::model::{Activation, BitNetConfig};

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("configs")
        .join(name)
}

fn parse(text: &str) -> titanbit::Result<Config> {
    Config::parse(text, Path::new("test.yaml"), &[])
}

fn parse_with(text: &str, overrides: &[&str]) -> titanbit::Result<Config> {
    let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
    Config::parse(text, Path::new("test.yaml"), &overrides)
}

/// The message of a refusal, which must be a usage error of one line.
fn refusal(outcome: titanbit::Result<Config>) -> String {
    let error = outcome.expect_err("must be refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// `text` is refused with a message that has all of `parts`.
fn refused(text: &str, parts: &[&str]) {
    let message = refusal(parse(text));
    for part in parts {
        assert!(message.contains(part), "{text}: `{message}` lacks `{part}`");
    }
}

/// `a.b.c` of every leaf.
fn leaves(tree: &Value, path: &str, found: &mut Vec<String>) {
    match tree.as_mapping() {
        Some(mapping) => {
            for (key, value) in mapping {
                let key = key.as_str().unwrap();
                let path = match path {
                    "" => key.to_string(),
                    _ => format!("{path}.{key}"),
                };
                leaves(value, &path, found);
            }
        }
        None => found.push(path.to_string()),
    }
}

#[test]
fn default_yaml_is_the_default_and_names_every_key() {
    let path = shipped("default.yaml");
    assert_eq!(Config::load(&path, &[]).unwrap(), Config::default());

    let keys = |text: &str| {
        let mut found = Vec::new();
        leaves(&serde_yaml::from_str(text).unwrap(), "", &mut found);
        found
    };
    let written = keys(&std::fs::read_to_string(path).unwrap());
    let there_are = keys(&Config::default().to_yaml().unwrap());
    assert!(there_are.len() > 50, "{there_are:?}");
    for key in there_are {
        assert!(written.contains(&key), "{key} is not in default.yaml");
    }
}

#[test]
fn every_config_that_ships_loads() {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(shipped("")).unwrap() {
        let path = entry.unwrap().path();
        Config::load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    names.sort();
    assert_eq!(
        names,
        [
            "125m.yaml",
            "350m.yaml",
            "3b.yaml",
            "700m.yaml",
            "default.yaml",
            "quickstart.yaml"
        ]
    );
}

#[test]
fn the_sized_configs_follow_the_recipe() {
    for (name, preset, lr, stage2_lr) in [
        ("125m.yaml", "125M", 1.8e-3, 1.2e-3),
        ("350m.yaml", "350M", 1.8e-3, 1.2e-3),
        ("700m.yaml", "700M", 1.5e-3, 1e-3),
        ("default.yaml", "1.3B", 1.2e-3, 8e-4),
        ("3b.yaml", "3B", 1.2e-3, 8e-4),
    ] {
        let config = Config::load(&shipped(name), &[]).unwrap();
        assert_eq!(
            config.model,
            BitNetConfig::preset(preset).unwrap(),
            "{name}"
        );
        assert_eq!(config.optimizer.lr, lr, "{name}");
        assert_eq!(config.schedule.stage2_lr, stage2_lr, "{name}");
        assert_eq!(config.schedule.kind, ScheduleKind::TwoStage, "{name}");
        assert_eq!(config.tokens_per_step(), 1 << 19, "{name}");
    }
}

#[test]
fn an_unknown_key_gets_the_nearest_known_one() {
    refused(
        "train: {micro_bach: 4}",
        &[
            "test.yaml",
            "`train.micro_bach`",
            "did you mean `train.micro_batch`",
        ],
    );
    refused("optimiser: {lr: 1}", &["did you mean `optimizer`"]);
    refused(
        "data: {prepare: {inputs: [a]}}",
        &["did you mean `data.prepare.input`"],
    );
    refused("model: {presets: 125M}", &["did you mean `model.preset`"]);
    // In another section, if the name is the same there.
    refused("layers: 3", &["`layers`", "did you mean `model.layers`"]);
    refused(
        "train: {lr: 3}",
        &["`train.lr`", "did you mean `optimizer.lr`"],
    );
    refused("train: {1: 3}", &["train: keys are words, not `1`"]);
    refused(
        "data: {train: [{path: a, wieght: 2}]}",
        &["data.train[0]", "wieght", "weight"],
    );
    let message = refusal(parse_with("", &["train.mirco_batch=4"]));
    assert!(message.contains("--set train.mirco_batch=4"), "{message}");
    assert!(
        message.contains("did you mean `train.micro_batch`"),
        "{message}"
    );
}

#[test]
fn overrides_win_over_the_file_and_later_ones_over_earlier() {
    let config = parse_with(
        "train: {micro_batch: 2, seed: 7}",
        &[
            "train.micro_batch=8",
            "optimizer.lr=3e-3",
            "schedule.kind=cosine",
            "model.activation=relu2",
            "hardware.device=cuda:1",
            "data.prepare.input=[a, b]",
            "data.prepare.train_vocab=4096",
            "data.prepare.val_fraction=0",
            "data.val=null",
            "optimizer.lr=4e-3",
        ],
    )
    .unwrap();
    assert_eq!(config.train.micro_batch, 8);
    assert_eq!(config.train.seed, 7);
    assert_eq!(config.optimizer.lr, 4e-3);
    assert_eq!(config.schedule.kind, ScheduleKind::Cosine);
    assert_eq!(config.model.activation, Activation::Relu2);
    assert_eq!(config.hardware.device, "cuda:1");
    assert_eq!(config.data.prepare.unwrap().input, ["a", "b"]);
    assert_eq!(config.data.val, None);
}

#[test]
fn malformed_overrides_are_refused() {
    for (assignment, why) in [
        ("train.micro_batch", "section.key=value"),
        ("=4", "an empty key"),
        ("train..seed=4", "an empty key"),
        ("train.seed.x=4", "train.seed"),
        ("train=4", "train must be a section"),
        ("train.seed=[1", "--set train.seed=[1"),
        ("train.steps=many", "train.steps"),
    ] {
        let message = refusal(parse_with("train: {seed: 1}", &[assignment]));
        assert!(message.contains(why), "{assignment}: {message}");
    }
}

#[test]
fn a_preset_gives_the_shape_and_keys_beside_it_win() {
    let config = parse("model: {preset: 125m, vocab_size: 50304, layers: 6}").unwrap();
    let expected = BitNetConfig {
        vocab_size: 50304,
        layers: 6,
        ..BitNetConfig::preset("125M").unwrap()
    };
    assert_eq!(config.model, expected);
    refused(
        "model: {preset: 2B}",
        &["model.preset", "2B", "125M, 350M, 700M, 1.3B, 3B"],
    );
    refused("model: {preset: 3}", &["model.preset"]);
}

/// A file that spells its shape out, as default.yaml and a run's config.yaml do, must not win
/// over the size asked for on the command line; what is not the size stays.
#[test]
fn a_preset_on_the_command_line_replaces_the_files_shape() {
    let file = Config::default().to_yaml().unwrap();
    let config = parse_with(
        &file,
        &[
            "model.vocab_size=50304",
            "model.preset=125M",
            "model.layers=6",
        ],
    )
    .unwrap();
    let expected = BitNetConfig {
        vocab_size: 50304,
        layers: 6,
        ..BitNetConfig::preset("125M").unwrap()
    };
    assert_eq!(config.model, expected);
}

#[test]
fn a_wrong_type_is_named_by_its_key() {
    refused(
        "train: {steps: many}",
        &["test.yaml", "train.steps", "many"],
    );
    refused("train: {steps: -5}", &["train.steps", "-5"]);
    refused("train: {micro_batch: 1.5}", &["train.micro_batch", "1.5"]);
    refused("optimizer: {lr: fast}", &["optimizer.lr", "fast"]);
    refused(
        "schedule: {kind: zigzag}",
        &["schedule.kind", "zigzag", "two_stage"],
    );
    refused(
        "logging: {tensorboard: maybe}",
        &["logging.tensorboard", "maybe"],
    );
    refused("data: {train: a.bin}", &["data.train", "a.bin"]);
    refused("data: {dtype: u8}", &["data.dtype", "u8", "u16"]);
    refused("train: 5", &["train must be a section"]);
    refused("[1, 2]", &["test.yaml", "sections"]);
    refused("train: {steps: 5", &["test.yaml"]);
}

#[test]
fn hyper_parameters_out_of_range_are_refused_by_key() {
    for key in [
        "optimizer.lr",
        "optimizer.beta1",
        "optimizer.beta2",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.grad_clip",
        "schedule.stage2_lr",
        "schedule.min_lr",
        "schedule.decay_fraction",
        "stability.spike_threshold",
        "stability.ema_decay",
        "stability.lr_factor",
        "eval.sample_temperature",
        "hardware.peak_tflops",
        "model.rope_theta",
        "model.rms_norm_eps",
        "model.init_std",
    ] {
        for value in [".nan", "-1", ".inf"] {
            let message = refusal(parse_with("", &[&format!("{key}={value}")]));
            assert!(message.contains(key), "{key}={value}: {message}");
            assert!(message.contains("must be"), "{key}={value}: {message}");
        }
    }
    refused(
        "data: {train: [{path: a, weight: .nan}]}",
        &["data.train", "NaN"],
    );
    refused("data: {train: []}", &["data.train", "empty"]);
    refused(
        "train: {steps: 300}",
        &["schedule.warmup_steps", "375", "300"],
    );
    for key in ["steps", "seq_len", "micro_batch", "grad_accum"] {
        refused(
            &format!("train: {{{key}: 0}}"),
            &[&format!("train.{key} is 0"), "at least 1"],
        );
    }
}

/// Larger ones would overflow sums and products of counts later on.
#[test]
fn counts_beyond_any_use_are_refused_by_key() {
    let max = u64::MAX.to_string();
    for (key, limit) in [
        ("train.steps", 1 << 30),
        ("train.seq_len", 1 << 20),
        ("train.micro_batch", 1 << 20),
        ("train.grad_accum", 1 << 20),
        ("stability.ema_warmup", 1 << 30),
        ("stability.settle_steps", 1 << 30),
        ("stability.recovery_steps", 1 << 30),
        ("eval.every", 1 << 30),
        ("eval.batches", 1 << 20),
        ("eval.sample_tokens", 1 << 20),
        ("checkpoint.every", 1 << 30),
        ("checkpoint.keep_last", 1 << 20),
        ("checkpoint.keep_every", 1 << 30),
        ("logging.every", 1 << 30),
    ] {
        let message = refusal(parse_with("", &[&format!("{key}={max}")]));
        let says = format!("{key} is {max}: must be at most {limit}");
        assert!(message.ends_with(&says), "{message}");
    }
    let message = refusal(parse_with("", &[&format!("schedule.warmup_steps={max}")]));
    assert!(message.contains("below train.steps"), "{message}");

    let steps = "train.steps=1073741824";
    let largest = ["train.micro_batch=4096", "train.grad_accum=512", steps];
    let config = parse_with("", &largest).unwrap();
    assert_eq!(config.tokens_per_step(), 1 << 32);
    let message = refusal(parse_with("", &["train.micro_batch=4097", largest[1]]));
    assert!(message.contains("the tokens of a step"), "{message}");
    assert!(message.contains("at most 4294967296"), "{message}");
}

#[test]
fn what_data_prepare_makes_must_suit_the_rest() {
    let section = |prepare: &str| {
        format!("data: {{val: VAL, prepare: {{input: [a], train_vocab: 4096, {prepare}}}}}")
    };
    for fraction in ["0", "1", "-0.1", ".nan"] {
        refused(
            &section(&format!("val_fraction: {fraction}")).replace("VAL", "v.bin"),
            &[
                "data.prepare.val_fraction is",
                "above 0 and below 1, as data.val is set",
            ],
        );
    }
    for fraction in ["0.1", ".nan"] {
        refused(
            &section(&format!("val_fraction: {fraction}")).replace("VAL", "null"),
            &[
                "data.prepare.val_fraction is",
                "must be 0, as data.val is null",
            ],
        );
    }
    let good = section("val_fraction: 0.1").replace("VAL", "v.bin");
    assert!(parse(&good).is_ok());
    let message = refusal(parse_with(&good, &["model.vocab_size=4095"]));
    let says = "data.prepare.train_vocab is 4096: must not exceed model.vocab_size (4095)";
    assert!(message.ends_with(says), "{message}");
}

#[test]
fn impossible_shapes_are_refused() {
    refused("model: {layers: 0}", &["model.layers is 0", "at least 1"]);
    refused(
        "model: {vocab_size: 10000000000000000000}",
        &["model.vocab_size is 10000000000000000000"],
    );
    refused(
        "model: {hidden_size: 2050}",
        &["model.hidden_size is 2050", "model.heads (32)"],
    );
    refused(
        "model: {kv_heads: 5}",
        &["model.kv_heads is 5", "divisor of model.heads (32)"],
    );
    refused(
        "train: {seq_len: 4096}",
        &["train.seq_len is 4096", "model.max_seq_len (2048)"],
    );
}

#[test]
fn written_out_and_read_again_it_is_the_same() {
    let config = Config::load(&shipped("quickstart.yaml"), &["data.dtype=u32".into()]).unwrap();
    let prepare = config.data.prepare.as_ref().unwrap();
    assert_eq!(prepare.input, ["${CARGO_HOME:-~/.cargo}/registry/src/*"]);
    assert_eq!(parse(&config.to_yaml().unwrap()).unwrap(), config);
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn a_missing_file_is_a_usage_error() {
    let message = refusal(Config::load(Path::new("no/such.yaml"), &[]));
    assert!(message.contains("no/such.yaml does not exist"), "{message}");
}
