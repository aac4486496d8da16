//! Ternary and int8 codes, their packing, and the exact integer product over them.

pub mod matmul;
pub mod packing;
pub mod ternary;

pub use matmul::ternary_matmul;
pub use packing::PackedTernary;
