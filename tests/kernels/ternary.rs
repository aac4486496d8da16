//! The product over packed ternary weights on every path and at any shape, and their device layout.

use half::bf16;
use titanbit::config::Kernels;
use titanbit::cuda::kernels::quantize_tokens::{Activations, QuantizeTokens};
use titanbit::cuda::kernels::{TernaryMatmul, TernaryTiles};
use titanbit::quant::PackedTernary;

use crate::check::{exact, near, rounded};
use crate::gpu::{Gpu, gpu};
use crate::random::Random;

struct Case {
    m: usize,
    n: usize,
    k: usize,
    x: Vec<i8>,
    w: Vec<i8>,
    token_scales: Vec<f32>,
    row_scales: Vec<f32>,
}

impl Case {
    fn random(random: &mut Random, [m, n, k]: [usize; 3]) -> Self {
        let mut positive = || (0.01 * (1.0 + random.uniform())) as f32;
        Self {
            token_scales: (0..m).map(|_| positive()).collect(),
            row_scales: (0..n).map(|_| positive()).collect(),
            x: random.codes(m * k),
            w: random.ternary(n * k),
            m,
            n,
            k,
        }
    }

    fn constant([m, n, k]: [usize; 3], x: i8, w: i8) -> Self {
        Self {
            token_scales: vec![0.5; m],
            row_scales: vec![0.25; n],
            x: vec![x; m * k],
            w: vec![w; n * k],
            m,
            n,
            k,
        }
    }

    fn sums(&self) -> Vec<i32> {
        let product = |(x, w): (&i8, &i8)| i64::from(*x) * i64::from(*w);
        let dot = |x: &[i8], w: &[i8]| x.iter().zip(w).map(product).sum::<i64>();
        self.x
            .chunks(self.k)
            .flat_map(|x| self.w.chunks(self.k).map(move |w| dot(x, w)))
            .map(|sum| i32::try_from(sum).unwrap())
            .collect()
    }
}

/// All three kinds of result, each to the bit.
fn check(gpu: &Gpu, kernels: &TernaryMatmul, case: &Case) {
    let &Case { m, n, k, .. } = case;
    let what = format!("{} {m} x {n} x {k}", kernels.kernel_name(m, n, k));
    let packed = PackedTernary::pack(&case.w, n, k).unwrap();
    let tiles = TernaryTiles::load(&gpu.device).unwrap();
    let w = tiles.upload(&packed, &case.row_scales).unwrap();
    let (x, scales) = (gpu.upload(&case.x), gpu.upload(&case.token_scales));
    let sums = case.sums();
    let scaled: Vec<f32> = (0..m * n)
        .map(|i| sums[i] as f32 * case.row_scales[i % n] * case.token_scales[i / n])
        .collect();
    let rounded: Vec<bf16> = scaled.iter().map(|y| bf16::from_f32(*y)).collect();

    let mut y = gpu.poisoned::<i32>(m * n);
    kernels.sums(&x.view(), m, &w, &mut y.view_mut()).unwrap();
    exact(&what, &y.read(), &sums);
    let mut y = gpu.poisoned::<f32>(m * n);
    kernels
        .scaled(&x.view(), &scales.view(), m, &w, &mut y.view_mut())
        .unwrap();
    exact(&format!("{what} in f32"), &y.read(), &scaled);
    let mut y = gpu.poisoned::<bf16>(m * n);
    kernels
        .scaled(&x.view(), &scales.view(), m, &w, &mut y.view_mut())
        .unwrap();
    exact(&format!("{what} in bf16"), &y.read(), &rounded);
}

/// The kernels of the GPU at hand, and those for any.
fn paths(gpu: &Gpu) -> [TernaryMatmul; 2] {
    [Kernels::Auto, Kernels::Portable].map(|which| TernaryMatmul::load(&gpu.device, which).unwrap())
}

#[test]
fn ternary_products_are_exact_at_any_shape() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let shapes = [
        [1, 1, 32],
        [1, 2560, 2560],
        [1, 333, 8640],
        [2, 16, 96],
        [5, 17, 160],
        [8, 50, 2048],
        [16, 300, 6912],
        [16, 2560, 2560],
        [17, 1, 64],
        [33, 129, 1024],
        [64, 768, 768],
        [65, 2050, 320],
        [127, 16, 2080],
        [129, 257, 96],
        [256, 384, 768],
        [50, 3000, 1600],
        [250, 2048, 6144],
        [100, 12288, 512],
        [500, 333, 3200],
        [1000, 50, 32],
        [2048, 1030, 256],
    ];
    for kernels in paths(&gpu) {
        for shape in shapes {
            check(&gpu, &kernels, &Case::random(&mut random, shape));
        }
        for _ in 0..24 {
            let most = [16, 100, 700][random.below(3)];
            let m = 1 + random.below(most);
            let shape = [m, 1 + random.below(600), 32 * (1 + random.below(60))];
            check(&gpu, &kernels, &Case::random(&mut random, shape));
        }
    }
}

#[test]
fn the_largest_ternary_sums_are_exact() {
    let Some(gpu) = gpu() else { return };
    for kernels in paths(&gpu) {
        for (x, w) in [(-128, -1), (-128, 1), (127, -1), (127, 1), (-128, 0)] {
            for m in [1, 9, 20, 40, 130] {
                let shape = [m, 18, (1 << 18) - 32];
                check(&gpu, &kernels, &Case::constant(shape, x, w));
            }
        }
    }
}

/// Products that may start while the ones before still run.
#[test]
fn ternary_products_in_a_row_are_exact() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let tiles = TernaryTiles::load(&gpu.device).unwrap();
    let (n, k) = (1088, 2080);
    for kernels in paths(&gpu) {
        let cases = [1, 8, 16, 17, 50, 64, 120, 200, 400, 600, 1]
            .map(|m| Case::random(&mut random, [m, n, k]));
        let operands = cases.each_ref().map(|case| {
            let packed = PackedTernary::pack(&case.w, n, k).unwrap();
            let w = tiles.upload(&packed, &case.row_scales).unwrap();
            (gpu.upload(&case.x), w)
        });
        let mut results = cases.each_ref().map(|case| gpu.poisoned::<i32>(case.m * n));
        for ((case, (x, w)), y) in cases.iter().zip(&operands).zip(&mut results) {
            kernels
                .sums(&x.view(), case.m, w, &mut y.view_mut())
                .unwrap();
        }
        for (case, y) in cases.iter().zip(&results) {
            let what = kernels.kernel_name(case.m, n, k);
            exact(&what, &y.read(), &case.sums());
        }
    }
}

#[test]
fn the_device_layout_goes_both_ways() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let tiles = TernaryTiles::load(&gpu.device).unwrap();
    for (n, k) in [(1, 32), (16, 128), (17, 160), (333, 2080), (2560, 6912)] {
        let codes = random.ternary(n * k);
        let packed = PackedTernary::pack(&codes, n, k).unwrap();
        let scales = vec![1.0; n];
        let w = tiles.upload(&packed, &scales).unwrap();
        assert_eq!(w.bytes(), n.div_ceil(16) * k.div_ceil(128) * 512);
        let from_codes = gpu.upload(&codes);
        let from_codes = tiles
            .pack_codes(&from_codes.view(), [n, k], &scales)
            .unwrap();
        for w in [&w, &w.duplicate().unwrap(), &from_codes] {
            assert!(tiles.download(w).unwrap() == packed, "{n} x {k}");
            assert!(tiles.unpack_codes(w).unwrap() == codes, "{n} x {k}");
        }
    }
}

#[test]
fn ternary_products_that_cannot_be_are_refused() {
    let Some(gpu) = gpu() else { return };
    let kernels = TernaryMatmul::load(&gpu.device, Kernels::Auto).unwrap();
    let tiles = TernaryTiles::load(&gpu.device).unwrap();
    let upload = |n: usize, k: usize, scales: usize| {
        let packed = PackedTernary::pack(&vec![1; n * k], n, k).unwrap();
        tiles.upload(&packed, &vec![1.0; scales])
    };
    for (k, scales, message) in [
        (48, 2, "an inner dimension of 48 is no multiple of 32"),
        (1 << 18, 2, "at most 262112"),
        (64, 3, "3 weight scales do not fit 2 weight rows"),
    ] {
        let error = upload(2, k, scales).err().unwrap().to_string();
        assert!(error.contains(message), "{error}");
    }
    let many = upload(65535 * 16 + 1, 32, 1).err().unwrap().to_string();
    assert!(many.contains("1 to 1048560 rows"), "{many}");
    let w = upload(2, 64, 2).unwrap();
    for (m, x_len, y_len, message) in [
        (2, 127, 4, "64 columns"),
        (0, 0, 1, "64 columns"),
        (2, 128, 5, "cannot hold"),
    ] {
        let x = gpu.upload(&vec![1i8; x_len]);
        let mut y = gpu.poisoned::<i32>(y_len);
        let error = kernels.sums(&x.view(), m, &w, &mut y.view_mut());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let (x, scales) = (gpu.upload(&[1i8; 128]), gpu.upload(&[1f32; 1]));
    let mut y = gpu.poisoned::<f32>(4);
    let error = kernels.scaled(&x.view(), &scales.view(), 2, &w, &mut y.view_mut());
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("1 token scales do not fit 2 tokens"),
        "{error}"
    );
    // 16 bytes are what vector loads and bulk copies start on.
    let x = gpu.upload(&[1i8; 129]);
    let error = kernels.sums(&x.view().slice(1..), 2, &w, &mut gpu.poisoned(4).view_mut());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("16 bytes"), "{error}");
}

#[test]
fn tokens_are_quantized() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let kernel = QuantizeTokens::load(&gpu.device).unwrap();
    for (tokens, k, stride) in [(1, 2048, 2048), (3, 17, 32), (70, 272, 288), (5, 1, 4)] {
        let mut x = random.f32s(tokens * k, 3.0);
        x[..k].fill(0.0);
        let half: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
        for of_bf16 in [false, true] {
            let values: Vec<f64> = match of_bf16 {
                true => half.iter().map(|x| x.to_f64()).collect(),
                false => x.iter().map(|x| f64::from(*x)).collect(),
            };
            let (f32s, bf16s) = (gpu.upload(&x), gpu.upload(&half));
            let input = match of_bf16 {
                true => Activations::Bf16(bf16s.ptr()),
                false => Activations::F32(f32s.ptr()),
            };
            let (mut got, mut scales) = (gpu.poisoned(tokens * stride), gpu.poisoned(tokens));
            let shape = [tokens, k, stride];
            unsafe { kernel.quantize(input, &mut got.view_mut(), &mut scales.view_mut(), shape) }
                .unwrap();
            let largest = |row: &[f64]| row.iter().fold(1e-5, |max: f64, x| max.max(x.abs()));
            let wanted: Vec<f64> = values.chunks(k).map(|row| largest(row) / 127.0).collect();
            near("scales", &scales.read(), &wanted, 1e-6);
            let got = got.read();
            for ((row, scale), got) in values.chunks(k).zip(wanted).zip(got.chunks(stride)) {
                let near =
                    |x: &f64| [-1e-6, 0.0, 1e-6].map(|off| x / scale + off * x.abs() / scale);
                let values: Vec<[f64; 3]> = row.iter().map(near).collect();
                let codes: Vec<f64> = got[..k].iter().map(|code| f64::from(*code)).collect();
                rounded("codes", &codes, &values, f64::round_ties_even);
                assert!(got[k..].iter().all(|code| *code == 0));
            }
        }
    }
}

#[test]
fn a_token_with_nan_has_a_scale_of_nan() {
    let Some(gpu) = gpu() else { return };
    let kernel = QuantizeTokens::load(&gpu.device).unwrap();
    let x = gpu.upload(&[1f32, 2.0, 3.0, f32::NAN, 5.0, 6.0]);
    let (mut codes, mut scales) = (gpu.poisoned(8), gpu.poisoned(2));
    let input = Activations::F32(x.ptr());
    unsafe {
        kernel.quantize(
            input,
            &mut codes.view_mut(),
            &mut scales.view_mut(),
            [2, 3, 4],
        )
    }
    .unwrap();
    let scales = scales.read();
    assert!(scales[0].is_finite() && scales[1].is_nan(), "{scales:?}");
}
