//! The paths on an NVIDIA GPU, each timed as a CUDA graph of many launches.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use half::bf16;

use super::Args;
use super::cpu::copies;
use super::machine::Machine;
use super::problem::Problem;
use super::report::{Path, Row};
use super::shapes::Shape;
use super::timing::{self, Percentiles};
use crate::Result;
use crate::cuda::kernels::gemm::{Float, Gemm, Layout, Operand, Output};
use crate::cuda::kernels::{TernaryMatmul, TernaryTiles, address};
use crate::cuda::{DevicePtr, record};

/// Launches in a graph at least, so that its start weighs little.
const LAUNCHES: usize = 32;

pub struct Bench<'a> {
    device: &'a CudaDevice,
    machine: &'a Machine,
    gemm: Gemm,
    tiles: TernaryTiles,
    kernels: TernaryMatmul,
}

impl<'a> Bench<'a> {
    pub fn new(args: &Args, device: &'a CudaDevice, machine: &'a Machine) -> Result<Self> {
        let kernels = TernaryMatmul::load(device, args.kernels)?;
        Ok(Self {
            device,
            machine,
            gemm: Gemm::new(device.cuda_stream())?,
            tiles: TernaryTiles::load(device)?,
            kernels: match args.in_turn {
                true => kernels.in_turn(),
                false => kernels,
            },
        })
    }

    pub fn row(&self, shape: &Shape, problem: &Problem) -> Result<Row> {
        Ok(Row {
            shape: shape.clone(),
            m: problem.m,
            ternary: self.ternary(problem)?,
            dense: self.bf16(problem)?,
            int8: self.int8(problem),
        })
    }

    /// The product over packed weights as inference runs it: scaled, in bf16. Its sums are checked
    /// in int32, and that they are what was scaled.
    fn ternary(&self, problem: &Problem) -> Result<Path> {
        let (m, n, k) = (problem.m, problem.weights.n, problem.weights.k);
        let packed = &problem.weights.packed;
        let x = self.device.clone_htod(&problem.x)?;
        let x_scales = self.device.clone_htod(&problem.scales)?;
        let w = self.tiles.upload(packed, &problem.weights.scales)?;
        let copies = (1..copies(w.bytes(), self.machine))
            .map(|_| w.duplicate())
            .collect::<Result<Vec<_>>>()?;
        let weights: Vec<_> = std::iter::once(&w).chain(&copies).collect();
        // No right answers: the checks must not pass on memory that the kernels left alone.
        let mut sums = self.device.clone_htod(&vec![i32::MIN; m * n])?;
        let mut y = self.device.clone_htod(&vec![bf16::NAN; m * n])?;
        let (x, x_scales) = (x.as_view(), x_scales.as_view());
        self.kernels.sums(&x, m, &w, &mut sums.as_view_mut())?;
        self.kernels
            .scaled(&x, &x_scales, m, &w, &mut y.as_view_mut())?;
        let agreement = problem.check_scaled(
            &self.device.clone_dtoh(&sums)?,
            &self.device.clone_dtoh(&y)?,
            |sum, b, s| bf16::from_f32(sum as f32 * b * s),
        );
        drop(sums);
        let (cold, warm) = self.measure(weights.len(), |copy| {
            let y = &mut y.as_view_mut();
            self.kernels.scaled(&x, &x_scales, m, weights[copy], y)
        })?;
        Ok(Path {
            name: self.kernels.kernel_name(m, n, k),
            cold,
            warm,
            bytes: m * k + packed.bytes() + size_of::<bf16>() * m * n,
            agreement,
        })
    }

    /// cuBLASLt on the codes in bf16, which holds each of them exactly; its result is rounded.
    fn bf16(&self, problem: &Problem) -> Result<Path> {
        let (n, k) = (problem.weights.n, problem.weights.k);
        let values = |codes: &[i8]| -> Vec<bf16> {
            codes
                .iter()
                .map(|&code| bf16::from_f32(code.into()))
                .collect()
        };
        let multiply = |sizes, x, w, y: DevicePtr<bf16>| {
            let output = Output {
                address: y.address(),
                stride: n,
                dtype: Float::Bf16,
                add: false,
            };
            let (x, w) = (Operand::bf16(x, k), Operand::bf16(w, k));
            // SAFETY: `library` gives operands of the sizes given.
            unsafe { self.gemm.multiply(Layout::NT, sizes, x, w, output) }
        };
        self.library("bf16 cuBLASLt", problem, values, bf16::NAN, multiply)
    }

    /// cuBLASLt on the codes, with its sums left in int32. `None` where it does not take the shape.
    fn int8(&self, problem: &Problem) -> Option<Path> {
        let values = |codes: &[i8]| codes.to_vec();
        // SAFETY: as above.
        let multiply = |sizes, x, w, y| unsafe { self.gemm.multiply_int8(sizes, x, w, y) };
        self.library("int8 cuBLASLt", problem, values, i32::MIN, multiply)
            .ok()
    }

    fn library<T, Y>(
        &self,
        name: &str,
        problem: &Problem,
        values: impl Fn(&[i8]) -> Vec<T>,
        no_answer: Y,
        multiply: impl Fn([usize; 3], DevicePtr<T>, DevicePtr<T>, DevicePtr<Y>) -> Result<()>,
    ) -> Result<Path>
    where
        T: DeviceRepr + 'static,
        Y: DeviceRepr + Copy + Into<f64> + Sync + 'static,
    {
        let (m, n, k) = (problem.m, problem.weights.n, problem.weights.k);
        let x = self.device.clone_htod(&values(&problem.x))?;
        let w = self.device.clone_htod(&values(&problem.weights.codes))?;
        let copies = (1..copies(size_of::<T>() * n * k, self.machine))
            .map(|_| Ok(self.device.cuda_stream().clone_dtod(&w).w()?))
            .collect::<Result<Vec<CudaSlice<T>>>>()?;
        let weights: Vec<_> = std::iter::once(&w).chain(&copies).collect();
        let y = self.device.clone_htod(&vec![no_answer; m * n])?;
        let launch = |copy: usize| {
            let (x, w) = (address(&x), address(weights[copy]));
            multiply(
                [m, n, k],
                DevicePtr::new(x),
                DevicePtr::new(w),
                DevicePtr::new(address(&y)),
            )
        };
        launch(0)?;
        let agreement = problem.check(&self.device.clone_dtoh(&y)?);
        let (cold, warm) = self.measure(weights.len(), launch)?;
        Ok(Path {
            name: name.into(),
            cold,
            warm,
            bytes: size_of::<T>() * (m * k + n * k) + size_of::<Y>() * m * n,
            agreement,
        })
    }

    /// Times graphs of launches: cold, going round all copies of the weights, and warm, staying at
    /// one.
    fn measure(
        &self,
        copies: usize,
        mut launch: impl FnMut(usize) -> Result<()>,
    ) -> Result<(Percentiles, Percentiles)> {
        let stream = self.device.cuda_stream();
        let event = || {
            stream
                .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
                .w()
        };
        let mut timed = |copies: usize| {
            let launches = LAUNCHES.next_multiple_of(copies);
            let graph = record(&stream, || {
                (0..launches).try_for_each(|i| launch(i % copies))
            })?;
            let replay = || {
                let start = event()?;
                graph.launch().w()?;
                let seconds = f64::from(start.elapsed_ms(&event()?).w()?) / 1e3;
                Ok(seconds / launches as f64)
            };
            replay()?;
            timing::sample(replay)
        };
        Ok((timed(copies)?, timed(1)?))
    }
}
