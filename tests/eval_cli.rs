//! `titanbit eval` through the binary: what it prints, in words and in JSON, and what it refuses.

mod common;

use std::fs;
use std::path::Path;
use std::process::Output;

use candle_core::Device;
use common::{assert_refused, counting, metrics, titanbit, write_bin, write_config};
use serde_json::{Value, json};
use tempfile::TempDir;
use titanbit::inference::{PackedWeights, packed_file};
use titanbit::model::{BitNetConfig, BitNetTransformer, Parameters};

const TOKENIZER: &str = "tests/reference/lm_eval_tokenizer.json";
const WEIGHTS: &str = "tests/reference/lm_eval_reference.safetensors";
const TASKS: &str = "tests/reference/tasks";

fn run(args: &[&str]) -> Output {
    titanbit().arg("eval").args(args).output().unwrap()
}

#[track_caller]
fn human(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {stderr}");
    assert_eq!(stderr, "", "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn json(args: &[&str]) -> Value {
    serde_json::from_str(&human(&[args, &["--json"]].concat())).unwrap()
}

#[track_caller]
fn refused(args: &[&str], code: i32, says: &[&str]) {
    let output = run(args);
    assert_refused(&output, code, says);
    assert!(output.stdout.is_empty(), "{args:?}");
}

fn config() -> BitNetConfig {
    BitNetConfig {
        vocab_size: 500,
        hidden_size: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 48,
        max_seq_len: 96,
        tie_embeddings: true,
        ..BitNetConfig::default()
    }
}

/// Packed files: the model of the reference with its tokenizer, another one without.
fn write_models(dir: &Path) -> [String; 2] {
    let config = config();
    let parameters = Parameters::load(&config, Path::new(WEIGHTS), &Device::Cpu).unwrap();
    let reference = BitNetTransformer::with_parameters(&config, parameters).unwrap();
    let other = BitNetTransformer::new(&config, 1, &Device::Cpu).unwrap();
    let tokenizer = fs::read_to_string(TOKENIZER).unwrap();
    [
        ("a.safetensors", reference, Some(tokenizer.as_str())),
        ("b.safetensors", other, None),
    ]
    .map(|(name, model, tokenizer)| {
        let path = dir.join(name);
        let weights = PackedWeights::read(&config, &model).unwrap();
        packed_file::write(&path, &config, &weights, tokenizer).unwrap();
        path.to_str().unwrap().to_string()
    })
}

/// A text with a sidecar, by the tokenizer of the reference.
fn write_text(dir: &Path) -> String {
    let text = "Two and two make four, and the car is washed again. ".repeat(60);
    fs::write(dir.join("text.txt"), text).unwrap();
    let bin = dir.join("text.bin").to_str().unwrap().to_string();
    let output = titanbit()
        .args([
            "tokenize",
            "--tokenizer",
            TOKENIZER,
            "--output",
            &bin,
            "--input",
        ])
        .arg(dir.join("text.txt"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    bin
}

#[test]
fn the_loss_of_a_run_is_its_validation_loss() {
    let dir = TempDir::new().unwrap();
    let config = write_config(dir.path());
    let run = dir.path().join("run");
    let mut train = titanbit();
    train
        .args(["train", "--max-steps", "40", "--config"])
        .arg(&config);
    assert!(
        train
            .arg("--out")
            .arg(&run)
            .output()
            .unwrap()
            .status
            .success()
    );
    let metrics = metrics(&run);
    let mut validated = metrics.iter().filter_map(|line| line["val_loss"].as_f64());
    let expected = validated.next_back().unwrap();

    // Validation took 5 batches of 4 windows of 16 tokens: all there are.
    let val = dir.path().join("val.bin");
    let args = [
        "--checkpoint",
        run.to_str().unwrap(),
        "--data",
        val.to_str().unwrap(),
    ];
    let report = json(&args);
    let loss = report["models"][0]["data"]["loss"]["value"]
        .as_f64()
        .unwrap();
    assert!((loss - expected).abs() < 1e-5, "{loss} and {expected}");
    assert_eq!(report["models"][0]["kind"], "checkpoint of step 40");
    assert_eq!(report["data"]["tokens"], 320);
    assert_eq!(report["data"]["blocks"], 20);
    assert_eq!(report["models"][0]["data"]["bits_per_byte"], Value::Null);
    assert_eq!(report["difference"], Value::Null);
    let text = human(&args);
    assert!(
        text.contains("bits per byte  n/a: neither a tokenizer nor a sidecar"),
        "{text}"
    );
}

#[test]
fn one_model_on_text_and_tasks() {
    let dir = TempDir::new().unwrap();
    let [model, _] = write_models(dir.path());
    let text = write_text(dir.path());
    let swag = format!("{TASKS}/hellaswag_val.jsonl");
    let piqa = format!("{TASKS}/valid.jsonl");
    let args = [
        "--checkpoint",
        &model,
        "--data",
        &text,
        "--stride",
        "32",
        "--tasks",
        &swag,
        "--tasks",
        &piqa,
    ];
    let report = json(&args);
    let data = &report["data"];
    assert_eq!(
        (&data["seq_len"], &data["stride"]),
        (&json!(96), &json!(32))
    );
    assert_eq!(data["bytes_per_token"]["from"], "sidecar");
    let results = &report["models"][0]["data"];
    let number = |value: &Value| value.as_f64().unwrap();
    let loss = number(&results["loss"]["value"]);
    let bytes = number(&data["bytes_per_token"]["value"]);
    assert!((number(&results["perplexity"]["value"]) - loss.exp()).abs() < 1e-6 * loss.exp());
    let bits = loss / 2f64.ln() / bytes;
    assert!((number(&results["bits_per_byte"]["value"]) - bits).abs() < 1e-9);
    let relative = number(&results["loss"]["stderr"]) * loss.exp();
    assert!((number(&results["perplexity"]["stderr"]) / relative - 1.0).abs() < 1e-9);

    // As lm-evaluation-harness has it.
    let stored = fs::read_to_string("tests/reference/lm_eval_reference.jsonl").unwrap();
    let stored: Vec<Value> = stored
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    for (i, (file, form, questions)) in [
        ("hellaswag_val.jsonl", "HellaSwag", 7),
        ("valid.jsonl", "PIQA", 6),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(report["tasks"][i]["form"], form);
        assert_eq!(report["tasks"][i]["questions"], questions);
        assert_eq!(report["models"][0]["truncated"][i], 1, "{file}");
        let expected = stored
            .iter()
            .find(|results| results["file"] == file)
            .unwrap();
        let found = &report["models"][0]["tasks"][i];
        for metric in ["acc", "acc_norm"] {
            let stderr = &expected[format!("{metric}_stderr")];
            let difference = number(&found[metric]["value"]) - number(&expected[metric]);
            assert!(difference.abs() < 1e-12, "{file}: {metric}");
            let difference = number(&found[metric]["stderr"]) - number(stderr);
            assert!(difference.abs() < 1e-12, "{file}: {metric}");
        }
    }

    let text = human(&args);
    let acc_norm = &report["models"][0]["tasks"][1]["acc_norm"];
    let digits = |key: &str| format!("{:.4}", number(&acc_norm[key]));
    for says in [
        format!("loss           {loss:.4} ± "),
        format!("bits per byte  {bits:.4} ± "),
        "windows of 96, 32 from one to the next, ".into(),
        format!("{swag}, 7 questions of HellaSwag\nacc            0."),
        format!(
            "acc_norm       {} ± {}\ntruncated      1\n",
            digits("value"),
            digits("stderr")
        ),
    ] {
        assert!(text.contains(&says), "`{says}` in:\n{text}");
    }
    let limited = json(&["--checkpoint", &model, "--tasks", &piqa, "--limit", "2"]);
    assert_eq!(limited["tasks"][0]["questions"], 2);
    assert_eq!(limited["data"], Value::Null);
    assert_eq!(limited["models"][0]["data"], Value::Null);
    assert!(!human(&["--checkpoint", &model, "--tasks", &piqa]).contains("loss"));
}

#[test]
fn two_models_side_by_side() {
    let dir = TempDir::new().unwrap();
    let [a, b] = write_models(dir.path());
    let text = write_text(dir.path());
    let arc = format!("{TASKS}/ARC-Challenge-Test.jsonl");
    let shared = [
        "--data",
        &text,
        "--tasks",
        &arc,
        "--tokenizer",
        TOKENIZER,
        "--max-tokens",
        "500",
    ];
    let report = json(&[&["--compare", &a, &b], shared.as_slice()].concat());
    let number = |value: &Value| value.as_f64().unwrap();
    for (i, model) in [&a, &b].into_iter().enumerate() {
        let alone = json(&[&["--checkpoint", model], shared.as_slice()].concat());
        assert_eq!(alone["models"][0], report["models"][i]);
        assert_eq!(alone["data"], report["data"]);
    }
    let [of_a, of_b] = [0, 1].map(|i| &report["models"][i]);
    let difference = &report["difference"];
    for metric in ["loss", "perplexity", "bits_per_byte"] {
        let [a, b, d] = [of_a, of_b, difference].map(|r| number(&r["data"][metric]["value"]));
        assert!((b - a - d).abs() < 1e-9 * a, "{metric}");
        assert!(number(&difference["data"][metric]["stderr"]) > 0.0);
    }
    for metric in ["acc", "acc_norm"] {
        let [a, b, d] = [of_a, of_b, difference].map(|r| number(&r["tasks"][0][metric]["value"]));
        assert!((b - a - d).abs() < 1e-12, "{metric}");
    }
    let itself = json(&[&["--compare", &a, &a], shared.as_slice()].concat());
    let nothing = json!({"value": 0.0, "stderr": 0.0});
    assert_eq!(itself["difference"]["data"]["loss"], nothing);
    assert_eq!(itself["difference"]["tasks"][0]["acc"], nothing);

    let text = human(&[&["--compare", &a, &b], shared.as_slice()].concat());
    let header = text.lines().find(|line| line.ends_with("B - A")).unwrap();
    let loss = text.lines().find(|line| line.starts_with("loss")).unwrap();
    let column = |line: &str, part: &str| {
        let at = line.rfind(part).unwrap();
        line[..at].chars().count()
    };
    let last = format!("{:.4} ± ", number(&difference["data"]["loss"]["value"]));
    assert_eq!(column(header, "B - A"), column(loss, &last), "{text}");
}

#[test]
fn questions_that_cannot_be_asked() {
    let dir = TempDir::new().unwrap();
    let [model, bare] = write_models(dir.path());
    let task = dir.path().join("task.jsonl");
    let path = task.to_str().unwrap();
    let good = r#"{"query": "a", "choices": ["b", "c"], "gold": 0}"#;
    fs::write(
        &task,
        format!("{good}\n{{\"query\": \"a\", \"gold\": 0}}\n"),
    )
    .unwrap();
    let args = ["--checkpoint", &model, "--tasks", path];
    refused(&args, 1, &["task.jsonl: line 2: missing field `choices`"]);
    let long = good.replace("\"c\"", &format!("\"{}\"", "word ".repeat(100)));
    fs::write(&task, format!("{good}\n\n{long}\n")).unwrap();
    refused(
        &args,
        1,
        &["task.jsonl: line 3: ", "the model's context has 96"],
    );
    fs::write(&task, "").unwrap();
    refused(&args, 1, &["task.jsonl: ", "no questions"]);
    fs::write(&task, good).unwrap();
    let says = ["b.safetensors has no tokenizer", "--tokenizer"];
    refused(&["--checkpoint", &bare, "--tasks", path], 2, &says);
    let none = [
        "--checkpoint",
        &bare,
        "--tasks",
        path,
        "--tokenizer",
        "none.json",
    ];
    refused(&none, 1, &["none.json"]);
    let wrong = ["--checkpoint", &bare, "--tasks", path, "--tokenizer", path];
    refused(&wrong, 1, &["task.jsonl: not a tokenizer.json"]);
    refused(
        &["--checkpoint", &model, "--tasks", "none.jsonl"],
        1,
        &["none.jsonl"],
    );
    // Ids beyond a model of 64 tokens.
    let small = BitNetConfig {
        vocab_size: 64,
        ..config()
    };
    let weights = BitNetTransformer::new(&small, 1, &Device::Cpu).unwrap();
    let weights = PackedWeights::read(&small, &weights).unwrap();
    let file = dir.path().join("small.safetensors");
    packed_file::write(&file, &small, &weights, None).unwrap();
    let file = file.to_str().unwrap();
    let args = [
        "--checkpoint",
        file,
        "--tasks",
        path,
        "--tokenizer",
        TOKENIZER,
    ];
    refused(
        &args,
        1,
        &["task.jsonl: line 1: ", "vocabulary of 64", "--tokenizer"],
    );
}

#[test]
fn data_that_cannot_be_scored() {
    let dir = TempDir::new().unwrap();
    let [model, bare] = write_models(dir.path());
    let text = write_text(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let with = |data: &str, more: &[&str], code, says: &[&str]| {
        refused(
            &[&["--checkpoint", &model, "--data", data], more].concat(),
            code,
            says,
        );
    };
    with(&text, &["--stride", "0"], 2, &["stride of 0", "1 to 96"]);
    with(&text, &["--stride", "97"], 2, &["stride of 97", "1 to 96"]);
    with(
        &text,
        &["--seq-len", "32", "--stride", "33"],
        2,
        &["stride of 33", "1 to 32"],
    );
    with(
        &text,
        &["--seq-len", "97"],
        2,
        &["97 tokens (--seq-len)", "context is 1 to 96"],
    );
    with(&text, &["--seq-len", "0"], 2, &["0 tokens (--seq-len)"]);
    with(&text, &["--max-tokens", "0"], 2, &["--max-tokens"]);
    with(&text, &["--dtype", "u8"], 2, &["u16 or u32"]);
    with(&path("none.bin"), &[], 2, &["no token file", "none.bin"]);
    fs::write(path("empty.bin"), "").unwrap();
    with(
        &path("empty.bin"),
        &[],
        1,
        &["empty.bin: the file is empty"],
    );
    for (tokens, says) in [(0, "has 0 tokens"), (1, "has 1 tokens")] {
        write_bin(Path::new(&path("short.bin")), &counting(tokens));
        with(
            &path("short.bin"),
            &[],
            2,
            &["short.bin", says, "at least 2"],
        );
    }
    let mut outside = counting(300);
    outside[150] = 500;
    write_bin(Path::new(&path("outside.bin")), &outside);
    with(
        &path("outside.bin"),
        &[],
        1,
        &["outside.bin: token 150 is id 500", "vocab_size is 500"],
    );
    // Before it there is nothing wrong.
    let before = [
        "--checkpoint",
        &model,
        "--data",
        &path("outside.bin"),
        "--max-tokens",
        "149",
    ];
    assert_eq!(json(&before)["data"]["tokens"], 149);

    // The text's sidecar names another tokenizer than this one.
    let other = fs::read_to_string(TOKENIZER).unwrap() + "\n";
    fs::write(path("tokenizer2.json"), other).unwrap();
    let tokenizer = path("tokenizer2.json");
    let more = ["--tokenizer", tokenizer.as_str()];
    with(
        &text,
        &more,
        2,
        &["text.bin was made with another tokenizer", "a.safetensors"],
    );
    let compare = ["--compare", &model, &bare, "--data", &text];
    assert!(run(&compare).status.success(), "one tokenizer is not known");
}

#[test]
fn arguments_that_do_not_go_together() {
    for (args, says) in [
        (&["--checkpoint", "a"] as &[&str], "--data"),
        (&["--data", "a.bin"], "--checkpoint"),
        (
            &["--checkpoint", "a", "--compare", "b", "c", "--data", "d"],
            "cannot be used with",
        ),
        (&["--compare", "b", "--data", "d"], "2 values required"),
        (
            &["--checkpoint", "a", "--tasks", "b", "--stride", "3"],
            "--data",
        ),
        (
            &["--checkpoint", "a", "--data", "b", "--limit", "3"],
            "--tasks",
        ),
        (
            &["--checkpoint", "a", "--tasks", "b", "--limit", "0"],
            "--limit",
        ),
    ] {
        refused(args, 2, &[says]);
    }
    let dir = TempDir::new().unwrap();
    let text = write_text(dir.path());
    refused(
        &["--checkpoint", "none", "--data", &text],
        2,
        &["none does not exist"],
    );
}
