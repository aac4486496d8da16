//! The two paths on an NVIDIA GPU.

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, Device, Tensor};
use half::bf16;

use super::problem::Problem;
use super::{Measured, timing};
use crate::Result;
use crate::cuda::kernels::{CudaPackedTernary, TernaryMatmul};

/// cuBLAS through candle on the codes in bf16, which holds each of them exactly; the result is
/// rounded to bf16.
pub fn gemm(problem: &Problem, device: &CudaDevice) -> Result<Measured> {
    let &Problem { m, k, n, .. } = problem;
    let device = Device::Cuda(device.clone());
    let float = |codes: &[i8]| -> Vec<bf16> {
        codes
            .iter()
            .map(|&code| bf16::from_f32(code.into()))
            .collect()
    };
    let x = Tensor::from_vec(float(&problem.x), (m, k), &device)?;
    let w = Tensor::from_vec(float(&problem.w), (n, k), &device)?.t()?;
    let mut y = None;
    let timing = timing::measure(
        || {
            y = Some(x.matmul(&w)?);
            Ok(())
        },
        || Ok(device.synchronize()?),
    )?;
    let y = y.expect("measuring calls at least once");
    Ok(Measured {
        name: "bf16 cuBLAS",
        timing,
        bytes: size_of::<bf16>() * (m * k + n * k + m * n),
        agreement: problem.check(&y.flatten_all()?.to_vec1::<bf16>()?),
    })
}

/// `kernels/ternary_matmul.cu`.
pub fn ternary(problem: &Problem, device: &CudaDevice) -> Result<Measured> {
    let &Problem { m, k, n, .. } = problem;
    let kernel = TernaryMatmul::load(device)?;
    let x = device.clone_htod(&problem.x)?;
    let w = CudaPackedTernary::upload(device, &problem.packed)?;
    // No right answer: the check must not pass on memory that the kernel left alone.
    let mut y = device.clone_htod(&vec![i32::MIN; m * n])?;
    let stream = device.cuda_stream();
    let timing = timing::measure(
        || kernel.launch(&x.as_view(), m, &w, &mut y.as_view_mut()),
        || Ok(stream.synchronize().w()?),
    )?;
    Ok(Measured {
        name: "ternary, packed 2-bit",
        timing,
        bytes: m * k + problem.packed.bytes() + size_of::<i32>() * m * n,
        agreement: problem.check(&device.clone_dtoh(&y)?),
    })
}
