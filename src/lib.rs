//! TitanBit pretrains BitNet b1.58 language models: every projection weight is -1, 0 or +1.

pub mod cli;
pub mod config;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod device;
pub mod error;
pub mod hardware;
pub mod model;
pub mod quant;
mod simd;
pub mod train;

pub use error::{Error, Result};
