//! Gradient norm and AdamW.

use half::bf16;
use titanbit::config::StateDtype;
use titanbit::cuda::DevicePtr;
use titanbit::cuda::kernels::gemm::Float;
use titanbit::cuda::kernels::optimizer::{AdamWStep, Optimizer, OptimizerTensor};
use titanbit::train::STATE_BLOCK;

use crate::check::{close, f64s};
use crate::gpu::{Buffer, Gpu, gpu};
use crate::random::Random;

const BETAS: [f64; 2] = [0.9, 0.95];
const EPS: f64 = 1e-8;
/// Values that a block of the kernels handles.
const BLOCK: usize = 16384;

/// The first step of a run, at a rate of 1e-3.
const FIRST_STEP: AdamWStep = AdamWStep {
    lr: 1e-3,
    weight_decay: 0.0,
    correction1: 1.0,
    correction2: 1.0,
    factor: 1.0,
    beta1: BETAS[0] as f32,
    beta2: BETAS[1] as f32,
    eps: EPS as f32,
    seed: 1,
};

/// f32 or bf16.
enum Floats {
    F32(Buffer<f32>),
    Bf16(Buffer<bf16>),
}

impl Floats {
    fn upload(gpu: &Gpu, dtype: Float, values: &[f64]) -> Self {
        match dtype {
            Float::F32 => Self::F32(gpu.upload(&f32s(values))),
            Float::Bf16 => Self::Bf16(gpu.upload(&bf16s(values))),
        }
    }

    fn write(&mut self, values: &[f64]) {
        match self {
            Self::F32(buffer) => buffer.write(&f32s(values)),
            Self::Bf16(buffer) => buffer.write(&bf16s(values)),
        }
    }

    fn read(&self) -> Vec<f64> {
        match self {
            Self::F32(buffer) => f64s(&buffer.read()),
            Self::Bf16(buffer) => f64s(&buffer.read()),
        }
    }

    fn address(&self) -> u64 {
        match self {
            Self::F32(buffer) => buffer.address(),
            Self::Bf16(buffer) => buffer.address(),
        }
    }

    fn dtype(&self) -> Float {
        match self {
            Self::F32(_) => Float::F32,
            Self::Bf16(_) => Float::Bf16,
        }
    }
}

fn f32s(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

fn bf16s(values: &[f64]) -> Vec<bf16> {
    values.iter().map(|x| bf16::from_f64(*x)).collect()
}

/// A moment as it is kept.
enum Moment {
    Floats(Floats),
    /// Codes, and the largest magnitude of every block.
    Bytes(Buffer<u8>, Buffer<f32>),
}

/// What an 8-bit moment's largest value stands at: codes number the floats of 3 mantissa bits from
/// 1 on; m / max is spread over 7 bits from 1 on, v / max over 8 bits.
const MEAN_TOP: f64 = 61432.0;
const SQUARE_TOP: f64 = 4.026e9;

fn float_of_code(code: u8) -> f64 {
    f32::from_bits((u32::from(code) << 20) + 1f32.to_bits()).into()
}

impl Moment {
    fn zeros(gpu: &Gpu, state: StateDtype, count: usize) -> Self {
        let floats = |dtype| Self::Floats(Floats::upload(gpu, dtype, &vec![0.0; count]));
        match state {
            StateDtype::F32 => floats(Float::F32),
            StateDtype::Bf16 => floats(Float::Bf16),
            StateDtype::Int8 => {
                let maxima = gpu.upload(&vec![0f32; count.div_ceil(STATE_BLOCK)]);
                Self::Bytes(gpu.upload(&vec![0u8; count]), maxima)
            }
        }
    }

    fn address(&self) -> u64 {
        match self {
            Self::Floats(values) => values.address(),
            Self::Bytes(codes, _) => codes.address(),
        }
    }

    fn maxima(&self) -> DevicePtr<f32> {
        match self {
            Self::Floats(_) => DevicePtr::NULL,
            Self::Bytes(_, maxima) => maxima.ptr(),
        }
    }

    fn read(&self, square: bool) -> Vec<f64> {
        let (codes, maxima) = match self {
            Self::Floats(values) => return values.read(),
            Self::Bytes(codes, maxima) => (codes.read(), maxima.read()),
        };
        let value = |(at, code): (usize, &u8)| {
            let max = f64::from(maxima[at / STATE_BLOCK]);
            match square {
                true => float_of_code(*code) * max / SQUARE_TOP,
                false => {
                    let size = (float_of_code(code & 0x7f) - 1.0) * max / MEAN_TOP;
                    if code & 0x80 == 0 { size } else { -size }
                }
            }
        };
        codes.iter().enumerate().map(value).collect()
    }

    /// Checks what is kept of a moment: its values, or one of the two neighbours of each.
    fn check(&self, what: &str, square: bool, want: &Wanted) {
        let kept = self.read(square);
        let slack = want.terms.iter().map(|x| 1e-6 * x);
        let values = kept.iter().zip(&want.values).zip(slack);
        let values = values.map(|((kept, want), slack)| [*kept, *want, slack]);
        match self {
            Self::Floats(Floats::F32(_)) => close(what, &kept, &want.values, kept.len(), 1e-6),
            Self::Floats(Floats::Bf16(_)) if square => check_rounding(what, 7, values),
            // To nearest.
            Self::Floats(Floats::Bf16(_)) => {
                for [kept, want, slack] in values {
                    let half = spacing(want, 7) / 2.0;
                    let off = (kept - want).abs();
                    assert!(off <= half + slack, "{what}: {kept:e}, not {want:e}");
                }
            }
            Self::Bytes(_, maxima) => {
                let largest = |block: &[f64]| block.iter().fold(0f64, |max, x| max.max(x.abs()));
                let largest: Vec<f64> = want.values.chunks(STATE_BLOCK).map(largest).collect();
                let maxima = maxima.read();
                close(&format!("{what}, maxima"), &maxima, &largest, 1, 1e-6);
                let floats = values.enumerate().map(|(at, [kept, want, slack])| {
                    assert!(kept * want >= 0.0, "{what}: {kept:e} for {want:e}");
                    let top = if square { SQUARE_TOP } else { MEAN_TOP };
                    let unit = f64::from(maxima[at / STATE_BLOCK]) / top;
                    let float = |x: f64| match square {
                        true => (x / unit).max(1.0),
                        false => 1.0 + x.abs() / unit,
                    };
                    [float(kept), float(want), slack / unit]
                });
                check_rounding(what, 3, floats);
            }
        }
    }
}

/// A moment in f64, and the magnitude of what was added up to it, to a millionth of which f32
/// arithmetic is exact.
#[derive(Default)]
struct Wanted {
    values: Vec<f64>,
    terms: Vec<f64>,
}

impl Wanted {
    fn push(&mut self, kept: f64, new: f64) {
        self.values.push(kept + new);
        self.terms.push(kept.abs() + new.abs());
    }
}

/// Of the floats about x that have so many mantissa bits.
fn spacing(x: f64, bits: i32) -> f64 {
    (x.abs().max(f64::MIN_POSITIVE).log2().floor() - f64::from(bits)).exp2()
}

/// Checks random rounding to so many mantissa bits: to one of the two neighbours, and right on
/// average. Of each value: what is kept, what is wanted, and how exactly that is known.
fn check_rounding(what: &str, bits: i32, values: impl Iterator<Item = [f64; 3]>) {
    let (mut sum, mut count) = (0.0, 0);
    for [kept, want, slack] in values {
        let spacing = spacing(want + slack, bits);
        let off = kept - want;
        assert!(
            off.abs() <= spacing + slack,
            "{what}: {kept:e} kept of {want:e}"
        );
        sum += off / spacing;
        count += 1;
    }
    // A rounding's standard deviation is at most half a spacing.
    let (mean, bound) = (sum / f64::from(count), 2.5 / f64::from(count).sqrt());
    println!("{what}: rounding is off by {mean:.2e} spacings on average, bound {bound:.0e}");
    assert!(mean.abs() <= bound, "{what}");
}

struct Weight {
    weights: Buffer<f32>,
    gradient: Floats,
    moments: [Moment; 2],
    count: usize,
    decay: bool,
    keep_gradient: bool,
}

impl Weight {
    fn table_row(&self) -> OptimizerTensor {
        OptimizerTensor {
            weights: self.weights.ptr(),
            gradient: self.gradient.address(),
            gradient_dtype: self.gradient.dtype(),
            moments: [self.moments[0].address(), self.moments[1].address()],
            maxima: [self.moments[0].maxima(), self.moments[1].maxima()],
            count: self.count,
            decay: self.decay,
            keep_gradient: self.keep_gradient,
        }
    }
}

/// Counts below, at and above what a block handles, and one that is no multiple of 256.
fn weights_of(gpu: &Gpu, random: &mut Random, state: StateDtype) -> Vec<Weight> {
    let tensors = [
        (8, Float::F32, true, false),
        (2 * BLOCK + 264, Float::Bf16, true, true),
        (4104, Float::F32, false, true),
        (BLOCK, Float::Bf16, true, false),
        (3 * BLOCK - 8, Float::F32, true, false),
    ];
    let weight = |(count, dtype, decay, keep_gradient)| Weight {
        weights: gpu.upload(&random.f32s(count, 0.02)),
        gradient: Floats::upload(gpu, dtype, &gradient_of(random, count)),
        moments: [
            Moment::zeros(gpu, state, count),
            Moment::zeros(gpu, state, count),
        ],
        count,
        decay,
        keep_gradient,
    };
    tensors.map(weight).into_iter().collect()
}

/// Gradients of very different size.
fn gradient_of(random: &mut Random, count: usize) -> Vec<f64> {
    (0..count)
        .map(|_| random.normal() * 10f64.powf(-3.0 * random.uniform()))
        .collect()
}

fn load(gpu: &Gpu, weights: &[Weight], state: StateDtype) -> Optimizer {
    let table: Vec<OptimizerTensor> = weights.iter().map(Weight::table_row).collect();
    Optimizer::load(&gpu.device, &table, state).unwrap()
}

#[test]
fn grad_norm() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let mut weights = weights_of(&gpu, &mut random, StateDtype::F32);
    let optimizer = load(&gpu, &weights, StateDtype::F32);
    let gradients: Vec<Vec<f64>> = weights.iter().map(|w| w.gradient.read()).collect();
    let squares: f64 = gradients.iter().flatten().map(|g| g * g).sum();
    let norm = unsafe { optimizer.grad_norm() }.unwrap();
    close("grad_norm", &[norm], &[squares.sqrt()], 1, 1e-6);

    for (index, gradient) in gradients.iter().enumerate() {
        for bad in [f64::NAN, f64::INFINITY, 1e25] {
            let mut with_bad = gradient.clone();
            with_bad[random.below(gradient.len())] = bad;
            weights[index].gradient.write(&with_bad);
            let norm = unsafe { optimizer.grad_norm() }.unwrap();
            assert!(!norm.is_finite(), "{bad} in tensor {index}: {norm}");
            assert_eq!(norm.is_nan(), bad.is_nan(), "{bad} in tensor {index}");
        }
        weights[index].gradient.write(gradient);
    }
}

/// More blocks than are summed at a time: one gradient, again and again.
#[test]
fn grad_norm_of_many_tensors() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let weights = weights_of(&gpu, &mut random, StateDtype::F32);
    let count = 5003;
    let table = vec![weights[0].table_row(); count];
    let optimizer = Optimizer::load(&gpu.device, &table, StateDtype::F32).unwrap();
    let norm = unsafe { optimizer.grad_norm() }.unwrap();
    let squares: f64 = weights[0].gradient.read().iter().map(|g| g * g).sum();
    let want = (count as f64 * squares).sqrt();
    close("grad_norm", &[norm], &[want], 1, 1e-6);
}

/// Four steps, each from what is kept of the one before.
fn check_adamw(state: StateDtype) {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let mut weights = weights_of(&gpu, &mut random, state);
    let optimizer = load(&gpu, &weights, state);
    let [beta1, beta2] = BETAS;
    let (lr, weight_decay) = (f64::from(FIRST_STEP.lr), 0.1);
    for (t, factor) in [(1, 1.0), (2, 0.37), (3, 2.0), (4, 0.01)] {
        let correction = |beta: f64| 1.0 / (1.0 - beta.powi(t));
        let mut wanted = Vec::new();
        for weight in &mut weights {
            weight
                .gradient
                .write(&gradient_of(&mut random, weight.count));
            let g = weight.gradient.read();
            let w = f64s(&weight.weights.read());
            let kept_m = weight.moments[0].read(false);
            let kept_v = weight.moments[1].read(true);
            let decay = if weight.decay { weight_decay } else { 0.0 };
            let (mut m, mut v) = (Wanted::default(), Wanted::default());
            let mut moves = Vec::new();
            for i in 0..weight.count {
                let scaled = g[i] * factor;
                m.push(beta1 * kept_m[i], (1.0 - beta1) * scaled);
                v.push(beta2 * kept_v[i], (1.0 - beta2) * scaled * scaled);
                let mean = m.values[i] * correction(beta1);
                let root = (v.values[i] * correction(beta2)).sqrt();
                moves.push(-lr * (mean / (root + EPS) + decay * w[i]));
            }
            wanted.push((w, moves, m, v, g));
        }
        let step = AdamWStep {
            weight_decay: weight_decay as f32,
            correction1: correction(beta1) as f32,
            correction2: correction(beta2) as f32,
            factor: factor as f32,
            seed: t as u32,
            ..FIRST_STEP
        };
        unsafe { optimizer.adamw(step) }.unwrap();
        for (index, (weight, (w, moves, m, v, g))) in weights.iter().zip(wanted).enumerate() {
            let what = format!("{state:?} tensor {index} step {t}");
            let now = f64s(&weight.weights.read());
            let moved: Vec<f64> = now.iter().zip(&w).map(|(now, w)| now - w).collect();
            close(
                &format!("{what}, update"),
                &moved,
                &moves,
                moves.len(),
                1e-5,
            );
            weight.moments[0].check(&format!("{what}, m"), false, &m);
            weight.moments[1].check(&format!("{what}, v"), true, &v);
            let left = weight.gradient.read();
            match weight.keep_gradient {
                true => assert_eq!(left, g, "{what}"),
                false => assert!(left.iter().all(|g| *g == 0.0), "{what}: gradient left"),
            }
        }
    }
}

#[test]
fn adamw_with_f32_moments() {
    check_adamw(StateDtype::F32);
}

#[test]
fn adamw_with_bf16_moments() {
    check_adamw(StateDtype::Bf16);
}

#[test]
fn adamw_with_8_bit_moments() {
    check_adamw(StateDtype::Int8);
}

/// A NaN that the norm was not asked about reaches its weight, and no other.
#[test]
fn adamw_passes_nan_on() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for state in [StateDtype::F32, StateDtype::Bf16, StateDtype::Int8] {
        let mut weights = weights_of(&gpu, &mut random, state);
        let optimizer = load(&gpu, &weights, state);
        let mut bad = Vec::new();
        for weight in &mut weights {
            let mut gradient = gradient_of(&mut random, weight.count);
            bad.push(random.below(weight.count));
            gradient[bad[bad.len() - 1]] = f64::NAN;
            weight.gradient.write(&gradient);
        }
        unsafe { optimizer.adamw(FIRST_STEP) }.unwrap();
        for (weight, bad) in weights.iter().zip(bad) {
            let is_nan = weight.weights.read().into_iter().map(f32::is_nan);
            let nan: Vec<usize> = is_nan.enumerate().filter(|x| x.1).map(|x| x.0).collect();
            assert_eq!(nan, [bad], "{state:?}");
        }
    }
}
