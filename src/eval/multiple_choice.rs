//! Multiple-choice questions by log-likelihood, in the sense of EleutherAI's lm-evaluation-harness
//! (0.4.13): the same tokens are scored, given the same tokens.

use tokenizers::Tokenizer;

use super::wording::is_python_space;
use super::{Estimate, Question};
use crate::data::tokenize::vocabulary::end_of_text;
use crate::inference::Session;
use crate::{Error, Result};

/// A question in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// At least one token.
    pub context: Vec<u32>,
    /// What each choice adds to the context, at least one token each.
    pub continuations: Vec<Vec<u32>>,
}

/// What a model says to a question.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Natural log of the probability of each choice, given the query.
    pub log_likelihoods: Vec<f64>,
    /// The likeliest choice is the right one.
    pub correct: bool,
    /// The same, by log-likelihood over the number of characters of the choice.
    pub correct_normalised: bool,
    /// The beginning of the query did not fit the model's context.
    pub truncated: bool,
}

/// Encodes the query together with each choice, so that the text decides where tokens end, and
/// splits where the query alone ends: spaces at its end belong to the choice. An empty query is an
/// end-of-text token, where a document starts. Special tokens are those that the tokenizer adds by
/// itself.
///
/// # Errors
/// What is wrong with the question, for a model of `vocab_size` tokens and a context of
/// `max_seq_len`.
pub fn encode(
    tokenizer: &Tokenizer,
    question: &Question,
    vocab_size: usize,
    max_seq_len: usize,
) -> std::result::Result<Prompt, String> {
    let ids = |text: &str| {
        let encoding = tokenizer.encode_fast(text, true);
        let ids = encoding
            .map_err(|error| error.to_string())?
            .get_ids()
            .to_vec();
        match ids.iter().find(|id| **id as usize >= vocab_size) {
            None => Ok(ids),
            Some(id) => Err(format!(
                "the tokenizer's id {id} is outside the model's vocabulary of {vocab_size}: name \
                 the model's own with --tokenizer"
            )),
        }
    };
    let query = question.query.trim_end_matches(is_python_space);
    let mut context = ids(query)?;
    let continuation = |(i, choice): (usize, &String)| {
        let whole = ids(&format!("{} {choice}", question.query))?;
        match whole.get(context.len()..) {
            None | Some([]) => Err(format!("choice {i} (from 0) adds no token to the query")),
            Some(ids) if ids.len() > max_seq_len => Err(format!(
                "choice {i} (from 0) takes {} tokens, but the model's context has {max_seq_len}",
                ids.len()
            )),
            Some(ids) => Ok(ids.to_vec()),
        }
    };
    let choices = question.choices.iter().enumerate();
    let continuations = choices
        .map(continuation)
        .collect::<std::result::Result<_, _>>()?;
    if context.is_empty() {
        let id = end_of_text(tokenizer);
        context.push(id.ok_or("the query is empty and the tokenizer has no end-of-text token")?);
    }
    Ok(Prompt {
        context,
        continuations,
    })
}

/// Scores every choice. The query is run once; where it and a choice exceed the model's context, its
/// beginning is left out.
///
/// # Errors
/// Those of [`Session::log_likelihoods`].
pub fn answer(session: &mut Session, question: &Question, prompt: &Prompt) -> Result<Answer> {
    session.truncate(0);
    let room = session.room();
    let mut truncated = false;
    // How much of the context's beginning what the session holds is without.
    let mut held = None;
    let mut log_likelihoods = Vec::with_capacity(prompt.continuations.len());
    for continuation in &prompt.continuations {
        // The last token of a choice is not fed.
        let tokens = prompt.context.len() + continuation.len() - 1;
        let skip = tokens.saturating_sub(room);
        truncated |= skip > 0;
        let Some((last, rest)) = prompt.context[skip..].split_last() else {
            return Err(Error::usage("a choice is longer than the model's context"));
        };
        if held != Some(skip) {
            session.truncate(0);
            if !rest.is_empty() {
                session.feed(rest)?;
            }
            held = Some(skip);
        }
        session.truncate(rest.len());
        let mut inputs = vec![*last];
        inputs.extend(&continuation[..continuation.len() - 1]);
        let likelihoods = session.log_likelihoods(&inputs, continuation)?;
        log_likelihoods.push(likelihoods.into_iter().map(f64::from).sum());
    }
    let lengths = question.choices.iter().map(|choice| choice.chars().count());
    let normalised = log_likelihoods.iter().zip(lengths);
    let normalised: Vec<f64> = normalised.map(|(l, length)| l / length as f64).collect();
    Ok(Answer {
        correct: largest(&log_likelihoods) == Some(question.gold),
        correct_normalised: largest(&normalised) == Some(question.gold),
        log_likelihoods,
        truncated,
    })
}

/// The first of the largest.
fn largest(values: &[f64]) -> Option<usize> {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best })
}

/// Share of answers that are `right`, by one measure or the other.
pub fn accuracy(answers: &[Answer], right: impl Fn(&Answer) -> bool + Copy) -> Estimate {
    Estimate::mean(answers.iter().map(|answer| f64::from(right(answer))))
}

/// Accuracy of `b` minus that of `a`, both to the same questions, which removes from the standard
/// error what makes a question hard for either.
pub fn accuracy_difference(
    a: &[Answer],
    b: &[Answer],
    right: impl Fn(&Answer) -> bool + Copy,
) -> Estimate {
    let gain = |(a, b): (&Answer, &Answer)| f64::from(right(b)) - f64::from(right(a));
    Estimate::mean(a.iter().zip(b).map(gain))
}
