//! Gradients in 8 bits: their transposed copies, and the weight gradients made of them. The kernels
//! that quantise are tested with their family.

use half::bf16;
use titanbit::cuda::kernels::bit_linear::Projection;
use titanbit::cuda::kernels::gemm::{Float, Gemm, Layout, Operand, Output};
use titanbit::cuda::kernels::rope::Rope;
use titanbit::cuda::kernels::transpose::Transpose;
use titanbit::cuda::{Batch, DevicePtr, QuantizedGradient};
use titanbit::model::BitNetConfig;

use crate::check::{BF16, close, exact, f64s, rounded};
use crate::gpu::{Buffer, Gpu, Value, gpu, gpu_with};
use crate::random::Random;

/// Where a kernel's own value may lie: from, most likely, to.
pub type Range = [f64; 3];

/// The nearest e4m3 value, the even one on a tie.
pub fn e4m3(value: f64) -> f64 {
    let exponent = value.abs().log2().floor().max(-6.0);
    let step = 2f64.powi(exponent as i32 - 3);
    ((value / step).round_ties_even() * step).clamp(-448.0, 448.0)
}

/// What e4m3 bytes stand for.
pub fn decoded(bytes: &[u8]) -> Vec<f64> {
    let value = |byte: &u8| {
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
        let size = match byte & 0x7f {
            0x7f => f64::NAN,
            0..8 => mantissa * 2f64.powi(-9),
            _ => (8.0 + mantissa) * 2f64.powi(exponent - 10),
        };
        if byte & 0x80 == 0 { size } else { -size }
    };
    bytes.iter().map(value).collect()
}

fn padded(tokens: usize) -> usize {
    tokens.next_multiple_of(16)
}

/// Room for an output gradient, (tokens, features).
pub struct Quantized {
    pub codes: Buffer<i8>,
    pub scale: Buffer<f32>,
    pub fp8: Buffer<u8>,
    pub transposed: Buffer<u8>,
    pub factors: Buffer<f32>,
    pub undo: Buffer<f32>,
}

impl Quantized {
    pub fn poisoned(gpu: &Gpu, tokens: usize, features: usize) -> Self {
        Self {
            codes: gpu.poisoned(tokens * features),
            scale: gpu.poisoned(tokens),
            fp8: gpu.poisoned(tokens * features),
            transposed: gpu.poisoned(padded(tokens) * features),
            factors: gpu.poisoned(tokens),
            undo: gpu.poisoned(1),
        }
    }

    pub fn gradient(&self) -> QuantizedGradient {
        QuantizedGradient {
            codes: self.codes.ptr(),
            scale: self.scale.ptr(),
            fp8: self.fp8.ptr(),
            transposed: self.transposed.ptr(),
            factors: self.factors.ptr(),
            undo: self.undo.ptr(),
        }
    }

    /// Checks each token's scale, that of dY times the `b` of each feature.
    pub fn check_scale(&self, what: &str, dy: &[Range], b: &[f64]) {
        let scale = |row: &[Range], bound: usize| {
            let g = row.iter().zip(b).map(|(dy, b)| dy[bound].abs() * b);
            g.fold(1e-30, f64::max) / 127.0
        };
        let mut largest = 0f64;
        for (row, got) in dy.chunks(b.len()).zip(f64s(&self.scale.read())) {
            let [a, want, c] = [0, 1, 2].map(|bound| scale(row, bound));
            // The middle may lie outside of both ends: the largest of a row need not stay the largest.
            let low = a.min(want).min(c) * (1.0 - 3e-6);
            let high = a.max(want).max(c) * (1.0 + 3e-6);
            let inside = (low..=high).contains(&got);
            assert!(inside, "{what}: a scale is {got:e}, not {want:e}");
            largest = largest.max((got / want - 1.0).abs());
        }
        println!("{what}, scale: error {largest:.2e}");
    }

    /// Checks the codes and the e4m3 values of dY by the scales that are there.
    pub fn check_values(&self, what: &str, dy: &[Range], b: &[f64]) {
        let (scale, features) = (f64s(&self.scale.read()), b.len());
        let smallest = b.iter().copied().fold(f64::INFINITY, f64::min);
        let range = |at: usize, b: f64, unit: f64| {
            let [low, value, high] = dy[at].map(|dy| unit * b * dy / scale[at / features]);
            // f32 arithmetic.
            let error = unit * 1e-4 + 1e-6 * value.abs();
            [low - error, value, high + error]
        };
        let places = 0..dy.len();
        let codes = places.clone().map(|at| range(at, b[at % features], 1.0));
        let codes: Vec<Range> = codes.collect();
        let fp8: Vec<Range> = places.map(|at| range(at, smallest, 3.5)).collect();
        let (of_codes, of_fp8) = (format!("{what}, codes"), format!("{what}, e4m3"));
        rounded(
            &of_codes,
            &f64s(&self.codes.read()),
            &codes,
            f64::round_ties_even,
        );
        rounded(&of_fp8, &decoded(&self.fp8.read()), &fp8, e4m3);
    }
}

/// (rows, columns) to (columns, padded), zeros behind the rows.
fn transposed<T: Copy + Default>(values: &[T], columns: usize, padded: usize) -> Vec<T> {
    let rows = values.len() / columns;
    let value = |at: usize| match at % padded {
        row if row < rows => values[row * columns + at / padded],
        _ => T::default(),
    };
    (0..columns * padded).map(value).collect()
}

/// Finite e4m3 bytes.
fn bytes(random: &mut Random, len: usize) -> Vec<u8> {
    let byte = |_| match random.below(256) as u8 {
        0x7f | 0xff => 0,
        byte => byte,
    };
    (0..len).map(byte).collect()
}

/// Between 1 and 2 times `size`.
fn scales(random: &mut Random, len: usize, size: f64) -> Vec<f32> {
    (0..len)
        .map(|_| (size * (1.0 + random.uniform())) as f32)
        .collect()
}

const SIZES: [[usize; 2]; 6] = [
    [1, 16],
    [77, 48],
    [128, 128],
    [301, 272],
    [1003, 80],
    [130, 1040],
];

#[test]
fn weight_is_transposed() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let transpose = Transpose::load(&gpu.device).unwrap();
    for [n, k] in SIZES.map(|[n, k]| [padded(n), k]) {
        let codes = random.ternary(n * k);
        let (on_gpu, out) = (gpu.upload(&codes), gpu.poisoned(n * k));
        unsafe { transpose.weight(on_gpu.ptr(), out.ptr(), [n, k]) }.unwrap();
        let want = transposed(&codes, k, n);
        exact(&format!("weight {n} x {k}"), &out.read(), &want);
    }
}

#[test]
fn inputs_are_transposed() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let transpose = Transpose::load(&gpu.device).unwrap();
    for [tokens, k] in SIZES {
        let codes = random.codes(tokens * k);
        // Of tokens whose gradients differ by orders of magnitude.
        let factors: Vec<f32> = (0..tokens)
            .map(|_| 3.5 * 10f32.powf(-4.0 * random.uniform() as f32))
            .collect();
        let (on_gpu, factors_gpu) = (gpu.upload(&codes), gpu.upload(&factors));
        let out = gpu.poisoned(padded(tokens) * k);
        unsafe { transpose.inputs(on_gpu.ptr(), factors_gpu.ptr(), out.ptr(), [tokens, k]) }
            .unwrap();
        let value = |(at, code): (usize, &i8)| e4m3((f32::from(*code) * factors[at / k]).into());
        let want: Vec<f64> = codes.iter().enumerate().map(value).collect();
        let want = transposed(&want, k, padded(tokens));
        let what = format!("inputs {tokens} x {k}");
        exact(&what, &decoded(&out.read()), &want);
    }
}

#[test]
fn gradient_is_transposed() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let transpose = Transpose::load(&gpu.device).unwrap();
    for ([tokens, n], weights) in SIZES.into_iter().zip([1, 3, 2, 3, 2, 1]) {
        let fp8 = bytes(&mut random, tokens * n);
        let (b, x_scale) = (
            scales(&mut random, 3, 0.01),
            scales(&mut random, tokens, 0.02),
        );
        let mut scale: Vec<f32> = (0..tokens)
            .map(|_| 10f32.powf(-3.0 - 4.0 * random.uniform() as f32))
            .collect();
        let run = |scale: &[f32]| {
            let (b, x_scale) = (gpu.upload(&b), gpu.upload(&x_scale));
            let dy = Quantized {
                fp8: gpu.upload(&fp8),
                scale: gpu.upload(scale),
                ..Quantized::poisoned(&gpu, tokens, n)
            };
            let projection = Projection {
                codes: DevicePtr::NULL,
                scales: b.ptr(),
                n,
                k: 16,
                ends: [[n, n], [16, n], [16, 32]][weights - 1],
            };
            let gradient = dy.gradient();
            unsafe { transpose.gradient(&projection, x_scale.ptr(), &gradient, tokens) }.unwrap();
            (dy.transposed.read(), dy.factors.read(), dy.undo.read())
        };
        let (got, factors, undo) = run(&scale);
        let what = format!("gradient {tokens} x {n}, {weights} weights");
        exact(&what, &got, &transposed(&fp8, n, padded(tokens)));
        let parts = f64s(&scale).into_iter().zip(f64s(&x_scale));
        let parts: Vec<f64> = parts.map(|(dy, x)| dy * x).collect();
        let largest = parts.iter().copied().fold(0f64, f64::max);
        let want: Vec<f64> = parts.iter().map(|part| 3.5 * part / largest).collect();
        close(&format!("{what}, factors"), &factors, &want, 1, 1e-6);
        let b = f64s(&b[..weights]);
        let smallest = b.into_iter().fold(f64::INFINITY, f64::min);
        let want = [largest / (3.5 * 3.5 * smallest)];
        close(&format!("{what}, undo"), &undo, &want, 1, 1e-6);

        // Gradients of zero, whose scale is at its floor, and one that is NaN.
        let (_, factors, undo) = run(&vec![1e-30 / 127.0; tokens]);
        let finite = factors.iter().all(|x| x.is_finite() && *x <= 3.5);
        assert!(finite && undo[0] > 0.0 && undo[0] < 1e-27, "{what}: zeros");
        scale[random.below(tokens)] = f32::NAN;
        assert!(run(&scale).2[0].is_nan(), "{what}: undo of NaN");
    }
}

/// c (m, n) = or += a (m, k) . b (n, k)^T.
fn multiply<T: Value>(
    gemm: &Gemm,
    sizes: [usize; 3],
    [a, b]: [(&Buffer<u8>, Option<&Buffer<f32>>); 2],
    c: &Buffer<T>,
    add: bool,
) {
    let output = Output {
        address: c.address(),
        stride: sizes[1],
        dtype: match size_of::<T>() {
            4 => Float::F32,
            _ => Float::Bf16,
        },
        add,
    };
    let [a, b] =
        [a, b].map(|(values, scale)| Operand::fp8(values.ptr(), sizes[2], scale.map(Buffer::ptr)));
    unsafe { gemm.multiply(Layout::NT, sizes, a, b, output) }.unwrap();
}

/// `rounding`: of an output. cuBLAS rounds a product before it adds it, and the sum again.
fn check_product<T: Value + Into<f64>>(convert: fn(f64) -> T, rounding: f64) {
    let Some(gpu) = gpu_with(true) else { return };
    let mut random = Random::new();
    let gemm = Gemm::new(gpu.device.cuda_stream()).unwrap();
    for [m, n, k] in [
        [16, 16, 16],
        [48, 272, 80],
        [144, 1040, 1008],
        [512, 64, 4096],
    ] {
        let (a, b) = (bytes(&mut random, m * k), bytes(&mut random, n * k));
        let scale = scales(&mut random, 1, 1e-3);
        let (x, y) = (decoded(&a), decoded(&b));
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let product: Vec<f64> = (x.chunks(k))
            .flat_map(|x| y.chunks(k).map(move |y| dot(x, y)))
            .collect();
        let (a, b, scale_gpu) = (gpu.upload(&a), gpu.upload(&b), gpu.upload(&scale));
        let before: Vec<T> = (0..m * n).map(|_| convert(random.normal())).collect();
        // A scale of either operand, and of none.
        for (scales, add) in [(0, false), (1, false), (1, true), (2, true)] {
            let c = match add {
                true => gpu.upload(&before),
                false => gpu.poisoned(m * n),
            };
            let given = |nth| (scales == nth).then_some(&scale_gpu);
            multiply(&gemm, [m, n, k], [(&a, given(1)), (&b, given(2))], &c, add);
            let factor = if scales == 0 {
                1.0
            } else {
                f64::from(scale[0])
            };
            let before = before.iter().map(|c| if add { (*c).into() } else { 0.0 });
            let want = product.iter().zip(before).map(|(x, c)| x * factor + c);
            let what = format!("e4m3 {m} x {n} x {k}, scale {scales}, add {add}");
            let bound = 1e-3 + if add { 2.0 * rounding } else { rounding };
            close(&what, &c.read(), &want.collect::<Vec<f64>>(), n, bound);
        }
    }
}

#[test]
fn gemm_multiplies_fp8() {
    check_product(|x| x as f32, 0.0);
    check_product(bf16::from_f64, BF16);
}

/// dW of fused queries, keys and values, from dY and input codes to the product. A lone token of a
/// sequence is not turned: dY is quantised as it is.
fn check_weight_gradient(small_features: bool) {
    let Some(gpu) = gpu_with(true) else { return };
    let mut random = Random::new();
    let (tokens, k, heads, kv_heads, head_dim) = (1003, 256, 4, 2, 64);
    let (q, n) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim);
    let qk = q + kv_heads * head_dim;
    let size: Vec<f64> = (0..tokens)
        .map(|_| 10f64.powf(-2.0 - 2.0 * random.uniform()))
        .collect();
    let dy: Vec<bf16> = (0..tokens * n)
        .map(|at| {
            let small = small_features && at % n % 3 == 0;
            let feature = if small { 1e-3 } else { 1.0 };
            bf16::from_f64(size[at / n] * feature * random.normal())
        })
        .collect();
    let (codes, x_scale) = (random.codes(tokens * k), scales(&mut random, tokens, 0.01));
    let b = scales(&mut random, 3, 0.02);

    let config = BitNetConfig {
        hidden_size: q,
        heads,
        kv_heads,
        ..BitNetConfig::default()
    };
    let rope = Rope::load(&gpu.device, &config).unwrap();
    let transpose = Transpose::load(&gpu.device).unwrap();
    let gemm = Gemm::new(gpu.device.cuda_stream()).unwrap();
    let (dy_gpu, codes_gpu) = (gpu.upload(&dy), gpu.upload(&codes));
    let (x_scale_gpu, b_gpu) = (gpu.upload(&x_scale), gpu.upload(&b));
    let projection = Projection {
        codes: DevicePtr::NULL,
        scales: b_gpu.ptr(),
        n,
        k,
        ends: [q, qk],
    };
    let parts = [qk, n - qk].map(|features| Quantized::poisoned(&gpu, tokens, features));
    let gradients = [parts[0].gradient(), parts[1].gradient()];
    let batch = Batch {
        rows: tokens,
        seq: 1,
    };
    unsafe { rope.rotate_back_quantize(dy_gpu.ptr(), &projection, gradients, batch) }.unwrap();
    let mut got = Vec::new();
    for ((_, part), to) in projection.parts().zip(&parts) {
        let dy = to.gradient();
        let inputs = gpu.poisoned(padded(tokens) * k);
        unsafe {
            transpose
                .gradient(&part, x_scale_gpu.ptr(), &dy, tokens)
                .unwrap();
            transpose
                .inputs(codes_gpu.ptr(), dy.factors, inputs.ptr(), [tokens, k])
                .unwrap();
        }
        let c = gpu.poisoned::<f32>(part.n * k);
        let operands = [(&to.transposed, Some(&to.undo)), (&inputs, None)];
        multiply(&gemm, [part.n, k, padded(tokens)], operands, &c, false);
        got.extend(c.read());
    }

    let mut want = vec![0f64; n * k];
    for ((dy, codes), scale) in dy.chunks(n).zip(codes.chunks(k)).zip(f64s(&x_scale)) {
        for (dy, want) in dy.iter().zip(want.chunks_mut(k)) {
            for (want, code) in want.iter_mut().zip(codes) {
                *want += dy.to_f64() * f64::from(*code) * scale;
            }
        }
    }
    let what = format!("dW, small features {small_features}");
    close(&format!("{what}, all"), &got, &want, n * k, 0.05);
    close(&format!("{what}, by rows"), &got, &want, k, 0.06);
}

#[test]
fn weight_gradient_through_fp8() {
    check_weight_gradient(false);
}

/// Int8 codes would lose them.
#[test]
fn weight_gradient_of_small_features_through_fp8() {
    check_weight_gradient(true);
}
