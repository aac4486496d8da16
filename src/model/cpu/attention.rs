//! Causal attention by blocks of queries, in the manner of FlashAttention-2 (arXiv 2307.08691):
//! scores live only for one block; the backward recomputes them from the saved log-sum-exp.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Mat, Write, matmul};
use crate::model::ops::Heads;
use crate::quant::matmul::Threads;
use crate::simd::{dot, exp, max_by, sum, vectorized};

/// Queries whose scores exist at a time.
const QUERY_BLOCK: usize = 64;

/// Rotary embedding and causal grouped-query attention over sequences of `seq` tokens: qkv
/// (batch * seq, qkv_features) -> (batch * seq, heads * head_dim).
pub struct Attention<'a> {
    pub heads: Heads,
    pub seq: usize,
    /// Rotary tables, (at least seq, head_dim / 2).
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

vectorized! {
    /// Turns pairs (i, i + half) of one head's rows by the angle of their position, backwards for
    /// gradients.
    pub fn rotate(rows: &mut [f32], cos: &[f32], sin: &[f32], head_dim: usize, inverse: bool) {
        let half = head_dim / 2;
        let sign = if inverse { -1.0 } else { 1.0 };
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (row, (cos, sin)) in rows.chunks_exact_mut(head_dim).zip(angles) {
            let (x1, x2) = row.split_at_mut(half);
            for (((x1, x2), c), s) in x1.iter_mut().zip(x2).zip(cos).zip(sin) {
                let (a, b, s) = (*x1, *x2, sign * s);
                *x1 = a * c - b * s;
                *x2 = b * c + a * s;
            }
        }
    }
}

vectorized! {
    /// Scores (queries, keys) to softmax weights, 0 for keys after the query; query i of the block
    /// is number `first + i`. Leaves each row's log-sum-exp.
    fn causal_softmax(scores: &mut [f32], keys: usize, first: usize, log_sum_exp: &mut [f32]) {
        let rows = scores.chunks_exact_mut(keys).zip(log_sum_exp);
        for (i, (row, log_sum_exp)) in rows.enumerate() {
            let (seen, future) = row.split_at_mut(first + i + 1);
            let largest = max_by(seen, |x| x);
            for x in seen.iter_mut() {
                *x = exp(*x - largest);
            }
            let total = sum(seen);
            let inverse = total.recip();
            for x in seen.iter_mut() {
                *x *= inverse;
            }
            future.fill(0.0);
            *log_sum_exp = largest + total.ln();
        }
    }
}

vectorized! {
    /// Scores to softmax weights P again, and dP to dS = P * (dP - dO . O).
    fn causal_softmax_backward(
        p: &mut [f32],
        ds: &mut [f32],
        keys: usize,
        first: usize,
        log_sum_exp: &[f32],
        out: &[f32],
        dout: &[f32],
    ) {
        let head_dim = out.len() / log_sum_exp.len();
        let rows = p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys));
        let outputs = out.chunks_exact(head_dim).zip(dout.chunks_exact(head_dim));
        let rows = rows.zip(outputs).zip(log_sum_exp).enumerate();
        for (i, (((p, ds), (out, dout)), log_sum_exp)) in rows {
            let delta = dot(dout, out);
            let seen = first + i + 1;
            for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
                *p = exp(*p - log_sum_exp);
                *ds = *p * (*ds - delta);
            }
            p[seen..].fill(0.0);
            ds[seen..].fill(0.0);
        }
    }
}

/// One sequence's (seq, features) activations, read and written by head.
#[derive(Clone, Copy)]
struct HeadLayout {
    features: usize,
    head_dim: usize,
}

impl HeadLayout {
    fn gather(&self, source: &[f32], head: usize) -> Vec<f32> {
        let first = head * self.head_dim;
        let mut rows = Vec::with_capacity(source.len() / self.features * self.head_dim);
        for token in source.chunks_exact(self.features) {
            rows.extend_from_slice(&token[first..first + self.head_dim]);
        }
        rows
    }

    fn scatter(&self, rows: &[f32], target: &mut [f32], head: usize) {
        let first = head * self.head_dim;
        for (token, row) in target
            .chunks_exact_mut(self.features)
            .zip(rows.chunks_exact(self.head_dim))
        {
            token[first..first + self.head_dim].copy_from_slice(row);
        }
    }
}

/// Causal blocks of queries: each with the number of keys its last query sees.
fn query_blocks(seq: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    (0..seq).step_by(QUERY_BLOCK).map(move |first| {
        let end = (first + QUERY_BLOCK).min(seq);
        (first..end, end)
    })
}

fn score_scale(head_dim: usize) -> f32 {
    (head_dim as f32).sqrt().recip()
}

/// Scores of queries (queries, d) against the first `keys` of k: (queries, keys).
fn scores(q: &[f32], k: &[f32], keys: usize, d: usize) -> Vec<f32> {
    let queries = q.len() / d;
    let mut scores = vec![0f32; queries * keys];
    let lhs = Mat::new(q, queries, d);
    let rhs = Mat::new(k, keys, d).t();
    let scale = score_scale(d);
    matmul(&mut scores, Write::Replace, scale, lhs, rhs, Threads::One);
    scores
}

/// One head: queries (seq, d), rotated, of the last tokens of k and v (past + seq, d) -> output rows
/// (seq, d) and log-sum-exp (seq,).
pub fn attend(q: &[f32], k: &[f32], v: &[f32], d: usize) -> (Vec<f32>, Vec<f32>) {
    let seq = q.len() / d;
    let past = k.len() / d - seq;
    let mut out = vec![0f32; q.len()];
    let mut log_sum_exp = vec![0f32; seq];
    for (queries, end) in query_blocks(seq) {
        let keys = past + end;
        let rows = queries.start * d..queries.end * d;
        let mut scores = scores(&q[rows.clone()], k, keys, d);
        let lse = &mut log_sum_exp[queries.clone()];
        causal_softmax(&mut scores, keys, past + queries.start, lse);
        let lhs = Mat::new(&scores, queries.len(), keys);
        let rhs = Mat::new(v, keys, d);
        matmul(&mut out[rows], Write::Replace, 1.0, lhs, rhs, Threads::One);
    }
    (out, log_sum_exp)
}

impl Attention<'_> {
    fn qkv_layout(&self) -> HeadLayout {
        HeadLayout {
            features: self.heads.qkv_features(),
            head_dim: self.heads.head_dim,
        }
    }

    fn out_layout(&self) -> HeadLayout {
        HeadLayout {
            features: self.heads.heads * self.heads.head_dim,
            head_dim: self.heads.head_dim,
        }
    }

    fn group(&self) -> usize {
        self.heads.heads / self.heads.kv_heads
    }

    /// Adds one query head's share to dk and dv, and returns dq. With P the softmax and
    /// delta = dO . O per row: dP = dO V^T, dS = P * (dP - delta), dq = scale dS K,
    /// dk = scale dS^T Q, dv = P^T dO.
    fn head_backward(
        &self,
        (q, k, v): (&[f32], &[f32], &[f32]),
        (out, dout): (&[f32], &[f32]),
        log_sum_exp: &[f32],
        (dk, dv): (&mut [f32], &mut [f32]),
    ) -> Vec<f32> {
        let d = self.heads.head_dim;
        let scale = score_scale(d);
        let mut dq = vec![0f32; q.len()];
        for (queries, keys) in query_blocks(log_sum_exp.len()) {
            let count = queries.len();
            let rows = queries.start * d..queries.end * d;
            let douts = Mat::new(&dout[rows.clone()], count, d);
            let mut p = scores(&q[rows.clone()], k, keys, d);
            let mut ds = vec![0f32; count * keys];
            let values = Mat::new(v, keys, d).t();
            matmul(&mut ds, Write::Replace, 1.0, douts, values, Threads::One);
            causal_softmax_backward(
                &mut p,
                &mut ds,
                keys,
                queries.start,
                &log_sum_exp[queries],
                &out[rows.clone()],
                &dout[rows.clone()],
            );
            let p = Mat::new(&p, count, keys);
            let ds = Mat::new(&ds, count, keys);
            let queries = Mat::new(&q[rows.clone()], count, d);
            let keys = Mat::new(k, keys, d);
            matmul(&mut dq[rows], Write::Replace, scale, ds, keys, Threads::One);
            matmul(dk, Write::Add, scale, ds.t(), queries, Threads::One);
            matmul(dv, Write::Add, 1.0, p.t(), douts, Threads::One);
        }
        dq
    }

    /// Runs `task(sequence, kv_head)` for all in parallel; all results of a sequence, in order.
    fn for_each_kv_head<T: Send>(
        &self,
        batch: usize,
        task: impl Fn(usize, usize) -> Vec<T> + Sync,
    ) -> Vec<Vec<T>> {
        let kv_heads = self.heads.kv_heads;
        (0..batch)
            .into_par_iter()
            .map(|sequence| {
                (0..kv_heads)
                    .into_par_iter()
                    .flat_map(|kv_head| task(sequence, kv_head))
                    .collect()
            })
            .collect()
    }

    /// One group's rotated queries, rotated keys, and values.
    fn group_inputs(&self, qkv: &[f32], kv_head: usize) -> (Vec<Vec<f32>>, Vec<f32>, Vec<f32>) {
        let Heads {
            heads, kv_heads, ..
        } = self.heads;
        let layout = self.qkv_layout();
        let rotated = |head| {
            let mut rows = layout.gather(qkv, head);
            rotate(&mut rows, self.cos, self.sin, layout.head_dim, false);
            rows
        };
        let first = kv_head * self.group();
        let queries = (first..first + self.group()).map(rotated).collect();
        let values = layout.gather(qkv, heads + kv_heads + kv_head);
        (queries, rotated(heads + kv_head), values)
    }

    /// The output, and the log-sum-exp of the scores for the backward: (batch, heads, seq).
    pub fn forward(&self, qkv: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (layout, out_layout) = (self.qkv_layout(), self.out_layout());
        let (size, out_size) = (self.seq * layout.features, self.seq * out_layout.features);
        let batch = qkv.len() / size;
        let sequences = self.for_each_kv_head(batch, |sequence, kv_head| {
            let (queries, k, v) = self.group_inputs(&qkv[sequence * size..][..size], kv_head);
            let heads = queries.iter().map(|q| attend(q, &k, &v, layout.head_dim));
            heads.collect()
        });
        let mut out = vec![0f32; batch * out_size];
        let mut log_sum_exp = vec![0f32; batch * self.heads.heads * self.seq];
        out.par_chunks_mut(out_size)
            .zip(log_sum_exp.par_chunks_mut(self.heads.heads * self.seq))
            .zip(sequences)
            .for_each(|((out, log_sum_exp), heads)| {
                let log_sum_exp = log_sum_exp.chunks_exact_mut(self.seq);
                for (head, ((rows, lse), log_sum_exp)) in heads.iter().zip(log_sum_exp).enumerate()
                {
                    out_layout.scatter(rows, out, head);
                    log_sum_exp.copy_from_slice(lse);
                }
            });
        (out, log_sum_exp)
    }

    /// Gradient of qkv: `out` and `log_sum_exp` are the forward's, `dout` is of the shape of `out`.
    pub fn backward(
        &self,
        qkv: &[f32],
        out: &[f32],
        dout: &[f32],
        log_sum_exp: &[f32],
    ) -> Vec<f32> {
        let (layout, out_layout) = (self.qkv_layout(), self.out_layout());
        let (size, out_size) = (self.seq * layout.features, self.seq * out_layout.features);
        let Heads {
            heads, kv_heads, ..
        } = self.heads;
        let group = self.group();
        let batch = qkv.len() / size;
        let sequences = self.for_each_kv_head(batch, |sequence, kv_head| {
            let out = &out[sequence * out_size..][..out_size];
            let dout = &dout[sequence * out_size..][..out_size];
            let (queries, k, v) = self.group_inputs(&qkv[sequence * size..][..size], kv_head);
            let (mut dk, mut dv) = (vec![0f32; k.len()], vec![0f32; v.len()]);
            let mut gradients = Vec::with_capacity(group + 2);
            for (i, q) in queries.iter().enumerate() {
                let head = kv_head * group + i;
                let (out, dout) = (out_layout.gather(out, head), out_layout.gather(dout, head));
                let lse = &log_sum_exp[(sequence * heads + head) * self.seq..][..self.seq];
                let mut dq =
                    self.head_backward((q, &k, &v), (&out, &dout), lse, (&mut dk, &mut dv));
                rotate(&mut dq, self.cos, self.sin, layout.head_dim, true);
                gradients.push((head, dq));
            }
            rotate(&mut dk, self.cos, self.sin, layout.head_dim, true);
            gradients.push((heads + kv_head, dk));
            gradients.push((heads + kv_heads + kv_head, dv));
            gradients
        });
        let mut dqkv = vec![0f32; qkv.len()];
        dqkv.par_chunks_mut(size)
            .zip(sequences)
            .for_each(|(dqkv, gradients)| {
                for (head, rows) in gradients {
                    layout.scatter(&rows, dqkv, head);
                }
            });
        dqkv
    }
}
