//! Plain matrix products through cuBLASLt: input gradients, weight gradients and the LM head, and
//! what `titanbit bench` compares with. Sums are f32, of int8 operands int32; the algorithm is the
//! library's first choice for a shape, the same in every run.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;

use super::address;
use crate::cuda::DevicePtr;
use crate::{Error, Result};

/// What NVIDIA recommends for Hopper; smaller chips need less.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// How operands lie in memory, all by rows: the name gives a, then b; `T` is a transposed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// a (m, k), b (k, n)
    NN,
    /// a (m, k), b (n, k)
    NT,
    /// a (k, m), b (k, n)
    TN,
}

/// An operand and the distance between its rows in values. Both of a product have one format.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    address: u64,
    stride: usize,
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Format {
    Bf16,
    /// e4m3: one byte, three bits of mantissa; values times the f32 at `scale`, 1 if there is none.
    Fp8 {
        scale: Option<u64>,
    },
    Int8,
}

impl Operand {
    pub fn bf16(values: DevicePtr<bf16>, stride: usize) -> Self {
        Self {
            address: values.address(),
            stride,
            format: Format::Bf16,
        }
    }

    /// e4m3 values, which cuBLASLt takes in `Layout::NT` only, in rows of multiples of 16; they
    /// stand for the number at `scale`, on 16 bytes, times as much.
    pub fn fp8(values: DevicePtr<u8>, stride: usize, scale: Option<DevicePtr<f32>>) -> Self {
        Self {
            address: values.address(),
            stride,
            format: Format::Fp8 {
                scale: scale.map(DevicePtr::address),
            },
        }
    }
}

/// Where a product goes.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub address: u64,
    pub stride: usize,
    pub dtype: Float,
    /// Add to what is there instead of replacing it. A product of fp8 operands is rounded to `dtype`
    /// first.
    pub add: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    F32,
    Bf16,
}

impl Float {
    fn to_cuda(self) -> sys::cudaDataType {
        match self {
            Self::F32 => sys::cudaDataType::CUDA_R_32F,
            Self::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        }
    }
}

impl Format {
    fn to_cuda(self) -> sys::cudaDataType {
        match self {
            Self::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Self::Fp8 { .. } => sys::cudaDataType::CUDA_R_8F_E4M3,
            Self::Int8 => sys::cudaDataType::CUDA_R_8I,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    layout: Layout,
    sizes: [usize; 3],
    strides: [usize; 3],
    /// Of a and b.
    formats: [Format; 2],
    dtype: Float,
    add: bool,
}

/// cuBLASLt's descriptors of one shape, and the algorithm it chose.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    /// Of b, a and c: the library thinks in columns, so the product is turned around.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

pub struct Gemm {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
    workspace_address: u64,
    plans: RefCell<HashMap<Key, Plan>>,
}

// SAFETY: the handle and the descriptors are plain memory of the library, used by one thread at a time.
unsafe impl Send for Gemm {}

fn failed(error: result::CublasError) -> Error {
    Error::Tensor(candle_core::Error::msg(format!("cuBLASLt: {error}")))
}

impl Gemm {
    /// # Errors
    /// `Tensor` if the library or the driver refuses.
    pub fn new(stream: Arc<CudaStream>) -> Result<Self> {
        // SAFETY: the library fills the workspace before it reads it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE_BYTES) }.w()?;
        Ok(Self {
            handle: result::create_handle().map_err(failed)?,
            workspace_address: address(&workspace),
            workspace,
            stream,
            plans: RefCell::default(),
        })
    }

    /// c (m, n) = a . b, or c += a . b.
    ///
    /// # Safety
    /// The operands must be device memory of the sizes that `layout`, `m`, `n`, `k` and the strides say.
    ///
    /// # Errors
    /// `Tensor` if the library has no way to compute this product.
    pub unsafe fn multiply(
        &self,
        layout: Layout,
        [m, n, k]: [usize; 3],
        a: Operand,
        b: Operand,
        c: Output,
    ) -> Result<()> {
        let key = Key {
            layout,
            sizes: [m, n, k],
            strides: [a.stride, b.stride, c.stride],
            formats: [a.format, b.format],
            dtype: c.dtype,
            add: c.add,
        };
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(self.plan(&key)?),
        };
        // In the type of the sums.
        let factor = |value: bool| match a.format {
            Format::Int8 => u32::from(value),
            _ => f32::from(u8::from(value)).to_bits(),
        };
        let (alpha, beta) = (factor(true), factor(c.add));
        let [b_layout, a_layout, c_layout] = plan.layouts;
        let pointer = |address: u64| address as *mut c_void;
        // SAFETY: descriptors and workspace live as long as `self`; the operands are the caller's promise.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(b.address),
                b_layout,
                pointer(a.address),
                a_layout,
                pointer(c.address),
                c_layout,
                pointer(c.address),
                c_layout,
                &raw const plan.algorithm,
                pointer(self.workspace_address),
                self.workspace.len(),
                self.stream.cu_stream().cast(),
            )
        }
        .map_err(failed)
    }

    /// The exact sums c (m, n) = a . b^T: int8 a (m, k) and b (n, k), int32 c.
    ///
    /// # Safety
    /// The operands must be device memory of the sizes given.
    ///
    /// # Errors
    /// `Tensor` if the library has no way to compute this product: sizes must be multiples of 4.
    pub unsafe fn multiply_int8(
        &self,
        [m, n, k]: [usize; 3],
        a: DevicePtr<i8>,
        b: DevicePtr<i8>,
        c: DevicePtr<i32>,
    ) -> Result<()> {
        let operand = |values: DevicePtr<i8>| Operand {
            address: values.address(),
            stride: k,
            format: Format::Int8,
        };
        let sums = Output {
            address: c.address(),
            stride: n,
            // Of as many bytes; `plan` knows the type.
            dtype: Float::F32,
            add: false,
        };
        // SAFETY: the caller's promise.
        unsafe { self.multiply(Layout::NT, [m, n, k], operand(a), operand(b), sums) }
    }

    fn plan(&self, key: &Key) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let [m, n, k] = key.sizes;
        let [a_stride, b_stride, c_stride] = key.strides;
        let [a_format, b_format] = key.formats;
        let turned = |transposed| match transposed {
            true => cublasOperation_t::CUBLAS_OP_T,
            false => cublasOperation_t::CUBLAS_OP_N,
        };
        let (a_columns, a_rows, a_op) = match key.layout {
            Layout::TN => (m, k, turned(true)),
            _ => (k, m, turned(false)),
        };
        let (b_columns, b_rows, b_op) = match key.layout {
            Layout::NT => (k, n, turned(true)),
            _ => (n, k, turned(false)),
        };
        let matrix = |dtype: sys::cudaDataType, columns: usize, rows: usize, stride: usize| {
            result::create_matrix_layout(dtype, columns as u64, rows as u64, stride as i64)
                .map_err(failed)
        };
        let (compute, scale, c_type) = match a_format {
            Format::Int8 => (
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32I,
                sys::cudaDataType::CUDA_R_32I,
                sys::cudaDataType::CUDA_R_32I,
            ),
            _ => (
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType::CUDA_R_32F,
                key.dtype.to_cuda(),
            ),
        };
        let layouts = [
            matrix(b_format.to_cuda(), b_columns, b_rows, b_stride)?,
            matrix(a_format.to_cuda(), a_columns, a_rows, a_stride)?,
            matrix(c_type, n, m, c_stride)?,
        ];
        let description = result::create_matmul_desc(compute, scale).map_err(failed)?;
        let preference = result::create_matmul_pref().map_err(failed)?;
        let workspace_bytes = self.workspace.len();
        // SAFETY: each attribute is set from a value of its documented type and size; nothing was freed.
        let algorithm = unsafe {
            for (attribute, op) in [
                (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, b_op),
                (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, a_op),
            ] {
                result::set_matmul_desc_attribute(
                    description,
                    attribute,
                    (&raw const op).cast(),
                    size_of_val(&op),
                )
                .map_err(failed)?;
            }
            for (attribute, format) in [
                (Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, b_format),
                (Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, a_format),
            ] {
                if let Format::Fp8 { scale: Some(scale) } = format {
                    result::set_matmul_desc_attribute(
                        description,
                        attribute,
                        (&raw const scale).cast(),
                        size_of_val(&scale),
                    )
                    .map_err(failed)?;
                }
            }
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace_bytes).cast(),
                size_of_val(&workspace_bytes),
            )
            .map_err(failed)?;
            let [b, a, c] = layouts;
            let found =
                result::get_matmul_algo_heuristic(self.handle, description, b, a, c, c, preference);
            result::destroy_matmul_pref(preference).map_err(failed)?;
            found.map_err(failed)?.algo
        };
        Ok(Plan {
            description,
            layouts,
            algorithm,
        })
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        for plan in self.plans.get_mut().values() {
            // SAFETY: made in `plan`, used nowhere else; there is nothing to do about a failure.
            unsafe {
                for layout in plan.layouts {
                    let _ = result::destroy_matrix_layout(layout);
                }
                let _ = result::destroy_matmul_desc(plan.description);
            }
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
