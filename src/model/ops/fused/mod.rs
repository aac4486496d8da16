//! One threaded pass per operation with an explicit backward, for f32 tensors on the CPU.
//! Sums over rows are cut into blocks whose number does not depend on the thread count, so that
//! a run repeats itself to the bit.

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

/// Rows of activations one task of an elementwise operation handles.
const ROWS_PER_TASK: usize = 128;

/// Rows of activations one task of a matrix product handles: a few tasks a thread, as each task
/// packs the other operand anew.
fn rows_per_product(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads())
        .clamp(16, 1024)
}
