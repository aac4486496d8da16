//! Launcher of `kernels/ternary_tiles.cu`: packed ternary weights in the layout of the GPU's kernels.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DevicePtr, DeviceRepr};

use super::{Kernel, Module, address, fatbin};
use crate::quant::PackedTernary;
use crate::{Error, Result};

/// What K is a multiple of.
pub const K_STEP: usize = 32;

/// Largest K: the kernels' sums are 64 times the product, and stay within int32.
pub const MAX_K: usize = (1 << 18) - K_STEP;

/// Most rows: a CUDA grid counts 65535 rows of tiles.
pub const MAX_N: usize = 65535 * TILE_ROWS;

/// Rows, columns and bytes of a tile; tiles of a block.
const TILE_ROWS: usize = 16;
const TILE_COLUMNS: usize = 128;
const TILE_BYTES: usize = 512;
const TILES: usize = 32;
const THREADS: usize = 256;

/// Packed ternary weights (N, K) and a scale for each row in device memory; the layout is that of
/// `kernels/ternary_tiles.cuh`.
pub struct CudaPackedTernary {
    rows: usize,
    cols: usize,
    tiles: CudaSlice<u8>,
    scales: CudaSlice<f32>,
}

impl CudaPackedTernary {
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of the tiles.
    pub fn bytes(&self) -> usize {
        self.tiles.len()
    }

    /// A copy elsewhere in device memory.
    ///
    /// # Errors
    /// `Tensor` if memory runs out.
    pub fn duplicate(&self) -> Result<Self> {
        let stream = self.tiles.stream();
        Ok(Self {
            tiles: stream.clone_dtod(&self.tiles).w()?,
            scales: stream.clone_dtod(&self.scales).w()?,
            ..*self
        })
    }

    pub(super) fn tiles(&self) -> u64 {
        address(&self.tiles)
    }

    pub(super) fn scales(&self) -> u64 {
        address(&self.scales)
    }
}

/// Packing and unpacking, exact.
pub struct TernaryTiles {
    device: CudaDevice,
    tiles_from_words: Kernel,
    words_from_tiles: Kernel,
    tiles_from_codes: Kernel,
    codes_from_tiles: Kernel,
}

impl TernaryTiles {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("ternary_tiles"))?;
        let kernel = |name| module.kernel(name, 0);
        Ok(Self {
            device: device.clone(),
            tiles_from_words: kernel("tiles_from_words")?,
            words_from_tiles: kernel("words_from_tiles")?,
            tiles_from_codes: kernel("tiles_from_codes")?,
            codes_from_tiles: kernel("codes_from_tiles")?,
        })
    }

    /// Packed weights of the host, (N, K), with a scale for each row.
    ///
    /// # Errors
    /// `Usage` if K is no multiple of 32 or above [`MAX_K`], if N is above [`MAX_N`], or if there is
    /// not one scale a row; `Tensor` if memory runs out.
    pub fn upload(&self, packed: &PackedTernary, scales: &[f32]) -> Result<CudaPackedTernary> {
        let words = self.device.clone_htod(packed.words())?;
        let from = address(&words);
        self.pack(
            &self.tiles_from_words,
            from,
            [packed.rows(), packed.cols()],
            scales,
        )
    }

    /// The same of int8 codes -1, 0 and 1 in device memory, (`rows`, `cols`), on 16 bytes.
    ///
    /// # Errors
    /// As [`Self::upload`], and `Usage` if there are not `rows * cols` codes.
    pub fn pack_codes(
        &self,
        codes: &CudaView<i8>,
        [rows, cols]: [usize; 2],
        scales: &[f32],
    ) -> Result<CudaPackedTernary> {
        if rows.checked_mul(cols) != Some(codes.len()) {
            return Err(Error::usage(format!(
                "{} codes are no weights of {rows} x {cols}",
                codes.len()
            )));
        }
        let stream = self.device.cuda_stream();
        let (from, _codes) = codes.device_ptr(&stream);
        self.pack(&self.tiles_from_codes, from, [rows, cols], scales)
    }

    /// The packed weights, back on the host.
    ///
    /// # Errors
    /// `Tensor` if memory runs out.
    pub fn download(&self, w: &CudaPackedTernary) -> Result<PackedTernary> {
        let words: Vec<u32> = self.unpack(&self.words_from_tiles, w, w.rows * w.cols / 16)?;
        Ok(PackedTernary::from_words(words, w.rows, w.cols))
    }

    /// The codes, back on the host, row-major.
    ///
    /// # Errors
    /// `Tensor` if memory runs out.
    pub fn unpack_codes(&self, w: &CudaPackedTernary) -> Result<Vec<i8>> {
        self.unpack(&self.codes_from_tiles, w, w.rows * w.cols)
    }

    fn pack(
        &self,
        kernel: &Kernel,
        from: u64,
        [rows, cols]: [usize; 2],
        scales: &[f32],
    ) -> Result<CudaPackedTernary> {
        check_shape(rows, cols)?;
        if scales.len() != rows {
            return Err(Error::usage(format!(
                "{} weight scales do not fit {rows} weight rows",
                scales.len()
            )));
        }
        let bytes = tiles(rows, cols) * TILE_BYTES;
        let w = CudaPackedTernary {
            rows,
            cols,
            // SAFETY: the kernel writes all of it.
            tiles: unsafe { self.device.cuda_stream().alloc(bytes).w()? },
            scales: self.device.clone_htod(scales)?,
        };
        // SAFETY: the shape is that of both.
        unsafe { Self::launch(kernel, from, w.tiles(), [rows, cols])? };
        Ok(w)
    }

    fn unpack<T: DeviceRepr>(
        &self,
        kernel: &Kernel,
        w: &CudaPackedTernary,
        count: usize,
    ) -> Result<Vec<T>> {
        // SAFETY: the kernel writes all of it.
        let out = unsafe { self.device.cuda_stream().alloc::<T>(count).w()? };
        // SAFETY: the shape is that of both.
        unsafe { Self::launch(kernel, w.tiles(), address(&out), [w.rows, w.cols])? };
        Ok(self.device.clone_dtoh(&out)?)
    }

    unsafe fn launch(kernel: &Kernel, from: u64, to: u64, [n, k]: [usize; 2]) -> Result<()> {
        let blocks = tiles(n, k).div_ceil(TILES);
        let (n, k) = (n as i32, k as i32);
        // SAFETY: the caller's promise; the arguments are those of all four kernels.
        unsafe { kernel.launch([blocks, 1, 1], THREADS, &[&from, &to, &n, &k]) }
    }
}

fn tiles(rows: usize, cols: usize) -> usize {
    rows.div_ceil(TILE_ROWS) * cols.div_ceil(TILE_COLUMNS)
}

/// # Errors
/// `Usage` on weights that the kernels do not take.
pub fn check_shape(n: usize, k: usize) -> Result<()> {
    if !k.is_multiple_of(K_STEP) {
        return Err(Error::usage(format!(
            "an inner dimension of {k} is no multiple of {K_STEP}, which the GPU's ternary kernels \
             take at a time: pad it with zeros"
        )));
    }
    if k > MAX_K {
        return Err(Error::usage(format!(
            "an inner dimension of {k} can overflow the int32 sums of the GPU's ternary kernels: at \
             most {MAX_K} is exact"
        )));
    }
    if n == 0 || k == 0 || n > MAX_N {
        return Err(Error::usage(format!(
            "the GPU's ternary kernels cannot take weights of {n} x {k}: 1 to {MAX_N} rows, and at \
             least a column"
        )));
    }
    Ok(())
}
