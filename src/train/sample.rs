//! Text samples during training: enough to see what a model has learnt. Every token runs the
//! whole sequence through the model.

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use crate::config::Eval;
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
        let mut uniform = uniforms(seed);
        for _ in 0..self.config.sample_tokens {
            if ids.is_empty() || stop() {
                break;
            }
            let logits = next_logits(&ids)?;
            ids.push(draw(&logits, self.config.sample_temperature, uniform()));
        }
        let text = self.tokenizer.decode(&ids, true);
        text.map_err(|e| Error::format(&self.path, e))
    }
}

/// Uniform numbers in [0, 1) from a linear congruential generator (Knuth's MMIX constants):
/// plenty for picking a few words.
fn uniforms(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The token at which the cumulative softmax(logits / temperature) passes `uniform`; the likeliest
/// one at temperature 0.
fn draw(logits: &[f32], temperature: f64, uniform: f64) -> u32 {
    let likeliest = (0..logits.len())
        .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
        .unwrap_or(0);
    if temperature == 0.0 {
        return likeliest as u32;
    }
    let largest = logits[likeliest] as f64;
    let weight = |logit: f32| ((logit as f64 - largest) / temperature).exp();
    let mut left = uniform * logits.iter().map(|l| weight(*l)).sum::<f64>();
    for (id, logit) in logits.iter().enumerate() {
        left -= weight(*logit);
        if left < 0.0 {
            return id as u32;
        }
    }
    likeliest as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_by_their_probability() {
        let logits = [0.0, 3f32.ln(), f32::NEG_INFINITY];
        assert_eq!(draw(&logits, 0.0, 0.9), 1);
        assert_eq!(draw(&logits, 1.0, 0.24), 0);
        assert_eq!(draw(&logits, 1.0, 0.26), 1);
        // At half the temperature the odds are 1 to 9.
        assert_eq!(draw(&logits, 0.5, 0.09), 0);
        assert_eq!(draw(&logits, 0.5, 0.11), 1);
        let mut uniform = uniforms(1);
        let mean = (0..1000).map(|_| uniform()).sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.05);
    }
}
