//! Kernels of the inference passes: f32 rows to int8 codes, one token's BitLinear, attention over a
//! cache, embedding and LM head.

use half::{bf16, f16};
use titanbit::cuda::DevicePtr;
use titanbit::cuda::kernels::TernaryTiles;
use titanbit::cuda::kernels::bf16_pairs::{Bf16Pairs, SplitBf16, multiply};
use titanbit::cuda::kernels::cached_attention::{AttentionState, CachedAttention, LayerCache};
use titanbit::cuda::kernels::gemm::Gemm;
use titanbit::cuda::kernels::log_likelihood::{LogLikelihood, Logits};
use titanbit::cuda::kernels::token_linear::{NormedLinear, TokenLinear};
use titanbit::cuda::kernels::token_norm::{TokenCodes, TokenNorm, TokenRows};
use titanbit::cuda::kernels::vocabulary::{CudaTable, Vocabulary};
use titanbit::inference::Table;
use titanbit::inference::weights::TableValues;
use titanbit::model::{Activation, BitNetConfig};
use titanbit::quant::PackedTernary;

use crate::check::{close, codes, f64s, near};
use crate::gpu::{Gpu, gpu};
use crate::random::Random;
use crate::rows::{EPS, Normal, weight_of};

const ACTIVATIONS: [Activation; 2] = [Activation::Silu, Activation::Relu2];

fn act(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Relu2 => x.max(0.0).powi(2),
    }
}

/// Rows of very different size, the second of them zeros.
fn rows_of(random: &mut Random, rows: usize, features: usize) -> Vec<f32> {
    let row = |row| {
        let scale = match row {
            1 => 0.0,
            _ => 10f64.powf(5.0 * random.uniform() - 3.0),
        };
        random.f32s(features, scale)
    };
    (0..rows).flat_map(row).collect()
}

#[track_caller]
fn check_codes(what: &str, got: &[i8], scales: &[f32], want: &[Normal], stride: usize) {
    let wanted: Vec<f64> = want.iter().map(|row| row.scale).collect();
    close(&format!("{what}, scales"), scales, &wanted, 1, 2e-6);
    for (got, row) in got.chunks(stride).zip(want) {
        let (inside, outside) = got.split_at(row.values.len());
        let values: Vec<f64> = row.values.iter().map(|n| n / row.scale).collect();
        codes(&format!("{what}, codes"), inside, &values);
        assert!(outside.iter().all(|code| *code == 0), "{what}");
    }
}

#[test]
fn tokens_are_normalised() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let norm = TokenNorm::load(&gpu.device, EPS).unwrap();
    for (rows, features) in [
        (1usize, 8usize),
        (1, 32),
        (5, 272),
        (70, 768),
        (3, 2048),
        (9, 8640),
        (2, 16384),
    ] {
        let stride = features.next_multiple_of(32);
        let weight = weight_of(&mut random, features);
        let on_gpu = gpu.upload(&weight);
        let of = TokenRows {
            rows,
            features,
            norm: on_gpu.ptr(),
        };
        let normal = |x: &[f32]| -> Vec<Normal> {
            let rows = x.chunks(features);
            rows.map(|x| Normal::of(&f64s(x), &weight)).collect()
        };
        let x = rows_of(&mut random, rows, features);
        let y = random.f32s(rows * features, 1.0);
        for adds in [false, true] {
            let what = format!("{rows} x {features}, adds {adds}");
            let sum: Vec<f32> = match adds {
                true => x.iter().zip(&y).map(|(x, y)| x + y).collect(),
                false => x.clone(),
            };
            let want = normal(&sum);
            let (x_gpu, y_gpu) = (gpu.upload(&x), gpu.upload(&y));
            let y_ptr = if adds { y_gpu.ptr() } else { DevicePtr::NULL };
            let (got, scales) = (gpu.poisoned::<i8>(rows * stride), gpu.poisoned(rows));
            let to = TokenCodes {
                codes: got.ptr(),
                scales: scales.ptr(),
                stride,
            };
            unsafe { norm.add_norm_quantize(x_gpu.ptr(), y_ptr, of, to) }.unwrap();
            assert_eq!(x_gpu.read(), sum, "{what}");
            check_codes(&what, &got.read(), &scales.read(), &want, stride);

            let (x_gpu, out) = (gpu.upload(&x), gpu.poisoned(rows * features));
            unsafe { norm.add_norm(x_gpu.ptr(), y_ptr, of, out.ptr(), false) }.unwrap();
            assert_eq!(x_gpu.read(), sum, "{what}");
            let values: Vec<f64> = want.into_iter().flat_map(|row| row.values).collect();
            close(&what, &out.read(), &values, features, 1e-6);
        }
        for activation in ACTIVATIONS {
            let gate_up = random.f32s(rows * 2 * features, 2.0);
            let gated: Vec<Normal> = (f64s(&gate_up).chunks(2 * features))
                .map(|row| {
                    let (gate, up) = row.split_at(features);
                    let products = gate.iter().zip(up).map(|(g, u)| act(activation, *g) * u);
                    Normal::of(&products.collect::<Vec<_>>(), &weight)
                })
                .collect();
            let gate_up = gpu.upload(&gate_up);
            let (got, scales) = (gpu.poisoned::<i8>(rows * stride), gpu.poisoned(rows));
            let to = TokenCodes {
                codes: got.ptr(),
                scales: scales.ptr(),
                stride,
            };
            unsafe { norm.gate_norm_quantize(gate_up.ptr(), activation, of, to) }.unwrap();
            let what = format!("{rows} x {features}, {activation:?}");
            check_codes(&what, &got.read(), &scales.read(), &gated, stride);
        }
    }
}

/// A token whose normalised values are codes times a scale, so that no rounding can change a code.
struct Token {
    codes: Vec<i8>,
    x: Vec<f32>,
    norm: Vec<f32>,
    scale: f64,
}

impl Token {
    fn new(random: &mut Random, k: usize) -> Self {
        let mut codes: Vec<i8> = (0..k)
            .map(|_| (random.below(255) as i32 - 127) as i8)
            .collect();
        codes[random.below(k)] = -127;
        let norm = weight_of(random, k);
        let norm: Vec<f32> = norm.iter().map(|w| w.abs().max(0.1)).collect();
        let x: Vec<f32> = (codes.iter().zip(&norm))
            .map(|(code, w)| (0.03 * f64::from(*code) / f64::from(*w)) as f32)
            .collect();
        Self {
            scale: Normal::of(&f64s(&x), &norm).scale,
            codes,
            x,
            norm,
        }
    }
}

#[test]
fn a_token_goes_through_a_bit_linear() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let tiles = TernaryTiles::load(&gpu.device).unwrap();
    for (n, k) in [
        (32, 32),
        (64, 272),
        (1280, 768),
        (768, 2048),
        (96, 96),
        (12288, 2048),
        (2048, 6144),
        (3200, 8640),
        (64, 3200),
        (64, 16384),
    ] {
        let token = Token::new(&mut random, k);
        let w = random.ternary(n * k);
        let scales: Vec<f32> = (0..n)
            .map(|_| (0.01 * (1.0 + random.uniform())) as f32)
            .collect();
        let product: Vec<f64> = (w.chunks(k).zip(&scales))
            .map(|(w, b)| {
                let terms = w.iter().zip(&token.codes);
                let sum: i64 = terms.map(|(w, x)| i64::from(*w) * i64::from(*x)).sum();
                sum as f64 * f64::from(*b) * token.scale
            })
            .collect();
        let packed = PackedTernary::pack(&w, n, k).unwrap();
        let packed = packed.padded(k.next_multiple_of(32));
        let weights = tiles.upload(&packed, &scales).unwrap();
        let (x, norm) = (gpu.upload(&token.x), gpu.upload(&token.norm));
        let linear = NormedLinear {
            norm: norm.ptr(),
            features: k,
            weights: &weights,
        };
        for activation in ACTIVATIONS {
            let kernels = TokenLinear::load(&gpu.device, EPS, activation).unwrap();
            let what = format!("{n} x {k}, {activation:?}");
            let y = gpu.poisoned(n);
            unsafe { kernels.store(x.ptr(), linear, y.ptr()) }.unwrap();
            close(&format!("{what}: store"), &y.read(), &product, n, 2e-6);

            let before = random.f32s(n, 1.0);
            let y = gpu.upload(&before);
            unsafe { kernels.add(x.ptr(), linear, y.ptr()) }.unwrap();
            let sum = product.iter().zip(&before).map(|(y, b)| y + f64::from(*b));
            let sum: Vec<f64> = sum.collect();
            close(&format!("{what}: add"), &y.read(), &sum, n, 2e-6);

            let y = gpu.poisoned(n / 2);
            unsafe { kernels.gate(x.ptr(), linear, y.ptr()) }.unwrap();
            let (gate, up) = product.split_at(n / 2);
            let gated = gate.iter().zip(up).map(|(g, u)| act(activation, *g) * u);
            let gated: Vec<f64> = gated.collect();
            close(&format!("{what}: gate"), &y.read(), &gated, n / 2, 4e-6);
        }
    }
}

/// Rotated queries or keys of a position.
fn rotated(x: &[f32], position: usize, theta: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let turned = |i: usize| {
        let frequency = theta.powf(-(i as f64) / half as f64) as f32;
        let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
        let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
        [a * cos - b * sin, b * cos + a * sin]
    };
    let pairs: Vec<[f64; 2]> = (0..half).map(turned).collect();
    (pairs.iter().map(|pair| pair[0]))
        .chain(pairs.iter().map(|pair| pair[1]))
        .collect()
}

/// qkv (tokens, features) of a whole sequence -> (tokens, heads * head_dim).
fn attention(qkv: &[f32], config: &BitNetConfig) -> Vec<f64> {
    let (d, heads, kv_heads) = (config.head_dim(), config.heads, config.kv_heads);
    let features = (heads + 2 * kv_heads) * d;
    let rows: Vec<&[f32]> = qkv.chunks(features).collect();
    let part = |token: usize, head: usize| &rows[token][head * d..][..d];
    let turned = |token, head| rotated(part(token, head), token, config.rope_theta);
    let keys: Vec<Vec<Vec<f64>>> = (0..kv_heads)
        .map(|head| (0..rows.len()).map(|t| turned(t, heads + head)).collect())
        .collect();
    let mut out = Vec::new();
    for token in 0..rows.len() {
        for head in 0..heads {
            let (q, kv_head) = (turned(token, head), head / (heads / kv_heads));
            let score = |key: &Vec<f64>| {
                let dot: f64 = key.iter().zip(&q).map(|(k, q)| k * q).sum();
                dot / (d as f64).sqrt()
            };
            let scores: Vec<f64> = keys[kv_head][..=token].iter().map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sum = vec![0.0; d];
            for (t, weight) in weights.iter().enumerate() {
                let value = part(t, heads + kv_heads + kv_head);
                for (sum, v) in sum.iter_mut().zip(value) {
                    *sum += weight / total * f64::from(*v);
                }
            }
            out.extend(sum);
        }
    }
    out
}

/// Feeds `pieces` of tokens; the outputs of all.
fn run_attention(gpu: &Gpu, config: &BitNetConfig, qkv: &[f32], pieces: &[usize]) -> Vec<f32> {
    let (d, heads, kv_heads) = (config.head_dim(), config.heads, config.kv_heads);
    let features = (heads + 2 * kv_heads) * d;
    let kernels = CachedAttention::load(&gpu.device, config).unwrap();
    let scratch = kernels.scratch(*pieces.iter().max().unwrap());
    let parts = gpu.poisoned::<f32>(scratch.parts);
    let pairs = gpu.poisoned::<bf16>(scratch.pairs);
    let done = gpu.upload(&vec![0u32; scratch.done]);
    let cache = [(); 2].map(|()| gpu.poisoned::<f32>(kv_heads * config.max_seq_len * d));
    let mut position = gpu.upload(&[0u32]);
    let state = AttentionState {
        position: position.ptr(),
        parts: parts.ptr(),
        pairs: pairs.ptr(),
        done: done.ptr(),
    };
    let cache_ptr = LayerCache {
        keys: cache[0].ptr(),
        values: cache[1].ptr(),
    };
    let (mut outputs, mut len) = (Vec::new(), 0);
    for tokens in pieces {
        position.write(&[len as u32]);
        let rows = gpu.upload(&qkv[len * features..(len + tokens) * features]);
        let out = gpu.poisoned::<f32>(tokens * heads * d);
        unsafe {
            match tokens {
                1 => kernels.token(rows.ptr(), cache_ptr, state, out.ptr()),
                _ => kernels.tokens(rows.ptr(), cache_ptr, state, out.ptr(), [len, *tokens]),
            }
        }
        .unwrap();
        outputs.extend(out.read());
        len += tokens;
    }
    assert!(done.read().iter().all(|count| *count == 0));
    for cache in cache {
        let rows = cache.read();
        let head = |row: &[f32]| row.iter().skip(len * d).all(|x| x.is_nan());
        assert!(rows.chunks(config.max_seq_len * d).all(head));
    }
    outputs
}

#[test]
fn tokens_attend_to_those_of_the_cache() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (heads, kv_heads, head_dim) in [
        (4, 1, 64),
        (6, 2, 64),
        (2, 2, 128),
        (8, 2, 100),
        (12, 2, 16),
        (2, 1, 4),
        (7, 1, 32),
        (3, 1, 112),
        // No kernel for prompts.
        (2, 1, 116),
    ] {
        let config = BitNetConfig {
            hidden_size: heads * head_dim,
            heads,
            kv_heads,
            max_seq_len: 700,
            ..BitNetConfig::default()
        };
        let features = (heads + 2 * kv_heads) * head_dim;
        let tokens = 600;
        let qkv = random.f32s(tokens * features, 1.5);
        let want = attention(&qkv, &config);
        for pieces in [
            vec![600],
            vec![1; 600],
            vec![1, 2, 1, 5, 90, 1, 300, 1, 33, 1, 1, 160, 3, 1],
        ] {
            let got = run_attention(&gpu, &config, &qkv, &pieces);
            let what = format!(
                "{heads}/{kv_heads} heads of {head_dim}, {} pieces",
                pieces.len()
            );
            // Many tokens at a time multiply 16 bits of a value: a score of ten is off by ten times 2^-16.
            let many = pieces.iter().any(|piece| *piece > 8);
            let bound = if many { 2e-4 } else { 2e-5 };
            close(&what, &got, &want, head_dim, bound);
        }
    }
}

/// x (rows, k) . w (vocab, k)^T
fn products(x: &[f32], w: &[f32], k: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| {
        let terms = x.iter().zip(w);
        terms
            .map(|(x, w)| f64::from(*x) * f64::from(*w))
            .sum::<f64>()
    };
    (x.chunks(k))
        .flat_map(|x| w.chunks(k).map(move |w| dot(x, w)))
        .collect()
}

#[test]
fn vocabularies_are_read_in_their_format() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let kernels = Vocabulary::load(&gpu.device).unwrap();
    for (vocab, k) in [(300, 96), (1001, 768), (4000, 2048), (65, 3200), (37, 8)] {
        let values = random.f32s(vocab * k, 1.0);
        let halves: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
        let rounded: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
        for (name, values, table) in [
            ("f32", &values, TableValues::F32(values.clone().into())),
            ("f16", &rounded, TableValues::F16(halves.into())),
        ] {
            let table = Table::new(vocab, k, table);
            let table = CudaTable::upload(&gpu.device, &table).unwrap();
            for tokens in [1, 2, 8, 13] {
                let what = format!("{name} {vocab} x {k}, {tokens} tokens");
                let ids: Vec<u32> = (0..tokens).map(|_| random.below(vocab) as u32).collect();
                let (ids_gpu, x) = (gpu.upload(&ids), gpu.poisoned::<f32>(tokens * k));
                unsafe { kernels.embed(ids_gpu.ptr(), &table, x.ptr(), tokens) }.unwrap();
                let rows: Vec<f64> = (ids.iter())
                    .flat_map(|id| f64s(&values[*id as usize * k..][..k]))
                    .collect();
                near(&format!("{what}: embed"), &x.read(), &rows, 0.0);

                let x = random.f32s(tokens * k, 1.0);
                let (x_gpu, logits) = (gpu.upload(&x), gpu.poisoned::<f32>(tokens * vocab));
                unsafe { kernels.head(x_gpu.ptr(), &table, logits.ptr(), tokens) }.unwrap();
                let want = products(&x, values, k);
                close(&format!("{what}: head"), &logits.read(), &want, vocab, 1e-6);
            }
        }
    }
}

#[test]
fn pairs_of_bf16_multiply_to_16_bits() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let split = SplitBf16::load(&gpu.device).unwrap();
    let gemm = Gemm::new(gpu.device.cuda_stream()).unwrap();
    for (rows, vocab, k) in [
        (3, 37, 8),
        (64, 300, 96),
        (130, 1001, 768),
        (256, 4000, 2048),
    ] {
        let values = random.f32s(vocab * k, 1.0);
        let halves: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
        let rounded: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
        let x = random.f32s(rows * k, 1.0);
        let pairs = Bf16Pairs::zeros(&gpu.device, rows, k).unwrap();
        unsafe { split.rows(gpu.upload(&x).ptr(), &pairs, rows) }.unwrap();
        for (name, values, table) in [
            ("f32", &values, TableValues::F32(values.clone().into())),
            ("f16", &rounded, TableValues::F16(halves.into())),
        ] {
            let table = CudaTable::upload(&gpu.device, &Table::new(vocab, k, table)).unwrap();
            let table = split.table(&table).unwrap();
            let stride = vocab.next_multiple_of(4);
            let y = gpu.poisoned::<f32>(rows * stride);
            unsafe { multiply(&gemm, [&pairs, &table], rows, y.ptr(), stride) }.unwrap();
            let y = y.read();
            assert!(
                y.chunks(stride)
                    .all(|y| y[vocab..].iter().all(|y| y.is_nan()))
            );
            let y: Vec<f32> = y
                .chunks(stride)
                .flat_map(|y| &y[..vocab])
                .copied()
                .collect();
            let what = format!("{name} {rows} x {vocab} x {k}");
            close(&what, &y, &products(&x, values, k), vocab, 1e-5);
        }
    }
}

#[test]
fn log_likelihoods_are_those_of_a_softmax() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let kernel = LogLikelihood::load(&gpu.device).unwrap();
    for (rows, vocab, stride) in [
        (1, 1, 1),
        (3, 2, 5),
        (7, 300, 300),
        (5, 1001, 1003),
        (9, 32000, 32000),
        (2, 128_256, 128_256),
    ] {
        let mut logits = random.f32s(rows * stride, 6.0);
        let row = |logits: &[f32], row: usize| f64s(&logits[row * stride..][..vocab]);
        let targets: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
        let run = |logits: &[f32]| {
            let (values, out) = (gpu.upload(logits), gpu.poisoned::<f32>(rows));
            let logits = Logits {
                values: values.ptr(),
                rows,
                stride,
                vocab,
            };
            unsafe { kernel.run(logits, gpu.upload(&targets).ptr(), out.ptr()) }.unwrap();
            out.read()
        };
        let want: Vec<f64> = (0..rows)
            .map(|r| {
                let row = row(&logits, r);
                row[targets[r] as usize] - row.iter().map(|x| x.exp()).sum::<f64>().ln()
            })
            .collect();
        near(&format!("{rows} x {vocab}"), &run(&logits), &want, 5e-6);

        // Of another row, nothing of it shows.
        logits[(rows - 1) * stride + random.below(vocab)] = f32::NAN;
        logits[random.below(vocab)] = if rows > 1 { f32::INFINITY } else { f32::NAN };
        let got = run(&logits);
        assert!(got[0].is_nan() && got[rows - 1].is_nan());
        let inside = 1..(rows - 1).max(1);
        near("others", &got[inside.clone()], &want[inside], 5e-6);
    }
}
