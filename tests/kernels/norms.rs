//! RMSNorm, with its int8 codes and gradients.

use half::bf16;
use titanbit::cuda::kernels::rms_norm::{NormGradients, RmsNorm};
use titanbit::cuda::{DevicePtr, NORM_PARTS};

use crate::check::{BF16, close, exact, f64s, only_these_are_nan};
use crate::fp8::Quantized;
use crate::gpu::gpu;
use crate::random::Random;
use crate::rows::{
    EPS, Normal, OnGpu, SIZES, check_quantised, dequantised, projection, rows_of, weight_of,
};

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
