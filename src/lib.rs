//! TitanBit pretrains BitNet b1.58 language models: every projection weight is -1, 0 or +1.

pub mod cli;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod device;
pub mod error;
pub mod model;
pub mod quant;

pub use error::{Error, Result};
