//! LM head and cross-entropy over chunks of tokens: the logits of one chunk at a time, and their
//! gradients at once, as the forward already holds all they need.

use rayon::prelude::*;

use super::gemm::{Mat, Write, matmul};
use crate::quant::matmul::Threads;
use crate::simd::{exp, max_by, sum, vectorized};

/// Logits held at a time (16 MiB), but for 16 tokens at least.
const CHUNK_LOGITS: usize = 4 << 20;

vectorized! {
    /// Cross-entropy of one row of logits; leaves (softmax - one_hot) * scale in their place.
    fn row_loss(logits: &mut [f32], target: usize, scale: f32) -> f32 {
        let (target_logit, total) = exponentials(logits, target);
        let factor = scale / total;
        for x in logits.iter_mut() {
            *x *= factor;
        }
        logits[target] -= scale;
        total.ln() - target_logit
    }
}

vectorized! {
    /// The natural log of the probability that softmax gives to the target; the logits are lost.
    pub fn log_likelihood(logits: &mut [f32], target: usize) -> f32 {
        let (target_logit, total) = exponentials(logits, target);
        target_logit - total.ln()
    }
}

/// Leaves exp(logit - largest) -> the target's logit less the largest, and the sum of all.
#[inline(always)]
fn exponentials(logits: &mut [f32], target: usize) -> (f32, f32) {
    let largest = max_by(logits, |x| x);
    let target_logit = logits[target] - largest;
    for x in logits.iter_mut() {
        *x = exp(*x - largest);
    }
    (target_logit, sum(logits))
}

/// Gradients of the loss, (tokens, K) and (vocab, K).
pub struct Gradients {
    pub hidden: Vec<f32>,
    pub weight: Vec<f32>,
}

/// Mean cross-entropy in nats of logits = hidden . weight^T against the targets: hidden
/// (tokens, K), weight (vocab, K), targets (tokens,) below vocab.
pub fn loss(hidden: &[f32], weight: &[f32], targets: &[u32]) -> f64 {
    for_each_chunk(hidden, weight, targets, 1.0, |_, _, _| ())
}

/// The same, and the gradients of the loss times `scale`.
pub fn loss_and_gradients(
    hidden: &[f32],
    weight: &[f32],
    targets: &[u32],
    scale: f32,
) -> (f64, Gradients) {
    let k = hidden.len() / targets.len();
    let head = Mat::new(weight, weight.len() / k, k);
    let mut gradients = Gradients {
        hidden: vec![0f32; hidden.len()],
        weight: vec![0f32; weight.len()],
    };
    let mut write = Write::Replace;
    let loss = for_each_chunk(hidden, weight, targets, scale, |first, rows, dlogits| {
        let dhidden = &mut gradients.hidden[first * k..];
        matmul(dhidden, Write::Replace, 1.0, dlogits, head, Threads::All);
        let dweight = &mut gradients.weight;
        matmul(dweight, write, 1.0, dlogits.t(), rows, Threads::All);
        write = Write::Add;
    });
    (loss, gradients)
}

/// The mean loss; `then` gets each chunk's first token, its rows of `hidden`, and the gradient of
/// the loss times `scale` by its logits.
fn for_each_chunk(
    hidden: &[f32],
    weight: &[f32],
    targets: &[u32],
    scale: f32,
    mut then: impl FnMut(usize, Mat, Mat),
) -> f64 {
    let tokens = targets.len();
    let k = hidden.len() / tokens;
    let vocab = weight.len() / k;
    let head = Mat::new(weight, vocab, k).t();
    let chunk = (CHUNK_LOGITS / vocab).max(16).min(tokens);
    let mut logits = vec![0f32; chunk * vocab];
    let mut loss = 0f64;
    for (i, targets) in targets.chunks(chunk).enumerate() {
        let first = i * chunk;
        let count = targets.len();
        let logits = &mut logits[..count * vocab];
        let rows = Mat::new(&hidden[first * k..][..count * k], count, k);
        matmul(logits, Write::Replace, 1.0, rows, head, Threads::All);
        let losses: Vec<f32> = logits
            .par_chunks_mut(vocab)
            .zip(targets)
            .map(|(row, target)| row_loss(row, *target as usize, scale / tokens as f32))
            .collect();
        loss += losses.iter().map(|l| *l as f64).sum::<f64>();
        then(first, rows, Mat::new(logits, count, vocab));
    }
    loss / tokens as f64
}
