//! Ternary and int8 codes, their packing, and the exact integer product over them.

pub mod activation;
pub mod matmul;
mod packed_bit_linear;
pub mod packing;
pub mod ternary;

pub use matmul::ternary_matmul;
#[cfg(feature = "cuda")]
pub(crate) use packed_bit_linear::output_shape;
pub use packed_bit_linear::{Backend, PackedBitLinear};
pub use packing::PackedTernary;
