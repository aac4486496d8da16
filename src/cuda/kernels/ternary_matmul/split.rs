//! `kernels/ternary_matmul_split_hopper.cu`: products of few tiles, where the blocks of a cluster
//! split K.

use candle_core::CudaDevice;

use super::{ByOutput, Product};
use crate::Result;
use crate::cuda::kernels::tensor_map::{Element, TensorMap};
use crate::cuda::kernels::{Launch, Module, fatbin};

/// Rows and columns of a tile of w, and its lines of so many bytes.
const TILE_ROWS: usize = 16;
const TILE_COLUMNS: usize = 128;
const TILE_LINES: usize = 4;
const LINE: usize = 128;

const THREADS: usize = 288;
/// Blocks that may split K.
const PARTS: [usize; 6] = [1, 2, 3, 4, 6, 8];

/// A kernel of the file. Its microseconds were fitted to an H200.
struct Tiling {
    /// Tokens and rows of w of a tile of y.
    tile: [usize; 2],
    /// Columns of w in a stage, in tiles of w.
    chunks: usize,
    shared_bytes: usize,
    /// Of a launch, and of a chunk.
    launch_us: f64,
    chunk_us: f64,
}

const fn tiling(
    tile: [usize; 2],
    chunks: usize,
    shared_kb: usize,
    launch_us: f64,
    chunk_us: f64,
) -> Tiling {
    Tiling {
        tile,
        chunks,
        shared_bytes: shared_kb << 10,
        launch_us,
        chunk_us,
    }
}

const TILINGS: [Tiling; 5] = [
    tiling([32, 64], 2, 113, 1.7, 0.108),
    tiling([32, 128], 2, 113, 2.0, 0.161),
    tiling([64, 64], 1, 113, 1.9, 0.165),
    tiling([64, 128], 1, 113, 2.4, 0.228),
    tiling([128, 128], 1, 227, 4.6, 0.305),
];

/// Microseconds that each further tile of a multiprocessor adds.
const TILE_US: f64 = 1.0;

struct Version {
    tiling: &'static Tiling,
    kernels: ByOutput,
}

pub struct Split {
    versions: Vec<Version>,
    /// Clusters of [`PARTS`] blocks that the GPU holds with one block a multiprocessor.
    clusters: Vec<usize>,
}

/// A kernel, and how many blocks split K.
pub struct Choice<'a> {
    version: &'a Version,
    pub parts: usize,
    pub predicted_us: f64,
}

impl Split {
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("ternary_matmul_split_hopper"))?;
        let versions = TILINGS.each_ref().map(|tiling| {
            let [tokens, rows] = tiling.tile;
            let name = format!("ternary_matmul_split_{tokens}x{rows}");
            let kernels = ByOutput::load(&module, &name, tiling.shared_bytes)?;
            Ok(Version { tiling, kernels })
        });
        let versions = versions.into_iter().collect::<Result<Vec<_>>>()?;
        // The last fills a multiprocessor.
        let largest = &versions[TILINGS.len() - 1].kernels.int32;
        let clusters = PARTS.map(|parts| largest.resident_clusters(THREADS, parts));
        Ok(Self {
            clusters: clusters.into_iter().collect::<Result<_>>()?,
            versions,
        })
    }

    /// The kernel and split of the least predicted time; none where y has many tiles.
    pub fn choose(&self, m: usize, n: usize, k: usize) -> Option<Choice<'_>> {
        let splits = || PARTS.into_iter().zip(&self.clusters);
        let choices = self.versions.iter().flat_map(|version| {
            splits().filter_map(move |(parts, clusters)| {
                Some(Choice {
                    version,
                    parts,
                    predicted_us: version.tiling.predicted_us([m, n, k], parts, *clusters)?,
                })
            })
        });
        choices.min_by(|a, b| a.predicted_us.total_cmp(&b.predicted_us))
    }
}

impl Tiling {
    fn predicted_us(&self, [m, n, k]: [usize; 3], parts: usize, clusters: usize) -> Option<f64> {
        let [tokens, rows] = self.tile;
        let chunks = k.div_ceil(TILE_COLUMNS);
        let turns = (m.div_ceil(tokens) * n.div_ceil(rows)).div_ceil(clusters);
        let one_turn = turns == 1;
        // Of products of more turns these were found the fastest.
        let more_turns = parts == 1 && tokens < 128 && (turns == 2 || m <= 64);
        if parts > chunks.div_ceil(self.chunks) || !(one_turn || more_turns) {
            return None;
        }
        let turns = turns as f64;
        let us = self.chunk_us * turns * chunks.div_ceil(parts) as f64;
        Some(self.launch_us + us + TILE_US * (turns - 1.0))
    }
}

impl Choice<'_> {
    /// Tokens and rows of w.
    pub fn tile(&self) -> [usize; 2] {
        self.version.tiling.tile
    }

    /// # Safety
    /// As [`Product::launch`].
    pub unsafe fn launch(&self, product: &Product) -> Result<()> {
        let Tiling {
            tile: [tokens, rows],
            chunks,
            shared_bytes,
            ..
        } = *self.version.tiling;
        let &Product { m, n, k, .. } = product;
        let x_box = [LINE as u32, tokens as u32];
        let x = TensorMap::new(Element::U8, product.x, [k, m], &[k], x_box)?;
        let lines = TILE_LINES * k.div_ceil(TILE_COLUMNS);
        let w_box = [LINE, TILE_LINES * chunks, rows / TILE_ROWS].map(|size| size as u32);
        let w = TensorMap::new(
            Element::U8,
            product.w,
            [LINE, lines, n.div_ceil(TILE_ROWS)],
            &[LINE, LINE * lines],
            w_box,
        )?;
        let launch = Launch {
            grid: [self.parts * m.div_ceil(tokens), n.div_ceil(rows), 1],
            threads: THREADS,
            shared_bytes,
            cluster: self.parts,
            overlapped: product.overlapped,
        };
        let kernel = self.version.kernels.of(product.output);
        // SAFETY: the caller's promise; the launch is the kernel's.
        unsafe { product.launch(kernel, &launch, &x, &w) }
    }
}
