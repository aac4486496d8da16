//! The loss on a data set, by sliding windows.

use std::num::NonZeroU64;

use indicatif::ProgressBar;

use super::Estimate;
use crate::data::{TokenFile, TokenSet};
use crate::inference::Model;
use crate::{Error, Result};

/// How a text longer than the context is cut: the first window scores all its targets, each one
/// after it starts `stride` tokens later and scores those that no window has scored before. So every
/// target is scored once, with at least `seq_len - stride` tokens before it (less at the beginning).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    pub seq_len: usize,
    pub stride: usize,
}

impl Windows {
    /// # Errors
    /// `Usage` on a window that no model of a context of `max_seq_len` can have, or a stride that
    /// scores nothing or leaves targets out.
    pub fn check(&self, max_seq_len: usize) -> Result<()> {
        let Self { seq_len, stride } = *self;
        if seq_len == 0 || seq_len > max_seq_len {
            return Err(Error::usage(format!(
                "a window of {seq_len} tokens (--seq-len): the model's context is 1 to \
                 {max_seq_len}"
            )));
        }
        if stride == 0 || stride > seq_len {
            return Err(Error::usage(format!(
                "a stride of {stride} tokens (--stride): it must be 1 to {seq_len}, the length of a \
                 window"
            )));
        }
        Ok(())
    }
}

/// The beginning of a shard: all of it, unless less is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Excerpt<'a> {
    pub shard: &'a TokenFile,
    /// At least 2. The first is no target: nothing comes before it.
    pub tokens: u64,
}

impl Excerpt<'_> {
    pub fn targets(&self) -> u64 {
        self.tokens - 1
    }

    /// How many [`Block`]s it makes.
    pub fn blocks(&self, windows: Windows) -> u64 {
        self.targets().div_ceil(windows.seq_len as u64)
    }
}

/// What to score: the shards in order, `max_targets` of their tokens.
///
/// # Errors
/// `Usage` when there is no target.
pub fn excerpts(set: &TokenSet, max_targets: Option<NonZeroU64>) -> Result<Vec<Excerpt<'_>>> {
    let mut left = max_targets.map_or(u64::MAX, NonZeroU64::get);
    let mut excerpts = Vec::new();
    for shard in set.shards() {
        let targets = shard.len().saturating_sub(1).min(left);
        left -= targets;
        if targets > 0 {
            let tokens = targets + 1;
            excerpts.push(Excerpt { shard, tokens });
        }
    }
    match set.shards().iter().max_by_key(|shard| shard.len()) {
        Some(longest) if excerpts.is_empty() => Err(Error::usage(format!(
            "{} has {} tokens: a loss needs at least 2, one to predict the other from",
            longest.path().display(),
            longest.len()
        ))),
        _ => Ok(excerpts),
    }
}

/// `seq_len` targets in a row, fewer at the end of an excerpt: what counts as one sample. Targets of
/// one text depend on each other, and most on their neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Block {
    /// Negative log-likelihood in nats, summed.
    pub nll: f64,
    pub targets: u64,
}

impl Block {
    /// Mean of all targets in nats.
    pub fn loss(blocks: &[Self]) -> Estimate {
        Estimate::ratio(blocks.iter().map(|b| (b.nll, b.targets as f64)))
    }

    /// Loss of `b` minus that of `a`, both on the same blocks, which removes from the standard error
    /// what makes a block hard for either.
    pub fn difference(a: &[Self], b: &[Self]) -> Estimate {
        let pairs = a.iter().zip(b);
        Estimate::ratio(pairs.map(|(a, b)| (b.nll - a.nll, a.targets as f64)))
    }

    /// The same of perplexities, by the delta method.
    pub fn perplexity_difference(a: &[Self], b: &[Self]) -> Estimate {
        let [of_a, of_b] = [a, b].map(|blocks| Self::loss(blocks).value.exp());
        let gradient = |(a, b): (&Self, &Self)| (of_b * b.nll - of_a * a.nll, a.targets as f64);
        Estimate {
            value: of_b - of_a,
            stderr: Estimate::ratio(a.iter().zip(b).map(gradient)).stderr,
        }
    }
}

/// Scores `excerpts` -> their blocks in order. `progress` counts targets.
///
/// # Errors
/// `Usage` on windows that do not fit the model; `Format` on ids outside its vocabulary, naming
/// file and position; `Tensor` if the device refuses.
pub fn perplexity(
    model: &Model,
    excerpts: &[Excerpt],
    windows: Windows,
    progress: &ProgressBar,
) -> Result<Vec<Block>> {
    windows.check(model.config().max_seq_len)?;
    let mut blocks = Vec::new();
    for excerpt in excerpts {
        let first = blocks.len();
        blocks.resize(first + excerpt.blocks(windows) as usize, Block::default());
        score(model, excerpt, windows, &mut blocks[first..], progress)?;
    }
    Ok(blocks)
}

fn score(
    model: &Model,
    excerpt: &Excerpt,
    windows: Windows,
    blocks: &mut [Block],
    progress: &ProgressBar,
) -> Result<()> {
    let vocab_size = model.config().vocab_size as u32;
    let (seq_len, stride) = (windows.seq_len as u64, windows.stride as u64);
    let last = excerpt.targets();
    let mut session = model.session();
    // Target number i is token i. Those up to `scored` have been.
    let (mut start, mut scored) = (0, 0);
    while scored < last {
        let end = last.min(start + seq_len);
        let mut ids = Vec::with_capacity(windows.seq_len + 1);
        (excerpt.shard).read_for(start..end + 1, vocab_size, &mut ids)?;
        let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
        let context = (scored - start) as usize;
        session.truncate(0);
        if context > 0 {
            session.feed(&inputs[..context])?;
        }
        let likelihoods = session.log_likelihoods(&inputs[context..], &targets[context..])?;
        for (target, likelihood) in (scored + 1..).zip(likelihoods) {
            let block = &mut blocks[((target - 1) / seq_len) as usize];
            block.nll -= f64::from(likelihood);
            block.targets += 1;
        }
        progress.inc(end - scored);
        scored = end;
        start += stride;
    }
    Ok(())
}
