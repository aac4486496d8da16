//! Launchers of `kernels/bit_linear.cu` and `kernels/bit_linear_hopper.cu`: the forward product of
//! a BitLinear.

use candle_core::CudaDevice;
use half::bf16;

use super::tensor_map::{Element, TensorMap};
use super::{Kernel, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;

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

pub struct BitLinear {
    kernel: Kernel,
    version: Version,
    /// Blocks that the device holds at a time.
    blocks: usize,
}

enum Version {
    /// mma.sync: any chip.
    Portable,
    /// wgmma and TMA.
    Hopper,
}

impl BitLinear {
    /// # Errors
    /// `Tensor` if the driver refuses the kernel.
    pub fn load(device: &CudaDevice, hopper: bool) -> Result<Self> {
        if hopper {
            let module = Module::load(device, fatbin!("bit_linear_hopper"))?;
            let kernel = module.kernel("bit_linear_hopper", hopper::SHARED_BYTES)?;
            return Ok(Self {
                // Clusters of two.
                blocks: kernel.processors()? / 2 * 2,
                kernel,
                version: Version::Hopper,
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
            kernel,
            version: Version::Portable,
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
            match self.version {
                Version::Portable => self.kernel.launch(
                    [self.blocks.min(portable::tiles(m, w.n)), 1, 1],
                    portable::THREADS,
                    &[
                        &x, &w.codes, &x_scale, &w.scales, &residual, &y, rows, n, k, &end0, &end1,
                    ],
                ),
                Version::Hopper => {
                    let codes = |codes: DevicePtr<i8>, rows| {
                        let (address, sizes) = (codes.address(), [w.k, rows]);
                        TensorMap::new(Element::U8, address, sizes, &[w.k], hopper::BOX)
                    };
                    let (x, codes) = (codes(x, m)?, codes(w.codes, w.n)?);
                    self.kernel.launch(
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
    pub const BOX: [u32; 2] = [128, 128];
}
