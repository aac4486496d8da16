//! Byte-level BPE (GPT-2, Llama 3, Qwen2, ...). What differs is how text is split into the words
//! that merges stay inside of; llama.cpp knows these ways by name (`tokenizer.ggml.pre`).

use serde_json::Value as Json;

use super::{Kind, Source, flatten, refused, type_of};
use crate::Result;
use crate::export::gguf::container::Value;

/// One way: regular expressions, each of which splits what the ones before it left; whether a word
/// that is a token is taken whole (`ignore_merges`); and its name. Among the names of one way, the
/// one that the most versions of llama.cpp know.
struct Way {
    splits: &'static [&'static str],
    ignore_merges: bool,
    name: &'static str,
}

/// GPT-2's (Radford et al. 2019, `encoder.py`).
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const ONE_DIGIT: &str = r"\p{N}";

/// cl100k's, which is also Llama 3's: up to three digits a word.
const THREE_DIGITS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Qwen2's: every digit is a word.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const WAYS: [Way; 5] = [
    Way {
        splits: &[GPT2],
        ignore_merges: false,
        name: "gpt-2",
    },
    Way {
        splits: &[ONE_DIGIT, GPT2],
        ignore_merges: false,
        name: "smollm",
    },
    Way {
        splits: &[THREE_DIGITS],
        ignore_merges: true,
        name: "llama-bpe",
    },
    Way {
        splits: &[THREE_DIGITS],
        ignore_merges: false,
        name: "dbrx",
    },
    Way {
        splits: &[QWEN2],
        ignore_merges: false,
        name: "qwen2",
    },
];

pub fn kind(source: &Source) -> Result<Kind> {
    let model = &source.json["model"];
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[key].as_str().is_some_and(|mark| !mark.is_empty()) {
            return Err(refused(format!("its BPE marks words by a {key}")));
        }
    }
    let splits = splits(&source.json["pre_tokenizer"])?;
    let ignore_merges = model["ignore_merges"] == true;
    let way = |way: &&Way| way.splits == splits && way.ignore_merges == ignore_merges;
    let Some(way) = WAYS.iter().find(way) else {
        return Err(refused(format!(
            "it splits text by `{}`{}, and only the ways of {} are known",
            splits.join("` and `"),
            if ignore_merges {
                " with ignore_merges"
            } else {
                ""
            },
            WAYS.map(|way| way.name).join(", ")
        )));
    };
    let merges = source
        .merges()
        .iter()
        .map(|(a, b)| format!("{a} {b}"))
        .collect();
    Ok(Kind {
        model: "gpt2",
        pre: way.name,
        keys: vec![("tokenizer.ggml.merges".into(), Value::Strings(merges))],
        notes: Vec::from_iter(normalizer_note(&source.json["normalizer"])?),
    })
}

/// The regular expressions that a pre-tokenizer splits by.
fn splits(pre_tokenizer: &Json) -> Result<Vec<&str>> {
    let mut splits = Vec::new();
    let mut byte_level = false;
    for part in flatten(pre_tokenizer, "pretokenizers") {
        let pattern = part["pattern"]["Regex"].as_str();
        // Both keep what matches as words, and the expressions above match everything.
        let keeps_matches = part["behavior"] == "Isolated" && part["invert"] == false
            || part["behavior"] == "Removed" && part["invert"] == true;
        match (type_of(part), pattern) {
            ("ByteLevel", _) if part["add_prefix_space"] == true => {
                return Err(refused("it adds a space before a text, byte-level"));
            }
            ("ByteLevel", _) => {
                byte_level = true;
                splits.extend((part["use_regex"] == true).then_some(GPT2));
            }
            ("Digits", _) if part["individual_digits"] == true => splits.push(ONE_DIGIT),
            ("Split", Some(pattern)) if keeps_matches => splits.push(pattern),
            (other, _) => return Err(refused(format!("its pre-tokenizer has a part {other}"))),
        }
    }
    match byte_level {
        true => Ok(splits),
        false => Err(refused(
            "its BPE works neither on bytes nor falls back to them",
        )),
    }
}

/// llama.cpp takes text as it is.
fn normalizer_note(normalizer: &Json) -> Result<Option<String>> {
    let parts = flatten(normalizer, "normalizers");
    match parts
        .iter()
        .map(|part| type_of(part))
        .find(|kind| *kind != "NFC")
    {
        Some(other) => Err(refused(format!("its normaliser is {other}"))),
        None if parts.is_empty() => Ok(None),
        None => Ok(Some(
            "the tokenizer composes characters (NFC) and llama.cpp does not: text with combining \
             accents gets other tokens there"
                .into(),
        )),
    }
}
