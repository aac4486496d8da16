//! Rotary embedding, and back with int8 codes and e4m3 values.

use half::bf16;
use titanbit::cuda::DevicePtr;
use titanbit::cuda::kernels::bit_linear::Projection;
use titanbit::cuda::kernels::rope::Rope;

use crate::attention::{Shape, columns};
use crate::check::{BF16, close, exact, f64s, only_these_are_nan};
use crate::fp8::Quantized;
use crate::gpu::{Gpu, gpu};
use crate::random::Random;

/// Queries and keys by their position, or back. The tables' angles are rounded to f32.
fn turned(shape: Shape, qkv: &[bf16], back: bool) -> Vec<f64> {
    let Shape { seq, head_dim, .. } = shape;
    let theta = shape.config().rope_theta;
    let mut qkv = f64s(qkv);
    for (token, row) in qkv.chunks_mut(shape.qkv()).enumerate() {
        for head in row.chunks_mut(head_dim).take(shape.heads + shape.kv_heads) {
            let (low, high) = head.split_at_mut(head_dim / 2);
            for (i, (low, high)) in low.iter_mut().zip(high).enumerate() {
                let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
                let angle = f64::from((token % seq) as f32 * frequency as f32);
                let sin = if back { -angle.sin() } else { angle.sin() };
                let (a, b) = (*low, *high);
                *low = a * angle.cos() - b * sin;
                *high = b * angle.cos() + a * sin;
            }
        }
    }
    qkv
}

fn rotate(shape: Shape, back: bool) {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let (width, turned_heads) = (shape.qkv(), shape.heads + shape.kv_heads);
    let x = random.bf16s(shape.tokens() * width, 1.0);
    let on_gpu = gpu.upload(&x);
    let rope = Rope::load(&gpu.device, &shape.config()).unwrap();
    unsafe { rope.rotate(on_gpu.ptr(), shape.batch(), back) }.unwrap();
    let got = on_gpu.read();
    let what = format!("rope {shape:?} back {back}");
    let want = turned(shape, &x, back);
    close(&what, &got, &want, shape.head_dim, BF16);
    let values = |all| columns(all, width, turned_heads * shape.head_dim..width);
    exact(&format!("{what}, values"), &values(&got), &values(&x));
}

/// Heads that a warp turns by shuffles, and others.
#[test]
fn rope_rotates() {
    for (head_dim, kv_heads) in [(64, 2), (100, 4), (128, 1), (20, 4), (16, 3), (256, 1)] {
        for (rows, seq) in [(3, 77), (1, 1), (9, 301), (1, 999)] {
            let shape = Shape {
                rows,
                seq,
                heads: 2 * kv_heads,
                kv_heads,
                head_dim,
            };
            rotate(shape, false);
            rotate(shape, true);
        }
    }
}

#[test]
fn rope_passes_nan_on() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for head_dim in [64, 100] {
        let shape = Shape {
            rows: 2,
            seq: 33,
            heads: 4,
            kv_heads: 4,
            head_dim,
        };
        let rope = Rope::load(&gpu.device, &shape.config()).unwrap();
        let run = |x: &[bf16]| {
            let x = gpu.upload(x);
            unsafe { rope.rotate(x.ptr(), shape.batch(), false) }.unwrap();
            x.read()
        };
        let x = random.bf16s(shape.tokens() * shape.qkv(), 1.0);
        let (token, turned) = (random.below(shape.tokens()), random.below(8));
        let low = token * shape.qkv() + turned * head_dim + random.below(head_dim / 2);
        let high = low + head_dim / 2;
        let mut with_nan = x.clone();
        with_nan[low] = bf16::NAN;
        only_these_are_nan("rope", &run(&with_nan), &run(&x), |at| {
            at == low || at == high
        });
    }
}

/// Queries and keys, and values, from gradients of all.
fn quantize_back(gpu: &Gpu, shape: Shape, dqkv: &[bf16], b: &[f32; 3]) -> [Quantized; 2] {
    let end = shape.hidden() + shape.kv_heads * shape.head_dim;
    let parts = [end, shape.qkv() - end];
    let parts = parts.map(|features| Quantized::poisoned(gpu, shape.tokens(), features));
    let (dqkv, scales) = (gpu.upload(dqkv), gpu.upload(b));
    let projection = Projection {
        codes: DevicePtr::NULL,
        scales: scales.ptr(),
        n: shape.qkv(),
        k: shape.hidden(),
        ends: [shape.hidden(), end],
    };
    let rope = Rope::load(&gpu.device, &shape.config()).unwrap();
    let to = [parts[0].gradient(), parts[1].gradient()];
    unsafe { rope.rotate_back_quantize(dqkv.ptr(), &projection, to, shape.batch()) }.unwrap();
    scales.read();
    parts
}

/// Heads of vectors of eight, and others.
#[test]
fn rope_quantizes_gradients() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (head_dim, kv_heads) in [(64, 2), (100, 4), (128, 1), (20, 4), (128, 5)] {
        for (rows, seq) in [(3, 77), (1, 1), (5, 301), (1, 999)] {
            let shape = Shape {
                rows,
                seq,
                heads: 2 * kv_heads,
                kv_heads,
                head_dim,
            };
            let (width, q, kv) = (shape.qkv(), shape.hidden(), kv_heads * head_dim);
            let b = [(); 3].map(|()| (0.01 * (1.0 + random.uniform())) as f32);
            // Values have larger gradients than queries and keys; those of the last token are zero.
            let mut dqkv = random.bf16s(shape.tokens() * width, 1e-3);
            for (at, value) in dqkv.iter_mut().enumerate() {
                if at % width >= q + kv {
                    *value = bf16::from_f32(300.0 * value.to_f32());
                }
            }
            let last = dqkv.len() - width;
            dqkv[last..].fill(bf16::ZERO);
            let want = turned(shape, &dqkv, true);
            let parts = quantize_back(&gpu, shape, &dqkv, &b);
            let [b_q, b_k, b_v] = b.map(f64::from);
            let qk_scales = [vec![b_q; q], vec![b_k; kv]].concat();
            for (name, part, columns_of, b) in [
                ("dq, dk", &parts[0], 0..q + kv, qk_scales),
                ("dv", &parts[1], q + kv..width, vec![b_v; kv]),
            ] {
                let what = format!("rope {shape:?}, {name}");
                let want = columns(&want, width, columns_of);
                let ranges: Vec<_> = want.into_iter().map(|x| [x; 3]).collect();
                part.check_scale(&what, &ranges, &b);
                part.check_values(&what, &ranges, &b);
            }
        }
    }
}

#[test]
fn rope_passes_nan_on_to_scales() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for head_dim in [64, 100] {
        let shape = Shape {
            rows: 2,
            seq: 33,
            heads: 4,
            kv_heads: 4,
            head_dim,
        };
        let b = [0.01, 0.02, 0.03];
        let dqkv = random.bf16s(shape.tokens() * shape.qkv(), 1.0);
        let bad = random.below(shape.tokens());
        let scales = |dqkv: &[bf16], b: &[f32; 3]| {
            quantize_back(&gpu, shape, dqkv, b).map(|x| x.scale.read())
        };
        let before = scales(&dqkv, &b);
        for head in 0..12 {
            let mut with_nan = dqkv.clone();
            let feature = head * head_dim + random.below(head_dim);
            with_nan[bad * shape.qkv() + feature] = bf16::NAN;
            for (part, nan) in scales(&with_nan, &b).iter().enumerate() {
                let here = part == head / 8;
                only_these_are_nan("scale", nan, &before[part], |row| here && row == bad);
            }
        }
        for weight in 0..3 {
            let mut b = b;
            b[weight] = f32::NAN;
            for (part, nan) in scales(&dqkv, &b).iter().enumerate() {
                only_these_are_nan("b: scale", nan, &before[part], |_| part == weight / 2);
            }
        }
    }
}
