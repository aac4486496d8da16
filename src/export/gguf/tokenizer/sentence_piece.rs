//! SentencePiece's BPE with byte fallback (Llama 2, Mistral): blanks are written as U+2581, and two
//! neighbours merge where together they are a token, the one of the highest score first.

use std::collections::HashSet;

use serde_json::json;

use super::{Kind, Source, flatten, refused};
use crate::Result;
use crate::export::gguf::container::Value;

/// What stands for a blank.
const BLANK: char = '\u{2581}';

pub fn kind(source: &Source, vocab_size: usize) -> Result<Kind> {
    if source.json["model"]["ignore_merges"] == true {
        return Err(refused("it falls back to bytes and has ignore_merges"));
    }
    let missing = |byte: &u8| !source.vocab.contains_key(&byte_token(*byte));
    if let Some(byte) = (0..=u8::MAX).find(missing) {
        let token = byte_token(byte);
        return Err(refused(format!("it has no token {token}")));
    }
    let blanks = Blanks::of(source)?;
    let scores = scores(source, vocab_size)?;
    Ok(Kind {
        model: "llama",
        pre: "default",
        keys: vec![
            ("tokenizer.ggml.scores".into(), Value::F32s(scores)),
            (
                "tokenizer.ggml.add_space_prefix".into(),
                Value::Bool(blanks.prefix),
            ),
        ],
        notes: Vec::from_iter(blanks.note),
    })
}

/// The token that stands for a byte.
pub fn byte_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// The score of every id: the higher, the earlier it is merged.
///
/// `tokenizers` merges the pairs in its list and no others, llama.cpp whatever makes a token. Both
/// do the same if every pair that makes a token is listed, and all pairs of a token together.
fn scores(source: &Source, vocab_size: usize) -> Result<Vec<f32>> {
    let merges = source.merges();
    let mut scores = vec![-(merges.len() as f32); vocab_size];
    let mut merged = HashSet::new();
    let mut last = String::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        let token = [*left, *right].concat();
        if token != last {
            if !merged.insert(token.clone()) {
                return Err(refused(format!(
                    "it falls back to bytes, and its merges are not SentencePiece's: those that \
                     make `{token}` lie apart"
                )));
            }
            scores[source.vocab[&token] as usize] = -(rank as f32);
            last = token;
        }
    }
    let listed: HashSet<_> = merges.into_iter().collect();
    let plain = |token: &str| match source.vocab.get(token) {
        Some(id) => !source.added.contains_key(id) && !source.bytes.contains(id),
        None => false,
    };
    let mut tokens: Vec<_> = source.vocab.keys().filter(|token| plain(token)).collect();
    tokens.sort();
    for token in tokens {
        let cuts = token.char_indices().skip(1);
        let mut pairs = cuts.map(|(at, _)| token.split_at(at));
        let unlisted = pairs
            .find(|&(left, right)| !listed.contains(&(left, right)) && plain(left) && plain(right));
        if let Some((left, right)) = unlisted {
            return Err(refused(format!(
                "it falls back to bytes, and its merges are not SentencePiece's: `{left}` and \
                 `{right}` stay apart, though `{token}` is a token"
            )));
        }
    }
    Ok(scores)
}

/// What becomes of blanks.
struct Blanks {
    /// Text gets one in front.
    prefix: bool,
    note: Option<String>,
}

impl Blanks {
    fn of(source: &Source) -> Result<Self> {
        let prepend = json!({"type": "Prepend", "prepend": BLANK});
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": BLANK});
        let normalizers = flatten(&source.json["normalizer"], "normalizers");
        let pre_tokenizers = flatten(&source.json["pre_tokenizer"], "pretokenizers");
        match (&normalizers[..], &pre_tokenizers[..]) {
            ([first, second], []) if **first == prepend && **second == replace => Ok(Self {
                prefix: true,
                note: None,
            }),
            ([only], []) if **only == replace => Ok(Self {
                prefix: false,
                note: None,
            }),
            ([], [only]) if only["type"] == "Metaspace" && only["replacement"] == json!(BLANK) => {
                if only["split"] == true {
                    check_no_blank_inside(source)?;
                }
                let prefix = only["prepend_scheme"] != "never";
                let note = "llama.cpp puts a blank before text that begins with one or follows a \
                            special token, and the tokenizer does not: such text gets other tokens";
                Ok(Self {
                    prefix,
                    note: prefix.then(|| note.into()),
                })
            }
            _ => Err(refused(
                "it falls back to bytes, and its normaliser and pre-tokenizer are not those of \
                 Llama 2 (Prepend and Replace, or Metaspace)",
            )),
        }
    }
}

/// A tokenizer that splits text before blanks never merges across one; llama.cpp does if it can.
fn check_no_blank_inside(source: &Source) -> Result<()> {
    let across = |(_, right): &(&str, &str)| right.starts_with(BLANK);
    match source.merges().into_iter().find(across) {
        Some((left, right)) => Err(refused(format!(
            "it splits text at blanks, and its token `{left}{right}` has one inside"
        ))),
        None => Ok(()),
    }
}
