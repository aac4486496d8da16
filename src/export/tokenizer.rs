//! The tokenizer that goes with an exported model.

use std::fs;
use std::path::Path;

use crate::data::tokenize::vocabulary;
use crate::error::IoContext;
use crate::{Error, Result};

/// A `tokenizer.json` of Hugging Face's `tokenizers`.
pub struct Tokenizer {
    pub json: String,
    pub end_of_text: Option<EndOfText>,
}

/// The token that ends a document.
pub struct EndOfText {
    pub token: String,
    pub id: u32,
}

impl Tokenizer {
    /// Reads the file at `path`, for a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// `Usage` when it does not exist or has more tokens than the model; `Io` when it cannot be
    /// read; `Format` when it is no tokenizer.
    pub fn load(path: &Path, vocab_size: usize) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::usage(format!(
                "tokenizer {} does not exist",
                path.display()
            )));
        }
        let json = fs::read_to_string(path).at("read", path)?;
        let tokenizer: tokenizers::Tokenizer = json
            .parse()
            .map_err(|e| Error::format(path, format!("not a tokenizer.json ({e})")))?;
        let largest = tokenizer.get_vocab(true).into_values().max();
        if let Some(id) = largest.filter(|id| *id as usize >= vocab_size) {
            return Err(Error::usage(format!(
                "tokenizer {} has the id {id}, outside the model's vocabulary of {vocab_size}: \
                 give the one that made the training data",
                path.display()
            )));
        }
        let end_of_text = vocabulary::end_of_text(&tokenizer);
        let end_of_text = end_of_text.and_then(|id| {
            let token = tokenizer.id_to_token(id)?;
            Some(EndOfText { token, id })
        });
        Ok(Self { json, end_of_text })
    }
}
