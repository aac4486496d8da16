//! `kernels/ternary_matmul.cu`: any number of tokens, on every GPU from sm_80 on.

use candle_core::CudaDevice;

use super::{ByOutput, Launch, Product};
use crate::Result;
use crate::cuda::kernels::{Module, fatbin};

/// How a kernel of the file cuts up y.
struct Tiling {
    /// Tokens and rows of w of a block's tile.
    tile: [usize; 2],
    threads: usize,
    shared_bytes: usize,
    /// Blocks walk over tiles, as many as are resident; else there is one for each.
    persistent: bool,
    /// Time of a tile for each multiprocessor, in proportion to the others'. Fitted to an H200.
    cost: f64,
}

const TILINGS: [Tiling; 4] = [
    Tiling {
        tile: [128, 256],
        threads: 256,
        shared_bytes: 98304,
        persistent: true,
        cost: 8.7,
    },
    Tiling {
        tile: [128, 128],
        threads: 128,
        shared_bytes: 61440,
        persistent: true,
        cost: 4.55,
    },
    Tiling {
        tile: [32, 64],
        threads: 128,
        shared_bytes: 49152,
        persistent: false,
        cost: 0.82,
    },
    Tiling {
        tile: [32, 32],
        threads: 128,
        shared_bytes: 61440,
        persistent: false,
        cost: 0.55,
    },
];

impl Tiling {
    fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.tile[0]) * n.div_ceil(self.tile[1])
    }

    fn name(&self) -> String {
        let [tokens, rows] = self.tile;
        format!("{tokens}x{rows}")
    }
}

struct Version {
    tiling: &'static Tiling,
    kernels: ByOutput,
    resident_blocks: usize,
}

pub struct Portable {
    versions: Vec<Version>,
    processors: usize,
}

impl Portable {
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("ternary_matmul"))?;
        let versions = TILINGS.each_ref().map(|tiling| {
            let name = format!("ternary_matmul_{}", tiling.name());
            let kernels = ByOutput::load(&module, &name, tiling.shared_bytes)?;
            Ok(Version {
                resident_blocks: kernels.bf16.resident_blocks(tiling.threads)?,
                tiling,
                kernels,
            })
        });
        let versions = versions.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(Self {
            processors: versions[0].kernels.int32.processors()?,
            versions,
        })
    }

    pub fn tile_name(&self, m: usize, n: usize) -> String {
        self.choose(m, n).tiling.name()
    }

    /// The version whose busiest multiprocessor has the least to do.
    fn choose(&self, m: usize, n: usize) -> &Version {
        let cost = |version: &Version| {
            let tiling = version.tiling;
            tiling.cost * tiling.tiles(m, n).div_ceil(self.processors) as f64
        };
        let versions = self.versions.iter();
        versions
            .min_by(|a, b| cost(a).total_cmp(&cost(b)))
            .expect("there are four")
    }

    /// # Safety
    /// As [`Product::launch`].
    pub unsafe fn launch(&self, product: &Product) -> Result<()> {
        let version = self.choose(product.m, product.n);
        let tiling = version.tiling;
        let tiles = tiling.tiles(product.m, product.n);
        let blocks = match tiling.persistent {
            true => tiles.min(version.resident_blocks),
            false => tiles,
        };
        let launch = Launch {
            grid: [blocks, 1, 1],
            threads: tiling.threads,
            shared_bytes: tiling.shared_bytes,
        };
        // SAFETY: the caller's promise; the launch is the kernel's.
        unsafe { product.launch(version.kernels.of(product.output), &launch, None) }
    }
}
