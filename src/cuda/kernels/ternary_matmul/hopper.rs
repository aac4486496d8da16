//! `kernels/ternary_matmul_hopper.cu`: more than a few tokens, by wgmma and TMA.

use candle_core::CudaDevice;

use super::split::{self, Split};
use super::{ByOutput, Product};
use crate::Result;
use crate::cuda::kernels::tensor_map::{Element, TensorMap};
use crate::cuda::kernels::{Launch, Module, fatbin};

/// Columns of w that the kernels take at a time.
const CHUNK: usize = 128;
const THREADS: usize = 384;
const SHARED_BYTES: usize = 227 << 10;
/// Bytes and tokens of a box of x.
const BOX: [u32; 2] = [128, 128];

/// A kernel of `ternary_matmul_hopper.cu`, in which blocks walk over tiles of y.
struct Tiling {
    /// Tokens, and rows of w of all blocks of a cluster.
    tile: [usize; 2],
    /// Blocks that take a tile together.
    cluster: usize,
    /// Fewer tokens leave so much of a box of x empty that it arrives slowly.
    least_tokens: usize,
    /// Microseconds of a launch, and of a chunk. Fitted to an H200.
    launch_us: f64,
    chunk_us: f64,
}

const TILINGS: [Tiling; 2] = [
    Tiling {
        tile: [128, 64],
        cluster: 1,
        least_tokens: 65,
        launch_us: 2.8,
        chunk_us: 0.199,
    },
    Tiling {
        tile: [256, 128],
        cluster: 2,
        least_tokens: 256,
        launch_us: 4.5,
        chunk_us: 0.298,
    },
];

/// Microseconds from one tile to the next.
const TILE_US: f64 = 0.4;

struct Version {
    tiling: &'static Tiling,
    kernels: ByOutput,
    /// Blocks of a launch.
    blocks: usize,
}

pub struct Hopper {
    versions: Vec<Version>,
    split: Split,
}

/// The kernel for a product.
enum Choice<'a> {
    Whole(&'a Version),
    Split(split::Choice<'a>),
}

impl Hopper {
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("ternary_matmul_hopper"))?;
        let versions = TILINGS.each_ref().map(|tiling| {
            let name = format!("ternary_matmul_hopper_{}", tiling.tile[0]);
            let kernels = ByOutput::load(&module, &name, SHARED_BYTES)?;
            let processors = kernels.int32.processors()?;
            Ok(Version {
                tiling,
                kernels,
                blocks: processors / tiling.cluster * tiling.cluster,
            })
        });
        Ok(Self {
            versions: versions.into_iter().collect::<Result<_>>()?,
            split: Split::load(device)?,
        })
    }

    /// What takes the least time, as predicted: large tiles multiply faster, small ones and a split
    /// of K leave fewer multiprocessors idle.
    fn choose(&self, m: usize, n: usize, k: usize) -> Choice<'_> {
        let versions = self.versions.iter();
        let whole = versions
            .filter(|version| m >= version.tiling.least_tokens)
            .map(|version| (version.predicted_us(m, n, k), Choice::Whole(version)));
        let split = self.split.choose(m, n, k);
        let split = split.map(|split| (split.predicted_us, Choice::Split(split)));
        let choices = whole.chain(split);
        let (_, fastest) = choices
            .min_by(|(a, _), (b, _)| a.total_cmp(b))
            .expect("up to 64 tokens K can be split, and beyond it need not be");
        fastest
    }

    pub fn name(&self, m: usize, n: usize, k: usize) -> String {
        let tiles = |[tokens, rows]: [usize; 2]| format!("wgmma, tiles of {tokens}x{rows}");
        match self.choose(m, n, k) {
            Choice::Whole(Version { tiling, .. }) => {
                tiles([tiling.tile[0], tiling.tile[1] / tiling.cluster])
            }
            Choice::Split(split) if split.parts == 1 => tiles(split.tile()),
            Choice::Split(split) => format!("{}, K in {}", tiles(split.tile()), split.parts),
        }
    }

    /// # Safety
    /// As [`Product::launch`].
    pub unsafe fn launch(&self, product: &Product) -> Result<()> {
        let version = match self.choose(product.m, product.n, product.k) {
            Choice::Whole(version) => version,
            // SAFETY: the caller's promise.
            Choice::Split(split) => return unsafe { split.launch(product) },
        };
        let sizes = [product.k, product.m];
        let x = TensorMap::new(Element::U8, product.x, sizes, &[product.k], BOX)?;
        let launch = Launch {
            grid: [version.blocks, 1, 1],
            threads: THREADS,
            shared_bytes: SHARED_BYTES,
            cluster: 0,
            overlapped: product.overlapped,
        };
        let kernel = version.kernels.of(product.output);
        // SAFETY: the caller's promise; the launch is the kernel's.
        unsafe { product.launch(kernel, &launch, &x, &product.w) }
    }
}

impl Version {
    fn predicted_us(&self, m: usize, n: usize, k: usize) -> f64 {
        let Tiling {
            tile: [tokens, rows],
            cluster,
            launch_us,
            chunk_us,
            ..
        } = *self.tiling;
        let tiles = m.div_ceil(tokens) * n.div_ceil(rows);
        let turns = tiles.div_ceil(self.blocks / cluster) as f64;
        launch_us + chunk_us * turns * k.div_ceil(CHUNK) as f64 + TILE_US * (turns - 1.0)
    }
}
