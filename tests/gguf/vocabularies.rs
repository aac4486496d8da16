//! Tokenizers of the kinds that there are.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use titanbit::data::tokenize::vocabulary::Vocabulary;
use tokenizers::Trainer;
use tokenizers::models::bpe::{BPE, BpeTrainer};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// With up to three digits a word as Llama 3 has it, or one as Qwen2.
fn cl100k(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| {}",
        r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

const FOREIGN: &str = "Zwölf Boxkämpfer jagen Viktor. Ходили Илья и Пётр 12 раз; 吾輩は猫である。\n\
                       \tfor (i = 0;    i < 10;  ++i) {\n\n        it's 1234567 -- we'll see!\n    }\n";

/// This repository's own text and some that is not English.
fn texts() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    let mut texts = vec![read("README.md"), read("src/data/tokenize/gpt2.rs")];
    texts.extend(vec![FOREIGN.to_string(); 20]);
    texts
}

/// A vocabulary as `titanbit tokenize --train-vocab` makes them.
pub fn byte_level(size: usize) -> Value {
    let vocabulary = Vocabulary::train(size, texts().into_iter()).unwrap();
    serde_json::from_slice(&vocabulary.json).unwrap()
}

/// The same with another way to split text.
fn splitting(pre_tokenizers: &[Value], ignore_merges: bool) -> Value {
    let mut json = byte_level(700);
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": pre_tokenizers});
    json["model"]["ignore_merges"] = ignore_merges.into();
    json
}

pub fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

pub fn bytes(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
           "use_regex": use_regex})
}

/// Adds a token that is looked for in text before anything else.
pub fn add_token(json: &mut Value, content: &str, special: bool) -> usize {
    let id = json["model"]["vocab"].as_object().unwrap().len();
    json["model"]["vocab"][content] = id.into();
    let token = json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                       "rstrip": false, "normalized": false, "special": special});
    json["added_tokens"].as_array_mut().unwrap().push(token);
    id
}

/// A post-processor that puts the token in front.
pub fn begin_with(token: &str, id: usize) -> Value {
    let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    json!({"type": "TemplateProcessing", "single": [special, sequence("A")],
           "pair": [special, sequence("A"), sequence("B")],
           "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}})
}

/// A SentencePiece-like vocabulary: control tokens, bytes, then whatever BPE finds in words that
/// begin with a blank; merges as SentencePiece's are, any two tokens that make one.
pub fn sentence_piece() -> Value {
    let mut trainer = BpeTrainer::builder()
        .vocab_size(500)
        .limit_alphabet(90)
        .show_progress(false)
        .build();
    let words = |text: &str| {
        let words = text.split_inclusive(' ');
        Ok(words
            .map(|word| format!("▁{}", word.trim_end_matches(' ')))
            .collect())
    };
    trainer.feed(texts().into_iter(), words).unwrap();
    let mut trained = BPE::default();
    trainer.train(&mut trained).unwrap();
    let mut pieces: Vec<(u32, String)> = trained
        .get_vocab()
        .into_iter()
        .map(|(token, id)| (id, token))
        .collect();
    pieces.sort();

    let control = ["<unk>", "<s>", "</s>"].map(String::from);
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let pieces = pieces.into_iter().map(|(_, piece)| piece);
    let tokens: Vec<String> = control.into_iter().chain(bytes).chain(pieces).collect();
    let ids: HashMap<&str, usize> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut merges = Vec::new();
    for token in &tokens[3 + 256..] {
        let cuts = token
            .char_indices()
            .skip(1)
            .map(|(at, _)| token.split_at(at));
        let mut pairs: Vec<_> = cuts
            .filter_map(|(left, right)| Some((ids.get(left)?, ids.get(right)?, left, right)))
            .collect();
        pairs.sort();
        merges.extend(pairs.into_iter().map(|(_, _, left, right)| [left, right]));
    }
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), id.into()))
        .collect();
    let added = ["<unk>", "<s>", "</s>"]
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
        });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": begin_with("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    })
}

/// Every kind that can be exported, by name.
pub fn all() -> Vec<(&'static str, Value)> {
    let digits = json!({"type": "Digits", "individual_digits": true});
    let (llama3, qwen2) = (cl100k(r"\p{N}{1,3}"), cl100k(r"\p{N}"));
    let mut begun = splitting(&[split(&llama3), bytes(false)], true);
    let begin = add_token(&mut begun, "<|begin_of_text|>", true);
    add_token(&mut begun, "<tool>", false);
    begun["post_processor"] = json!({"type": "Sequence", "processors": [
        bytes(true), begin_with("<|begin_of_text|>", begin)
    ]});
    let mut unprefixed = sentence_piece();
    unprefixed["normalizer"] = unprefixed["normalizer"]["normalizers"][1].clone();
    unprefixed["post_processor"] = Value::Null;
    let mut metaspace = sentence_piece();
    metaspace["normalizer"] = Value::Null;
    metaspace["pre_tokenizer"] = json!({"type": "Metaspace", "replacement": "▁",
                                        "prepend_scheme": "first", "split": false});
    let mut words = metaspace.clone();
    words["pre_tokenizer"]["prepend_scheme"] = "always".into();
    words["pre_tokenizer"]["split"] = true.into();
    vec![
        ("gpt-2", byte_level(700)),
        (
            "gpt-2 as a split",
            splitting(&[split(GPT2), bytes(false)], false),
        ),
        ("smollm", splitting(&[digits, bytes(true)], false)),
        ("llama-bpe", begun),
        ("dbrx", splitting(&[split(&llama3), bytes(false)], false)),
        ("qwen2", splitting(&[split(&qwen2), bytes(false)], false)),
        ("sentencepiece", sentence_piece()),
        ("sentencepiece, no prefix", unprefixed),
        ("sentencepiece, metaspace", metaspace),
        ("sentencepiece, metaspace, words", words),
    ]
}
