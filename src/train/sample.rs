//! Text samples during training: enough to see what a model has learnt. Every token runs the
//! whole sequence through the model.

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use crate::config::Eval;
use crate::inference::{self, Sampling};
use crate::{Error, Result};

/// Continues a prompt.
pub struct Sampler {
    tokenizer: Tokenizer,
    path: PathBuf,
    prompt: Vec<u32>,
    config: Eval,
}

impl Sampler {
    /// For a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// A tokenizer file that cannot be read; a prompt with ids that the model does not have.
    pub fn new(path: &Path, config: &Eval, vocab_size: usize) -> Result<Self> {
        let tokenizer = Tokenizer::from_file(path)
            .map_err(|e| Error::format(path, format!("not a readable tokenizer ({e})")))?;
        let encoding = tokenizer
            .encode(config.sample_prompt.as_str(), false)
            .map_err(|e| Error::format(path, e))?;
        let prompt = encoding.get_ids().to_vec();
        if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab_size) {
            return Err(Error::format(
                path,
                format!(
                    "id {id} of eval.sample_prompt is outside the model's vocabulary of \
                     {vocab_size}: give the tokenizer that made the training data"
                ),
            ));
        }
        Ok(Self {
            tokenizer,
            path: path.to_path_buf(),
            prompt,
            config: config.clone(),
        })
    }

    /// The prompt and its continuation, or what there is of it once `stop` says so; the same text
    /// from the same logits and seed.
    pub fn text(
        &self,
        mut next_logits: impl FnMut(&[u32]) -> Result<Vec<f32>>,
        seed: u64,
        stop: impl Fn() -> bool,
    ) -> Result<String> {
        let mut ids = self.prompt.clone();
        let sampling = Sampling {
            temperature: self.config.sample_temperature,
            ..Sampling::default()
        };
        let mut sampler = inference::Sampler::new(sampling, seed);
        for _ in 0..self.config.sample_tokens {
            if ids.is_empty() || stop() {
                break;
            }
            let mut logits = next_logits(&ids)?;
            ids.push(sampler.next(&mut logits, &ids));
        }
        let text = self.tokenizer.decode(&ids, true);
        text.map_err(|e| Error::format(&self.path, e))
    }
}
