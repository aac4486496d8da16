//! Launcher of `kernels/vocabulary.cu`: embedding and LM head for inference.

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::f16;

use super::{Kernel, Launch, Module, address, fatbin};
use crate::Result;
use crate::cuda::DevicePtr;
use crate::inference::Table;
use crate::inference::weights::TableValues;

const THREADS: usize = 256;
/// Rows of the table that a block of the LM head multiplies.
const ROWS: usize = 32;
/// Tokens that share the reading of a row.
const TOKENS: usize = 8;

/// What the rows' width is a multiple of.
pub const COLUMN_STEP: usize = 8;

/// A table (rows, cols) in device memory, in the format it is stored in.
pub struct CudaTable {
    values: CudaTableValues,
    rows: usize,
    cols: usize,
}

pub enum CudaTableValues {
    F32(CudaSlice<f32>),
    F16(CudaSlice<f16>),
}

impl CudaTable {
    /// # Errors
    /// `Tensor` if memory runs out.
    pub fn upload(device: &CudaDevice, table: &Table) -> Result<Self> {
        let stream = device.cuda_stream();
        Ok(Self {
            values: match table.values() {
                TableValues::F32(values) => {
                    CudaTableValues::F32(stream.clone_htod(&values[..]).w()?)
                }
                TableValues::F16(values) => {
                    CudaTableValues::F16(stream.clone_htod(&values[..]).w()?)
                }
            },
            rows: table.rows(),
            cols: table.cols(),
        })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn values(&self) -> &CudaTableValues {
        &self.values
    }

    fn address(&self) -> u64 {
        match &self.values {
            CudaTableValues::F32(values) => address(values),
            CudaTableValues::F16(values) => address(values),
        }
    }
}

/// Kernels for tables of either format.
pub struct Vocabulary {
    f32: Kernels,
    f16: Kernels,
    overlapped: bool,
}

struct Kernels {
    embed: Kernel,
    head_one: Kernel,
    head_some: Kernel,
}

impl Vocabulary {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let module = Module::load(device, fatbin!("vocabulary"))?;
        let kernels = |format: &str| -> Result<Kernels> {
            let kernel = |name: String| module.kernel(&name, 0);
            Ok(Kernels {
                embed: kernel(format!("embed_{format}"))?,
                head_one: kernel(format!("lm_head_{format}_1"))?,
                head_some: kernel(format!("lm_head_{format}_{TOKENS}"))?,
            })
        };
        let stream = device.cuda_stream();
        let (major, _) = stream.context().compute_capability().w()?;
        Ok(Self {
            f32: kernels("f32")?,
            f16: kernels("f16")?,
            overlapped: major >= 9,
        })
    }

    fn kernels(&self, table: &CudaTable) -> &Kernels {
        match table.values {
            CudaTableValues::F32(_) => &self.f32,
            CudaTableValues::F16(_) => &self.f16,
        }
    }

    /// x (tokens, cols) = rows `ids` (tokens,) of the table.
    ///
    /// # Safety
    /// The addresses must hold what the shapes say, ids rows of the table.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn embed(
        &self,
        ids: DevicePtr<u32>,
        table: &CudaTable,
        x: DevicePtr<f32>,
        tokens: usize,
    ) -> Result<()> {
        let (values, cols) = (table.address(), table.cols as i32);
        // SAFETY: the arguments are those of the kernel.
        unsafe {
            self.kernels(table)
                .embed
                .launch([tokens, 1, 1], THREADS, &[&ids, &values, &x, &cols])
        }
    }

    /// logits (tokens, rows) = x (tokens, cols) times the table; `cols` is a multiple of
    /// [`COLUMN_STEP`].
    ///
    /// # Safety
    /// The addresses must hold what the shapes say.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses the launch.
    pub unsafe fn head(
        &self,
        x: DevicePtr<f32>,
        table: &CudaTable,
        logits: DevicePtr<f32>,
        tokens: usize,
    ) -> Result<()> {
        let kernels = self.kernels(table);
        let (kernel, tokens_by_block) = match tokens {
            1 => (&kernels.head_one, 1),
            _ => (&kernels.head_some, TOKENS),
        };
        let blocks = [
            table.rows.div_ceil(ROWS),
            tokens.div_ceil(tokens_by_block),
            1,
        ];
        let values = table.address();
        let [tokens, rows, cols] = [tokens, table.rows, table.cols].map(|size| size as i32);
        // SAFETY: the arguments are those of the kernel, which waits before it reads x.
        unsafe {
            kernel.launch_with(
                &Launch {
                    grid: blocks,
                    threads: THREADS,
                    shared_bytes: 0,
                    cluster: 0,
                    overlapped: self.overlapped,
                },
                &[&values, &x, &logits, &tokens, &rows, &cols],
            )
        }
    }
}
