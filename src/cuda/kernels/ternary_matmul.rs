//! Launcher of `kernels/ternary_matmul.cu`.

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut,
};

use super::{Kernel, Module, address, fatbin};
use crate::quant::{PackedTernary, matmul};
use crate::{Error, Result};

/// Rows of `x`, and rows of `w`, that one thread block of the kernel multiplies.
const TILE: usize = 128;
const THREADS: usize = 256;

/// A [`PackedTernary`] in device memory.
pub struct CudaPackedTernary {
    rows: usize,
    cols: usize,
    words: CudaSlice<u32>,
}

impl CudaPackedTernary {
    /// Copies packed weights to the device.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses, as when memory runs out.
    pub fn upload(device: &CudaDevice, packed: &PackedTernary) -> Result<Self> {
        Ok(Self {
            rows: packed.rows(),
            cols: packed.cols(),
            words: device.clone_htod(packed.words())?,
        })
    }
}

/// `y = x . w^T` on the GPU, exact: int8 `x` of shape (M, K), packed ternary `w` of shape (N, K),
/// int32 `y` of shape (M, N). The CPU's version is [`matmul::ternary_matmul`].
pub struct TernaryMatmul {
    device: CudaDevice,
    kernel: Kernel,
}

impl TernaryMatmul {
    /// Loads the kernel.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses it.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            kernel: Module::load(device, fatbin!("ternary_matmul"))?.kernel("ternary_matmul", 0)?,
        })
    }

    /// Queues the product on the device's stream and returns without waiting for it; `y` is
    /// overwritten whole. All three operands must live on the device given to `load`.
    ///
    /// # Errors
    /// `Usage` on lengths that do not fit together, on K above [`matmul::MAX_K`], on M above
    /// 2^31 - 1 or N above 65535 tiles (the limits of a CUDA grid); `Tensor` if the driver refuses.
    pub fn launch(
        &self,
        x: &CudaView<i8>,
        m: usize,
        w: &CudaPackedTernary,
        y: &mut CudaViewMut<i32>,
    ) -> Result<()> {
        let (n, k) = (w.rows, w.cols);
        matmul::check_shapes(x.len(), m, k)?;
        if m.checked_mul(n) != Some(y.len()) {
            return Err(Error::usage(format!(
                "an output of {} values cannot hold a product of shape {m} x {n}",
                y.len()
            )));
        }
        if m > i32::MAX as usize || n.div_ceil(TILE) > 65535 {
            return Err(Error::usage(format!(
                "a product of shape {m} x {n} is larger than a CUDA grid: at most {} x {}",
                i32::MAX,
                65535 * TILE
            )));
        }
        let grid = [m.div_ceil(TILE), n.div_ceil(TILE), 1];
        let stream = self.device.cuda_stream();
        let (x, _x) = x.device_ptr(&stream);
        let (y, _y) = y.device_ptr_mut(&stream);
        let words = address(&w.words);
        let (m, n, k) = (m as i32, n as i32, k as i32);
        // SAFETY: the arguments are those of the kernel's signature, in order; it reads m * k
        // values of x and n * ceil(k / 16) words and writes m * n values of y, which is what the
        // checks above (and `PackedTernary`) say the buffers hold.
        unsafe {
            self.kernel
                .launch(grid, THREADS, &[&x, &words, &y, &m, &n, &k])
        }
    }
}
