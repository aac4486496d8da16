//! Causal attention.

use std::ops::Range;

use half::bf16;
use titanbit::config::Config;
use titanbit::cuda::kernels::attention::{Attended, Attention, AttentionGradient, takes_head_dim};
use titanbit::cuda::{AttentionScratch, Batch, Sizes};
use titanbit::model::BitNetConfig;

use crate::check::{close, exact, f64s, near};
use crate::gpu::{Buffer, Gpu, gpu_with};
use crate::random::Random;

#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub rows: usize,
    pub seq: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Shape {
    pub fn config(self) -> BitNetConfig {
        BitNetConfig {
            hidden_size: self.hidden(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            max_seq_len: 1000,
            ..BitNetConfig::default()
        }
    }

    pub fn batch(self) -> Batch {
        Batch {
            rows: self.rows,
            seq: self.seq,
        }
    }

    pub fn tokens(self) -> usize {
        self.rows * self.seq
    }

    pub fn hidden(self) -> usize {
        self.heads * self.head_dim
    }

    /// Features of queries, keys and values together.
    pub fn qkv(self) -> usize {
        self.hidden() + 2 * self.kv_heads * self.head_dim
    }
}

/// These columns out of rows of `width`.
pub fn columns<T: Copy>(values: &[T], width: usize, columns: Range<usize>) -> Vec<T> {
    values
        .chunks(width)
        .flat_map(|row| row[columns.clone()].to_vec())
        .collect()
}

struct Wanted {
    out: Vec<f64>,
    log_sum_exp: Vec<f64>,
    dqkv: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(sum: &mut [f64], x: &[f64], factor: f64) {
    sum.iter_mut()
        .zip(x)
        .for_each(|(sum, x)| *sum += factor * x);
}

/// Softmax by softmax.
fn attend(shape: Shape, qkv: &[bf16], dout: &[bf16]) -> Wanted {
    let Shape {
        seq,
        heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    let (width, hidden) = (shape.qkv(), shape.hidden());
    let (qkv, dout) = (f64s(qkv), f64s(dout));
    let mut out = vec![0f64; shape.tokens() * hidden];
    let mut log_sum_exp = vec![0f64; shape.rows * heads * seq];
    let mut dqkv = vec![0f64; qkv.len()];
    let scale = 1.0 / (head_dim as f64).sqrt();
    for row in 0..shape.rows {
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let place = |token: usize, head: usize| {
                let start = (row * seq + token) * width + head * head_dim;
                start..start + head_dim
            };
            let key = |token| place(token, heads + kv_head);
            let value = |token| place(token, heads + kv_heads + kv_head);
            for token in 0..seq {
                let query = &qkv[place(token, head)];
                let mut p: Vec<f64> = (0..=token)
                    .map(|at| scale * dot(query, &qkv[key(at)]))
                    .collect();
                let max = p.iter().fold(f64::MIN, |max, s| max.max(*s));
                let sum: f64 = p.iter().map(|s| (s - max).exp()).sum();
                let log_sum = max + sum.ln();
                log_sum_exp[(row * heads + head) * seq + token] = log_sum;
                p.iter_mut().for_each(|s| *s = (*s - log_sum).exp());

                let start = (row * seq + token) * hidden + head * head_dim;
                let (out, dout) = (
                    &mut out[start..start + head_dim],
                    &dout[start..start + head_dim],
                );
                for (at, p) in p.iter().enumerate() {
                    add(out, &qkv[value(at)], *p);
                }
                let delta = dot(dout, out);
                for (at, p) in p.iter().enumerate() {
                    let ds = scale * p * (dot(dout, &qkv[value(at)]) - delta);
                    add(&mut dqkv[place(token, head)], &qkv[key(at)], ds);
                    add(&mut dqkv[key(at)], query, ds);
                    add(&mut dqkv[value(at)], dout, *p);
                }
            }
        }
    }
    Wanted {
        out,
        log_sum_exp,
        dqkv,
    }
}

struct OnGpu {
    out: Buffer<bf16>,
    log_sum_exp: Buffer<f32>,
    dqkv: Buffer<bf16>,
}

/// Forward and backward.
fn run(gpu: &Gpu, hopper: bool, shape: Shape, qkv: &[bf16], dout: &[bf16]) -> OnGpu {
    let attention = Attention::load(&gpu.device, &shape.config(), hopper).unwrap();
    let on_gpu = OnGpu {
        out: gpu.poisoned(shape.tokens() * shape.hidden()),
        log_sum_exp: gpu.poisoned(shape.tokens() * shape.heads),
        dqkv: gpu.poisoned(qkv.len()),
    };
    let (qkv, dout) = (gpu.upload(qkv), gpu.upload(dout));
    let mut config = Config {
        model: shape.config(),
        ..Config::default()
    };
    (config.train.micro_batch, config.train.seq_len) = (shape.rows, shape.seq);
    let sizes = Sizes::new(&config);
    let statistics = gpu.poisoned(sizes.attention_statistics());
    let copy_of = |features| gpu.poisoned(shape.tokens() * sizes.aligned_heads(features));
    let [qkv_copy, dout_copy] = [shape.qkv(), shape.hidden()].map(copy_of);
    let layer = Attended {
        qkv: qkv.ptr(),
        out: on_gpu.out.ptr(),
        log_sum_exp: on_gpu.log_sum_exp.ptr(),
        scratch: AttentionScratch {
            statistics: statistics.ptr(),
            qkv: qkv_copy.ptr(),
            dout: dout_copy.ptr(),
        },
    };
    let gradient = AttentionGradient {
        dout: dout.ptr(),
        dqkv: on_gpu.dqkv.ptr(),
    };
    unsafe {
        attention.forward(&layer, shape.batch()).unwrap();
        attention.backward(&layer, gradient, shape.batch()).unwrap();
    }
    // The guards are checked, and the inputs outlive the kernels.
    statistics.read();
    qkv_copy.read();
    dout_copy.read();
    on_gpu
}

/// Heads by themselves, but together in short sequences: there a head's softmax may be so steep
/// that its gradient vanishes beside the rounding of `out`.
fn check(gpu: &Gpu, random: &mut Random, hopper: bool, shape: Shape) {
    let Shape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    let (width, hidden) = (shape.qkv(), shape.hidden());
    let qkv = random.bf16s(shape.tokens() * width, 1.0);
    let dout = random.bf16s(shape.tokens() * hidden, 1.0);
    let on_gpu = run(gpu, hopper, shape, &qkv, &dout);
    let want = attend(shape, &qkv, &dout);
    println!("hopper {hopper}, {shape:?}");
    let log_sum_exp = on_gpu.log_sum_exp.read();
    near("log_sum_exp", &log_sum_exp, &want.log_sum_exp, 2e-6);
    let (out, dqkv) = (on_gpu.out.read(), on_gpu.dqkv.read());
    let end = heads + kv_heads;
    for (name, got, want, width, heads, bound) in [
        ("out", &out, &want.out, hidden, 0..heads, 4e-3),
        ("dq", &dqkv, &want.dqkv, width, 0..heads, 1e-2),
        ("dk", &dqkv, &want.dqkv, width, heads..end, 1e-2),
        ("dv", &dqkv, &want.dqkv, width, end..end + kv_heads, 5e-3),
    ] {
        let part = heads.start * head_dim..heads.end * head_dim;
        if shape.seq < 16 {
            let (got, want) = (
                columns(got, width, part.clone()),
                columns(want, width, part),
            );
            close(name, &got, &want, want.len(), bound);
            continue;
        }
        for first in part.step_by(head_dim) {
            let head = first..first + head_dim;
            let (got, want) = (
                columns(got, width, head.clone()),
                columns(want, width, head),
            );
            let what = format!("{name}, head {}", first / head_dim);
            close(&what, &got, &want, shape.seq * head_dim, bound);
        }
    }
}

fn check_head_dim(head_dim: usize, hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    // The width of keys is a multiple of 16.
    let kv_heads = if head_dim.is_multiple_of(16) { 2 } else { 4 };
    for (rows, seq, heads) in [
        (3, 77, 2 * kv_heads),
        (2, 130, kv_heads),
        (5, 3, 3 * kv_heads),
        (1, 515, kv_heads),
        // More tiles than blocks, of one length and of two.
        (24, 70, 16),
        (5, 260, 16),
    ] {
        let shape = Shape {
            rows,
            seq,
            heads,
            kv_heads,
            head_dim,
        };
        check(&gpu, &mut random, hopper, shape);
    }
}

#[test]
fn portable_attention_of_64_features() {
    check_head_dim(64, false);
}

#[test]
fn portable_attention_of_100_features() {
    check_head_dim(100, false);
}

#[test]
fn portable_attention_of_128_features() {
    check_head_dim(128, false);
}

#[test]
fn hopper_attention_of_64_features() {
    check_head_dim(64, true);
}

/// These heads do not start at multiples of 16 bytes.
#[test]
fn hopper_attention_of_100_features() {
    check_head_dim(100, true);
}

#[test]
fn hopper_attention_of_128_features() {
    check_head_dim(128, true);
}

fn check_all_head_dims(hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    for head_dim in (1..=256).filter(|dim| takes_head_dim(*dim)) {
        let shape = Shape {
            rows: 2,
            seq: 67,
            heads: 4,
            kv_heads: 4,
            head_dim,
        };
        check(&gpu, &mut random, hopper, shape);
    }
}

#[test]
fn portable_attention_of_every_head_dim() {
    check_all_head_dims(false);
}

#[test]
fn hopper_attention_of_every_head_dim() {
    check_all_head_dims(true);
}

/// A lone token attends to itself: what it says of its query and key is rounding.
fn check_lone_token(hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    for head_dim in [64, 100, 128] {
        let shape = Shape {
            rows: 5,
            seq: 1,
            heads: 4,
            kv_heads: 4,
            head_dim,
        };
        let (width, hidden) = (shape.qkv(), shape.hidden());
        let qkv = random.bf16s(shape.tokens() * width, 1.0);
        let dout = random.bf16s(shape.tokens() * hidden, 1.0);
        let on_gpu = run(&gpu, hopper, shape, &qkv, &dout);
        let (out, dqkv) = (on_gpu.out.read(), on_gpu.dqkv.read());
        exact("out", &out, &columns(&qkv, width, 2 * hidden..width));
        exact("dv", &columns(&dqkv, width, 2 * hidden..width), &dout);
        let others = columns(&dqkv, width, 0..2 * hidden);
        near("dq and dk", &others, &vec![0.0; others.len()], 1e-5);
    }
}

#[test]
fn portable_attention_of_a_lone_token() {
    check_lone_token(false);
}

#[test]
fn hopper_attention_of_a_lone_token() {
    check_lone_token(true);
}

/// Checks that these tokens and features of a head are NaN in the second of two sequences, and that
/// there is none in the first.
#[track_caller]
fn assert_nan(
    what: &str,
    values: &[bf16],
    width: usize,
    (head, head_dim): (usize, usize),
    tokens: Range<usize>,
    features: &Range<usize>,
) {
    let (first, second) = values.split_at(values.len() / 2);
    assert!(!first.iter().any(|x| x.is_nan()), "{what}: NaN elsewhere");
    for token in tokens {
        let row = &second[token * width + head * head_dim..][..head_dim];
        let nan = row[features.clone()].iter().all(|x| x.is_nan());
        assert!(nan, "{what}: a number at token {token}");
    }
}

/// A NaN in the second sequence reaches all that depends on it.
fn check_nan(hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    for head_dim in [64, 100, 128] {
        let shape = Shape {
            rows: 2,
            seq: 130,
            heads: 8,
            kv_heads: 4,
            head_dim,
        };
        let (width, hidden, seq) = (shape.qkv(), shape.hidden(), shape.seq);
        let qkv = random.bf16s(shape.tokens() * width, 1.0);
        let dout = random.bf16s(shape.tokens() * hidden, 1.0);
        let (bad, head, feature) = (random.below(seq), random.below(8), random.below(head_dim));
        println!("hopper {hopper}: token {bad}, head {head}, feature {feature} of {head_dim}");
        let query = (head, head_dim);
        let (key, value) = ((8 + head / 2, head_dim), (12 + head / 2, head_dim));
        let (all, one) = (0..head_dim, feature..feature + 1);
        let (before, at, after) = (0..bad + 1, bad..bad + 1, bad..seq);

        // Of a query the token's own output; of a key and a value those after it.
        for (name, place, queries, keys, features) in [
            ("q", query, at.clone(), before.clone(), &all),
            ("k", key, after.clone(), 0..seq, &all),
            ("v", value, after, 0..seq, &one),
        ] {
            let mut with_nan = qkv.clone();
            with_nan[(seq + bad) * width + place.0 * head_dim + feature] = bf16::NAN;
            let on_gpu = run(&gpu, hopper, shape, &with_nan, &dout);
            let (out, dqkv) = (on_gpu.out.read(), on_gpu.dqkv.read());
            let check = |what: &str, values: &[bf16], width, place, tokens, features| {
                let what = format!("{what} by {name}");
                assert_nan(&what, values, width, place, tokens, features);
            };
            check("out", &out, hidden, query, queries.clone(), features);
            check("dq", &dqkv, width, query, queries.clone(), &all);
            check("dk", &dqkv, width, key, keys.clone(), &all);
            // Softmax does not depend on values.
            if name != "v" {
                check("dv", &dqkv, width, value, keys, &all);
                let log_sum_exp = on_gpu.log_sum_exp.read();
                let of_head = &log_sum_exp[(8 + head) * seq..][..seq];
                let nan = of_head[queries].iter().all(|x| x.is_nan());
                assert!(nan, "log_sum_exp by {name}");
            }
        }
        let mut with_nan = dout.clone();
        with_nan[(seq + bad) * hidden + head * head_dim + feature] = bf16::NAN;
        let dqkv = run(&gpu, hopper, shape, &qkv, &with_nan).dqkv.read();
        assert_nan("dq by dout", &dqkv, width, query, at, &all);
        assert_nan("dk by dout", &dqkv, width, key, before.clone(), &all);
        assert_nan("dv by dout", &dqkv, width, value, before, &one);
    }
}

#[test]
fn portable_attention_passes_nan_on() {
    check_nan(false);
}

#[test]
fn hopper_attention_passes_nan_on() {
    check_nan(true);
}
