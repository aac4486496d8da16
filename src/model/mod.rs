//! The BitNet b1.58 network: its shape, its parameters and its forward pass.

mod config;
pub mod cpu;
mod decoder;
mod memory;
pub mod ops;
mod parameters;
mod transformer;
pub(crate) mod weights;

pub use config::{Activation, BitNetConfig, ParameterCount, Projection};
pub(crate) use decoder::{BitLinear, Decoder, Layer};
pub use decoder::{Cache, LayerCache};
pub use memory::{MemoryEstimate, ModelBytes};
pub use parameters::{Parameter, Parameters, tensor_shapes};
pub use transformer::{BitNetTransformer, Output};
