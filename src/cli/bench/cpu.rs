//! The paths on the CPU.

use std::time::Instant;

use candle_core::{Device, Tensor};

use super::machine::Machine;
use super::problem::Problem;
use super::report::{Path, Row};
use super::shapes::Shape;
use super::timing::{self, Percentiles};
use crate::Result;
use crate::config::Kernels;
use crate::quant::matmul::{Kernel, TernaryMatmul, Threads};

/// Calls are timed in batches of at least this many seconds, far above the cost of reading the
/// clock.
const BATCH: f64 = 2e-4;

pub fn row(shape: &Shape, problem: &Problem, machine: &Machine, kernels: Kernels) -> Result<Row> {
    Ok(Row {
        shape: shape.clone(),
        m: problem.m,
        ternary: ternary(problem, machine, kernels)?,
        dense: dense(problem, machine)?,
        int8: None,
    })
}

/// candle's f32 matrix product (the `gemm` crate) of the codes; exact while sums stay below 2^24.
fn dense(problem: &Problem, machine: &Machine) -> Result<Path> {
    let (m, n, k) = (problem.m, problem.weights.n, problem.weights.k);
    let float = |codes: &[i8]| {
        codes
            .iter()
            .map(|&code| f32::from(code))
            .collect::<Vec<_>>()
    };
    let x = Tensor::from_vec(float(&problem.x), (m, k), &Device::Cpu)?;
    let w = Tensor::from_vec(float(&problem.weights.codes), (n, k), &Device::Cpu)?;
    let copies = (1..copies(size_of::<f32>() * n * k, machine)).map(|_| w.copy());
    let copies = std::iter::once(Ok(w.clone()))
        .chain(copies)
        .map(|w| w?.t())
        .collect::<candle_core::Result<Vec<_>>>()?;
    let (cold, warm) = measure(copies.len(), |copy| {
        x.matmul(&copies[copy])?;
        Ok(())
    })?;
    Ok(Path {
        name: "f32 GEMM".into(),
        cold,
        warm,
        bytes: size_of::<f32>() * (m * k + n * k + m * n),
        agreement: problem.check(&x.matmul(&w.t()?)?.flatten_all()?.to_vec1::<f32>()?),
    })
}

/// The product over packed weights as inference runs it: scaled, in f32. Its sums are checked, and
/// that they are what was scaled.
fn ternary(problem: &Problem, machine: &Machine, kernels: Kernels) -> Result<Path> {
    let (m, n, k) = (problem.m, problem.weights.n, problem.weights.k);
    let packed = &problem.weights.packed;
    let matmul = TernaryMatmul {
        kernel: match kernels {
            Kernels::Auto => Kernel::detect(),
            Kernels::Portable => Kernel::PORTABLE,
        },
        threads: Threads::All,
    };
    let mut sums = vec![0; m * n];
    matmul.exact(&mut sums, &problem.x, packed)?;
    let copies = vec![packed.clone(); copies(packed.bytes(), machine)];
    let mut y = vec![0f32; m * n];
    let (cold, warm) = measure(copies.len(), |copy| {
        let scales = &problem.weights.scales;
        matmul.scaled(&mut y, &problem.x, &problem.scales, &copies[copy], scales)
    })?;
    let scaled = |sum: i32, b: f32, s: f32| sum as f32 * b / s;
    Ok(Path {
        name: matmul.kernel.name().into(),
        cold,
        warm,
        bytes: m * k + packed.bytes() + size_of::<f32>() * m * n,
        agreement: problem.check_scaled(&sums, &y, scaled),
    })
}

/// Copies of weights that together are far beyond the last cache, if they are not tiny.
pub fn copies(bytes: usize, machine: &Machine) -> usize {
    const MOST: usize = 4096;
    (4 * machine.cache_bytes).div_ceil(bytes).min(MOST) + 1
}

/// Times `call` cold, going round all copies of the weights, and warm, staying at one.
fn measure(
    copies: usize,
    mut call: impl FnMut(usize) -> Result<()>,
) -> Result<(Percentiles, Percentiles)> {
    let mut copy = 0;
    let mut timed = |copies: usize| {
        let mut batch = |calls: usize| -> Result<f64> {
            let start = Instant::now();
            for _ in 0..calls {
                copy = (copy + 1) % copies;
                call(copy)?;
            }
            Ok(start.elapsed().as_secs_f64() / calls as f64)
        };
        // The first call pays for page faults, the second shows how long one takes.
        batch(1)?;
        let calls = (BATCH / batch(1)?).ceil() as usize;
        timing::sample(|| batch(calls))
    };
    Ok((timed(copies)?, timed(1)?))
}
