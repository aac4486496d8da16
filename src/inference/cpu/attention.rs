//! Causal grouped-query attention over a cache of keys and values.

use rayon::prelude::*;

use super::cache::{BLOCK, HeadCache, LayerCache};
use super::team::Shared;
use crate::model::cpu::attention::{attend, rotate};
use crate::model::ops::Heads;
use crate::simd::{exp, max_by, sum, vectorized};

/// Features of a value that are summed at a time, in registers.
const FEATURES: usize = 32;

pub struct Attention<'a> {
    pub heads: Heads,
    /// Rotary tables, (positions, head_dim / 2).
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

impl Attention<'_> {
    /// qkv (tokens, qkv_features) of tokens that follow those of the cache, which takes them in
    /// -> (tokens, heads * head_dim).
    pub fn forward(&self, qkv: &[f32], cache: &mut LayerCache) -> Vec<f32> {
        let Heads {
            heads,
            kv_heads,
            head_dim: d,
        } = self.heads;
        let (features, group) = (self.heads.qkv_features(), heads / kv_heads);
        let tokens = qkv.len() / features;
        let first = cache.tokens() * d / 2;
        let (cos, sin) = (&self.cos[first..], &self.sin[first..]);
        let gather = |head: usize| {
            let rows = qkv.chunks_exact(features).map(|row| &row[head * d..][..d]);
            rows.flatten().copied().collect::<Vec<f32>>()
        };
        let rotated = |head: usize| {
            let mut rows = gather(head);
            rotate(&mut rows, cos, sin, d, false);
            rows
        };
        let outputs: Vec<Vec<Vec<f32>>> = (cache.heads.par_iter_mut())
            .enumerate()
            .map(|(kv_head, cache)| {
                let values = gather(heads + kv_heads + kv_head);
                cache.append(&rotated(heads + kv_head), &values);
                let keys = cache.keys();
                let queries = kv_head * group..(kv_head + 1) * group;
                let queries = queries.into_par_iter().map(rotated);
                let attend = |q: Vec<f32>| attend(&q, &keys, cache.values(), d).0;
                queries.map(attend).collect()
            })
            .collect();
        let mut out = vec![0f32; tokens * heads * d];
        for (head, rows) in outputs.iter().flatten().enumerate() {
            for (out, row) in out.chunks_exact_mut(heads * d).zip(rows.chunks_exact(d)) {
                out[head * d..][..d].copy_from_slice(row);
            }
        }
        out
    }

    /// The queries of one group, of the one token in `qkv`: adds its key and value to the cache, and
    /// writes the group's part of `out`.
    pub fn token(&self, qkv: &Shared, out: &Shared, kv_head: usize, cache: &mut HeadCache) {
        let Heads {
            heads,
            kv_heads,
            head_dim: d,
        } = self.heads;
        let group = heads / kv_heads;
        let position = cache.tokens();
        let angles = position * d / 2..(position + 1) * d / 2;
        let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
        let read = |head: usize, rows: &mut [f32]| {
            qkv.read(head * d, rows);
            let rows = rows.chunks_exact_mut(d);
            rows.for_each(|row| rotate(row, cos, sin, d, false));
        };
        let (mut queries, mut key, mut value) =
            (vec![0f32; group * d], vec![0f32; d], vec![0f32; d]);
        read(kv_head * group, &mut queries);
        read(heads + kv_head, &mut key);
        qkv.read((heads + kv_heads + kv_head) * d, &mut value);
        cache.append(&key, &value);

        let mut scores = vec![0f32; cache.tokens().next_multiple_of(BLOCK)];
        let mut row = vec![0f32; d];
        for (i, query) in queries.chunks_exact(d).enumerate() {
            attend_one(
                &mut row,
                &mut scores,
                query,
                cache.key_blocks(),
                cache.values(),
            );
            out.write((kv_head * group + i) * d, &row);
        }
    }
}

vectorized! {
    /// `out = softmax(q . K^T / sqrt(d)) . V`: out and q (d,), keys in blocks, values (tokens, d);
    /// `scores` is scratch, a number for each place in the blocks.
    fn attend_one(out: &mut [f32], scores: &mut [f32], q: &[f32], key_blocks: &[f32], values: &[f32]) {
        let d = q.len();
        let scale = (d as f32).sqrt().recip();
        let blocks = key_blocks.chunks_exact(d * BLOCK);
        for (scores, block) in scores.as_chunks_mut::<BLOCK>().0.iter_mut().zip(blocks) {
            // Two sums, so that one addition need not wait for the one before.
            let (mut even, mut odd) = ([0f32; BLOCK], [0f32; BLOCK]);
            let pairs = block.as_chunks::<{ 2 * BLOCK }>().0.iter().zip(q.as_chunks::<2>().0);
            for (keys, [q0, q1]) in pairs {
                for lane in 0..BLOCK {
                    even[lane] += q0 * keys[lane];
                    odd[lane] += q1 * keys[BLOCK + lane];
                }
            }
            for lane in 0..BLOCK {
                scores[lane] = (even[lane] + odd[lane]) * scale;
            }
        }
        let weights = &mut scores[..values.len() / d];
        let largest = max_by(weights, |x| x);
        for weight in weights.iter_mut() {
            *weight = exp(*weight - largest);
        }
        let inverse = sum(weights).recip();
        let whole = d / FEATURES * FEATURES;
        for first in (0..whole).step_by(FEATURES) {
            let mut sums = [0f32; FEATURES];
            for (weight, value) in weights.iter().zip(values.chunks_exact(d)) {
                let value: &[f32; FEATURES] = value[first..].first_chunk().expect("so many are left");
                for lane in 0..FEATURES {
                    sums[lane] += weight * value[lane];
                }
            }
            for (out, sum) in out[first..].iter_mut().zip(sums) {
                *out = sum * inverse;
            }
        }
        for (feature, out) in out.iter_mut().enumerate().skip(whole) {
            let values = values.iter().skip(feature).step_by(d);
            let sum: f32 = weights.iter().zip(values).map(|(weight, value)| weight * value).sum();
            *out = sum * inverse;
        }
    }
}
