//! Rows for norms: inputs, their normalisation in f64, and buffers for what is kept of them.

use half::bf16;
use titanbit::cuda::kernels::bit_linear::Projection;
use titanbit::cuda::kernels::rms_norm::Normed;
use titanbit::cuda::{DevicePtr, NormStatistics};

use crate::check::{close, codes};
use crate::gpu::{Buffer, Gpu};
use crate::random::Random;

pub const EPS: f32 = 1e-5;
/// Rows and features: one row and more than go through the GPU at a time; up to the widest, on both
/// sides of 768, up to which a warp has a row.
pub const SIZES: [(usize, usize); 9] = [
    (1, 16),
    (5, 48),
    (33, 768),
    (3301, 784),
    (9001, 80),
    (300, 2048),
    (77, 3200),
    (301, 8640),
    (3, 16384),
];

/// A row's normalisation.
pub struct Normal {
    pub rstd: f64,
    pub scale: f64,
    /// Normalised values.
    pub values: Vec<f64>,
}

impl Normal {
    pub fn of(x: &[f64], weight: &[f32]) -> Self {
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
    pub fn backward(&self, x: &[f64], weight: &[f32], dn: &[f64], dweight: &mut [f64]) -> Vec<f64> {
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
pub struct OnGpu {
    pub x: Buffer<bf16>,
    pub weight: Buffer<f32>,
    pub scale: Buffer<f32>,
    pub rstd: Buffer<f32>,
}

impl OnGpu {
    pub fn new(gpu: &Gpu, x: &[bf16], weight: &[f32], rows: usize) -> Self {
        Self {
            x: gpu.upload(x),
            weight: gpu.upload(weight),
            scale: gpu.poisoned(rows),
            rstd: gpu.poisoned(rows),
        }
    }

    pub fn normed(&self) -> Normed {
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
pub fn rows_of(random: &mut Random, rows: usize, features: usize) -> Vec<bf16> {
    let row = |row| {
        let scale = match row {
            1 => 0.0,
            _ => 10f64.powf(5.0 * random.uniform() - 3.0),
        };
        random.bf16s(features, scale)
    };
    (0..rows).flat_map(row).collect()
}

pub fn weight_of(random: &mut Random, features: usize) -> Vec<f32> {
    (0..features)
        .map(|_| (1.0 + 0.3 * random.normal()) as f32)
        .collect()
}

/// What the codes stand for, as the backward pass writes it for the next product.
pub fn dequantised(codes: &[i8], scales: &[f32], features: usize) -> Vec<bf16> {
    let value = |(at, code): (usize, &i8)| bf16::from_f32(f32::from(*code) * scales[at / features]);
    codes.iter().enumerate().map(value).collect()
}

/// Codes, and what the norm keeps of each row.
pub fn check_quantised(what: &str, got: &[i8], on_gpu: &OnGpu, rows: &[Normal]) {
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

/// A projection of which only the b of its weights are read.
pub fn projection(scales: &Buffer<f32>, [n, k]: [usize; 2], ends: [usize; 2]) -> Projection {
    Projection {
        codes: DevicePtr::NULL,
        scales: scales.ptr(),
        n,
        k,
        ends,
    }
}
