//! BitLinear's products and plain bf16 ones.

use half::bf16;
use titanbit::cuda::DevicePtr;
use titanbit::cuda::kernels::bit_linear::{BitLinear, Projection};
use titanbit::cuda::kernels::gemm::{Float, Gemm, Layout, Operand, Output};

use crate::check::{BF16, close, exact, only_these_are_nan};
use crate::fp8::Quantized;
use crate::gpu::{Buffer, Gpu, Value, gpu, gpu_with};
use crate::random::Random;

/// A product's operands.
#[derive(Clone)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    ends: [usize; 2],
    x: Vec<i8>,
    x_scale: Vec<f32>,
    codes: Vec<i8>,
    scales: [f32; 3],
    /// By `input_gradient`, for which x is dY, and `scales` are 1.
    gradient: bool,
}

impl Case {
    fn random(random: &mut Random, [m, n, k]: [usize; 3], weights: usize) -> Self {
        let mut end = |first: usize| first + 16 * random.below((n - first) / 16 + 1);
        let ends = match weights {
            1 => [n, n],
            2 => [end(16), n],
            _ => {
                let end0 = end(16);
                [end0, end(end0 + 16)]
            }
        };
        let mut positive = || (0.01 * (1.0 + random.uniform())) as f32;
        let scales = [positive(), positive(), positive()];
        Self {
            x_scale: (0..m).map(|_| positive()).collect(),
            x: random.codes(m * k),
            codes: random.ternary(n * k),
            m,
            n,
            k,
            ends,
            scales,
            gradient: false,
        }
    }

    fn sums(&self) -> Vec<i32> {
        let product = |(x, w): (&i8, &i8)| i32::from(*x) * i32::from(*w);
        let dot = |x: &[i8], w: &[i8]| x.iter().zip(w).map(product).sum();
        self.x
            .chunks(self.k)
            .flat_map(|x| self.codes.chunks(self.k).map(move |w| dot(x, w)))
            .collect()
    }

    fn scale_of(&self, column: usize) -> f32 {
        self.scales[self.ends.iter().filter(|end| column >= **end).count()]
    }

    fn run(&self, gpu: &Gpu, kernel: &BitLinear, residual: Residual) -> Vec<bf16> {
        let x = Quantized {
            codes: gpu.upload(&self.x),
            scale: gpu.upload(&self.x_scale),
            ..Quantized::poisoned(gpu, self.m, self.k)
        };
        let (codes, scales) = (gpu.upload(&self.codes), gpu.upload(&self.scales));
        let projection = Projection {
            codes: codes.ptr(),
            scales: scales.ptr(),
            n: self.n,
            k: self.k,
            ends: self.ends,
        };
        let y = match residual {
            Residual::InPlace(values) => gpu.upload(values),
            _ => gpu.poisoned(self.m * self.n),
        };
        let beside: Option<Buffer<bf16>> = match residual {
            Residual::Beside(values) => Some(gpu.upload(values)),
            _ => None,
        };
        let residual = match residual {
            Residual::None => DevicePtr::NULL,
            _ => beside.as_ref().unwrap_or(&y).ptr(),
        };
        let (codes, scale) = (x.codes.ptr(), x.scale.ptr());
        unsafe {
            match self.gradient {
                true => kernel.input_gradient(
                    &x.gradient(),
                    projection.codes,
                    residual,
                    y.ptr(),
                    [self.m, self.k, self.n],
                ),
                false => kernel.forward(codes, scale, &projection, residual, y.ptr(), self.m),
            }
        }
        .unwrap();
        y.read()
    }
}

#[derive(Clone, Copy)]
enum Residual<'a> {
    None,
    Beside(&'a [bf16]),
    InPlace(&'a [bf16]),
}

/// y = sum * b * x_scale in f32, rounded to bf16; the residual is added in f32, with the second
/// product rounded (Hopper) or not (fused multiply-add).
fn check(gpu: &Gpu, kernel: &BitLinear, random: &mut Random, case: &Case, fused: bool) {
    let &Case { m, n, k, ends, .. } = case;
    let kind = match case.gradient {
        true => "input_gradient",
        false => "bit_linear",
    };
    let what = format!("{kind} {m} x {n} x {k}, ends {ends:?}");
    let products: Vec<[f32; 2]> = (case.sums().into_iter().enumerate())
        .map(|(at, sum)| [sum as f32 * case.scale_of(at % n), case.x_scale[at / n]])
        .collect();
    let want: Vec<bf16> = products
        .iter()
        .map(|[p, s]| bf16::from_f32(p * s))
        .collect();
    exact(&what, &case.run(gpu, kernel, Residual::None), &want);
    let residual = random.bf16s(m * n, 1.0);
    let want: Vec<bf16> = (products.iter().zip(&residual))
        .map(|([p, s], r)| {
            bf16::from_f32(match fused {
                true => p.mul_add(*s, r.to_f32()),
                false => p * s + r.to_f32(),
            })
        })
        .collect();
    let beside = case.run(gpu, kernel, Residual::Beside(&residual));
    exact(&format!("{what}, residual"), &beside, &want);
    let in_place = case.run(gpu, kernel, Residual::InPlace(&residual));
    exact(&format!("{what}, residual in place"), &in_place, &want);
}

fn check_bit_linear(hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    let kernel = BitLinear::load(&gpu.device, hopper).unwrap();
    for (sizes, weights) in [
        ([1, 16, 16], 1),
        ([3, 48, 32], 3),
        ([77, 80, 48], 2),
        ([129, 272, 272], 3),
        ([130, 144, 1040], 1),
        ([255, 256, 128], 2),
        ([200, 560, 8640], 3),
        // More tiles than blocks.
        ([3001, 1600, 144], 3),
    ] {
        let case = Case::random(&mut random, sizes, weights);
        check(&gpu, &kernel, &mut random, &case, !hopper);
    }
}

#[test]
fn portable_bit_linear() {
    check_bit_linear(false);
}

#[test]
fn hopper_bit_linear() {
    check_bit_linear(true);
}

fn check_input_gradient(hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    let kernel = BitLinear::load(&gpu.device, hopper).unwrap();
    for sizes in [
        [1, 16, 16],
        [77, 80, 48],
        [200, 560, 8640],
        [3001, 1600, 144],
    ] {
        let case = Case {
            scales: [1.0; 3],
            gradient: true,
            ..Case::random(&mut random, sizes, 1)
        };
        check(&gpu, &kernel, &mut random, &case, !hopper);
    }
}

#[test]
fn portable_input_gradient() {
    check_input_gradient(false);
}

#[test]
fn hopper_input_gradient() {
    check_input_gradient(true);
}

/// Sums on both sides of 2^22, where the portable kernel converts them in another way, and up to
/// 2^24, where f32 no longer holds every integer.
fn check_extremes(hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    let kernel = BitLinear::load(&gpu.device, hopper).unwrap();
    for k in [32752, 32768, 131056] {
        let mut case = Case::random(&mut random, [3, 48, k], 3);
        // Sums of alternating sign, all of the largest size, and random ones.
        case.x[..k].fill(-128);
        case.x[k..2 * k].fill(127);
        case.codes[..k].fill(-1);
        case.codes[k..2 * k].fill(1);
        // Powers of two: every bit of a sum below 2^8 reaches y.
        case.scales = [0.5, 0.25, 2.0];
        case.x_scale = vec![0.5, 1.0, 4.0];
        check(&gpu, &kernel, &mut random, &case, !hopper);
    }
}

#[test]
fn portable_bit_linear_with_large_sums() {
    check_extremes(false);
}

#[test]
fn hopper_bit_linear_with_large_sums() {
    check_extremes(true);
}

/// Sums of up to 8 bits are whole in bf16: any wrong one shows.
fn check_small_sums(hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    let kernel = BitLinear::load(&gpu.device, hopper).unwrap();
    for sizes in [[333, 400, 16], [130, 272, 208]] {
        let mut case = Case::random(&mut random, sizes, 3);
        case.x.iter_mut().for_each(|x| *x %= 2);
        case.scales = [1.0; 3];
        case.x_scale = vec![1.0; sizes[0]];
        let want: Vec<bf16> = case
            .sums()
            .iter()
            .map(|sum| bf16::from_f32(*sum as f32))
            .collect();
        assert!(case.sums().iter().all(|sum| sum.abs() <= 256));
        exact(
            "small sums",
            &case.run(&gpu, &kernel, Residual::None),
            &want,
        );
    }
}

#[test]
fn portable_bit_linear_with_small_sums() {
    check_small_sums(false);
}

#[test]
fn hopper_bit_linear_with_small_sums() {
    check_small_sums(true);
}

fn check_nan(hopper: bool) {
    let Some(gpu) = gpu_with(hopper) else { return };
    let mut random = Random::new();
    let kernel = BitLinear::load(&gpu.device, hopper).unwrap();
    let (m, n, k) = (77, 80, 48);
    let case = Case {
        ends: [16, 48],
        ..Case::random(&mut random, [m, n, k], 3)
    };
    let before = case.run(&gpu, &kernel, Residual::None);
    let bad = random.below(m);
    let mut x_scale = case.x_scale.clone();
    x_scale[bad] = f32::NAN;
    let with_nan = Case {
        x_scale,
        ..case.clone()
    };
    let nan = with_nan.run(&gpu, &kernel, Residual::None);
    only_these_are_nan("x_scale", &nan, &before, |at| at / n == bad);
    let mut scales = case.scales;
    scales[1] = f32::NAN;
    let with_nan = Case {
        scales,
        ..case.clone()
    };
    let nan = with_nan.run(&gpu, &kernel, Residual::None);
    only_these_are_nan("b", &nan, &before, |at| (16..48).contains(&(at % n)));
    let mut residual = vec![bf16::ZERO; m * n];
    let before = case.run(&gpu, &kernel, Residual::Beside(&residual));
    let bad = random.below(m * n);
    residual[bad] = bf16::NAN;
    let nan = case.run(&gpu, &kernel, Residual::Beside(&residual));
    only_these_are_nan("residual", &nan, &before, |at| at == bad);
}

#[test]
fn portable_bit_linear_passes_nan_on() {
    check_nan(false);
}

#[test]
fn hopper_bit_linear_passes_nan_on() {
    check_nan(true);
}

/// Rows of `columns` values, and behind each what must not be read.
fn matrix(random: &mut Random, rows: usize, columns: usize) -> (Vec<bf16>, usize) {
    let stride = columns.next_multiple_of(8);
    let row = |_| {
        let mut row = random.bf16s(columns, 1.0);
        row.resize(stride, bf16::POISON);
        row
    };
    ((0..rows).flat_map(row).collect(), stride)
}

struct Product {
    layout: Layout,
    sizes: [usize; 3],
    a: (Vec<bf16>, usize),
    b: (Vec<bf16>, usize),
}

impl Product {
    fn random(random: &mut Random, layout: Layout, [m, n, k]: [usize; 3]) -> Self {
        let (a, b) = match layout {
            Layout::NN => ([m, k], [k, n]),
            Layout::NT => ([m, k], [n, k]),
            Layout::TN => ([k, m], [k, n]),
        };
        Self {
            layout,
            sizes: [m, n, k],
            a: matrix(random, a[0], a[1]),
            b: matrix(random, b[0], b[1]),
        }
    }

    fn reference(&self) -> Vec<f64> {
        let [m, n, k] = self.sizes;
        let mut c = vec![0f64; m * n];
        let (a, b) = (&self.a, &self.b);
        for i in 0..m {
            for l in 0..k {
                let a = match self.layout {
                    Layout::TN => a.0[l * a.1 + i],
                    _ => a.0[i * a.1 + l],
                };
                let a = a.to_f64();
                for (j, c) in c[i * n..(i + 1) * n].iter_mut().enumerate() {
                    let b = match self.layout {
                        Layout::NT => b.0[j * b.1 + l],
                        _ => b.0[l * b.1 + j],
                    };
                    *c += a * b.to_f64();
                }
            }
        }
        c
    }

    fn run<T: Value>(&self, gpu: &Gpu, gemm: &Gemm, c: Vec<T>, add: bool) -> Vec<T> {
        let (a, b, c) = (gpu.upload(&self.a.0), gpu.upload(&self.b.0), gpu.upload(&c));
        let operand = |values: &Buffer<bf16>, stride| Operand::bf16(values.ptr(), stride);
        let output = Output {
            address: c.address(),
            stride: self.sizes[1].next_multiple_of(8),
            dtype: match size_of::<T>() {
                4 => Float::F32,
                _ => Float::Bf16,
            },
            add,
        };
        let (a, b) = (operand(&a, self.a.1), operand(&b, self.b.1));
        unsafe { gemm.multiply(self.layout, self.sizes, a, b, output) }.unwrap();
        c.read()
    }

    /// Replacing what is there, and adding to it.
    fn check<T: Value + Into<f64>>(
        &self,
        gpu: &Gpu,
        gemm: &Gemm,
        random: &mut Random,
        product: &[f64],
        (convert, bound): (fn(f64) -> T, f64),
    ) {
        let n = self.sizes[1];
        let stride = n.next_multiple_of(8);
        for add in [false, true] {
            let values: Vec<T> = (0..product.len())
                .map(|_| convert(10.0 * random.normal()))
                .collect();
            let mut c = vec![T::POISON; self.sizes[0] * stride];
            let mut want = product.to_vec();
            if add {
                for (row, values) in c.chunks_mut(stride).zip(values.chunks(n)) {
                    row[..n].copy_from_slice(values);
                }
                let added = want.iter_mut().zip(&values);
                added.for_each(|(want, value)| *want += (*value).into());
            }
            let got = self.run(gpu, gemm, c, add);
            let (layout, sizes) = (self.layout, self.sizes);
            let what = format!("{layout:?} {sizes:?}, {} bytes, add {add}", size_of::<T>());
            for row in got.chunks(stride) {
                let beside = row[n..].iter().all(|x| x.bits() == T::POISON.bits());
                assert!(beside, "{what}: wrote beside a row");
            }
            let rows = got.chunks(stride).flat_map(|row| row[..n].to_vec());
            close(&what, &rows.collect::<Vec<T>>(), &want, n, bound);
        }
    }
}

const LAYOUTS: [Layout; 3] = [Layout::NN, Layout::NT, Layout::TN];

#[test]
fn gemm_multiplies() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let gemm = Gemm::new(gpu.device.cuda_stream()).unwrap();
    for layout in LAYOUTS {
        for sizes in [
            [1, 16, 16],
            [77, 301, 48],
            [301, 48, 77],
            [77, 48, 301],
            [130, 512, 1040],
            [1000, 264, 513],
        ] {
            let product = Product::random(&mut random, layout, sizes);
            let want = product.reference();
            product.check(&gpu, &gemm, &mut random, &want, (|x| x as f32, 1e-5));
            product.check(&gpu, &gemm, &mut random, &want, (bf16::from_f64, BF16));
        }
    }
}

#[test]
fn gemm_passes_nan_on() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let gemm = Gemm::new(gpu.device.cuda_stream()).unwrap();
    let [m, n, k] = [80, 304, 48];
    for layout in LAYOUTS {
        let mut product = Product::random(&mut random, layout, [m, n, k]);
        let c = vec![f32::POISON; m * n];
        let before = product.run(&gpu, &gemm, c.clone(), false);
        let (bad, at) = (random.below(m), random.below(k));
        let stride = product.a.1;
        let place = match layout {
            Layout::TN => at * stride + bad,
            _ => bad * stride + at,
        };
        product.a.0[place] = bf16::NAN;
        let nan = product.run(&gpu, &gemm, c, false);
        only_these_are_nan("a", &nan, &before, |at| at / n == bad);
    }
}
