//! A `tokenizer.json` in llama.cpp's terms (src/llama-vocab.cpp there). Two kinds of tokenizers
//! have exact counterparts: byte-level BPE as GPT-2 has it, and SentencePiece's BPE with byte
//! fallback as Llama 2 has it.

mod byte_level;
mod sentence_piece;

use std::collections::{HashMap, HashSet};
use std::fmt::Display;

use serde_json::Value as Json;
use tokenizers::{AddedToken, Tokenizer};

use super::container::{Metadata, Value};
use crate::data::tokenize::vocabulary::{END_OF_TEXT_NAMES, end_of_text};
use crate::{Error, Result};

/// Tokens that begin a text, where the tokenizer itself does not say which one does.
const BEGIN_OF_TEXT_NAMES: [&str; 3] = ["<|begin_of_text|>", "<s>", "<bos>"];

/// `enum llama_token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A tokenizer file, read.
struct Source {
    tokenizer: Tokenizer,
    /// The file as `tokenizers` would write it, whatever version did.
    json: Json,
    /// All tokens.
    vocab: HashMap<String, u32>,
    added: HashMap<u32, AddedToken>,
    /// Tokens that stand for bytes, of a tokenizer that falls back to them.
    bytes: HashSet<u32>,
    /// The token for text that no other covers, likewise.
    unknown: Option<u32>,
}

/// What depends on the kind of tokenizer.
struct Kind {
    /// `tokenizer.ggml.model` and `tokenizer.ggml.pre`.
    model: &'static str,
    pre: &'static str,
    keys: Metadata,
    notes: Vec<String>,
}

/// Keys for the tokenizer in `json`, the content of a `tokenizer.json`, with tokens added up to the
/// `vocab_size` of the model, and what a user should know of them, a line each.
///
/// # Errors
/// `Usage` on what is no tokenizer, and on one that llama.cpp cannot run.
pub fn metadata(json: &str, vocab_size: usize) -> Result<(Metadata, Vec<String>)> {
    let source = Source::read(json)?;
    let (tokens, types) = source.tokens(vocab_size)?;
    let model = &source.json["model"];
    let kind = match type_of(model) {
        "BPE" if model["byte_fallback"] == true => sentence_piece::kind(&source, vocab_size)?,
        "BPE" => byte_level::kind(&source)?,
        other => return Err(refused(format!("its model is {other}, not BPE"))),
    };
    let text = |text: &str| Value::String(text.into());
    let mut keys = vec![
        ("tokenizer.ggml.model".into(), text(kind.model)),
        ("tokenizer.ggml.pre".into(), text(kind.pre)),
        ("tokenizer.ggml.tokens".into(), Value::Strings(tokens)),
        ("tokenizer.ggml.token_type".into(), Value::I32s(types)),
    ];
    keys.extend(kind.keys);
    keys.extend(source.special_tokens()?);
    let mut notes = kind.notes;
    notes.extend(source.blanks_note());
    Ok((keys, notes))
}

/// Tokens may hold line breaks, messages may not.
fn refused(what: impl Display) -> Error {
    let what = what.to_string().replace('\n', "\\n").replace('\r', "\\r");
    Error::usage(format!(
        "GGUF cannot hold this tokenizer: {what} (export as hf or packed)"
    ))
}

impl Source {
    fn read(json: &str) -> Result<Self> {
        let broken = |e: &dyn Display| {
            Error::usage(format!("the model's tokenizer.json cannot be read: {e}"))
        };
        let tokenizer: Tokenizer = json.parse().map_err(|e| broken(&e))?;
        let json = tokenizer.to_string(false).map_err(|e| broken(&e))?;
        let json: Json = serde_json::from_str(&json).map_err(|e| broken(&e))?;
        let vocab = tokenizer.get_vocab(true);
        let model = &json["model"];
        let (mut bytes, mut unknown) = (HashSet::new(), None);
        if model["byte_fallback"] == true {
            let token = |byte| vocab.get(&sentence_piece::byte_token(byte));
            bytes.extend((0..=u8::MAX).filter_map(token));
            unknown = model["unk_token"]
                .as_str()
                .and_then(|token| vocab.get(token).copied());
        }
        Ok(Self {
            added: tokenizer.get_added_tokens_decoder().into_iter().collect(),
            tokenizer,
            json,
            vocab,
            bytes,
            unknown,
        })
    }

    /// Pairs of tokens that BPE merges, the first ones first.
    fn merges(&self) -> Vec<(&str, &str)> {
        let merges = self.json["model"]["merges"].as_array();
        let pairs = merges.into_iter().flatten().map(|pair| {
            let part = |i: usize| pair[i].as_str().unwrap_or_default();
            (part(0), part(1))
        });
        pairs.collect()
    }

    fn token_type(&self, id: u32) -> i32 {
        match self.added.get(&id) {
            _ if self.unknown == Some(id) => UNKNOWN,
            _ if self.bytes.contains(&id) => BYTE,
            Some(added) if added.special => CONTROL,
            Some(_) => USER_DEFINED,
            None => NORMAL,
        }
    }

    /// Text and type of all ids below `vocab_size`.
    fn tokens(&self, vocab_size: usize) -> Result<(Vec<String>, Vec<i32>)> {
        let mut named: Vec<Option<&str>> = vec![None; vocab_size];
        for (token, &id) in &self.vocab {
            let Some(name) = named.get_mut(id as usize) else {
                return Err(refused(format!(
                    "its token `{token}` has id {id}, and the model's vocabulary is {vocab_size}"
                )));
            };
            if let Some(other) = name.replace(token) {
                return Err(refused(format!(
                    "`{other}` and `{token}` both have id {id}"
                )));
            }
        }
        let token = |(id, name): (usize, &Option<&str>)| match name {
            Some(name) => (name.to_string(), self.token_type(id as u32)),
            None => (format!("[PAD{id}]"), UNUSED),
        };
        let (tokens, types): (Vec<_>, Vec<_>) = named.iter().enumerate().map(token).unzip();
        let mut seen = HashSet::new();
        match tokens.iter().find(|token| !seen.insert(*token)) {
            Some(token) => Err(refused(format!("it would have two tokens `{token}`"))),
            None => Ok((tokens, types)),
        }
    }

    /// The tokens that begin and end a text, and whether they are added to it.
    fn special_tokens(&self) -> Result<Metadata> {
        let (first, last) = self.template()?;
        let Some(eos) = last.or_else(|| end_of_text(&self.tokenizer)) else {
            return Err(refused(format!(
                "it has none of the tokens {}, and llama.cpp must know which one ends a text",
                END_OF_TEXT_NAMES.join(" ")
            )));
        };
        let named = |name: &&str| self.tokenizer.token_to_id(name);
        let bos = first.or_else(|| BEGIN_OF_TEXT_NAMES.iter().find_map(named));
        let id = |name: &str, id: u32| (format!("tokenizer.ggml.{name}_token_id"), Value::U32(id));
        let adds = |name: &str, adds: bool| {
            let key = format!("tokenizer.ggml.add_{name}_token");
            (key, Value::Bool(adds))
        };
        let unknown = self.unknown.map(|unknown| id("unknown", unknown));
        let keys = [
            id("bos", bos.unwrap_or(eos)),
            id("eos", eos),
            adds("bos", first.is_some()),
            adds("eos", last.is_some()),
        ];
        Ok(keys.into_iter().chain(unknown).collect())
    }

    /// The tokens that the post-processor puts before and after a text.
    fn template(&self) -> Result<(Option<u32>, Option<u32>)> {
        let mut found = (None, None);
        for processor in flatten(&self.json["post_processor"], "processors") {
            match type_of(processor) {
                "ByteLevel" => {}
                "TemplateProcessing" => found = self.parse_template(&processor["single"])?,
                other => return Err(refused(format!("its post-processor is {other}"))),
            }
        }
        Ok(found)
    }

    fn parse_template(&self, pieces: &Json) -> Result<(Option<u32>, Option<u32>)> {
        let pieces = pieces.as_array().map_or(&[][..], Vec::as_slice);
        let token = |piece: &Json| {
            let name = piece["SpecialToken"]["id"].as_str()?;
            self.tokenizer.token_to_id(name)
        };
        match pieces.iter().map(token).collect::<Vec<_>>()[..] {
            [None] => Ok((None, None)),
            [first @ Some(_), None] => Ok((first, None)),
            [None, last @ Some(_)] => Ok((None, last)),
            [first @ Some(_), None, last @ Some(_)] => Ok((first, last)),
            _ => Err(refused(
                "its post-processor adds more than one token at either end of a text",
            )),
        }
    }

    /// llama.cpp looks for added tokens as they are.
    fn blanks_note(&self) -> Option<String> {
        let special = |added: &&AddedToken| added.lstrip || added.rstrip || added.single_word;
        let added = self.added.values().filter(special);
        let first = added.map(|added| &added.content).min()?;
        Some(format!(
            "llama.cpp finds `{first}` and tokens like it inside of words too, and keeps the \
             blanks beside them, other than the tokenizer"
        ))
    }
}

fn type_of(json: &Json) -> &str {
    json["type"].as_str().unwrap_or("unknown")
}

/// The parts of a `Sequence`, which `parts` names, or the one thing that is there instead, or
/// nothing.
fn flatten<'a>(json: &'a Json, parts: &str) -> Vec<&'a Json> {
    match &json[parts] {
        Json::Array(all) => all.iter().flat_map(|part| flatten(part, parts)).collect(),
        _ if json.is_null() => Vec::new(),
        _ => vec![json],
    }
}
