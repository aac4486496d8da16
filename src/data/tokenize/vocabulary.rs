//! The tokenizer: read from a file, or trained on a sample of the input.

use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, Trainer};
use xxhash_rust::xxh3::xxh3_64;

use super::encoder::byte_level_form;
use super::gpt2;
use crate::data::bin_format::hex;
use crate::error::IoContext;
use crate::{Error, Result};

/// Ends each document, in vocabularies trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// What other vocabularies call it.
pub(crate) const END_OF_TEXT_NAMES: [&str; 6] = [
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
];

/// Bytes and end of text: the smallest vocabulary.
pub const MIN_VOCAB: usize = 257;

/// Far beyond any vocabulary in use; the trainer allocates for what it is asked.
pub const MAX_VOCAB: usize = 1 << 20;

/// Pre-tokens longer than this are left out of training: runs of one character cost quadratic
/// time there and teach nothing.
const MAX_TRAINING_WORD: usize = 256;

/// The hash of a tokenizer file, as the `tokenizer_hash` of a sidecar gives it.
///
/// # Errors
/// `Io` when it cannot be read.
pub fn tokenizer_hash(path: &Path) -> Result<String> {
    Ok(hash(&std::fs::read(path).at("read", path)?))
}

/// The same of a file's content.
pub(crate) fn hash(json: &[u8]) -> String {
    hex(xxh3_64(json))
}

/// A tokenizer from the content of `path`, a `tokenizer.json`. It takes every text whole and as it
/// is, whatever the file says of inference batches.
///
/// # Errors
/// `Format` when it is not a tokenizer.
pub fn parse(json: &[u8], path: &Path) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_bytes(json).map_err(|error| {
        Error::format(
            path,
            format!("not a tokenizer.json of `tokenizers`: {error}"),
        )
    })?;
    tokenizer
        .with_truncation(None)
        .map_err(|error| Error::format(path, error))?
        .with_padding(None);
    Ok(tokenizer)
}

/// The token that ends a document, if it has one of the usual names.
pub fn end_of_text(tokenizer: &Tokenizer) -> Option<u32> {
    let mut names = END_OF_TEXT_NAMES.iter();
    names.find_map(|name| tokenizer.token_to_id(name))
}

/// A tokenizer and what the token files need to know of it.
pub struct Vocabulary {
    pub tokenizer: Tokenizer,
    /// The tokenizer as the file `tokenizer.json` holds it.
    pub json: Vec<u8>,
    /// xxh3-64 of that file, in hexadecimal.
    pub hash: String,
    /// Every id is below this.
    pub size: u32,
    pub eos_id: u32,
}

impl Vocabulary {
    /// Reads a `tokenizer.json`. `eos_token` names the token that ends a document; by default it
    /// is looked for under its usual names.
    ///
    /// # Errors
    /// `Usage` when it does not exist or has no such token, `Io` when it cannot be read, `Format`
    /// when it is not a tokenizer.
    pub fn load(path: &Path, eos_token: Option<&str>) -> Result<Self> {
        if !path.exists() {
            return Err(Error::usage(format!(
                "tokenizer {} does not exist",
                path.display()
            )));
        }
        let json = std::fs::read(path).at("read", path)?;
        let tokenizer = parse(&json, path)?;
        Self::new(tokenizer, json, path, eos_token)
    }

    /// Trains byte-level BPE as GPT-2 has it: all 256 bytes, [`END_OF_TEXT`], and as many merges
    /// as `size` leaves room for and `texts` has pairs for. The result depends neither on the
    /// order of the texts nor on the number of threads.
    ///
    /// # Errors
    /// `Usage` when `size` is not between [`MIN_VOCAB`] and [`MAX_VOCAB`].
    pub fn train(size: usize, texts: impl Iterator<Item = String> + Send) -> Result<Self> {
        if !(MIN_VOCAB..=MAX_VOCAB).contains(&size) {
            return Err(Error::usage(format!(
                "a vocabulary of {size} cannot be trained: byte-level BPE needs at least \
                 {MIN_VOCAB} (256 bytes and {END_OF_TEXT}), and {MAX_VOCAB} is the most"
            )));
        }
        let failed = |error| Error::usage(format!("cannot train a vocabulary: {error}"));
        let end_of_text = AddedToken::from(END_OF_TEXT, true);
        let mut trainer = BpeTrainer::builder()
            .vocab_size(size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![end_of_text.clone()])
            .show_progress(false)
            .build();
        let words = |text: &str| {
            Ok(gpt2::split(text)
                .filter(|word| word.len() <= MAX_TRAINING_WORD)
                .map(byte_level_form)
                .collect())
        };
        trainer.feed(texts, words).map_err(failed)?;
        let mut model = BPE::default();
        trainer.train(&mut model).map_err(failed)?;

        let byte_level = ByteLevel::new(false, true, true);
        let mut tokenizer = Tokenizer::new(model);
        tokenizer
            .with_pre_tokenizer(Some(byte_level))
            .with_decoder(Some(byte_level))
            .with_post_processor(Some(byte_level));
        tokenizer
            .add_special_tokens([end_of_text])
            .map_err(failed)?;
        let json = tokenizer.to_string(true).map_err(failed)?.into_bytes();
        Self::new(tokenizer, json, Path::new("tokenizer.json"), None)
    }

    fn new(
        tokenizer: Tokenizer,
        json: Vec<u8>,
        path: &Path,
        eos_token: Option<&str>,
    ) -> Result<Self> {
        let found = match eos_token {
            Some(name) => tokenizer.token_to_id(name),
            None => end_of_text(&tokenizer),
        };
        let Some(eos_id) = found else {
            return Err(Error::usage(match eos_token {
                Some(name) => format!("{} has no token {name}", path.display()),
                None => format!(
                    "{} has no token that ends a document (looked for {}): name it with \
                     --eos-token",
                    path.display(),
                    END_OF_TEXT_NAMES.join(" ")
                ),
            }));
        };
        let largest = tokenizer.get_vocab(true).into_values().max();
        Ok(Self {
            hash: hash(&json),
            size: largest.unwrap_or(eos_id) + 1,
            tokenizer,
            json,
            eos_id,
        })
    }
}
