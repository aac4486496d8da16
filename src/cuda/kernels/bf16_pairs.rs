//! Launcher of `kernels/bf16_pairs.cu`: f32 matrices as pairs of bf16 ones, which tensor cores
//! multiply to 16 bits.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::bf16;

use super::gemm::{Float, Gemm, Layout, Operand, Output};
use super::vocabulary::{CudaTable, CudaTableValues};
use super::{Kernel, Module, address, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;

const THREADS: usize = 256;
/// Values that a thread splits.
const VALUES: usize = 4;

/// A matrix (rows, cols): its values rounded to bf16, then what that leaves of them.
pub struct Bf16Pairs {
    values: CudaSlice<bf16>,
    rows: usize,
    cols: usize,
}

impl Bf16Pairs {
    /// # Errors
    /// `Tensor` if memory runs out.
    pub fn zeros(device: &CudaDevice, rows: usize, cols: usize) -> Result<Self> {
        let values = device.cuda_stream().alloc_zeros(2 * rows * cols).w()?;
        Ok(Self { values, rows, cols })
    }

    /// high, low
    fn halves(&self) -> [DevicePtr<bf16>; 2] {
        let high = DevicePtr::new(address(&self.values));
        [high, high.offset(self.rows * self.cols)]
    }
}

pub struct SplitBf16 {
    device: CudaDevice,
    f32: Kernel,
    f16: Kernel,
}

impl SplitBf16 {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("bf16_pairs"))?;
        Ok(Self {
            device: device.clone(),
            f32: module.kernel("split_f32", 0)?,
            f16: module.kernel("split_f16", 0)?,
        })
    }

    /// # Errors
    /// `Tensor` if the driver refuses the launch or memory runs out.
    pub fn table(&self, table: &CudaTable) -> Result<Bf16Pairs> {
        let pairs = Bf16Pairs::zeros(&self.device, table.rows(), table.cols())?;
        let (kernel, values) = match table.values() {
            CudaTableValues::F32(values) => (&self.f32, address(values)),
            CudaTableValues::F16(values) => (&self.f16, address(values)),
        };
        // SAFETY: both hold so many values.
        unsafe { run(kernel, values, &pairs, table.rows())? };
        Ok(pairs)
    }

    /// The first `rows` rows of `pairs` from x (rows, cols).
    ///
    /// # Safety
    /// `x` must hold them, and `pairs` have them.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn rows(&self, x: DevicePtr<f32>, pairs: &Bf16Pairs, rows: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { run(&self.f32, x.address(), pairs, rows) }
    }
}

unsafe fn run(kernel: &Kernel, x: u64, pairs: &Bf16Pairs, rows: usize) -> Result<()> {
    let [high, low] = pairs.halves();
    let count = rows * pairs.cols;
    let blocks = count.div_ceil(THREADS * VALUES);
    // SAFETY: the arguments are those of the kernel; the rest is the caller's promise.
    unsafe { kernel.launch([blocks, 1, 1], THREADS, &[&x, &high, &low, &(count as i64)]) }
}

/// y (rows, stride) = the first rows of a, times b^T: high . high + high . low + low . high.
///
/// # Safety
/// `y` must hold it, and `a` so many rows of as many columns as `b`.
///
/// # Errors
/// `Tensor` if the library refuses.
pub unsafe fn multiply(
    gemm: &Gemm,
    [a, b]: [&Bf16Pairs; 2],
    rows: usize,
    y: DevicePtr<f32>,
    stride: usize,
) -> Result<()> {
    let sizes = [rows, b.rows, b.cols];
    let [a_high, a_low] = a.halves().map(|values| Operand::bf16(values, a.cols));
    let [b_high, b_low] = b.halves().map(|values| Operand::bf16(values, b.cols));
    // The small sums first.
    for (nth, (a, b)) in [(a_low, b_high), (a_high, b_low), (a_high, b_high)]
        .into_iter()
        .enumerate()
    {
        let output = Output {
            address: y.address(),
            stride,
            dtype: Float::F32,
            add: nth > 0,
        };
        // SAFETY: the caller's promise.
        unsafe { gemm.multiply(Layout::NT, sizes, a, b, output)? };
    }
    Ok(())
}
