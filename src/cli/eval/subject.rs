//! A model that is evaluated, with its tokenizer.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use indicatif::ProgressBar;
use tokenizers::Tokenizer;

use crate::data::tokenize::vocabulary::{hash, parse};
use crate::error::IoContext;
use crate::eval::{self, Answer, Prompt, Task};
use crate::inference::{self, Model};
use crate::{Error, Result};

pub struct Subject {
    pub path: PathBuf,
    /// What it is, for people.
    pub kind: String,
    pub model: Model,
    /// As sidecars of token files have it.
    pub tokenizer_hash: Option<String>,
    tokenizer: Option<Tokenizer>,
}

impl Subject {
    /// `tokenizer` takes the place of what the model came with.
    pub fn load(path: &Path, tokenizer: Option<&Path>, device: &Device) -> Result<Self> {
        let loaded = inference::load(path)?;
        let (json, origin) = match tokenizer {
            Some(path) => (Some(fs::read(path).at("open", path)?), path),
            None => (loaded.tokenizer.map(String::into_bytes), path),
        };
        let json = json.as_deref();
        Ok(Self {
            path: path.to_path_buf(),
            kind: loaded.kind,
            model: Model::new(&loaded.config, loaded.weights, device)?,
            tokenizer_hash: json.map(hash),
            tokenizer: json.map(|json| parse(json, origin)).transpose()?,
        })
    }

    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The questions in tokens.
    ///
    /// # Errors
    /// `Usage` without a tokenizer; `Format` on a question that the model cannot be asked, with its
    /// line.
    pub fn encode(&self, task: &Task) -> Result<Vec<Prompt>> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(Error::usage(format!(
                "{} has no tokenizer, which --tasks needs: name one with --tokenizer",
                self.path.display()
            )));
        };
        let config = self.model.config();
        let prompt = |question| {
            eval::encode(tokenizer, question, config.vocab_size, config.max_seq_len).map_err(
                |what| Error::format(&task.path, format!("line {}: {what}", question.line)),
            )
        };
        task.questions.iter().map(prompt).collect()
    }

    pub fn answer(
        &self,
        task: &Task,
        prompts: &[Prompt],
        progress: &ProgressBar,
    ) -> Result<Vec<Answer>> {
        let mut session = self.model.session();
        let questions = task.questions.iter().zip(prompts);
        questions
            .map(|(question, prompt)| {
                progress.inc(1);
                eval::answer(&mut session, question, prompt)
            })
            .collect()
    }
}
