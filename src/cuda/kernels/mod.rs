//! Launchers: one file beside each `kernels/*.cu`, and plain products by cuBLASLt.

pub mod attention;
pub mod bf16_pairs;
pub mod bit_linear;
pub mod cached_attention;
pub mod cross_entropy;
pub mod embedding;
pub mod gated_activation;
pub mod gemm;
pub mod log_likelihood;
mod module;
pub mod optimizer;
pub mod prompt_attention;
pub mod quantize_tokens;
pub mod rms_norm;
pub mod rope;
pub mod rows;
mod tensor_map;
pub mod ternary_matmul;
pub mod ternary_tiles;
pub mod ternary_weights;
pub mod to_bf16;
pub mod token_linear;
pub mod token_norm;
pub mod transpose;
pub mod vocabulary;

pub use module::{Argument, Kernel, Launch, Module};
pub use ternary_matmul::TernaryMatmul;
pub use ternary_tiles::{CudaPackedTernary, TernaryTiles};

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr as _};

/// The images that `build.rs` compiled.
macro_rules! fatbin {
    ($kernel:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $kernel, ".fatbin"))
    };
}
use fatbin;

/// Where an allocation lies. It must outlive every use of the address; all work is on one stream,
/// so that nothing needs to be recorded.
pub fn address<T>(slice: &CudaSlice<T>) -> u64 {
    let (address, _record) = slice.device_ptr(slice.stream());
    address
}
