//! Our own CUDA kernels: loading here, one launcher file beside each `kernels/*.cu`.

mod ternary_matmul;

pub use ternary_matmul::{CudaPackedTernary, TernaryMatmul};

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, cuda_backend::cudarc};
use cudarc::driver::CudaFunction;
use cudarc::nvrtc::Ptx;

use crate::Result;

/// The images that `build.rs` compiled.
macro_rules! fatbin {
    ($kernel:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $kernel, ".fatbin"))
    };
}
use fatbin;

/// Loads one function of a fatbin into the context that candle uses, so that both share memory
/// and streams. The driver picks the machine code of its GPU, or compiles the PTX.
fn load(device: &CudaDevice, fatbin: &[u8], function: &str) -> Result<CudaFunction> {
    let stream = device.cuda_stream();
    let module = stream
        .context()
        .load_module(Ptx::from_binary(fatbin.to_vec()))
        .w()?;
    Ok(module.load_function(function).w()?)
}
