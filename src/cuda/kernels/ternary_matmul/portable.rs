//! `kernels/ternary_matmul.cu`: any number of tokens, on every GPU from sm_80 on.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;

use super::{ByOutput, Product};
use crate::Result;
use crate::cuda::kernels::{Launch, Module, fatbin};

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

    /// Shared memory that a block asks for where a multiprocessor has `each` of them: so much that
    /// no more fit. Blocks of the next product come as soon as there is room, and a multiprocessor
    /// that took more of them than the others would keep all waiting.
    fn launch_bytes(&self, each: usize, processor_bytes: usize) -> usize {
        match self.persistent {
            true => self.shared_bytes,
            false => self.shared_bytes.max(processor_bytes / (each + 1)),
        }
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
    /// Shared memory of a multiprocessor.
    processor_bytes: usize,
}

impl Portable {
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("ternary_matmul"))?;
        let attribute =
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR;
        let processor_bytes = device.cuda_stream().context().attribute(attribute).w()? as usize;
        let versions = TILINGS.each_ref().map(|tiling| {
            let name = format!("ternary_matmul_{}", tiling.name());
            let most_bytes = tiling.launch_bytes(1, processor_bytes);
            let kernels = ByOutput::load(&module, &name, most_bytes)?;
            Ok(Version {
                resident_blocks: kernels.bf16.resident_blocks(tiling.threads)?,
                tiling,
                kernels,
            })
        });
        let versions = versions.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(Self {
            processors: versions[0].kernels.int32.processors()?,
            processor_bytes,
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
        let each = blocks.div_ceil(self.processors);
        let launch = Launch {
            grid: [blocks, 1, 1],
            threads: tiling.threads,
            shared_bytes: tiling.launch_bytes(each, self.processor_bytes),
            cluster: 0,
            overlapped: product.overlapped,
        };
        // SAFETY: the caller's promise; the launch is the kernel's.
        unsafe {
            product.launch(
                version.kernels.of(product.output),
                &launch,
                &product.x,
                &product.w,
            )
        }
    }
}
