//! Tokenizers in GGUF files.

use std::fs;
use std::path::Path;

use candle_core::Device;
use serde_json::{Value, json};
use titanbit::export::gguf::{self, TernaryType};
use titanbit::model::{BitNetConfig, BitNetTransformer};

use super::python;
use super::vocabularies::{self, add_token, begin_with, bytes, split};

const VOCAB_SIZE: usize = 1024;

/// Writes a model of 1024 tokens with this tokenizer.
fn write(path: &Path, tokenizer: &Value) -> titanbit::Result<Vec<String>> {
    let config = BitNetConfig {
        vocab_size: VOCAB_SIZE,
        hidden_size: 32,
        layers: 1,
        heads: 1,
        kv_heads: 1,
        intermediate_size: 32,
        tie_embeddings: true,
        ..BitNetConfig::default()
    };
    let model = BitNetTransformer::new(&config, 1, &Device::Cpu)?;
    let json = tokenizer.to_string();
    let mut notes = gguf::write(path, &model, Some(&json), TernaryType::Tq2_0, "tokens")?;
    assert!(notes.remove(0).contains("Q4_0"));
    Ok(notes)
}

#[test]
fn llama_cpp_finds_the_same_tokens_as_tokenizers() {
    let Some(python) = python::with(&["llama_cpp", "tokenizers"]) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut args = vec!["tokens".to_string()];
    for (name, tokenizer) in vocabularies::all() {
        let path = dir.path().join(name);
        let (json, gguf) = (path.with_extension("json"), path.with_extension("gguf"));
        fs::write(&json, tokenizer.to_string()).unwrap();
        let notes = write(&gguf, &tokenizer).unwrap();
        // What the note tells of is left out of the comparison.
        assert_eq!(
            !notes.is_empty(),
            name.contains("metaspace"),
            "{name}: {notes:?}"
        );
        let kind = if notes.is_empty() {
            "all"
        } else {
            "no-leading-blank"
        };
        for argument in [kind, json.to_str().unwrap(), gguf.to_str().unwrap()] {
            args.push(argument.to_string());
        }
    }
    python::check(&python, &args);
}

#[test]
fn tokenizers_that_llama_cpp_cannot_run_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let plain = vocabularies::byte_level(300);
    let piece = vocabularies::sentence_piece();
    let changed = |base: &Value, change: &dyn Fn(&mut Value)| {
        let mut json = base.clone();
        change(&mut json);
        json
    };
    let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]});
    let word_level = json!({"type": "WordLevel", "vocab": {"<eos>": 0, "a": 1}, "unk_token": "a"});
    for (tokenizer, says) in [
        (json!({"model": 5}), "tokenizer.json cannot be read"),
        (
            changed(&plain, &|t| t["model"] = unigram.clone()),
            "its model is Unigram, not BPE",
        ),
        (
            changed(&plain, &|t| t["model"] = word_level.clone()),
            "its model is WordLevel",
        ),
        (
            changed(&plain, &|t| t["normalizer"] = json!({"type": "Lowercase"})),
            "Lowercase",
        ),
        (
            changed(&plain, &|t| {
                t["pre_tokenizer"]["add_prefix_space"] = true.into()
            }),
            "adds a space before a text",
        ),
        (
            changed(&plain, &|t| {
                t["pre_tokenizer"] = json!({"type": "Whitespace"})
            }),
            "its pre-tokenizer has a part Whitespace",
        ),
        (
            changed(&plain, &|t| t["pre_tokenizer"] = Value::Null),
            "neither on bytes",
        ),
        (
            changed(&plain, &|t| {
                t["pre_tokenizer"] =
                    json!({"type": "Sequence", "pretokenizers": [split("x+"), bytes(false)]});
            }),
            "it splits text by `x+`, and only the ways of gpt-2,",
        ),
        (
            changed(&plain, &|t| t["model"]["ignore_merges"] = true.into()),
            "with ignore_merges",
        ),
        (
            changed(&plain, &|t| {
                t["model"]["end_of_word_suffix"] = "</w>".into()
            }),
            "end_of_word_suffix",
        ),
        (
            changed(&plain, &|t| {
                t["post_processor"] = json!({"type": "BertProcessing", "sep": ["a", 65],
                                             "cls": ["b", 66]});
            }),
            "its post-processor is BertProcessing",
        ),
        (
            changed(&plain, &|t| {
                let id = add_token(t, "<s>", true);
                t["post_processor"] = begin_with("<s>", id);
                let first = t["post_processor"]["single"][0].clone();
                t["post_processor"]["single"]
                    .as_array_mut()
                    .unwrap()
                    .insert(0, first);
            }),
            "more than one token at either end",
        ),
        (
            vocabularies::byte_level(1500),
            "the model's vocabulary is 1024",
        ),
        (
            changed(&plain, &|t| {
                let id = t["model"]["vocab"]
                    .as_object_mut()
                    .unwrap()
                    .remove("<|endoftext|>");
                t["model"]["vocab"]["<end>"] = id.unwrap();
                t["added_tokens"] = json!([]);
            }),
            "none of the tokens <|endoftext|>",
        ),
        (
            changed(&plain, &|t| {
                add_token(t, "[PAD500]", false);
            }),
            "two tokens `[PAD500]`",
        ),
        (
            changed(&piece, &|t| {
                t["normalizer"]["normalizers"][0]["prepend"] = "_".into()
            }),
            "normaliser and pre-tokenizer are not those of Llama 2",
        ),
        (
            changed(&piece, &|t| {
                t["model"]["merges"].as_array_mut().unwrap().pop();
            }),
            "stay apart, though",
        ),
        (
            changed(&piece, &|t| {
                for token in ["\n", "\r", "\n\r"] {
                    let id = t["model"]["vocab"].as_object().unwrap().len();
                    let vocab = t["model"]["vocab"].as_object_mut().unwrap();
                    vocab.entry(token).or_insert(id.into());
                }
            }),
            "`\\n` and `\\r` stay apart, though `\\n\\r` is a token",
        ),
        (
            changed(&piece, &|t| {
                // The pair of a token that can be made in two ways, away from the other.
                let merges = t["model"]["merges"].as_array_mut().unwrap();
                let token =
                    |pair: &Value| [pair[0].as_str().unwrap(), pair[1].as_str().unwrap()].concat();
                let at = merges
                    .windows(2)
                    .position(|w| token(&w[0]) == token(&w[1]))
                    .unwrap();
                let pair = merges.remove(at);
                merges.push(pair);
            }),
            "lie apart",
        ),
        (
            changed(&piece, &|t| {
                t["model"]["vocab"]["▁▁"] = 900.into();
                let merges = t["model"]["merges"].as_array_mut().unwrap();
                merges.push(json!(["▁", "▁"]));
                t["normalizer"] = Value::Null;
                t["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁",
                                            "prepend_scheme": "always", "split": true});
            }),
            "its token `▁▁` has one inside",
        ),
        (
            changed(&piece, &|t| {
                t["model"]["vocab"]
                    .as_object_mut()
                    .unwrap()
                    .remove("<0xFF>");
            }),
            "it has no token <0xFF>",
        ),
    ] {
        let error = write(&path, &tokenizer).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        let error = error.to_string();
        assert!(
            error.contains(says) && error.lines().count() == 1,
            "`{says}` in: {error}"
        );
        assert!(!path.exists(), "{error}");
    }
}

#[test]
fn what_llama_cpp_does_otherwise_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut tokenizer = vocabularies::byte_level(300);
    assert_eq!(write(&path, &tokenizer).unwrap(), [""; 0]);
    tokenizer["normalizer"] = json!({"type": "NFC"});
    add_token(&mut tokenizer, "<mask>", true);
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    added.last_mut().unwrap()["lstrip"] = true.into();
    let notes = write(&path, &tokenizer).unwrap();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes[0].contains("(NFC)"), "{}", notes[0]);
    assert!(notes[1].contains("`<mask>`"), "{}", notes[1]);
}
