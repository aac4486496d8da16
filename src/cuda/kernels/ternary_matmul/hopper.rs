//! `kernels/ternary_matmul_hopper.cu`: many tokens, by wgmma and TMA.

use candle_core::CudaDevice;

use super::{ByOutput, Launch, Product};
use crate::Result;
use crate::cuda::kernels::tensor_map::{Element, TensorMap};
use crate::cuda::kernels::{Module, fatbin};

const THREADS: usize = 384;
const SHARED_BYTES: usize = 227 << 10;
/// Bytes and tokens of a box of x.
const BOX: [u32; 2] = [128, 128];
/// Tokens of the tiles, and rows of w.
const WIDE: usize = 256;
const NARROW: usize = 128;
const ROWS: usize = 64;

pub struct Hopper {
    wide: ByOutput,
    narrow: ByOutput,
    processors: usize,
}

impl Hopper {
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("ternary_matmul_hopper"))?;
        let tiles = |tokens: usize| {
            let name = format!("ternary_matmul_hopper_{tokens}");
            ByOutput::load(&module, &name, SHARED_BYTES)
        };
        let wide = tiles(WIDE)?;
        Ok(Self {
            processors: wide.int32.processors()?,
            wide,
            narrow: tiles(NARROW)?,
        })
    }

    /// Wide tiles multiply faster, narrow ones leave fewer multiprocessors idle; boxes that reach
    /// far beyond x are slow.
    fn is_wide(&self, m: usize, n: usize) -> bool {
        let turns_of = |tokens: usize, rows: usize, blocks: usize| {
            (m.div_ceil(tokens) * n.div_ceil(rows)).div_ceil(blocks)
        };
        let narrow = turns_of(NARROW, ROWS, self.processors);
        let wide = turns_of(WIDE, 2 * ROWS, self.processors / 2);
        m >= WIDE && 7 * narrow >= 10 * wide
    }

    /// At least half of the multiprocessors have a tile; smaller tiles are better otherwise.
    pub fn fills_the_gpu(&self, m: usize, n: usize) -> bool {
        2 * m.div_ceil(NARROW) * n.div_ceil(ROWS) > self.processors
    }

    pub fn tile_name(&self, m: usize, n: usize) -> String {
        let tokens = if self.is_wide(m, n) { WIDE } else { NARROW };
        format!("{tokens}x{ROWS}")
    }

    /// # Safety
    /// As [`Product::launch`].
    pub unsafe fn launch(&self, product: &Product) -> Result<()> {
        let is_wide = self.is_wide(product.m, product.n);
        let (kernels, blocks) = match is_wide {
            // Clusters of two.
            true => (&self.wide, self.processors / 2 * 2),
            false => (&self.narrow, self.processors),
        };
        let sizes = [product.k, product.m];
        let x = TensorMap::new(Element::U8, product.x, sizes, &[product.k], BOX)?;
        let launch = Launch {
            grid: [blocks, 1, 1],
            threads: THREADS,
            shared_bytes: SHARED_BYTES,
        };
        // SAFETY: the caller's promise; the launch is the kernel's.
        unsafe { product.launch(kernels.of(product.output), &launch, Some(&x)) }
    }
}
