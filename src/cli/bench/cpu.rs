//! The two paths on the CPU.

use candle_core::{Device, Tensor};

use super::problem::Problem;
use super::{Measured, timing};
use crate::Result;
use crate::quant::ternary_matmul;

/// candle's f32 matrix product (the `gemm` crate) of the codes; exact while sums stay below 2^24.
pub fn gemm(problem: &Problem) -> Result<Measured> {
    let &Problem { m, k, n, .. } = problem;
    let float = |codes: &[i8]| {
        codes
            .iter()
            .map(|&code| f32::from(code))
            .collect::<Vec<_>>()
    };
    let x = Tensor::from_vec(float(&problem.x), (m, k), &Device::Cpu)?;
    let w = Tensor::from_vec(float(&problem.w), (n, k), &Device::Cpu)?.t()?;
    let mut y = None;
    let timing = timing::measure(
        || {
            y = Some(x.matmul(&w)?);
            Ok(())
        },
        || Ok(()),
    )?;
    let y = y.expect("measuring calls at least once");
    Ok(Measured {
        name: "f32 GEMM",
        timing,
        bytes: size_of::<f32>() * (m * k + n * k + m * n),
        agreement: problem.check(&y.flatten_all()?.to_vec1::<f32>()?),
    })
}

pub fn ternary(problem: &Problem) -> Result<Measured> {
    let &Problem { m, k, n, .. } = problem;
    let mut y = Vec::new();
    let timing = timing::measure(
        || {
            y = ternary_matmul(&problem.x, m, &problem.packed)?;
            Ok(())
        },
        || Ok(()),
    )?;
    Ok(Measured {
        name: "ternary, packed 2-bit",
        timing,
        bytes: m * k + problem.packed.bytes() + size_of::<i32>() * m * n,
        agreement: problem.check(&y),
    })
}
