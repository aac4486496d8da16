//! What a user can do wrong with `titanbit train`: one clear line, the right exit code, and
//! nothing changed in what was there.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{assert_refused, counting, files, losses, titanbit, write_bin, write_config};

/// Trains in `dir`, with and without a backtrace wished for: refused, and every file as before.
#[track_caller]
fn refused(dir: &Path, arguments: &[&str], code: i32, says: &[&str]) {
    let before = files(dir);
    for backtrace in ["0", "1"] {
        let mut command = titanbit();
        command.env("RUST_BACKTRACE", backtrace).current_dir(dir);
        let output = command.arg("train").args(arguments).output().unwrap();
        assert_refused(&output, code, says);
        assert!(files(dir) == before, "files changed: {arguments:?}");
    }
}

/// The same with the tiny configuration and one override.
#[track_caller]
fn refused_setting(dir: &Path, assignment: &str, code: i32, says: &[&str]) {
    let arguments = ["--config", "tiny.yaml", "--out", "run", "--set", assignment];
    refused(dir, &arguments, code, says);
}

fn tiny() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path());
    dir
}

/// A run of ten steps in `run`, with a checkpoint at its end.
fn ten_steps(dir: &Path) {
    let output = titanbit()
        .current_dir(dir)
        .args(["train", "--config", "tiny.yaml", "--out", "run"])
        .args(["--max-steps", "10"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn wrong_arguments() {
    let dir = tiny();
    refused(dir.path(), &[], 2, &["--config <FILE>", "--help"]);
    refused(
        dir.path(),
        &["--config", "tiny.yaml", "--max-steps", "many"],
        2,
        &["many", "--max-steps"],
    );
    refused(dir.path(), &["--confg", "x"], 2, &["--confg", "--config"]);
    for device in ["gpu", "cuda:x"] {
        refused(
            dir.path(),
            &["--config", "tiny.yaml", "--device", device],
            2,
            &[device, "auto, cpu, cuda or cuda:N"],
        );
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_gpu_asked_of_a_cpu_build() {
    let dir = tiny();
    refused(
        dir.path(),
        &["--config", "tiny.yaml", "--device", "cuda"],
        2,
        &["without CUDA support", "--features cuda", "--device cpu"],
    );
}

#[test]
fn a_wrong_config_file() {
    let dir = tiny();
    let path = dir.path();
    refused(
        path,
        &["--config", "nope.yaml"],
        2,
        &["nope.yaml does not exist", "configs/quickstart.yaml"],
    );
    refused(path, &["--config", "."], 1, &["cannot read ."]);
    fs::write(path.join("torn.yaml"), "model: {layers: 2\ntrain: [").unwrap();
    refused(
        path,
        &["--config", "torn.yaml"],
        2,
        &["torn.yaml", "line 2"],
    );
    fs::write(path.join("typo.yaml"), "model: {hiden_size: 64}").unwrap();
    refused(
        path,
        &["--config", "typo.yaml"],
        2,
        &["typo.yaml", "`model.hiden_size`", "`model.hidden_size`"],
    );
}

#[test]
fn wrong_settings() {
    let dir = tiny();
    let path = dir.path();
    refused_setting(path, "nonsense", 2, &["nonsense", "section.key=value"]);
    refused_setting(path, "=3", 2, &["section.key=value"]);
    refused_setting(path, "train.steps=[1", 2, &["train.steps=[1"]);
    refused_setting(path, "train=3", 2, &["train must be a section"]);
    refused_setting(path, "train.step=3", 2, &["did you mean `train.steps`"]);
    refused_setting(
        path,
        "train.steps=many",
        2,
        &["train.steps", "many", "a whole number"],
    );
    refused_setting(path, "model.preset=9B", 2, &["9B", "125M, 350M"]);
    refused_setting(path, "optimizer.lr=.nan", 2, &["optimizer.lr is NaN"]);
    refused_setting(path, "model.kv_heads=3", 2, &["kv_heads is 3", "heads (4)"]);
    refused_setting(path, "model.vocab_size=5000000000", 2, &["at most"]);
    refused_setting(path, "train.seq_len=17", 2, &["model.max_seq_len (16)"]);
    refused_setting(
        path,
        "model.layers=1000000",
        2,
        &["GiB are free", "smaller model"],
    );
    refused_setting(
        path,
        "hardware.threads=100000",
        2,
        &["hardware.threads", "at most 1024"],
    );
    refused_setting(
        path,
        "schedule.min_lr=1",
        2,
        &["schedule.min_lr", "optimizer.lr (0.01)"],
    );
    refused_setting(
        path,
        "data.tokenizer=no.json",
        2,
        &["no.json does not exist", "null"],
    );
    refused_setting(
        path,
        "data.val=train.bin",
        2,
        &["train.bin", "data.train", "data.val"],
    );
    refused_setting(path, "hardware.device=tpu", 2, &["tpu", "cuda:N"]);
}

#[test]
fn wrong_data() {
    let dir = tiny();
    let path = dir.path();
    write_bin(&path.join("short.bin"), &counting(16));
    let short = ["16 needs 17 tokens", "short.bin has only 16"];
    refused_setting(path, "data.train=[{path: short.bin}]", 2, &short);
    refused_setting(path, "data.val=short.bin", 2, &short);

    let missing = ["nope.bin", "titanbit tokenize"];
    refused_setting(path, "data.train=[{path: nope.bin}]", 2, &missing);
    refused_setting(path, "data.val=nope.bin", 2, &missing);

    let whole = fs::read(path.join("train.bin")).unwrap();
    fs::write(path.join("cut.bin"), &whole[..whole.len() - 3]).unwrap();
    let cut = ["cut.bin", "cut short", "make it again"];
    refused_setting(path, "data.train=[{path: cut.bin}]", 1, &cut);
    refused_setting(path, "data.val=cut.bin", 1, &cut);

    write_bin(&path.join("side.bin"), &counting(100));
    let sidecar = r#"{"tokenizer": "t.json", "tokenizer_hash": "0", "vocab_size": 5000,
        "eos_id": 0, "tokens": 100, "documents": 1, "source_bytes": 100, "checksum": "0",
        "command": "by hand"}"#;
    fs::write(path.join("side.json"), sidecar).unwrap();
    let larger = ["side.bin", "5000", "vocab_size is 64"];
    refused_setting(path, "data.train=[{path: side.bin}]", 2, &larger);
    refused_setting(path, "data.val=side.bin", 2, &larger);

    write_bin(&path.join("ids.bin"), &[64; 400]);
    let outside = ["ids.bin", "id 64", "vocab_size is 64"];
    refused_setting(path, "data.val=ids.bin", 1, &outside);

    fs::write(path.join("not-one.json"), "{\"a\": 1}").unwrap();
    let tokenizer = ["not-one.json", "not a readable tokenizer"];
    refused_setting(path, "data.tokenizer=not-one.json", 1, &tokenizer);
}

#[test]
fn a_tokenizer_of_other_data_or_a_larger_model() {
    let dir = tiny();
    let path = dir.path();
    fs::write(
        path.join("text.txt"),
        "some words to tokenise. ".repeat(200),
    )
    .unwrap();
    let made = titanbit()
        .current_dir(path)
        .args(["tokenize", "--input", "text.txt", "--train-vocab", "270"])
        .args(["--output", "text/text.bin"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    // The bytes of the prompt alone have ids beyond the model's 64.
    let prompt = [
        "text/tokenizer.json",
        "eval.sample_prompt",
        "vocabulary of 64",
    ];
    refused_setting(path, "data.tokenizer=text/tokenizer.json", 1, &prompt);

    let mut other: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join("text/tokenizer.json")).unwrap()).unwrap();
    other["truncation"] = serde_json::Value::Null;
    fs::write(path.join("other.json"), format!("{other}\n\n")).unwrap();
    let arguments = [
        "--config",
        "tiny.yaml",
        "--out",
        "run",
        "--set",
        "model.vocab_size=270",
    ];
    let data = [
        "--set",
        "data.train=[{path: text/text.bin}]",
        "--set",
        "data.val=null",
    ];
    let tokenizer = ["--set", "data.tokenizer=other.json"];
    let says = ["other.json is not the tokenizer", "text/text.bin"];
    refused(
        path,
        &[&arguments[..], &data, &tokenizer].concat(),
        2,
        &says,
    );
}

/// Training files are too large to look through first: the ids are checked as they are read.
#[test]
fn ids_outside_the_vocabulary_stop_the_run_and_leave_the_name_free() {
    let dir = tiny();
    write_bin(&dir.path().join("ids.bin"), &[64; 400]);
    let train = |more: &[&str]| {
        let mut command = titanbit();
        command.env("RUST_BACKTRACE", "1").current_dir(dir.path());
        command.args(["train", "--config", "tiny.yaml", "--out", "run"]);
        command.args(["--max-steps", "1"]).args(more).output()
    };
    let output = train(&["--set", "data.train=[{path: ids.bin}]"]).unwrap();
    assert_refused(&output, 1, &["ids.bin", "id 64", "vocab_size is 64"]);
    let output = train(&[]).unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn wrong_run_directories() {
    let dir = tiny();
    let path = dir.path();
    let out = |out| ["--config", "tiny.yaml", "--out", out];
    refused(path, &out("train.bin/run"), 1, &["train.bin/run"]);
    ten_steps(path);
    refused(
        path,
        &out("run"),
        2,
        &["run already holds a run", "--resume latest", "--out"],
    );
}

#[test]
fn wrong_checkpoints() {
    let dir = tiny();
    let path = dir.path();
    let from = |from| ["--config", "tiny.yaml", "--out", "run", "--resume", from];
    let nothing = ["run/checkpoints", "nothing to resume", "without --resume"];
    refused(path, &from("latest"), 2, &nothing);
    for not_one in ["nope", ".", "train.bin"] {
        refused(path, &from(not_one), 2, &[not_one, "is not a checkpoint"]);
    }
    ten_steps(path);
    let with = |setting| [&from("latest")[..], &["--set", setting]].concat();
    refused(
        path,
        &with("model.intermediate_size=64"),
        1,
        &[
            "step_0000010/model.safetensors",
            "ffn_sub_norm",
            "[48]",
            "[64]",
        ],
    );
    let missing = ["step_0000010/model.safetensors", "model.layers.2."];
    refused(path, &with("model.layers=3"), 1, &missing);
    let extra = ["step_0000010/model.safetensors", "model.layers.1."];
    refused(path, &with("model.layers=1"), 1, &extra);
}

/// A limit on the size of a file stands for a full disk: writing fails just the same.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_earlier_checkpoints_whole() {
    let dir = tiny();
    ten_steps(dir.path());
    let checkpoints = dir.path().join("run/checkpoints");
    let before = files(&checkpoints);
    let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" train --config tiny.yaml --out run \
                  --resume latest";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_titanbit")])
        .env("RUST_BACKTRACE", "1")
        .env("RUST_LOG", "warn")
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_refused(&output, 1, &["cannot write", "step_0000020", "too large"]);
    assert!(files(&checkpoints) == before, "a checkpoint changed");
    let names = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut left: Vec<_> = fs::read_dir(&checkpoints).unwrap().map(names).collect();
    left.sort();
    assert_eq!(left, ["best", "latest", "step_0000010"]);
}

/// A step that cannot be recorded ends the run, with half a line written; the next run repairs it.
#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_while_recording_costs_no_step() {
    let (dir, straight) = (tiny(), tiny());
    for dir in [&dir, &straight] {
        ten_steps(dir.path());
    }
    let recorded = dir.path().join("run/metrics.jsonl");
    let blocks = fs::metadata(&recorded).unwrap().len() / 512 + 1;
    let script = format!(
        "trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" train --config tiny.yaml \
                          --out run --resume latest"
    );
    let output = Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_titanbit")])
        .env("RUST_LOG", "warn")
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_refused(&output, 1, &["cannot write", "metrics.jsonl", "too large"]);
    let text = fs::read(&recorded).unwrap();
    assert_ne!(
        text.last(),
        Some(&b'\n'),
        "the limit fell between two lines"
    );

    for dir in [&dir, &straight] {
        let output = titanbit()
            .current_dir(dir.path())
            .args(["train", "--config", "tiny.yaml", "--out", "run"])
            .args(["--resume", "latest", "--max-steps", "20"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let runs = [&dir, &straight].map(|dir| losses(&dir.path().join("run")));
    assert_eq!(runs[0].len(), 20);
    assert_eq!(runs[0], runs[1]);
}
