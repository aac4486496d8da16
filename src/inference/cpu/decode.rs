//! One token through the network: bound by reading the weights, so that all else must be short.

use std::ops::Range;
use std::sync::Mutex;

use super::Network;
use super::cache::{HeadCache, LayerCache};
use super::head;
use super::projection::quantize_normed;
use super::team::{Member, Shared};
use crate::inference::weights::{PackedLayer, Projections};
use crate::model::cpu::{gated_activation, rms_norm};
use crate::quant::matmul::Activations;

/// Parts into which each member's share of a matrix is cut: more even out what else the processors do.
const TASKS_PER_MEMBER: usize = 4;

/// Rows that one kernel call multiplies, at most.
const ROWS_PER_CALL: usize = 64;

/// Activations between the steps of a layer.
struct Activity {
    /// The residual stream, (hidden,).
    x: Shared,
    qkv: Shared,
    attention: Shared,
    gated: Shared,
}

/// Runs token `id` after those of the cache, which takes it in -> its normalised final activations
/// (hidden,) and its logits (vocab,).
pub fn token(network: &Network, cache: &mut [LayerCache], id: u32) -> (Vec<f32>, Vec<f32>) {
    let weights = &network.weights;
    let hidden = network.hidden_size();
    let mut x = vec![0f32; hidden];
    weights.embed_tokens.read_rows(id as usize, &mut x);
    let activity = Activity {
        x: Shared::new(hidden),
        qkv: Shared::new(network.heads.qkv_features()),
        attention: Shared::new(hidden),
        gated: Shared::new(network.intermediate_size()),
    };
    activity.x.write(0, &x);
    let cache: Vec<_> = cache.iter_mut().map(LayerCache::lock_heads).collect();
    let lm_head = weights.lm_head();
    let mut logits = vec![0f32; lm_head.rows()];
    let parts = row_parts(lm_head.rows(), network.team.members());
    let logit_parts = split(&mut logits, &parts);

    network.team.run(|member| {
        for (layer, cache) in weights.layers.iter().zip(&cache) {
            network.layer_step(member, layer, &activity, cache);
        }
        let x = network.final_activations(&activity);
        member.share(parts.len(), |task| {
            let mut logits = logit_parts[task].lock().expect("no member panicked");
            head::rows(&mut logits, &x, lm_head, parts[task].start);
        });
    });
    drop(logit_parts);
    (network.final_activations(&activity), logits)
}

/// Rows 0 to `rows` in parts for the members of a team to share out.
fn row_parts(rows: usize, members: usize) -> Vec<Range<usize>> {
    let size = rows
        .div_ceil(members * TASKS_PER_MEMBER)
        .next_multiple_of(4);
    let parts = (0..rows).step_by(size);
    parts.map(|first| first..rows.min(first + size)).collect()
}

/// Consecutive parts of `values`, each for one thread.
fn split<'a>(mut values: &'a mut [f32], parts: &[Range<usize>]) -> Vec<Mutex<&'a mut [f32]>> {
    let mut split = Vec::with_capacity(parts.len());
    for part in parts {
        let (first, rest) = values.split_at_mut(part.len());
        split.push(Mutex::new(first));
        values = rest;
    }
    split
}

/// A token as a projection takes it.
struct Quantized {
    x: Activations,
    scale: f32,
}

impl Network {
    /// All members call it together.
    fn layer_step(
        &self,
        member: &Member,
        w: &PackedLayer,
        activity: &Activity,
        cache: &[Mutex<&mut HeadCache>],
    ) {
        let Activity {
            x,
            qkv,
            attention,
            gated,
        } = activity;
        let add_to_x = |row, y| x.set(row, x.get(row) + y);
        let token = self.quantize(x, &w.input_layernorm);
        self.project(member, &token, &w.qkv, |row, y| qkv.set(row, y));

        member.share(self.heads.kv_heads, |kv_head| {
            let mut cache = cache[kv_head].lock().expect("no member panicked");
            self.attention().token(qkv, attention, kv_head, &mut cache);
        });

        let token = self.quantize(attention, &w.attn_sub_norm);
        self.project(member, &token, &w.o, add_to_x);

        let token = self.quantize(x, &w.post_attention_layernorm);
        self.gate_up(member, &token, &w.gate_up, gated);

        let token = self.quantize(gated, &w.ffn_sub_norm);
        self.project(member, &token, &w.down, add_to_x);
    }

    /// Every member does it for itself: that takes less time than to wait for one that does it.
    fn quantize(&self, x: &Shared, norm: &[f32]) -> Quantized {
        let k = norm.len();
        let (mut values, mut normed) = (vec![0f32; k], vec![0f32; k]);
        x.read(0, &mut values);
        let mut codes = vec![0; k];
        let scale = quantize_normed(&mut codes, &mut normed, &values, norm, self.eps);
        Quantized {
            x: self.matmul.arrange(&codes, k),
            scale,
        }
    }

    /// Normalised residual stream, (hidden,).
    fn final_activations(&self, activity: &Activity) -> Vec<f32> {
        let mut x = vec![0f32; self.hidden_size()];
        activity.x.read(0, &mut x);
        rms_norm::forward(&x, &self.weights.norm, self.eps)
    }

    /// The outputs of a projection, each given to `put` by the member that computed it.
    fn project(
        &self,
        member: &Member,
        token: &Quantized,
        weights: &Projections,
        put: impl Fn(usize, f32),
    ) {
        for_rows(member, weights.packed.rows(), |rows| {
            self.scaled_rows(token, weights, rows, &put);
        });
    }

    /// `act(gate) * up`: rows of the gate together with those of up.
    fn gate_up(&self, member: &Member, token: &Quantized, w: &Projections, gated: &Shared) {
        let features = self.intermediate_size();
        for_rows(member, features, |rows| {
            let (first, count) = (rows.start, rows.len());
            let mut gate_up = [0f32; 2 * ROWS_PER_CALL];
            for (half, start) in [(0, first), (count, features + first)] {
                self.scaled_rows(token, w, start..start + count, |row, y| {
                    gate_up[half + row - start] = y;
                });
            }
            let mut values = [0f32; ROWS_PER_CALL];
            let (gate_up, values) = (&gate_up[..2 * count], &mut values[..count]);
            gated_activation::forward_rows(values, gate_up, count, self.activation);
            gated.write(first, values);
        });
    }

    /// Outputs of at most [`ROWS_PER_CALL`] rows, each given to `put`.
    fn scaled_rows(
        &self,
        token: &Quantized,
        weights: &Projections,
        rows: Range<usize>,
        mut put: impl FnMut(usize, f32),
    ) {
        let sums = &mut [0; ROWS_PER_CALL][..rows.len()];
        self.matmul
            .rows(sums, &token.x, &weights.packed, rows.start);
        let scales = &weights.scales[rows.clone()];
        for ((row, sum), b) in rows.zip(sums).zip(scales) {
            put(row, *sum as f32 * b / token.scale);
        }
    }
}

/// The members share out rows 0 to `count`; `part` gets at most [`ROWS_PER_CALL`] at a time.
fn for_rows(member: &Member, count: usize, part: impl Fn(Range<usize>)) {
    let parts = row_parts(count, member.members());
    member.share(parts.len(), |task| {
        let rows = &parts[task];
        for first in rows.clone().step_by(ROWS_PER_CALL) {
            part(first..rows.end.min(first + ROWS_PER_CALL));
        }
    });
}
