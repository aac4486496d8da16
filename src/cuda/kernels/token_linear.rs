//! Launcher of `kernels/token_linear.cu`: BitLinear of one token with the norm before it.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;

use super::rows::MAX_FEATURES;
use super::token_norm::BY_THREAD;
use super::{CudaPackedTernary, Kernel, Launch, Module, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::model::Activation;

/// Rows and columns of a tile of weights.
const TILE_ROWS: usize = 16;
const TILE_COLUMNS: usize = 128;
const WARP: usize = 32;
/// Warps of a block, at most, and those that a multiprocessor has registers for.
const MAX_WARPS: usize = 32;
const RESIDENT_WARPS: usize = 32;
/// Shared memory for the columns of a tile: codes, and as many zeros.
const CHUNK_BYTES: usize = 2 * TILE_COLUMNS;

/// What a gated product's halves are multiples of.
pub const GATE_STEP: usize = TILE_ROWS;

pub struct TokenLinear {
    store: Kernel,
    add: Kernel,
    gate: Kernel,
    eps: f32,
    processors: usize,
    /// Launches may start while earlier kernels still run, and then bring weights meanwhile.
    overlapped: bool,
}

/// A projection with the norm before it.
#[derive(Clone, Copy)]
pub struct NormedLinear<'a> {
    /// (features,)
    pub norm: DevicePtr<f32>,
    /// A multiple of 4, at most [`MAX_FEATURES`].
    pub features: usize,
    /// (N, features), perhaps with columns of zeros behind them.
    pub weights: &'a CudaPackedTernary,
}

impl TokenLinear {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice, eps: f32, activation: Activation) -> Result<Self> {
        let module = Module::load(device, fatbin!("token_linear"))?;
        let shared_bytes = CHUNK_BYTES * MAX_FEATURES.div_ceil(TILE_COLUMNS);
        let kernel = |name| module.kernel(name, shared_bytes);
        let store = kernel("token_linear")?;
        let stream = device.cuda_stream();
        let (major, _) = stream.context().compute_capability().w()?;
        Ok(Self {
            processors: store.processors()?,
            store,
            add: kernel("token_linear_add")?,
            gate: kernel(match activation {
                Activation::Silu => "token_linear_silu",
                Activation::Relu2 => "token_linear_relu2",
            })?,
            eps,
            overlapped: major >= 9,
        })
    }

    /// y (N,) = the projection of x (features,).
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn store(
        &self,
        x: DevicePtr<f32>,
        linear: NormedLinear,
        y: DevicePtr<f32>,
    ) -> Result<()> {
        let tiles = linear.weights.rows().div_ceil(TILE_ROWS);
        // SAFETY: the caller's promise.
        unsafe { self.launch(&self.store, tiles, x, linear, y) }
    }

    /// Adds the projection of x (features,) to y (N,).
    ///
    /// # Safety
    /// As [`Self::store`].
    ///
    /// # Errors
    /// As [`Self::store`].
    pub unsafe fn add(
        &self,
        x: DevicePtr<f32>,
        linear: NormedLinear,
        y: DevicePtr<f32>,
    ) -> Result<()> {
        let tiles = linear.weights.rows().div_ceil(TILE_ROWS);
        // SAFETY: the caller's promise.
        unsafe { self.launch(&self.add, tiles, x, linear, y) }
    }

    /// y (N / 2,) = `act(gate) * up` of the projection's halves, each a multiple of [`GATE_STEP`].
    ///
    /// # Safety
    /// As [`Self::store`].
    ///
    /// # Errors
    /// As [`Self::store`].
    pub unsafe fn gate(
        &self,
        x: DevicePtr<f32>,
        linear: NormedLinear,
        y: DevicePtr<f32>,
    ) -> Result<()> {
        let tiles = linear.weights.rows() / (2 * TILE_ROWS);
        // SAFETY: the caller's promise.
        unsafe { self.launch(&self.gate, tiles, x, linear, y) }
    }

    unsafe fn launch(
        &self,
        kernel: &Kernel,
        blocks: usize,
        x: DevicePtr<f32>,
        linear: NormedLinear,
        y: DevicePtr<f32>,
    ) -> Result<()> {
        let NormedLinear {
            norm,
            features,
            weights,
        } = linear;
        let chunks = features.div_ceil(TILE_COLUMNS);
        let warps = warps(features, chunks, blocks.div_ceil(self.processors));
        let [n, k] = [weights.rows(), features].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernels, which wait before they read x or write y.
        unsafe {
            kernel.launch_with(
                &Launch {
                    grid: [blocks, 1, 1],
                    threads: WARP * warps,
                    shared_bytes: CHUNK_BYTES * chunks,
                    cluster: 0,
                    overlapped: self.overlapped,
                },
                &[
                    &x,
                    &norm,
                    &weights.tiles(),
                    &weights.scales(),
                    &y,
                    &n,
                    &k,
                    &self.eps,
                ],
            )
        }
    }
}

/// All blocks should be resident at once, and their warps evenly loaded; but a thread normalises at
/// most [`BY_THREAD`] features.
fn warps(features: usize, chunks: usize, blocks_each: usize) -> usize {
    let least = features.div_ceil(BY_THREAD * WARP).max(4);
    let most = (RESIDENT_WARPS / blocks_each).clamp(least, MAX_WARPS);
    chunks.div_ceil(chunks.div_ceil(most)).max(least)
}
