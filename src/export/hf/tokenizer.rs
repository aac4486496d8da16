//! The files that tell `transformers` about a `tokenizer.json`.

use serde_json::{Value, json};

use super::super::tokenizer::EndOfText;
use crate::model::BitNetConfig;

/// Both files by name.
pub fn files(config: &BitNetConfig, end_of_text: Option<&EndOfText>) -> Vec<(&'static str, Value)> {
    let special = match end_of_text {
        Some(EndOfText { token, .. }) => json!({"bos_token": token, "eos_token": token}),
        None => json!({}),
    };
    let mut tokenizer = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        // Text is given back as it is, blanks before punctuation included.
        "clean_up_tokenization_spaces": false,
    });
    for (key, value) in special.as_object().into_iter().flatten() {
        tokenizer[key] = value.clone();
    }
    vec![
        ("tokenizer_config.json", tokenizer),
        ("special_tokens_map.json", special),
    ]
}
