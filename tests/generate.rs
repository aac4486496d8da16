//! `titanbit generate`: what it prints, and what it refuses.

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use candle_core::{Device, Tensor};
use common::{assert_refused, titanbit};
use tempfile::TempDir;
use titanbit::data::tokenize::vocabulary::parse;
use titanbit::inference::{
    End, Generated, Model, PackedWeights, Request, Sampling, generate, likeliest, load, packed_file,
};
use titanbit::model::BitNetTransformer;
use titanbit::train::checkpoint;

/// A run of a few steps on text that repeats itself, with its tokenizer.
struct Run {
    dir: TempDir,
}

impl Run {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        let text = "ein Wal, zwei Wale, drei Wale – und é € 😀 dazu.\n".repeat(400);
        fs::write(at("text.txt"), text).unwrap();
        let tokenize = titanbit()
            .args(["tokenize", "--train-vocab", "300", "--input"])
            .arg(at("text.txt"))
            .arg("--output")
            .arg(at("train.bin"))
            .output()
            .unwrap();
        assert!(tokenize.status.success(), "{tokenize:?}");
        let config = format!(
            "model: {{vocab_size: 300, hidden_size: 64, layers: 2, heads: 4, kv_heads: 2, \
                      intermediate_size: 96, max_seq_len: 48}}\n\
             train: {{steps: 60, seq_len: 48, micro_batch: 4, grad_accum: 1}}\n\
             data: {{train: [{{path: {0}/train.bin}}], val: null, tokenizer: {0}/tokenizer.json}}\n\
             optimizer: {{lr: 0.01}}\n\
             schedule: {{kind: constant, warmup_steps: 5}}\n\
             checkpoint: {{every: 60}}\n\
             hardware: {{device: cpu}}\n",
            dir.path().display()
        );
        fs::write(at("tiny.yaml"), config).unwrap();
        let train = titanbit()
            .args(["train", "--config"])
            .arg(at("tiny.yaml"))
            .arg("--out")
            .arg(at("run"))
            .output()
            .unwrap();
        assert!(train.status.success(), "{train:?}");
        Self { dir }
    }

    fn checkpoint(&self) -> PathBuf {
        self.dir.path().join("run/checkpoints/step_0000060")
    }

    fn generate(&self, args: &[&str]) -> Output {
        generate_from(&self.checkpoint(), args, None)
    }
}

fn generate_from(model: &Path, args: &[&str], stdin: Option<&str>) -> Output {
    let mut child = titanbit()
        .args(["generate", "--device", "cpu", "--checkpoint"])
        .arg(model)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input
        .write_all(stdin.unwrap_or_default().as_bytes())
        .unwrap();
    drop(input);
    child.wait_with_output().unwrap()
}

#[track_caller]
fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn notes(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Greedy continuation by the training model, which runs the whole sequence for each token.
fn greedy(model: &BitNetTransformer, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..tokens {
        let input = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap();
        let logits = model
            .forward(&input.unsqueeze(0).unwrap(), None)
            .unwrap()
            .logits;
        let last = logits.get(0).unwrap().get(ids.len() - 1).unwrap();
        ids.push(likeliest(&last.to_vec1::<f32>().unwrap()));
    }
    ids.split_off(prompt.len())
}

#[test]
fn greedy_text_is_the_training_models_token_by_token() {
    let run = Run::new();
    let dir = run.checkpoint();
    let state = checkpoint::verify(&dir).unwrap();
    let model = checkpoint::load_model(&dir, &state.config, &Device::Cpu).unwrap();
    let loaded = load(&dir).unwrap();
    let json = loaded.tokenizer.unwrap();
    let tokenizer = parse(json.as_bytes(), &dir).unwrap();
    let prompt = tokenizer
        .encode("zwei W", false)
        .unwrap()
        .get_ids()
        .to_vec();
    let expected = greedy(&model, &prompt, 30);

    let packed = Model::new(&loaded.config, loaded.weights, &Device::Cpu).unwrap();
    let request = Request {
        prompt: prompt.clone(),
        max_tokens: 30,
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        seed: 0,
        stops: Vec::new(),
        end_ids: Vec::new(),
    };
    let mut shown = String::new();
    let Generated { ids, end, .. } = generate(
        &mut packed.session(),
        &tokenizer,
        &request,
        |piece| {
            shown += piece;
            Ok(())
        },
        || false,
    )
    .unwrap();
    assert_eq!(ids, expected);
    assert_eq!(end, End::MaxTokens);
    assert_eq!(shown, tokenizer.decode(&expected, true).unwrap());

    // The binary prints the same, streamed or not.
    let greedy = [
        "--prompt",
        "zwei W",
        "--temperature",
        "0",
        "--max-tokens",
        "30",
    ];
    let output = run.generate(&greedy);
    assert_eq!(text(&output), format!("{shown}\n"));
    let notes = notes(&output);
    for part in [
        "checkpoint of step 60",
        "prompt ",
        "decode 29 tokens",
        "tokens/s",
    ] {
        assert!(notes.contains(part), "`{part}` in: {notes}");
    }
    let streamed = run.generate(&[&greedy[..], &["--stream", "--echo"]].concat());
    assert_eq!(text(&streamed), format!("zwei W{shown}\n"));
    let piped = generate_from(&dir, &greedy[2..], Some("zwei W\n"));
    assert_eq!(text(&piped), format!("{shown}\n"));

    // So does a packed file, whose tables have 16 bits.
    let file = run.dir.path().join("model.safetensors");
    let weights = PackedWeights::read(model.config(), &model).unwrap();
    let json = fs::read_to_string(dir.join("tokenizer.json")).unwrap();
    packed_file::write(&file, model.config(), &weights, Some(&json)).unwrap();
    let packed = generate_from(&file, &greedy, None);
    assert_eq!(text(&packed), format!("{shown}\n"));
}

#[test]
fn a_seed_repeats_its_text_and_a_stop_text_ends_it() {
    let run = Run::new();
    let sample = |args: &[&str]| {
        let args = [
            &[
                "--prompt",
                "ein",
                "--max-tokens",
                "40",
                "--temperature",
                "2",
            ],
            args,
        ];
        text(&run.generate(&args.concat()))
    };
    assert_eq!(sample(&["--seed", "5"]), sample(&["--seed", "5"]));
    assert_ne!(sample(&["--seed", "5"]), sample(&["--seed", "6"]));

    let whole = text(&run.generate(&["--prompt", "ein", "--temperature", "0"]));
    let output = run.generate(&["--prompt", "ein", "--temperature", "0", "--stop", "drei"]);
    let (before, _) = whole.split_once("drei").expect("the model knows its text");
    assert_eq!(text(&output), format!("{before}\n"));
    assert!(notes(&output).contains("; stop text"));
}

#[test]
fn text_ends_where_the_context_does() {
    let run = Run::new();
    let output = run.generate(&[
        "--prompt",
        "ein",
        "--max-tokens",
        "1000",
        "--temperature",
        "0",
    ]);
    text(&output);
    let notes = notes(&output);
    assert!(notes.contains("; the context is full"), "{notes}");
    // An empty prompt begins a document.
    text(&run.generate(&["--prompt", ""]));
}

#[test]
fn what_cannot_be_generated_is_refused_in_one_line() {
    let run = Run::new();
    let long = "Wale ".repeat(60);
    let refused = |args: &[&str], code, says: &[&str]| {
        let output = run.generate(args);
        // After what was loaded.
        let error = notes(&output)
            .lines()
            .last()
            .unwrap_or_default()
            .to_string();
        let last = Output {
            stderr: error.into_bytes(),
            ..output
        };
        assert_refused(&last, code, says);
    };
    refused(&["--prompt", &long], 2, &["the prompt has", "room for 48"]);
    refused(
        &["--prompt", "a", "--top-p", "2"],
        2,
        &["--top-p 2", "at most 1"],
    );
    refused(&["--prompt", "a", "--stop", ""], 2, &["--stop"]);
    let missing = "no/such/tokenizer.json";
    refused(&["--prompt", "a", "--tokenizer", missing], 1, &[missing]);
    let config = run.dir.path().join("tiny.yaml");
    let config = config.to_str().unwrap();
    refused(
        &["--prompt", "a", "--tokenizer", config],
        1,
        &["not a tokenizer.json"],
    );
    let nowhere = generate_from(Path::new("no/such/model"), &["--prompt", "a"], None);
    assert_refused(&nowhere, 2, &["no/such/model does not exist"]);

    let copy = run.dir.path().join("bare");
    fs::create_dir(&copy).unwrap();
    for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        fs::copy(run.checkpoint().join(file), copy.join(file)).unwrap();
    }
    let bare = generate_from(&copy, &["--prompt", "a"], None);
    assert_refused(&bare, 1, &["tokenizer.json"]);
}

#[test]
fn a_packed_file_that_is_cut_or_foreign_is_refused() {
    let run = Run::new();
    let dir = run.checkpoint();
    let loaded = load(&dir).unwrap();
    let file = run.dir.path().join("model.safetensors");
    packed_file::write(&file, &loaded.config, &loaded.weights, None).unwrap();
    let no_tokenizer = generate_from(&file, &["--prompt", "a"], None);
    assert_refused(&no_tokenizer, 2, &["has no tokenizer", "--tokenizer"]);

    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 100]).unwrap();
    let cut = generate_from(&file, &["--prompt", "a"], None);
    assert_refused(&cut, 1, &["model.safetensors", "cut short"]);
    let foreign = dir.join("model.safetensors");
    let foreign = generate_from(&foreign, &["--prompt", "a"], None);
    assert_refused(
        &foreign,
        2,
        &["neither a checkpoint nor", "titanbit export"],
    );
}
