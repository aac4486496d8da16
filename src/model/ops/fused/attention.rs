//! Causal attention by blocks of queries, in the manner of FlashAttention-2 (arXiv 2307.08691):
//! scores live only for one block; the backward recomputes them from the saved log-sum-exp.

use std::ops::Range;
use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::gemm::{Mat, Threads, Write, matmul};
use super::storage::{Reader, slice};
use crate::model::ops::{Heads, Rope};
use crate::simd::{dot, exp, max_by, sum, vectorized};

/// Queries whose scores exist at a time.
const QUERY_BLOCK: usize = 64;

struct Attention {
    heads: Heads,
    rope: Rope,
    /// Log-sum-exp of the scores, (batch, kv_heads, group, seq), for the backward.
    log_sum_exp: Mutex<Vec<f32>>,
}

vectorized! {
    /// Turns pairs (i, i + half) of one head's rows by the angle of their position, backwards for
    /// gradients.
    fn rotate(rows: &mut [f32], cos: &[f32], sin: &[f32], head_dim: usize, inverse: bool) {
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
    seq: usize,
    features: usize,
    head_dim: usize,
}

impl HeadLayout {
    fn gather(&self, source: &[f32], head: usize) -> Vec<f32> {
        let first = head * self.head_dim;
        let mut rows = Vec::with_capacity(self.seq * self.head_dim);
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

impl Attention {
    fn qkv_layout(&self, seq: usize) -> HeadLayout {
        HeadLayout {
            seq,
            features: self.heads.qkv_features(),
            head_dim: self.heads.head_dim,
        }
    }

    fn out_layout(&self, seq: usize) -> HeadLayout {
        HeadLayout {
            features: self.heads.heads * self.heads.head_dim,
            ..self.qkv_layout(seq)
        }
    }

    fn group(&self) -> usize {
        self.heads.heads / self.heads.kv_heads
    }

    fn score_scale(&self) -> f32 {
        (self.heads.head_dim as f32).sqrt().recip()
    }

    /// Scores of one block of queries against the keys up to its end: (queries, keys).
    fn scores(&self, q: &[f32], k: &[f32], queries: &Range<usize>, keys: usize) -> Vec<f32> {
        let d = self.heads.head_dim;
        let mut scores = vec![0f32; queries.len() * keys];
        let lhs = Mat::new(&q[queries.start * d..queries.end * d], queries.len(), d);
        let rhs = Mat::new(k, keys, d).t();
        let scale = self.score_scale();
        matmul(
            &mut scores,
            keys,
            Write::Replace,
            scale,
            lhs,
            rhs,
            Threads::One,
        );
        scores
    }

    /// Output rows and log-sum-exp of one query head.
    fn head_forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let d = self.heads.head_dim;
        let seq = q.len() / d;
        let mut out = vec![0f32; q.len()];
        let mut log_sum_exp = vec![0f32; seq];
        for (queries, keys) in query_blocks(seq) {
            let mut scores = self.scores(q, k, &queries, keys);
            let lse = &mut log_sum_exp[queries.clone()];
            causal_softmax(&mut scores, keys, queries.start, lse);
            let rows = queries.start * d..queries.end * d;
            let lhs = Mat::new(&scores, queries.len(), keys);
            let rhs = Mat::new(v, keys, d);
            matmul(
                &mut out[rows],
                d,
                Write::Replace,
                1.0,
                lhs,
                rhs,
                Threads::One,
            );
        }
        (out, log_sum_exp)
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
        let scale = self.score_scale();
        let mut dq = vec![0f32; q.len()];
        for (queries, keys) in query_blocks(log_sum_exp.len()) {
            let count = queries.len();
            let rows = queries.start * d..queries.end * d;
            let douts = Mat::new(&dout[rows.clone()], count, d);
            let mut p = self.scores(q, k, &queries, keys);
            let mut ds = vec![0f32; count * keys];
            let values = Mat::new(v, keys, d).t();
            matmul(
                &mut ds,
                keys,
                Write::Replace,
                1.0,
                douts,
                values,
                Threads::One,
            );
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
            matmul(
                &mut dq[rows],
                d,
                Write::Replace,
                scale,
                ds,
                keys,
                Threads::One,
            );
            matmul(dk, d, Write::Add, scale, ds.t(), queries, Threads::One);
            matmul(dv, d, Write::Add, 1.0, p.t(), douts, Threads::One);
        }
        dq
    }

    /// Runs `task(sequence, kv_head)` for all in parallel, results in order.
    fn for_each_kv_head<T: Send>(
        &self,
        batch: usize,
        task: impl Fn(usize, usize) -> T + Sync,
    ) -> Vec<T> {
        let kv_heads = self.heads.kv_heads;
        (0..batch * kv_heads)
            .into_par_iter()
            .map(|i| task(i / kv_heads, i % kv_heads))
            .collect()
    }

    /// One group's rotated queries, rotated keys, and values.
    fn group_inputs(
        &self,
        qkv: &[f32],
        layout: HeadLayout,
        kv_head: usize,
        (cos, sin): (&[f32], &[f32]),
    ) -> (Vec<Vec<f32>>, Vec<f32>, Vec<f32>) {
        let Heads {
            heads, kv_heads, ..
        } = self.heads;
        let rotated = |head| {
            let mut rows = layout.gather(qkv, head);
            rotate(&mut rows, cos, sin, layout.head_dim, false);
            rows
        };
        let first = kv_head * self.group();
        let queries = (first..first + self.group()).map(rotated).collect();
        let values = layout.gather(qkv, heads + kv_heads + kv_head);
        (queries, rotated(heads + kv_head), values)
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, qkv_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = slice(qkv, qkv_layout)?;
        let (batch, seq, features) = qkv_layout.shape().dims3()?;
        if seq > self.rope.cos.dim(0)? {
            bail!("attention: {seq} positions, the rotary tables hold fewer");
        }
        let (cos, sin) = (Reader::new(&self.rope.cos), Reader::new(&self.rope.sin));
        let angles = (cos.slice()?, sin.slice()?);
        let layout = self.qkv_layout(seq);
        let groups = self.for_each_kv_head(batch, |sequence, kv_head| {
            let qkv = &qkv[sequence * seq * features..][..seq * features];
            let (queries, k, v) = self.group_inputs(qkv, layout, kv_head, angles);
            queries
                .iter()
                .map(|q| self.head_forward(q, &k, &v))
                .collect::<Vec<_>>()
        });

        let out_layout = self.out_layout(seq);
        let mut out = vec![0f32; batch * seq * out_layout.features];
        let mut log_sum_exp = Vec::with_capacity(batch * self.heads.heads * seq);
        for (index, (rows, lse)) in groups.into_iter().flatten().enumerate() {
            let (sequence, head) = (index / self.heads.heads, index % self.heads.heads);
            let size = seq * out_layout.features;
            out_layout.scatter(&rows, &mut out[sequence * size..][..size], head);
            log_sum_exp.extend(lse);
        }
        *self.log_sum_exp.lock().unwrap_or_else(|e| e.into_inner()) = log_sum_exp;
        Ok((
            CpuStorage::F32(out),
            (batch, seq, out_layout.features).into(),
        ))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let dout = dout.contiguous()?;
        let (batch, seq, features) = qkv.dims3()?;
        let (qkv_read, out_read, dout_read) =
            (Reader::new(qkv), Reader::new(out), Reader::new(&dout));
        let (qkvs, outs, douts) = (qkv_read.slice()?, out_read.slice()?, dout_read.slice()?);
        let (cos, sin) = (Reader::new(&self.rope.cos), Reader::new(&self.rope.sin));
        let (cos, sin) = (cos.slice()?, sin.slice()?);
        let log_sum_exp = self.log_sum_exp.lock().unwrap_or_else(|e| e.into_inner());
        let (layout, out_layout) = (self.qkv_layout(seq), self.out_layout(seq));
        let (
            group,
            Heads {
                heads, kv_heads, ..
            },
        ) = (self.group(), self.heads);

        let groups = self.for_each_kv_head(batch, |sequence, kv_head| {
            let qkv = &qkvs[sequence * seq * features..][..seq * features];
            let outs_of_sequence = sequence * seq * out_layout.features;
            let out = &outs[outs_of_sequence..][..seq * out_layout.features];
            let dout = &douts[outs_of_sequence..][..seq * out_layout.features];
            let (queries, k, v) = self.group_inputs(qkv, layout, kv_head, (cos, sin));
            let (mut dk, mut dv) = (vec![0f32; k.len()], vec![0f32; v.len()]);
            let mut gradients = Vec::with_capacity(group + 2);
            for (i, q) in queries.iter().enumerate() {
                let head = kv_head * group + i;
                let (out, dout) = (out_layout.gather(out, head), out_layout.gather(dout, head));
                let lse = &log_sum_exp[(sequence * heads + head) * seq..][..seq];
                let mut dq =
                    self.head_backward((q, &k, &v), (&out, &dout), lse, (&mut dk, &mut dv));
                rotate(&mut dq, cos, sin, layout.head_dim, true);
                gradients.push((head, dq));
            }
            rotate(&mut dk, cos, sin, layout.head_dim, true);
            gradients.push((heads + kv_head, dk));
            gradients.push((heads + kv_heads + kv_head, dv));
            gradients
        });

        let mut dqkv = vec![0f32; qkvs.len()];
        for (index, gradients) in groups.into_iter().enumerate() {
            let first = index / kv_heads * seq * features;
            for (head, rows) in gradients {
                layout.scatter(&rows, &mut dqkv[first..][..seq * features], head);
            }
        }
        Tensor::from_vec(dqkv, qkv.shape(), qkv.device()).map(Some)
    }
}

pub fn attention(qkv: &Tensor, heads: Heads, rope: &Rope) -> Result<Tensor> {
    qkv.contiguous()?.apply_op1(Attention {
        heads,
        rope: rope.clone(),
        log_sum_exp: Mutex::new(Vec::new()),
    })
}
