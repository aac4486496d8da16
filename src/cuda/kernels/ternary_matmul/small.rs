//! `kernels/ternary_matmul_small.cu`: few tokens, bound by reading the weights once.

use candle_core::CudaDevice;

use super::{ByOutput, Product};
use crate::Result;
use crate::cuda::kernels::{Launch, Module, fatbin};

/// Rows of a tile of weights.
const TILE_ROWS: usize = 16;
/// Columns that a warp has under way.
const RUN: usize = 256;
const WARP: usize = 32;
/// Registers of a multiprocessor.
const REGISTERS: usize = 65536;

/// A kernel of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Variant {
    /// As the kernel is called.
    name: &'static str,
    /// Most tokens of a block.
    tokens: usize,
    /// Rows of tiles of a block.
    tiles: usize,
    /// Of a thread, about: fitted to an H200.
    registers: usize,
    most_warps: usize,
}

const fn variant(
    name: &'static str,
    tokens: usize,
    tiles: usize,
    registers: usize,
    most_warps: usize,
) -> Variant {
    Variant {
        name,
        tokens,
        tiles,
        registers,
        most_warps,
    }
}

const VARIANTS: [Variant; 8] = [
    variant("1_1", 1, 1, 48, 32),
    variant("1_2", 1, 2, 56, 32),
    variant("8_1", 8, 1, 40, 32),
    variant("8_2", 8, 2, 56, 32),
    variant("16_1", 16, 1, 64, 24),
    variant("16_2", 16, 2, 80, 20),
    variant("16_2_stored", 16, 2, 84, 20),
    variant("16_4", 16, 4, 120, 16),
];

pub struct Small {
    /// Of [`VARIANTS`], in their order.
    kernels: Vec<ByOutput>,
    processors: usize,
}

impl Small {
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("ternary_matmul_small"))?;
        let kernels = VARIANTS.iter().map(|variant| {
            let name = format!("ternary_matmul_small_{}", variant.name);
            ByOutput::load(&module, &name, variant.shared_bytes(variant.most_warps))
        });
        let kernels = kernels.collect::<Result<Vec<_>>>()?;
        Ok(Self {
            processors: kernels[0].int32.processors()?,
            kernels,
        })
    }

    /// # Safety
    /// As [`Product::launch`].
    pub unsafe fn launch(&self, product: &Product) -> Result<()> {
        let row_tiles = product.n.div_ceil(TILE_ROWS);
        let at = choose(product.m, row_tiles, self.processors);
        let variant = &VARIANTS[at];
        let blocks = variant.blocks(product.m, row_tiles);
        let blocks_each = (blocks[0] * blocks[1]).div_ceil(self.processors);
        let warps = variant.warps(blocks_each, product.k.div_ceil(RUN));
        let launch = Launch {
            grid: [blocks[0], blocks[1], 1],
            threads: WARP * warps,
            shared_bytes: variant.shared_bytes(warps),
            cluster: 0,
            overlapped: product.overlapped,
        };
        let kernel = self.kernels[at].of(product.output);
        // SAFETY: the caller's promise; the launch is the kernel's.
        unsafe { product.launch(kernel, &launch, &product.x, &product.w) }
    }
}

/// The place in [`VARIANTS`] of the fastest: more tiles a block share the loads of x, fewer balance
/// better. Fitted to an H200.
fn choose(m: usize, row_tiles: usize, processors: usize) -> usize {
    // Rows of tiles of the busiest multiprocessor, with so many a block.
    let busiest = |tiles: usize| tiles * row_tiles.div_ceil(tiles).div_ceil(processors);
    let many_rows = row_tiles > 7 * processors;
    let more_rows_than_processors = row_tiles > processors;
    match m {
        1 => usize::from(many_rows),
        2..=8 => 2 + usize::from(more_rows_than_processors),
        _ if many_rows && 8 * busiest(4) <= 9 * busiest(2) => 7,
        _ if !more_rows_than_processors => 4,
        _ => {
            let [x, y] = VARIANTS[5].blocks(m, row_tiles);
            5 + usize::from((x * y).div_ceil(processors) > 2)
        }
    }
}

impl Variant {
    fn blocks(&self, m: usize, row_tiles: usize) -> [usize; 2] {
        [m.div_ceil(self.tokens), row_tiles.div_ceil(self.tiles)]
    }

    /// All blocks should be resident at once, with as many warps as then have registers, and these
    /// evenly loaded with `runs` of columns.
    fn warps(&self, blocks_each: usize, runs: usize) -> usize {
        let resident = REGISTERS / WARP / self.registers;
        let most = (resident / blocks_each).clamp(4, self.most_warps);
        runs.div_ceil(runs.div_ceil(most))
    }

    fn shared_bytes(&self, warps: usize) -> usize {
        warps * RUN * self.tokens.max(2)
    }
}
