//! The LM head: logits of final activations.

use rayon::prelude::*;

use super::half_dot::multiply_rows;
use crate::inference::weights::{Table, TableValues};
use crate::model::cpu::{Mat, Write, matmul};
use crate::quant::matmul::Threads;
use crate::simd::{dot, vectorized};

/// Rows of the head that one task widens to f32 and multiplies.
const HEAD_ROWS: usize = 64;

/// Up to so many tokens, to read the head for each takes less than to widen it for all.
const FEW_TOKENS: usize = 4;

/// hidden (tokens, K) times head (vocab, K) -> (tokens, vocab).
pub fn logits(hidden: &[f32], head: &Table) -> Vec<f32> {
    let (vocab, k) = (head.rows(), head.cols());
    let tokens = hidden.len() / k;
    if tokens <= FEW_TOKENS {
        return few_logits(hidden, head);
    }
    let parts: Vec<Vec<f32>> = (0..vocab.div_ceil(HEAD_ROWS))
        .into_par_iter()
        .map_init(
            || vec![0f32; HEAD_ROWS * k],
            |wide, block| {
                let first = block * HEAD_ROWS;
                let rows = HEAD_ROWS.min(vocab - first);
                let wide = &mut wide[..rows * k];
                head.read_rows(first, wide);
                let mut part = vec![0f32; tokens * rows];
                let lhs = Mat::new(hidden, tokens, k);
                let rhs = Mat::new(wide, rows, k).t();
                matmul(&mut part, Write::Replace, 1.0, lhs, rhs, Threads::One);
                part
            },
        )
        .collect();
    let mut logits = Vec::with_capacity(tokens * vocab);
    for token in 0..tokens {
        for part in &parts {
            let rows = part.len() / tokens;
            logits.extend_from_slice(&part[token * rows..][..rows]);
        }
    }
    logits
}

/// [`logits`], one token after the other.
fn few_logits(hidden: &[f32], head: &Table) -> Vec<f32> {
    let mut logits = vec![0f32; hidden.len() / head.cols() * head.rows()];
    let tokens = logits
        .chunks_exact_mut(head.rows())
        .zip(hidden.chunks_exact(head.cols()));
    for (logits, x) in tokens {
        let parts = logits.par_chunks_mut(HEAD_ROWS).enumerate();
        parts.for_each(|(part, logits)| rows(logits, x, head, part * HEAD_ROWS));
    }
    logits
}

/// Logits of one token by rows of the head from `first` on: x (K,).
pub fn rows(logits: &mut [f32], x: &[f32], head: &Table, first: usize) {
    let values = first * x.len()..(first + logits.len()) * x.len();
    match head.values() {
        TableValues::F16(rows) => multiply_rows(logits, &rows[values], x),
        TableValues::F32(rows) => multiply_wide_rows(logits, &rows[values], x),
    }
}

vectorized! {
    fn multiply_wide_rows(y: &mut [f32], rows: &[f32], x: &[f32]) {
        for (y, row) in y.iter_mut().zip(rows.chunks_exact(x.len())) {
            *y = dot(row, x);
        }
    }
}
