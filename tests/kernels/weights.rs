//! Master weights to ternary codes and to bf16.

use half::bf16;
use titanbit::cuda::kernels::bit_linear::Projection;
use titanbit::cuda::kernels::ternary_weights::{TernaryTensor, TernaryWeights};
use titanbit::cuda::kernels::to_bf16::ToBf16;

use crate::check::{close, exact};
use crate::gpu::{Buffer, Gpu, Value, gpu};
use crate::random::Random;

/// Scales and codes of tensors, one after the other.
fn quantize(gpu: &Gpu, tensors: &[Vec<f32>]) -> (Vec<f32>, Vec<i8>) {
    let on_gpu: Vec<Buffer<f32>> = tensors.iter().map(|tensor| gpu.upload(tensor)).collect();
    let mut count = 0;
    let mut table = Vec::new();
    for (tensor, weights) in tensors.iter().zip(&on_gpu) {
        table.push(TernaryTensor {
            weights: weights.ptr(),
            count: tensor.len(),
            codes: count,
        });
        count += tensor.len();
    }
    let (scales, codes) = (gpu.poisoned(tensors.len()), gpu.poisoned(count));
    let kernels = TernaryWeights::load(&gpu.device, &table).unwrap();
    unsafe { kernels.quantize(scales.ptr(), codes.ptr()) }.unwrap();
    (scales.read(), codes.read())
}

/// Pairs of magnitude b / 2, or a few bits beside it, and what makes b of them on average.
fn near_half(random: &mut Random, b: f32, pairs: usize) -> Vec<f32> {
    let pair = |_| {
        let bits = (b / 2.0).to_bits() + random.below(9) as u32 - 4;
        let near = f32::from_bits(bits);
        let other = 2.0 * b - near;
        let sign = |x: f32, negative| if negative { -x } else { x };
        [
            sign(near, random.below(2) == 0),
            sign(other, random.below(2) == 0),
        ]
    };
    (0..pairs).flat_map(pair).collect()
}

#[test]
fn weights_become_ternary() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    // b / 2 itself, where rounding goes to the even 0.
    let ties: Vec<f32> = [0.5, -0.5, 1.5, -1.5].repeat(5000);
    let mut tensors: Vec<Vec<f32>> = [16, 48, 16384, 16400, 5 * 16384 + 32, 4_300_016]
        .into_iter()
        .map(|count| random.f32s(count, 0.02))
        .collect();
    tensors.extend([
        vec![0.0; 272],
        random.f32s(16384, 1e-6),
        ties.iter().map(|x| x * 0.0234375).collect(),
        near_half(&mut random, 0.0203, 20_000),
    ]);
    let (scales, codes) = quantize(&gpu, &tensors);
    let mut codes = &codes[..];
    for (index, (tensor, b)) in tensors.iter().zip(scales).enumerate() {
        let mean = tensor.iter().map(|w| f64::from(w.abs())).sum::<f64>() / tensor.len() as f64;
        let what = format!("tensor {index} of {}", tensor.len());
        close(&format!("{what}, b"), &[b], &[mean.max(1e-5)], 1, 1e-6);
        let code = |w: &f32| (w / b).round_ties_even().clamp(-1.0, 1.0) as i8;
        let want: Vec<i8> = tensor.iter().map(code).collect();
        let got;
        (got, codes) = codes.split_at(tensor.len());
        exact(&format!("{what}, codes"), got, &want);
    }
}

#[test]
fn ternary_weights_tell_of_nan() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let mut tensors = [48, 32784, 64].map(|count| random.f32s(count, 0.02));
    tensors[1][random.below(32784)] = f32::NAN;
    let (scales, _) = quantize(&gpu, &tensors);
    let is_nan: Vec<bool> = scales.iter().map(|b| b.is_nan()).collect();
    assert_eq!(is_nan, [false, true, false]);
}

#[test]
fn ternary_codes_expand() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let weights = gpu.upload(&[0f32; 16]);
    let tensor = TernaryTensor {
        weights: weights.ptr(),
        count: 16,
        codes: 0,
    };
    let kernels = TernaryWeights::load(&gpu.device, &[tensor]).unwrap();
    for (n, k, ends) in [
        (16, 16, [16, 16]),
        (48, 80, [16, 48]),
        (272, 144, [128, 208]),
        (1600, 272, [800, 1200]),
    ] {
        let codes = random.ternary(n * k);
        let scales = [0.0203f32, 0.117, 1e-5];
        let (codes_gpu, scales_gpu) = (gpu.upload(&codes), gpu.upload(&scales));
        let out = gpu.poisoned(n * k);
        let projection = Projection {
            codes: codes_gpu.ptr(),
            scales: scales_gpu.ptr(),
            n,
            k,
            ends,
        };
        unsafe { kernels.dequantize(&projection, out.ptr()) }.unwrap();
        let scale = |row: usize| scales[ends.iter().filter(|end| row >= **end).count()];
        let want: Vec<bf16> = (codes.iter().enumerate())
            .map(|(at, code)| bf16::from_f32(f32::from(*code) * scale(at / k)))
            .collect();
        exact(&format!("expand {n} x {k}"), &out.read(), &want);
    }
}

#[test]
fn weights_become_bf16() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let kernel = ToBf16::load(&gpu.device).unwrap();
    for count in [8, 1000, 3_000_008] {
        let mut values: Vec<f32> = (0..count)
            .map(|_| 10f64.powf(60.0 * random.uniform() - 40.0) as f32)
            .collect();
        // Ties between two neighbours, infinity, what rounds to it, and NaN.
        for (value, bits) in values.iter_mut().zip([
            0x3f80_8000,
            0x3f81_8000,
            0xbf80_8000,
            0x7f80_0000,
            0x7f7f_ffff,
            0x7fc0_0000,
            0x8000_0000,
            0x0000_8001,
        ]) {
            *value = f32::from_bits(bits);
        }
        let (from, to) = (gpu.upload(&values), gpu.poisoned(count));
        unsafe { kernel.convert(from.ptr(), to.ptr(), count) }.unwrap();
        let want: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        let got = to.read();
        exact(&format!("{count} to bf16"), &got, &want);
        assert!(got.iter().all(|x| x.bits() != bf16::POISON.bits()));
    }
}
