//! TitanBit pretrains BitNet b1.58 language models: every projection weight is -1, 0 or +1.
//!
//! - [`bandwidth`]: how fast memory can be read, for `bench`
//! - [`cli`]: the command line, one file a subcommand
//! - [`config`]: the YAML configuration of a run
//! - [`cuda`]: training on an NVIDIA GPU, with the `cuda` feature
//! - [`data`]: text to token files, token files to batches
//! - [`device`]: which device a command runs on
//! - [`error`]: the one error type
//! - [`eval`]: how good a model is: perplexity, multiple-choice tasks
//! - [`export`]: the formats that other programs run
//! - [`hardware`]: peak rates of GPUs, for MFU
//! - [`inference`]: running a model over packed weights, with a cache of keys and values
//! - [`model`]: the network; start at [`model::BitNetTransformer`]
//! - [`quant`]: ternary and int8 codes, packing, the exact product over them
//! - [`train`]: the trainer and all that a run needs
//!
//! The README has an example.

pub mod bandwidth;
pub mod cli;
pub mod config;
pub mod cuda;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
pub mod export;
mod files;
pub mod hardware;
pub mod inference;
pub mod model;
pub mod quant;
mod random;
mod simd;
pub mod train;
mod values;

pub use error::{Error, Result};

/// Runs the README's example as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
