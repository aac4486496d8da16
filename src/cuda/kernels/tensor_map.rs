//! Descriptors of matrices for the bulk tensor copies (TMA) of Hopper kernels.

use std::mem::MaybeUninit;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, sys};

use crate::Result;

/// A `CUtensorMap`, as kernels take it by value.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct TensorMap(sys::CUtensorMap);

// SAFETY: opaque bytes made for kernels.
unsafe impl DeviceRepr for TensorMap {}

/// Formats of a matrix's values.
#[derive(Clone, Copy, Debug)]
pub enum Element {
    /// Int8 too: bytes are copied as they are.
    U8,
    Bf16,
}

impl TensorMap {
    /// Rows of `sizes[0]` values without gaps, further dimensions outwards, copied in boxes of
    /// `boxes` with 128-byte swizzling. `strides` are the bytes between rows, planes, ...
    ///
    /// # Errors
    /// `Tensor` if the driver refuses: addresses and strides must be multiples of 16 bytes.
    pub fn new<const RANK: usize>(
        element: Element,
        address: u64,
        sizes: [usize; RANK],
        strides: &[usize],
        boxes: [u32; RANK],
    ) -> Result<Self> {
        use sys::CUtensorMapDataType_enum as Type;
        let element = match element {
            Element::U8 => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            Element::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let sizes = sizes.map(|size| size as u64);
        let strides: Vec<u64> = strides.iter().map(|stride| *stride as u64).collect();
        let mut map = MaybeUninit::uninit();
        // SAFETY: every array has the length that the rank says, and the map is written on success.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                element,
                RANK as u32,
                address as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                [1u32; RANK].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .w()?;
            Ok(Self(map.assume_init()))
        }
    }
}
