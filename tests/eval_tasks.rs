//! Multiple-choice tasks against EleutherAI's lm-evaluation-harness itself, whose prompts, tokens,
//! log-likelihoods and scores `tests/reference/lm_eval_reference.py` stored, and against the
//! definition, by a whole pass for every choice.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use common::{assert_close, devices, reference_config};
use serde_json::Value;
use tempfile::TempDir;
use titanbit::data::tokenize::vocabulary::{Vocabulary, end_of_text, parse};
use titanbit::eval::{self, Answer, Form, Question, Task, accuracy, accuracy_difference};
use titanbit::inference::{Model, PackedWeights};
use titanbit::model::{BitNetConfig, BitNetTransformer, Parameters};
use tokenizers::Tokenizer;

const FILES: [(&str, Form); 4] = [
    ("questions.jsonl", Form::Query),
    ("hellaswag_val.jsonl", Form::HellaSwag),
    ("ARC-Challenge-Test.jsonl", Form::Arc),
    ("valid.jsonl", Form::Piqa),
];

fn reference(file: &str) -> PathBuf {
    Path::new("tests/reference").join(file)
}

fn task(file: &str) -> Task {
    Task::read(&reference("tasks").join(file)).unwrap()
}

/// What lm-evaluation-harness made of a file.
fn by_lm_eval(file: &str) -> Value {
    let all = fs::read_to_string(reference("lm_eval_reference.jsonl")).unwrap();
    let mut all = all
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    all.find(|results| results["file"] == file).unwrap()
}

fn tokenizer() -> Tokenizer {
    let path = reference("lm_eval_tokenizer.json");
    parse(&fs::read(&path).unwrap(), &path).unwrap()
}

/// The model that the harness ran.
fn model(device: &Device) -> Model {
    let path = reference("lm_eval_reference.safetensors");
    let config = reference_config(&path);
    let parameters = Parameters::load(&config, &path, &Device::Cpu).unwrap();
    let model = BitNetTransformer::with_parameters(&config, parameters).unwrap();
    let weights = PackedWeights::read(&config, &model).unwrap();
    Model::new(&config, weights, device).unwrap()
}

fn answers(model: &Model, tokenizer: &Tokenizer, questions: &[Question]) -> Vec<Answer> {
    let config = model.config();
    let mut session = model.session();
    let answer = |question| {
        let prompt = eval::encode(tokenizer, question, config.vocab_size, config.max_seq_len);
        eval::answer(&mut session, question, &prompt.unwrap()).unwrap()
    };
    questions.iter().map(answer).collect()
}

#[test]
fn questions_are_put_into_the_words_of_lm_eval() {
    for (file, form) in FILES {
        let task = task(file);
        assert_eq!(task.form, form);
        let expected = by_lm_eval(file);
        let expected = expected["questions"].as_array().unwrap();
        assert_eq!(task.questions.len(), expected.len());
        for (question, expected) in task.questions.iter().zip(expected) {
            assert_eq!(expected["query"], *question.query);
            assert_eq!(expected["choices"], serde_json::json!(question.choices));
            assert_eq!(expected["gold"], question.gold);
        }
    }
}

#[test]
fn tokens_are_split_where_lm_eval_splits_them() {
    let tokenizer = tokenizer();
    for (file, _) in FILES {
        let expected = by_lm_eval(file);
        for (i, question) in task(file).questions.iter().enumerate() {
            let prompt = eval::encode(&tokenizer, question, 500, 96).unwrap();
            let expected = &expected["questions"][i];
            assert_eq!(expected["context"], serde_json::json!(prompt.context));
            let continuations = serde_json::json!(prompt.continuations);
            assert_eq!(expected["continuations"], continuations);
        }
    }
}

#[test]
fn scores_are_those_of_lm_eval() {
    let tokenizer = tokenizer();
    for device in devices() {
        let model = model(&device);
        let mut differences = Vec::new();
        for (file, _) in FILES {
            let expected = by_lm_eval(file);
            let task = task(file);
            let answers = answers(&model, &tokenizer, &task.questions);
            let mut truncated = 0;
            for (answer, expected) in answers
                .iter()
                .zip(expected["questions"].as_array().unwrap())
            {
                let likelihoods = expected["log_likelihoods"].as_array().unwrap();
                let theirs = likelihoods.iter().map(|theirs| theirs.as_f64().unwrap());
                let ours = answer.log_likelihoods.iter();
                differences.extend(ours.zip(theirs).map(|(ours, theirs)| ours / theirs - 1.0));
                if device.is_cpu() {
                    assert_eq!(expected["acc"], f64::from(answer.correct));
                    let normalised = f64::from(answer.correct_normalised);
                    assert_eq!(expected["acc_norm"], normalised);
                }
                let tokens = |value: &Value| value.as_array().unwrap().len();
                let continuations = expected["continuations"].as_array().unwrap();
                let longest = continuations.iter().map(tokens).max().unwrap();
                // All but the last token are fed.
                let fed = tokens(&expected["context"]) + longest - 1;
                assert_eq!(answer.truncated, fed > 96, "{file}");
                truncated += usize::from(answer.truncated);
            }
            assert!(truncated > 0 || file == "questions.jsonl", "{file}");
            if device.is_cpu() {
                let acc = accuracy(&answers, |answer| answer.correct);
                let acc_norm = accuracy(&answers, |answer| answer.correct_normalised);
                for (ours, theirs) in [
                    (acc.value, "acc"),
                    (acc.stderr.unwrap(), "acc_stderr"),
                    (acc_norm.value, "acc_norm"),
                    (acc_norm.stderr.unwrap(), "acc_norm_stderr"),
                ] {
                    let expected = expected[theirs].as_f64().unwrap();
                    assert!((ours - expected).abs() < 1e-12, "{file}: {theirs}");
                }
            }
        }
        match device {
            Device::Cpu => assert_close(&differences, 1e-6, 2e-3),
            // Its kernels multiply by the reciprocal of a scale, which flips more codes.
            _ => assert!(
                differences.iter().all(|d| d.abs() < 2e-2),
                "{differences:?}"
            ),
        }
    }
}

/// Sum of ln softmax(logits)[target] over the targets of a whole pass.
fn by_definition(model: &BitNetTransformer, context: &[u32], continuation: &[u32]) -> f64 {
    let ids = [context, continuation].concat();
    let inputs = &ids[..ids.len() - 1];
    let inputs = Tensor::new(&inputs[inputs.len().saturating_sub(64)..], &Device::Cpu).unwrap();
    let logits = model.forward(&inputs.unsqueeze(0).unwrap(), None).unwrap();
    let likelihoods = candle_nn::ops::log_softmax(&logits.logits, 2).unwrap();
    let rows: Vec<Vec<f32>> = likelihoods.squeeze(0).unwrap().to_vec2().unwrap();
    let rows = &rows[rows.len() - continuation.len()..];
    let targets = rows.iter().zip(continuation);
    targets.map(|(row, id)| f64::from(row[*id as usize])).sum()
}

/// Another tokenizer, another network, and a query of every length up to three contexts.
#[test]
fn every_choice_is_scored_as_a_whole_pass_scores_it() {
    let words = [
        "the cat ",
        "sat on ",
        "a mat, ",
        "and then, ",
        "Ω ",
        "it ran. ",
    ];
    let text = |seed: usize, words_wanted: usize| -> String {
        let word = |i: usize| words[(seed * 7 + i * i * 5 + i) % words.len()];
        (0..words_wanted).map(word).collect()
    };
    let texts = (0..50).map(|seed| text(seed, 30));
    let vocabulary = Vocabulary::train(280, texts).unwrap();
    let config = BitNetConfig {
        vocab_size: 280,
        hidden_size: 48,
        layers: 2,
        heads: 4,
        kv_heads: 1,
        intermediate_size: 80,
        max_seq_len: 64,
        init_std: 0.2,
        ..BitNetConfig::default()
    };
    let model = BitNetTransformer::new(&config, 5, &Device::Cpu).unwrap();
    let weights = PackedWeights::read(&config, &model).unwrap();
    let packed = Model::new(&config, weights, &Device::Cpu).unwrap();
    let questions: Vec<Question> = (0..40)
        .map(|n| Question {
            line: n + 1,
            query: text(n, 2 * n),
            choices: vec![text(n, 1), text(n + 1, 8), text(n + 2, 3)],
            gold: n % 3,
        })
        .collect();
    let tokenizer = &vocabulary.tokenizer;
    let answers = answers(&packed, tokenizer, &questions);
    assert!(answers.iter().filter(|answer| answer.truncated).count() > 10);
    let (mut right, mut differences) = ([0; 2], Vec::new());
    for (question, answer) in questions.iter().zip(&answers) {
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        let query = question.query.trim_end();
        let context = match ids(query) {
            ids if ids.is_empty() => vec![end_of_text(tokenizer).unwrap()],
            ids => ids,
        };
        let mut expected = Vec::new();
        for (choice, found) in question.choices.iter().zip(&answer.log_likelihoods) {
            let whole = ids(&format!("{} {choice}", question.query));
            let continuation = &whole[ids(query).len()..];
            let likelihood = by_definition(&model, &context, continuation);
            differences.push(found / likelihood - 1.0);
            expected.push((likelihood, likelihood / choice.chars().count() as f64));
        }
        let best = |score: fn(&(f64, f64)) -> f64| {
            let largest = expected.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
            expected.iter().position(|e| score(e) == largest).unwrap()
        };
        assert_eq!(answer.correct, best(|e| e.0) == question.gold);
        assert_eq!(answer.correct_normalised, best(|e| e.1) == question.gold);
        right[0] += usize::from(answer.correct);
        right[1] += usize::from(answer.correct_normalised);
    }
    assert_close(&differences, 1e-6, 2e-3);
    assert!(
        right.iter().all(|count| (1..40).contains(count)),
        "{right:?}"
    );
}

#[test]
fn two_models_are_compared_question_by_question() {
    let answer = |correct| Answer {
        log_likelihoods: Vec::new(),
        correct,
        correct_normalised: !correct,
        truncated: false,
    };
    // Gains 0, 1, 0, -1, 1: mean 0.2, sum of squares 3 - 5 * 0.04, over 4, over 5.
    let a = [true, false, true, true, false].map(answer);
    let b = [true, true, true, false, true].map(answer);
    let gain = accuracy_difference(&a, &b, |answer| answer.correct);
    assert!((gain.value - 0.2).abs() < 1e-15);
    assert!((gain.stderr.unwrap() - (2.8f64 / 4.0 / 5.0).sqrt()).abs() < 1e-15);
    let same = accuracy_difference(&a, &a, |answer| answer.correct_normalised);
    assert_eq!((same.value, same.stderr), (0.0, Some(0.0)));
    assert_eq!(accuracy(&a[..1], |answer| answer.correct).stderr, None);
}

#[test]
fn a_wrong_line_is_named_with_what_is_wrong_there() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("task.jsonl");
    let good = r#"{"query": "a", "choices": ["b", "c"], "gold": 0}"#;
    let arc = r#"{"question": {"stem": "s", "choices": [{"text": "t", "label": "A"}, {"text": "u", "label": "B"}]}, "answerKey": "A"}"#;
    let swag =
        r#"{"activity_label": "x", "ctx_a": "a", "ctx_b": "b", "endings": ["c", "d"], "label": 1}"#;
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["no questions"]),
        (&["", "  ", ""], &["no questions"]),
        (&[good, "{\"query\": "], &["line 2: ", "not JSON", "column"]),
        (&[good, "", &format!("{good}x")], &["line 3: ", "not JSON"]),
        (&["text"], &["line 1: not a JSON object"]),
        (&[good, "[1]"], &["line 2: not a JSON object"]),
        (&["{}"], &["line 1: missing field `query`", "HellaSwag"]),
        (
            &[good, r#"{"query": "a", "choices": ["b", "c"]}"#],
            &["line 2: missing field `gold`"],
        ),
        (&[good, arc], &["line 2: missing field `query`"]),
        (
            &[r#"{"query": "a", "choices": ["b", 3], "gold": 0}"#],
            &["line 1: choices[1]: ", "`3`, expected a string"],
        ),
        (
            &[r#"{"query": "a", "choices": ["b", "c"], "gold": -1}"#],
            &["line 1: gold: ", "`-1`, expected a whole number"],
        ),
        (
            &[good, r#"{"query": "a", "choices": ["b", "c"], "gold": 2}"#],
            &["line 2: the right choice is number 2, but there are 2"],
        ),
        (
            &[r#"{"query": "a", "choices": [], "gold": 0}"#],
            &["line 1: `choices` has 0"],
        ),
        (
            &[r#"{"query": "a", "choices": ["b", ""], "gold": 0}"#],
            &["line 1: choices[1] is empty"],
        ),
        (
            &[arc, &arc.replace("answerKey", "key")],
            &["line 2: missing field `answerKey`"],
        ),
        (
            &[&arc
                .replace(r#""A"}]"#, "")
                .replace(r#""answerKey": "A""#, r#""answerKey": "E""#)],
            &["line 1: answerKey `E` is no choice's label"],
        ),
        (
            &[&arc.replacen("\"label\"", "\"name\"", 1)],
            &["line 1: question.choices[0]: missing field `label`"],
        ),
        (
            &[swag, &swag.replace("ctx_b", "c")],
            &["line 2: missing field `ctx_b`"],
        ),
        (
            &[&swag.replace('1', "\"1\"")],
            &["line 1: label: ", "expected a whole number"],
        ),
    ];
    for (lines, says) in cases {
        fs::write(&path, lines.join("\n")).unwrap();
        refused(&path, "task.jsonl: ", says);
    }
    fs::write(
        &path,
        [good.as_bytes(), b"\n{\"query\": \"\xff\"}"].concat(),
    )
    .unwrap();
    refused(&path, "task.jsonl: ", &["line 2: "]);
    assert!(matches!(
        Task::read(&dir.path().join("none.jsonl")),
        Err(titanbit::Error::Io { .. })
    ));
}

#[test]
fn piqa_needs_a_label_for_each_question() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("dev.jsonl");
    let question = r#"{"goal": "g", "sol1": "a", "sol2": "b"}"#;
    fs::write(&path, format!("\u{feff}{question}\r\n{question}\r\n")).unwrap();
    refused(&path, "dev.jsonl: ", &["labels", "dev-labels.lst"]);
    let labels = dir.path().join("dev-labels.lst");
    for (text, says) in [
        ("0\n", "1 labels, but"),
        ("0\n1\n0\n", "3 labels, but"),
        ("0\n2\n", "line 2: a label is 0 or 1, not `2`"),
    ] {
        fs::write(&labels, text).unwrap();
        refused(&path, "dev-labels.lst: ", &[says]);
    }
    fs::write(&labels, "1\r\n0\r\n\n").unwrap();
    let task = Task::read(&path).unwrap();
    let gold: Vec<_> = task.questions.iter().map(|q| (q.line, q.gold)).collect();
    assert_eq!(gold, [(1, 1), (2, 0)]);
}

#[track_caller]
fn refused(path: &Path, file: &str, says: &[&str]) {
    let error = Task::read(path).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    let error = error.to_string();
    assert_eq!(error.lines().count(), 1, "{error}");
    for part in [&[file], says].concat() {
        assert!(error.contains(part), "`{part}` in: {error}");
    }
}

#[test]
fn a_question_that_a_model_cannot_be_asked_is_refused() {
    let tokenizer = tokenizer();
    let question = |query: &str, choices: &[&str]| Question {
        line: 1,
        query: query.into(),
        choices: choices.iter().map(|choice| choice.to_string()).collect(),
        gold: 0,
    };
    let refused = |question: &Question, vocab_size, max_seq_len, says: &str| {
        let error = eval::encode(&tokenizer, question, vocab_size, max_seq_len).unwrap_err();
        assert!(error.contains(says), "{error}");
    };
    let short = question("two", &["a", "four hundred and twenty"]);
    refused(&short, 500, 4, "choice 1 (from 0) takes ");
    refused(&short, 100, 96, "outside the model's vocabulary of 100");
    // As long as the context is allowed: a token of the query is left to predict it from.
    let count = eval::encode(&tokenizer, &short, 500, 96)
        .unwrap()
        .continuations[1]
        .len();
    assert!(eval::encode(&tokenizer, &short, 500, count).is_ok());
    refused(&short, 500, count - 1, "choice 1 (from 0) takes ");
}
