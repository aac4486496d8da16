//! The gated activation with its norm, int8 codes and gradients.

use half::bf16;
use titanbit::cuda::NORM_PARTS;
use titanbit::cuda::kernels::gated_activation::GatedActivation;
use titanbit::model::{Activation, BitNetConfig};

use crate::check::{BF16, close, exact, f64s, only_these_are_nan};
use crate::fp8::{Quantized, Range};
use crate::gpu::{Gpu, gpu};
use crate::random::Random;
use crate::rows::{
    EPS, Normal, OnGpu, SIZES, check_quantised, dequantised, projection, rows_of, weight_of,
};

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
