//! Text to ids, on one thread. Most pre-tokens of a text have been seen before, so their ids are
//! kept in a table in front of the tokenizer; what is new goes through the tokenizer itself.

use std::borrow::Cow;
use std::sync::LazyLock;

use rustc_hash::FxHashMap;
use tokenizers::{Model, ModelWrapper, PreTokenizerWrapper, Tokenizer};

use super::gpt2;
use crate::{Error, Result};

/// Known pre-tokens; when there are more, the table starts anew. About 5 MB a thread.
const MAX_WORDS: usize = 1 << 16;

/// Longer pre-tokens are rare and not kept.
const MAX_WORD_BYTES: usize = 64;

/// Texts longer than this are cut before they reach the tokenizer's general path, which takes
/// some hundred bytes of memory a byte of text.
const MAX_GENERAL_BYTES: usize = 1 << 20;

/// Encodes texts with a tokenizer: the same ids as `tokenizer.encode(text, false)`. (Beyond
/// 1 MiB, a tokenizer that is not GPT-2's kind sees a text in pieces that are cut at blanks.)
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids of a pre-token depend on that pre-token alone, and pre-tokens are GPT-2's.
    word_by_word: bool,
    /// Tokens that are looked for in the text before anything else, such as `<|endoftext|>`.
    added: Vec<String>,
    words: FxHashMap<Box<[u8]>, (u32, u32)>,
    /// Ids of all known words; a word has a start and an end in it.
    ids: Vec<u32>,
}

impl<'a> Encoder<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        let added = tokenizer.get_added_vocabulary().get_vocab();
        Self {
            tokenizer,
            word_by_word: is_word_by_word(tokenizer),
            added: added.keys().cloned().collect(),
            words: FxHashMap::default(),
            ids: Vec::new(),
        }
    }

    /// Appends the ids of `text`.
    ///
    /// # Errors
    /// `Usage` when the tokenizer cannot encode the text.
    pub fn encode(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        if !self.word_by_word || self.added.iter().any(|token| text.contains(token)) {
            return self.encode_generally(text, ids);
        }
        for word in gpt2::split(text) {
            match self.words.get(word.as_bytes()) {
                Some(&(start, end)) => {
                    ids.extend_from_slice(&self.ids[start as usize..end as usize]);
                }
                None => self.encode_new_word(word, ids)?,
            }
        }
        Ok(())
    }

    fn encode_new_word(&mut self, word: &str, ids: &mut Vec<u32>) -> Result<()> {
        let before = ids.len();
        let model = self.tokenizer.get_model();
        let tokens = model.tokenize(&byte_level_form(word)).map_err(failed)?;
        ids.extend(tokens.iter().map(|token| token.id));
        if word.len() <= MAX_WORD_BYTES {
            if self.words.len() == MAX_WORDS {
                self.words.clear();
                self.ids.clear();
            }
            let start = self.ids.len() as u32;
            self.ids.extend_from_slice(&ids[before..]);
            let span = (start, self.ids.len() as u32);
            self.words.insert(word.as_bytes().into(), span);
        }
        Ok(())
    }

    fn encode_generally(&self, mut text: &str, ids: &mut Vec<u32>) -> Result<()> {
        while !text.is_empty() {
            let at = match text.len() > MAX_GENERAL_BYTES {
                true => gpt2::last_safe_cut(&text.as_bytes()[..MAX_GENERAL_BYTES]),
                false => None,
            };
            let (piece, rest) = text.split_at(at.unwrap_or(text.len()));
            let encoding = self.tokenizer.encode_fast(Cow::from(piece), false);
            ids.extend_from_slice(encoding.map_err(failed)?.get_ids());
            text = rest;
        }
        Ok(())
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::usage(format!("the tokenizer cannot encode this text: {error}"))
}

fn is_word_by_word(tokenizer: &Tokenizer) -> bool {
    let plain_bpe = match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) => bpe.dropout.is_none(),
        _ => false,
    };
    let gpt2 = match tokenizer.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::ByteLevel(it)) => it.use_regex && !it.add_prefix_space,
        _ => false,
    };
    plain_bpe && gpt2 && tokenizer.get_normalizer().is_none()
}

/// A pre-token with each byte as one visible character, as byte-level BPE writes it (`bytes_to_unicode`
/// in GPT-2's `encoder.py`): a byte that prints stands for itself, the others get U+0100 and on.
pub fn byte_level_form(word: &str) -> String {
    static FORMS: LazyLock<[char; 256]> = LazyLock::new(|| {
        let mut unprintable = 0x100..;
        std::array::from_fn(|byte| match byte as u8 {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
            _ => unprintable
                .next()
                .and_then(char::from_u32)
                .unwrap_or_default(),
        })
    });
    word.bytes().map(|byte| FORMS[usize::from(byte)]).collect()
}
