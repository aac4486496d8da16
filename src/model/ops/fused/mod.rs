//! One threaded pass per operation with an explicit backward, for f32 tensors on the CPU.
//! Work is cut into blocks of rows whose number does not depend on the thread count, so that
//! every result is the same to the bit on any machine of one instruction set.

mod attention;
mod bit_linear;
mod gated_activation;
mod gemm;
mod lm_loss;
mod rms_norm;
mod storage;

pub use attention::attention;
pub use bit_linear::bit_linear;
pub use gated_activation::gated_activation;
pub use lm_loss::lm_loss;
pub use rms_norm::rms_norm;

/// Rows of activations one task handles: small enough to stay in the cache between the steps of
/// an operation and to occupy many cores, large enough to pay for a matrix product's packing.
const ROWS_PER_TASK: usize = 128;
