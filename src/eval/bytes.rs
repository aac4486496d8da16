//! Bytes of text that tokens stand for, which make losses of different vocabularies comparable.

use serde::Serialize;
use tokenizers::{DecoderWrapper, Tokenizer};

use super::Excerpt;
use crate::data::tokenize::vocabulary::end_of_text;

/// UTF-8 bytes of text that a token stands for, on average. Special tokens, such as the one that
/// ends a document, are tokens and stand for no text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BytesPerToken {
    pub value: f64,
    /// `sidecar` or `tokenizer`.
    pub from: &'static str,
}

impl BytesPerToken {
    /// What a loss in nats per token is in bits per byte, when multiplied by this.
    pub fn bits_per_byte(&self) -> f64 {
        1.0 / (self.value * std::f64::consts::LN_2)
    }
}

/// Targets that are decoded at a time where tokens have no bytes of their own.
const DECODED: u64 = 4096;

/// By the sidecars of the shards, if all have one and are scored whole; else of all targets, by
/// decoding them. That is exact where each token has its bytes (byte-level BPE); others are decoded
/// some thousand at a time, which may be off by a few bytes at the seams.
///
/// # Errors
/// Why it is not known.
pub fn bytes_per_token(
    excerpts: &[Excerpt],
    tokenizer: Option<&Tokenizer>,
) -> Result<BytesPerToken, String> {
    let (bytes, tokens, from) = match (by_sidecars(excerpts), tokenizer) {
        (Some((bytes, tokens)), _) => (bytes, tokens, "sidecar"),
        (None, Some(tokenizer)) => (
            by_decoding(excerpts, tokenizer)?,
            excerpts.iter().map(Excerpt::targets).sum(),
            "tokenizer",
        ),
        (None, None) => {
            return Err("neither a tokenizer nor a sidecar of all that is scored".into());
        }
    };
    match bytes {
        0 => Err("the tokens stand for no text".into()),
        _ => Ok(BytesPerToken {
            value: bytes as f64 / tokens as f64,
            from,
        }),
    }
}

/// Bytes and tokens.
fn by_sidecars(excerpts: &[Excerpt]) -> Option<(u64, u64)> {
    excerpts
        .iter()
        .try_fold((0, 0), |(bytes, tokens), excerpt| {
            let sidecar = excerpt.shard.sidecar()?;
            let whole = excerpt.tokens == sidecar.tokens;
            whole.then_some((bytes + sidecar.source_bytes, tokens + sidecar.tokens))
        })
}

fn by_decoding(excerpts: &[Excerpt], tokenizer: &Tokenizer) -> Result<u64, String> {
    let lengths = byte_lengths(tokenizer);
    let mut bytes = 0;
    let mut ids = Vec::new();
    for excerpt in excerpts {
        for first in (1..excerpt.tokens).step_by(DECODED as usize) {
            ids.clear();
            let end = excerpt.tokens.min(first + DECODED);
            excerpt.shard.read(first..end, &mut ids);
            bytes += match &lengths {
                Some(lengths) => sum(lengths, &ids)?,
                None => {
                    let text = tokenizer.decode(&ids, true);
                    text.map_err(|error| error.to_string())?.len() as u64
                }
            };
        }
    }
    Ok(bytes)
}

fn sum(lengths: &[u64], ids: &[u32]) -> Result<u64, String> {
    let length = |id: &u32| {
        let length = lengths.get(*id as usize);
        length.ok_or_else(|| format!("the tokenizer has no token {id}, which the data has"))
    };
    ids.iter().map(length).sum()
}

/// The bytes of each token, if its text has a character for each byte, as GPT-2's.
fn byte_lengths(tokenizer: &Tokenizer) -> Option<Vec<u64>> {
    let byte_level = match tokenizer.get_decoder()? {
        DecoderWrapper::ByteLevel(_) => true,
        DecoderWrapper::Sequence(all) => {
            matches!(all.get_decoders(), [DecoderWrapper::ByteLevel(_)])
        }
        _ => false,
    };
    if !byte_level {
        return None;
    }
    let vocab = tokenizer.get_vocab(true);
    let mut lengths = vec![0; *vocab.values().max()? as usize + 1];
    for (token, id) in vocab {
        lengths[id as usize] = token.chars().count() as u64;
    }
    // These are matched in the text as they are.
    for (id, token) in tokenizer.get_added_tokens_decoder() {
        lengths[id as usize] = match token.special {
            true => 0,
            false => token.content.len() as u64,
        };
    }
    if let Some(id) = end_of_text(tokenizer) {
        lengths[id as usize] = 0;
    }
    Some(lengths)
}
