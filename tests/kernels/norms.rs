//! RMSNorm and the gated activation, with their int8 codes and gradients.

use half::bf16;
use titanbit::cuda::kernels::bit_linear::Projection;
use titanbit::cuda::kernels::gated_activation::GatedActivation;
use titanbit::cuda::kernels::rms_norm::{NormGradients, Normed, RmsNorm};
use titanbit::cuda::{DevicePtr, NORM_PARTS, NormStatistics};
use titanbit::model::{Activation, BitNetConfig};

use crate::check::{BF16, close, codes, exact, f64s, only_these_are_nan};
use crate::fp8::{Quantized, Range};
use crate::gpu::{Buffer, Gpu, gpu};
use crate::random::Random;

const EPS: f32 = 1e-5;
/// Rows and features: one row and more than go through the GPU at a time; up to the widest, on both
/// sides of 768, up to which a warp has a row.
const SIZES: [(usize, usize); 9] = [
    (1, 16),
    (5, 48),
    (33, 768),
    (3301, 784),
    (9001, 80),
    (300, 2048),
    (77, 3200),
    (9, 8640),
    (3, 16384),
];

/// A row's normalisation.
struct Normal {
    rstd: f64,
    scale: f64,
    /// Normalised values.
    values: Vec<f64>,
}

impl Normal {
    fn of(x: &[f64], weight: &[f32]) -> Self {
        let squares = x.iter().map(|x| x * x).sum::<f64>();
        let rstd = 1.0 / (squares / x.len() as f64 + f64::from(EPS)).sqrt();
        let values: Vec<f64> = (x.iter().zip(weight))
            .map(|(x, w)| x * rstd * f64::from(*w))
            .collect();
        let absmax = values.iter().fold(0f64, |max, n| max.max(n.abs()));
        Self {
            rstd,
            scale: absmax.max(1e-5) / 127.0,
            values,
        }
    }

    /// The gradient by x, given `dn`, that by the values; adds that by the weight to `dweight`.
    fn backward(&self, x: &[f64], weight: &[f32], dn: &[f64], dweight: &mut [f64]) -> Vec<f64> {
        let g: Vec<f64> = (dn.iter().zip(weight))
            .map(|(dn, w)| dn * f64::from(*w))
            .collect();
        let dot: f64 = g.iter().zip(x).map(|(g, x)| g * x).sum();
        let shrink = dot / x.len() as f64 * self.rstd.powi(3);
        for (i, sum) in dweight.iter_mut().enumerate() {
            *sum += dn[i] * x[i] * self.rstd;
        }
        let dx = g.iter().zip(x);
        dx.map(|(g, x)| self.rstd * g - x * shrink).collect()
    }
}

/// A norm's operands on the GPU, and room for what it keeps.
struct OnGpu {
    x: Buffer<bf16>,
    weight: Buffer<f32>,
    scale: Buffer<f32>,
    rstd: Buffer<f32>,
}

impl OnGpu {
    fn new(gpu: &Gpu, x: &[bf16], weight: &[f32], rows: usize) -> Self {
        Self {
            x: gpu.upload(x),
            weight: gpu.upload(weight),
            scale: gpu.poisoned(rows),
            rstd: gpu.poisoned(rows),
        }
    }

    fn normed(&self) -> Normed {
        Normed {
            x: self.x.ptr(),
            weight: self.weight.ptr(),
            kept: NormStatistics {
                scale: self.scale.ptr(),
                rstd: self.rstd.ptr(),
            },
        }
    }
}

/// Rows of very different size, the second of them zeros: eps and the floor of the scale matter.
fn rows_of(random: &mut Random, rows: usize, features: usize) -> Vec<bf16> {
    let row = |row| {
        let scale = match row {
            1 => 0.0,
            _ => 10f64.powf(5.0 * random.uniform() - 3.0),
        };
        random.bf16s(features, scale)
    };
    (0..rows).flat_map(row).collect()
}

fn weight_of(random: &mut Random, features: usize) -> Vec<f32> {
    (0..features)
        .map(|_| (1.0 + 0.3 * random.normal()) as f32)
        .collect()
}

/// What the codes stand for, as the backward pass writes it for the next product.
fn dequantised(codes: &[i8], scales: &[f32], features: usize) -> Vec<bf16> {
    let value = |(at, code): (usize, &i8)| bf16::from_f32(f32::from(*code) * scales[at / features]);
    codes.iter().enumerate().map(value).collect()
}

/// Codes, and what the norm keeps of each row.
fn check_quantised(what: &str, got: &[i8], on_gpu: &OnGpu, rows: &[Normal]) {
    let rstd: Vec<f64> = rows.iter().map(|row| row.rstd).collect();
    let scales: Vec<f64> = rows.iter().map(|row| row.scale).collect();
    close(
        &format!("{what}, rstd"),
        &on_gpu.rstd.read(),
        &rstd,
        1,
        1e-6,
    );
    close(
        &format!("{what}, scale"),
        &on_gpu.scale.read(),
        &scales,
        1,
        1e-6,
    );
    let values = rows
        .iter()
        .flat_map(|row| row.values.iter().map(|n| n / row.scale));
    codes(&format!("{what}, codes"), got, &values.collect::<Vec<_>>());
}

#[test]
fn rms_norm_quantizes() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, features) in SIZES {
        let x = rows_of(&mut random, rows, features);
        let weight = weight_of(&mut random, features);
        let on_gpu = OnGpu::new(&gpu, &x, &weight, rows);
        let codes = gpu.poisoned(rows * features);
        let norm = RmsNorm::load(&gpu.device, features, EPS).unwrap();
        unsafe { norm.quantize(&on_gpu.normed(), codes.ptr(), rows) }.unwrap();
        let want: Vec<Normal> = (f64s(&x).chunks(features))
            .map(|x| Normal::of(x, &weight))
            .collect();
        let what = format!("rms_norm {rows} x {features}");
        check_quantised(&what, &codes.read(), &on_gpu, &want);
    }
}

#[test]
fn rms_norm_normalizes() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, features) in SIZES {
        let x = rows_of(&mut random, rows, features);
        let weight = weight_of(&mut random, features);
        let on_gpu = OnGpu::new(&gpu, &x, &weight, rows);
        let y = gpu.poisoned(rows * features);
        let norm = RmsNorm::load(&gpu.device, features, EPS).unwrap();
        unsafe { norm.forward(&on_gpu.normed(), y.ptr(), rows) }.unwrap();
        let want: Vec<Normal> = (f64s(&x).chunks(features))
            .map(|x| Normal::of(x, &weight))
            .collect();
        let rstd: Vec<f64> = want.iter().map(|row| row.rstd).collect();
        let values: Vec<f64> = want.into_iter().flat_map(|row| row.values).collect();
        let what = format!("rms_norm {rows} x {features}");
        close(
            &format!("{what}, rstd"),
            &on_gpu.rstd.read(),
            &rstd,
            1,
            1e-6,
        );
        close(&format!("{what}, y"), &y.read(), &values, features, BF16);
    }
}

/// By the input, with `dresidual`, and by the weight, which are added to `before`.
fn gradients(
    x: &[bf16],
    weight: &[f32],
    dn: &[bf16],
    dresidual: Option<&[bf16]>,
    before: &[f32],
) -> (Vec<f64>, Vec<f64>) {
    let (x, dn, mut dweight) = (f64s(x), f64s(dn), f64s(before));
    let rows = x.chunks(weight.len()).zip(dn.chunks(weight.len()));
    let mut dx: Vec<f64> = rows
        .flat_map(|(x, dn)| Normal::of(x, weight).backward(x, weight, dn, &mut dweight))
        .collect();
    for (dx, residual) in dx.iter_mut().zip(dresidual.unwrap_or_default()) {
        *dx += residual.to_f64();
    }
    (dx, dweight)
}

/// As the engine does it: with a residual, whose place dx takes, and codes; and with neither.
#[test]
fn rms_norm_gradients() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, features) in SIZES {
        for with_residual in [true, false] {
            let x = rows_of(&mut random, rows, features);
            let weight = weight_of(&mut random, features);
            let on_gpu = OnGpu::new(&gpu, &x, &weight, rows);
            let dn = random.bf16s(rows * features, 0.01);
            let dresidual = random.bf16s(rows * features, 1.0);
            let before = random.f32s(features, 0.01);
            let norm = RmsNorm::load(&gpu.device, features, EPS).unwrap();
            let codes = gpu.poisoned(rows * features);
            unsafe { norm.quantize(&on_gpu.normed(), codes.ptr(), rows) }.unwrap();

            let (dn_gpu, dweight) = (gpu.upload(&dn), gpu.upload(&before));
            let parts = gpu.poisoned(NORM_PARTS * features);
            let inputs = gpu.poisoned(rows * features);
            let dx = match with_residual {
                true => gpu.upload(&dresidual),
                false => gpu.poisoned(rows * features),
            };
            let given = |pointer| match with_residual {
                true => pointer,
                false => DevicePtr::NULL,
            };
            let to = NormGradients {
                dx: dx.ptr(),
                dresidual: given(dx.ptr()),
                dweight: dweight.ptr(),
                parts: parts.ptr(),
            };
            let mut normed = on_gpu.normed();
            if !with_residual {
                normed.kept.scale = DevicePtr::NULL;
            }
            let inputs_ptr = given(inputs.ptr());
            unsafe { norm.backward(&normed, dn_gpu.ptr(), &to, inputs_ptr, rows) }.unwrap();

            let residual = with_residual.then_some(&dresidual[..]);
            let (want_dx, want_dweight) = gradients(&x, &weight, &dn, residual, &before);
            let what = format!("rms_norm {rows} x {features}, residual {with_residual}");
            close(&format!("{what}, dx"), &dx.read(), &want_dx, features, BF16);
            let got = dweight.read();
            close(
                &format!("{what}, dweight"),
                &got,
                &want_dweight,
                features,
                1e-6,
            );
            if with_residual {
                let want = dequantised(&codes.read(), &on_gpu.scale.read(), features);
                exact(&format!("{what}, inputs"), &inputs.read(), &want);
            }
        }
    }
}

/// A projection of which only the b of its weights are read.
fn projection(scales: &Buffer<f32>, [n, k]: [usize; 2], ends: [usize; 2]) -> Projection {
    Projection {
        codes: DevicePtr::NULL,
        scales: scales.ptr(),
        n,
        k,
        ends,
    }
}

/// As the engine does it: before a projection, after the last one and before the first.
#[test]
fn rms_norm_quantizes_gradients() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, features) in SIZES {
        for (with_codes, with_next) in [(true, true), (false, true), (true, false)] {
            let x = rows_of(&mut random, rows, features);
            let weight = weight_of(&mut random, features);
            let on_gpu = OnGpu::new(&gpu, &x, &weight, rows);
            let dn = random.bf16s(rows * features, 0.01);
            let dresidual = random.bf16s(rows * features, 1.0);
            let before = random.f32s(features, 0.01);
            let b = 0.01 * (1.0 + random.uniform() as f32);
            let norm = RmsNorm::load(&gpu.device, features, EPS).unwrap();
            let (want_codes, codes) =
                (gpu.poisoned(rows * features), gpu.poisoned(rows * features));
            unsafe { norm.quantize(&on_gpu.normed(), want_codes.ptr(), rows) }.unwrap();

            let (dn_gpu, dweight) = (gpu.upload(&dn), gpu.upload(&before));
            let (parts, scales) = (gpu.poisoned(NORM_PARTS * features), gpu.upload(&[b]));
            let residual = with_codes.then_some(&dresidual[..]);
            let dx = match with_codes {
                true => gpu.upload(&dresidual),
                false => gpu.poisoned(rows * features),
            };
            let given = |pointer| if with_codes { pointer } else { 0 };
            let to = NormGradients {
                dx: dx.ptr(),
                dresidual: DevicePtr::new(given(dx.address())),
                dweight: dweight.ptr(),
                parts: parts.ptr(),
            };
            let mut normed = on_gpu.normed();
            normed.kept.scale = DevicePtr::new(given(normed.kept.scale.address()));
            let dy = Quantized::poisoned(&gpu, rows, features);
            let next = projection(&scales, [features, 16], [features; 2]);
            let next = with_next.then(|| (&next, dy.gradient()));
            let codes_ptr = DevicePtr::new(given(codes.address()));
            unsafe { norm.backward_quantize(&normed, dn_gpu.ptr(), &to, codes_ptr, next, rows) }
                .unwrap();

            let (want_dx, want_dweight) = gradients(&x, &weight, &dn, residual, &before);
            let what = format!("rms_norm {rows} x {features}, codes {with_codes}");
            close(&format!("{what}, dx"), &dx.read(), &want_dx, features, BF16);
            let got = dweight.read();
            close(
                &format!("{what}, dweight"),
                &got,
                &want_dweight,
                features,
                1e-6,
            );
            if with_codes {
                exact(&format!("{what}, codes"), &codes.read(), &want_codes.read());
            }
            if with_next {
                let ranges: Vec<_> = want_dx.iter().map(|dx| [*dx; 3]).collect();
                let b = vec![f64::from(b); features];
                dy.check_scale(&format!("{what}, dx"), &ranges, &b);
                dy.check_values(&format!("{what}, dx"), &ranges, &b);
            } else {
                let untouched = dy.codes.read().iter().all(|code| *code == i8::MIN);
                assert!(untouched, "{what}: wrote codes of dx");
            }
        }
    }
}

#[test]
fn rms_norm_passes_nan_on_to_scales() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let (rows, features) = (77, 272);
    let norm = RmsNorm::load(&gpu.device, features, EPS).unwrap();
    let bad_row = random.below(rows);
    let bad = bad_row * features + random.below(features);
    // x, dn and the residual.
    let inputs = [(); 3].map(|()| random.bf16s(rows * features, 1.0));
    let weight = weight_of(&mut random, features);
    let run = |[x, dn, dresidual]: &[Vec<bf16>; 3], b: f32| {
        let on_gpu = OnGpu::new(&gpu, x, &weight, rows);
        let (dn, dx, scales) = (gpu.upload(dn), gpu.upload(dresidual), gpu.upload(&[b]));
        let parts = gpu.poisoned(NORM_PARTS * features);
        let dweight = gpu.upload(&vec![0f32; features]);
        let codes = gpu.poisoned(rows * features);
        let to = NormGradients {
            dx: dx.ptr(),
            dresidual: dx.ptr(),
            dweight: dweight.ptr(),
            parts: parts.ptr(),
        };
        let dy = Quantized::poisoned(&gpu, rows, features);
        let next = projection(&scales, [features, 16], [features; 2]);
        let (normed, next) = (on_gpu.normed(), Some((&next, dy.gradient())));
        unsafe {
            norm.quantize(&normed, codes.ptr(), rows).unwrap();
            norm.backward_quantize(&normed, dn.ptr(), &to, codes.ptr(), next, rows)
                .unwrap();
        }
        dy.scale.read()
    };
    let before = run(&inputs, 0.02);
    for input in 0..3 {
        let mut with_nan = inputs.clone();
        with_nan[input][bad] = bf16::NAN;
        only_these_are_nan("scale", &run(&with_nan, 0.02), &before, |row| {
            row == bad_row
        });
    }
    only_these_are_nan("b: scale", &run(&inputs, f32::NAN), &before, |_| true);
}

#[test]
fn rms_norm_passes_nan_on() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, features) in [(77, 272), (77, 2048)] {
        let norm = RmsNorm::load(&gpu.device, features, EPS).unwrap();
        let (bad_row, bad_column) = (random.below(rows), random.below(features));
        let in_row = |at| at / features == bad_row;
        let x = random.bf16s(rows * features, 1.0);
        let dn = random.bf16s(rows * features, 1.0);
        let weight = weight_of(&mut random, features);
        let with_nan = |values: &[bf16]| {
            let mut values = values.to_vec();
            values[bad_row * features + bad_column] = bf16::NAN;
            values
        };
        let run = |x: &[bf16], dn: &[bf16]| {
            let on_gpu = OnGpu::new(&gpu, x, &weight, rows);
            let normed = on_gpu.normed();
            let (codes, y) = (gpu.poisoned(rows * features), gpu.poisoned(rows * features));
            let (dx, dn) = (gpu.poisoned(rows * features), gpu.upload(dn));
            let parts = gpu.poisoned(NORM_PARTS * features);
            let dweight = gpu.upload(&vec![0f32; features]);
            let to = NormGradients {
                dx: dx.ptr(),
                dresidual: DevicePtr::NULL,
                dweight: dweight.ptr(),
                parts: parts.ptr(),
            };
            unsafe {
                norm.quantize(&normed, codes.ptr(), rows).unwrap();
                norm.forward(&normed, y.ptr(), rows).unwrap();
                norm.backward(&normed, dn.ptr(), &to, DevicePtr::NULL, rows)
                    .unwrap();
            }
            (on_gpu.scale.read(), y.read(), dx.read(), dweight.read())
        };
        let (scale, y, dx, dweight) = run(&x, &dn);
        let nan = run(&with_nan(&x), &dn);
        only_these_are_nan("x: scale", &nan.0, &scale, |row| row == bad_row);
        only_these_are_nan("x: y", &nan.1, &y, in_row);
        only_these_are_nan("x: dx", &nan.2, &dx, in_row);
        only_these_are_nan("x: dweight", &nan.3, &dweight, |_| true);
        let nan = run(&x, &with_nan(&dn));
        only_these_are_nan("dn: dx", &nan.2, &dx, in_row);
        only_these_are_nan("dn: dweight", &nan.3, &dweight, |column| {
            column == bad_column
        });
    }
}

fn gated(gpu: &Gpu, activation: Activation, features: usize) -> GatedActivation {
    let config = BitNetConfig {
        intermediate_size: features,
        rms_norm_eps: EPS.into(),
        activation,
        ..BitNetConfig::default()
    };
    GatedActivation::load(&gpu.device, &config).unwrap()
}

/// An activation and its slope.
fn activate(activation: Activation, x: f64) -> (f64, f64) {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-x).exp());
            (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
        }
        Activation::Relu2 => (x.max(0.0).powi(2), 2.0 * x.max(0.0)),
    }
}

/// act(gate) * up of a row of both.
fn product(activation: Activation, gate_up: &[f64]) -> Vec<f64> {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    gate.iter()
        .zip(up)
        .map(|(gate, up)| activate(activation, *gate).0 * up)
        .collect()
}

fn gate_quantizes(activation: Activation) {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, features) in SIZES {
        let gate_up = rows_of(&mut random, rows, 2 * features);
        let weight = weight_of(&mut random, features);
        let on_gpu = OnGpu::new(&gpu, &gate_up, &weight, rows);
        let codes = gpu.poisoned(rows * features);
        let gate = gated(&gpu, activation, features);
        unsafe { gate.quantize(&on_gpu.normed(), codes.ptr(), rows) }.unwrap();
        let want: Vec<Normal> = (f64s(&gate_up).chunks(2 * features))
            .map(|row| Normal::of(&product(activation, row), &weight))
            .collect();
        let what = format!("{activation:?} {rows} x {features}");
        check_quantised(&what, &codes.read(), &on_gpu, &want);
    }
}

#[test]
fn silu_gate_quantizes() {
    gate_quantizes(Activation::Silu);
}

#[test]
fn relu2_gate_quantizes() {
    gate_quantizes(Activation::Relu2);
}

/// Of each row its rstd and the gradient by gate and up divided by it, with the reach of f32
/// arithmetic; and the gradient by the weight, added to `before`.
fn gated_gradients(
    activation: Activation,
    gate_up: &[bf16],
    weight: &[f32],
    dn: &[bf16],
    before: &[f32],
) -> (Vec<(f64, Vec<Range>)>, Vec<f64>) {
    let features = weight.len();
    let (gate_up, dn, mut dweight) = (f64s(gate_up), f64s(dn), f64s(before));
    let rows = gate_up.chunks(2 * features).zip(dn.chunks(features));
    let rows = rows.map(|(row, dn)| {
        let f = product(activation, row);
        let normal = Normal::of(&f, weight);
        let df = normal.backward(&f, weight, dn, &mut dweight);
        let rms = (dn.iter().map(|dn| dn * dn).sum::<f64>() / features as f64).sqrt();
        let (gate, up) = row.split_at(features);
        let range = |at: usize| {
            let i = at % features;
            let df_here = df[i] / normal.rstd;
            // Two terms, of which the second may take most of the first away.
            let df_error = 2e-6 * rms * (1.0 + (f[i] * normal.rstd).abs());
            let (value, slope) = activate(activation, gate[i]);
            let (factor, factor_error) = match at < features {
                true => (slope * up[i], 3e-7 * up[i].abs()),
                false => (value, 0.0),
            };
            let exact = df_here * factor;
            let error = df_error * factor.abs() + factor_error * df_here.abs() + 3e-6 * exact.abs();
            [exact - error, exact, exact + error]
        };
        (normal.rstd, (0..2 * features).map(range).collect())
    });
    (rows.collect(), dweight)
}

fn gate_gradients(activation: Activation) {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, features) in SIZES {
        let gate_up = rows_of(&mut random, rows, 2 * features);
        let weight = weight_of(&mut random, features);
        let dn = random.bf16s(rows * features, 0.01);
        let before = random.f32s(features, 0.01);
        let on_gpu = OnGpu::new(&gpu, &gate_up, &weight, rows);
        let gate = gated(&gpu, activation, features);
        let (codes, inputs) = (gpu.poisoned(rows * features), gpu.poisoned(rows * features));
        let (dn_gpu, dweight) = (gpu.upload(&dn), gpu.upload(&before));
        let parts = gpu.poisoned(NORM_PARTS * features);
        let normed = on_gpu.normed();
        unsafe {
            gate.quantize(&normed, codes.ptr(), rows).unwrap();
            gate.backward(
                &normed,
                dn_gpu.ptr(),
                dweight.ptr(),
                parts.ptr(),
                (on_gpu.x.ptr(), inputs.ptr()),
                rows,
            )
            .unwrap();
        }

        let (rows_want, want_dweight) =
            gated_gradients(activation, &gate_up, &weight, &dn, &before);
        let want: Vec<f64> = (rows_want.iter())
            .flat_map(|(rstd, row)| row.iter().map(move |range| range[1] * rstd))
            .collect();
        let what = format!("{activation:?} {rows} x {features}");
        let got = on_gpu.x.read();
        close(
            &format!("{what}, dgate and dup"),
            &got,
            &want,
            features,
            BF16,
        );
        let got = dweight.read();
        close(
            &format!("{what}, dweight"),
            &got,
            &want_dweight,
            features,
            1e-6,
        );
        let want = dequantised(&codes.read(), &on_gpu.scale.read(), features);
        exact(&format!("{what}, inputs"), &inputs.read(), &want);
    }
}

#[test]
fn silu_gate_gradients() {
    gate_gradients(Activation::Silu);
}

#[test]
fn relu2_gate_gradients() {
    gate_gradients(Activation::Relu2);
}

fn gate_quantizes_gradients(activation: Activation) {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, features) in SIZES {
        let gate_up = rows_of(&mut random, rows, 2 * features);
        let weight = weight_of(&mut random, features);
        let dn = random.bf16s(rows * features, 0.01);
        let before = random.f32s(features, 0.01);
        let b = [(); 2].map(|()| 0.01 * (1.0 + random.uniform() as f32));
        let on_gpu = OnGpu::new(&gpu, &gate_up, &weight, rows);
        let gate = gated(&gpu, activation, features);
        let (want_codes, codes) = (gpu.poisoned(rows * features), gpu.poisoned(rows * features));
        let (dn_gpu, dweight) = (gpu.upload(&dn), gpu.upload(&before));
        let (parts, scales) = (gpu.poisoned(NORM_PARTS * features), gpu.upload(&b));
        let normed = on_gpu.normed();
        let dy = Quantized::poisoned(&gpu, rows, 2 * features);
        let projection = projection(&scales, [2 * features, 16], [features, 2 * features]);
        unsafe {
            gate.quantize(&normed, want_codes.ptr(), rows).unwrap();
            gate.backward_quantize(
                &normed,
                dn_gpu.ptr(),
                dweight.ptr(),
                parts.ptr(),
                (&projection, dy.gradient(), codes.ptr()),
                rows,
            )
            .unwrap();
        }

        let (want, want_dweight) = gated_gradients(activation, &gate_up, &weight, &dn, &before);
        let what = format!("{activation:?} {rows} x {features}");
        let got = dweight.read();
        close(
            &format!("{what}, dweight"),
            &got,
            &want_dweight,
            features,
            1e-6,
        );
        exact(&format!("{what}, codes"), &codes.read(), &want_codes.read());
        // The scale is that of values before they are rounded to bf16.
        let ranges = |round: fn(f64) -> f64| -> Vec<Range> {
            (want.iter())
                .flat_map(|(rstd, row)| row.iter().map(move |x| x.map(|x| round(x) * rstd)))
                .collect()
        };
        let b = b.map(|b| vec![f64::from(b); features]).concat();
        dy.check_scale(&what, &ranges(|x| x), &b);
        dy.check_values(&what, &ranges(|x| bf16::from_f64(x).to_f64()), &b);
    }
}

#[test]
fn silu_gate_quantizes_gradients() {
    gate_quantizes_gradients(Activation::Silu);
}

#[test]
fn relu2_gate_quantizes_gradients() {
    gate_quantizes_gradients(Activation::Relu2);
}

fn gate_passes_nan_on_to_scales(activation: Activation) {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let (rows, features) = (77, 272);
    let gate = gated(&gpu, activation, features);
    let (bad_row, bad_column) = (random.below(rows), random.below(features));
    let gate_up = random.bf16s(rows * 2 * features, 1.0);
    let dn = random.bf16s(rows * features, 1.0);
    let weight = weight_of(&mut random, features);
    let run = |gate_up: &[bf16], dn: &[bf16], b: [f32; 2]| {
        let on_gpu = OnGpu::new(&gpu, gate_up, &weight, rows);
        let (normed, codes) = (on_gpu.normed(), gpu.poisoned(rows * features));
        let (dn, dweight) = (gpu.upload(dn), gpu.upload(&vec![0f32; features]));
        let (parts, scales) = (gpu.poisoned(NORM_PARTS * features), gpu.upload(&b));
        let dy = Quantized::poisoned(&gpu, rows, 2 * features);
        let projection = projection(&scales, [2 * features, 16], [features, 2 * features]);
        unsafe {
            gate.quantize(&normed, codes.ptr(), rows).unwrap();
            gate.backward_quantize(
                &normed,
                dn.ptr(),
                dweight.ptr(),
                parts.ptr(),
                (&projection, dy.gradient(), codes.ptr()),
                rows,
            )
            .unwrap();
        }
        dy.scale.read()
    };
    let b = [0.02, 0.03];
    let before = run(&gate_up, &dn, b);
    for half in 0..2 {
        let mut with_nan = gate_up.clone();
        with_nan[(2 * bad_row + half) * features + bad_column] = bf16::NAN;
        let nan = run(&with_nan, &dn, b);
        only_these_are_nan("scale", &nan, &before, |row| row == bad_row);
        let mut b = b;
        b[half] = f32::NAN;
        only_these_are_nan("b: scale", &run(&gate_up, &dn, b), &before, |_| true);
    }
    let mut with_nan = dn.clone();
    with_nan[bad_row * features + bad_column] = bf16::NAN;
    let nan = run(&gate_up, &with_nan, b);
    only_these_are_nan("dn: scale", &nan, &before, |row| row == bad_row);
}

#[test]
fn silu_gate_passes_nan_on_to_scales() {
    gate_passes_nan_on_to_scales(Activation::Silu);
}

#[test]
fn relu2_gate_passes_nan_on_to_scales() {
    gate_passes_nan_on_to_scales(Activation::Relu2);
}

fn gate_passes_nan_on(activation: Activation) {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let (rows, features) = (77, 272);
    let gate = gated(&gpu, activation, features);
    let (bad_row, bad_column) = (random.below(rows), random.below(features));
    let gate_up = random.bf16s(rows * 2 * features, 1.0);
    let dn = random.bf16s(rows * features, 1.0);
    let weight = weight_of(&mut random, features);
    let run = |gate_up: &[bf16], dn: &[bf16]| {
        let on_gpu = OnGpu::new(&gpu, gate_up, &weight, rows);
        let normed = on_gpu.normed();
        let (codes, inputs) = (gpu.poisoned(rows * features), gpu.poisoned(rows * features));
        let (dn, dweight) = (gpu.upload(dn), gpu.upload(&vec![0f32; features]));
        let parts = gpu.poisoned(NORM_PARTS * features);
        unsafe {
            gate.quantize(&normed, codes.ptr(), rows).unwrap();
            gate.backward(
                &normed,
                dn.ptr(),
                dweight.ptr(),
                parts.ptr(),
                (on_gpu.x.ptr(), inputs.ptr()),
                rows,
            )
            .unwrap();
        }
        (on_gpu.scale.read(), on_gpu.x.read(), dweight.read())
    };
    let (scale, dx, dweight) = run(&gate_up, &dn);
    for half in 0..2 {
        let mut with_nan = gate_up.clone();
        with_nan[(2 * bad_row + half) * features + bad_column] = bf16::NAN;
        let nan = run(&with_nan, &dn);
        only_these_are_nan("scale", &nan.0, &scale, |row| row == bad_row);
        only_these_are_nan("dx", &nan.1, &dx, |at| at / (2 * features) == bad_row);
        only_these_are_nan("dweight", &nan.2, &dweight, |_| true);
    }
    let mut with_nan = dn.clone();
    with_nan[bad_row * features + bad_column] = bf16::NAN;
    let nan = run(&gate_up, &with_nan);
    only_these_are_nan("dn: dx", &nan.1, &dx, |at| at / (2 * features) == bad_row);
    only_these_are_nan("dn: dweight", &nan.2, &dweight, |at| at == bad_column);
}

#[test]
fn silu_gate_passes_nan_on() {
    gate_passes_nan_on(Activation::Silu);
}

#[test]
fn relu2_gate_passes_nan_on() {
    gate_passes_nan_on(Activation::Relu2);
}
