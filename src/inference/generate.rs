//! Text after a prompt.

use std::time::{Duration, Instant};

use tokenizers::Tokenizer;

use super::model::Session;
use super::sampling::{Sampler, Sampling};
use super::text::TextStream;
use crate::Result;

/// What to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one token; fed in one pass.
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampling: Sampling,
    pub seed: u64,
    /// Texts that end it, none of them empty; they are not part of the result.
    pub stops: Vec<String>,
    /// Tokens that end it.
    pub end_ids: Vec<u32>,
}

/// Why it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    MaxTokens,
    /// The model ended the text.
    EndOfText,
    StopText,
    /// There is no room for another token.
    ContextFull,
    /// By whoever asked for it.
    Interrupted,
}

#[derive(Clone, Debug)]
pub struct Generated {
    /// Tokens that followed the prompt, all of which the session has taken in but the last.
    pub ids: Vec<u32>,
    pub end: End,
    pub prefill: Duration,
    /// For all tokens but the first, which the prompt's pass gives.
    pub decode: Duration,
}

/// Continues the session by the prompt and what the model makes of it; each piece of text goes to
/// `show`.
///
/// # Errors
/// `Usage` if the prompt is empty, exceeds the session's room or has ids outside the vocabulary;
/// `Tensor` if the device refuses; those of `show`.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    request: &Request,
    mut show: impl FnMut(&str) -> Result<()>,
    interrupted: impl Fn() -> bool,
) -> Result<Generated> {
    let mut sampler = Sampler::new(request.sampling.clone(), request.seed);
    let mut text = TextStream::new(tokenizer, &request.stops);
    let mut context = request.prompt.clone();
    let start = Instant::now();
    let mut logits = session.next_logits(&request.prompt)?;
    let prefill = start.elapsed();

    let start = Instant::now();
    let end = loop {
        if context.len() - request.prompt.len() == request.max_tokens {
            break End::MaxTokens;
        }
        if interrupted() {
            break End::Interrupted;
        }
        let id = sampler.next(&mut logits, &context);
        context.push(id);
        if request.end_ids.contains(&id) {
            break End::EndOfText;
        }
        let piece = text.push(id)?;
        show(&piece.text)?;
        if piece.stopped {
            break End::StopText;
        }
        if context.len() - request.prompt.len() == request.max_tokens {
            break End::MaxTokens;
        }
        if session.room() == 0 {
            break End::ContextFull;
        }
        logits = session.next_logits(&[id])?;
    };
    let decode = start.elapsed();
    if end != End::StopText {
        show(&text.finish()?.text)?;
    }
    Ok(Generated {
        ids: context.split_off(request.prompt.len()),
        end,
        prefill,
        decode,
    })
}
