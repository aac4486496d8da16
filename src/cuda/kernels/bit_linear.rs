//! Launchers of `kernels/bit_linear.cu` and `kernels/bit_linear_hopper.cu`: exact products of int8
//! and ternary codes.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::bf16;

use super::tensor_map::{Element, TensorMap};
use super::{Kernel, Module, address, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::workspace::QuantizedGradient;

/// Ternary codes (n, k) of one weight, or of up to three that share their input.
#[derive(Clone, Copy, Debug)]
pub struct Projection {
    pub codes: DevicePtr<i8>,
    /// b of each weight.
    pub scales: DevicePtr<f32>,
    pub n: usize,
    pub k: usize,
    /// Rows where the second and the third weight start; n where there is none.
    pub ends: [usize; 2],
}

impl Projection {
    /// The first two weights, and the third where there is one; with each part's first row.
    pub fn parts(&self) -> impl Iterator<Item = (usize, Self)> {
        let end = self.ends[1];
        let first = Self {
            n: end,
            ends: [self.ends[0], end],
            ..*self
        };
        let n = self.n - end;
        let third = (n > 0).then_some(Self {
            codes: self.codes.offset(end * self.k),
            scales: self.scales.offset(2),
            n,
            ends: [n, n],
            ..*self
        });
        std::iter::once((0, first)).chain(third.map(|third| (end, third)))
    }
}

pub struct BitLinear {
    version: Version,
    /// 1, the scale of a weight whose b is elsewhere.
    one: CudaSlice<f32>,
    /// Blocks that the device holds at a time.
    blocks: usize,
}

enum Version {
    /// mma.sync: any chip.
    Portable(Kernel),
    /// wgmma and TMA, in tiles of 256 columns, or of 192.
    Hopper { wide: Kernel, narrow: Kernel },
}

impl BitLinear {
    /// # Errors
    /// `Tensor` if the driver refuses the kernel.
    pub fn load(device: &CudaDevice, hopper: bool) -> Result<Self> {
        let one = device.cuda_stream().clone_htod(&[1f32]).w()?;
        if hopper {
            let module = Module::load(device, fatbin!("bit_linear_hopper"))?;
            let kernel = |name| module.kernel(name, hopper::SHARED_BYTES);
            let wide = kernel("bit_linear_hopper")?;
            let narrow = kernel("bit_linear_hopper_192")?;
            return Ok(Self {
                // Clusters of two.
                blocks: wide.processors()? / 2 * 2,
                version: Version::Hopper { wide, narrow },
                one,
            });
        }
        let module = Module::load(device, fatbin!("bit_linear"))?;
        let four_stages = module.kernel("bit_linear", 4 * portable::STAGE_BYTES)?;
        let wanted = portable::BLOCKS_A_PROCESSOR * four_stages.processors()?;
        // Chips with less shared memory hold as many blocks with a stage less.
        let kernel = match four_stages.resident_blocks(portable::THREADS)? >= wanted {
            true => four_stages,
            false => module.kernel("bit_linear_3_stages", 3 * portable::STAGE_BYTES)?,
        };
        Ok(Self {
            blocks: wanted,
            version: Version::Portable(kernel),
            one,
        })
    }

    /// y = (x . w^T) * b * x_scale + residual, exact sums: int8 codes x (m, k) with a scale a row,
    /// residual (m, n) or null, y (m, n) bf16. y may be the residual.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn forward(
        &self,
        x: DevicePtr<i8>,
        x_scale: DevicePtr<f32>,
        w: &Projection,
        residual: DevicePtr<bf16>,
        y: DevicePtr<bf16>,
        m: usize,
    ) -> Result<()> {
        let [end0, end1] = w.ends.map(|end| end as i32);
        let sizes = [m, w.n, w.k].map(|size| size as i32);
        let [rows, n, k] = &sizes;
        // SAFETY: the arguments are those of the kernels; what they hold is the caller's promise.
        unsafe {
            match &self.version {
                Version::Portable(kernel) => kernel.launch(
                    [self.blocks.min(portable::tiles(m, w.n)), 1, 1],
                    portable::THREADS,
                    &[
                        &x, &w.codes, &x_scale, &w.scales, &residual, &y, rows, n, k, &end0, &end1,
                    ],
                ),
                Version::Hopper { wide, narrow } => {
                    let is_narrow = residual.is_null() && w.k <= hopper::NARROW_UP_TO;
                    let (kernel, w_rows) = if is_narrow { (narrow, 96) } else { (wide, 128) };
                    let codes = |codes: DevicePtr<i8>, rows, box_rows| {
                        let (address, sizes) = (codes.address(), [w.k, rows]);
                        TensorMap::new(Element::U8, address, sizes, &[w.k], [128, box_rows])
                    };
                    let (x, codes) = (codes(x, m, 128)?, codes(w.codes, w.n, w_rows)?);
                    kernel.launch(
                        [self.blocks, 1, 1],
                        hopper::THREADS,
                        &[
                            &x, &codes, &x_scale, &w.scales, &residual, &y, rows, n, k, &end0,
                            &end1,
                        ],
                    )
                }
            }
        }
    }

    /// dx (tokens, k) = dy . wq + residual, exact sums, from codes of dy (tokens, n) that hold b,
    /// and the transposed ternary codes (k, n). The residual may be null, or dx.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn input_gradient(
        &self,
        dy: &QuantizedGradient,
        transposed: DevicePtr<i8>,
        residual: DevicePtr<bf16>,
        dx: DevicePtr<bf16>,
        [tokens, n, k]: [usize; 3],
    ) -> Result<()> {
        let weight = Projection {
            codes: transposed,
            scales: DevicePtr::new(address(&self.one)),
            n: k,
            k: n,
            ends: [k, k],
        };
        // SAFETY: the caller's promise.
        unsafe { self.forward(dy.codes, dy.scale, &weight, residual, dx, tokens) }
    }
}

/// Of `kernels/bit_linear.cu`.
mod portable {
    /// Rows of x and of w that a block multiplies at a time.
    const TILE: usize = 128;
    pub const THREADS: usize = 128;
    pub const BLOCKS_A_PROCESSOR: usize = 2;
    /// 64 bytes of every row of both tiles.
    pub const STAGE_BYTES: usize = 2 * TILE * 64;

    pub fn tiles(m: usize, n: usize) -> usize {
        m.div_ceil(TILE) * n.div_ceil(TILE)
    }
}

/// Of `kernels/bit_linear_hopper.cu`.
mod hopper {
    pub const THREADS: usize = 384;
    pub const SHARED_BYTES: usize = 227 << 10;
    /// Sums, without a residual, for which narrow tiles taken in turns are faster (3% to 12%).
    pub const NARROW_UP_TO: usize = 3200;
}
