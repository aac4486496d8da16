//! Work on an NVIDIA GPU. Training: [`Engine`] runs whole steps, `network` and `layer` are the
//! passes through the model. Inference: `bit_linear` multiplies with packed weights; the passes
//! are in `crate::inference`. `kernels` has a launcher for each `kernels/*.cu`.
//!
//! Without the `cuda` feature only the layout of the memory is compiled, for `titanbit info`.

mod arena;
#[cfg(feature = "cuda")]
mod backward;
#[cfg(feature = "cuda")]
pub(crate) mod bit_linear;
#[cfg(feature = "cuda")]
mod engine;
#[cfg(feature = "cuda")]
mod input;
#[cfg(feature = "cuda")]
pub mod kernels;
#[cfg(feature = "cuda")]
mod layer;
#[cfg(feature = "cuda")]
mod network;
// As `token_groups`.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub mod profile;
#[cfg(feature = "cuda")]
mod replay;
// Only a GPU needs it; its test runs anywhere.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod token_groups;
mod workspace;

pub use arena::{Arena, DevicePtr};
#[cfg(feature = "cuda")]
pub use engine::Engine;
#[cfg(feature = "cuda")]
pub use network::{Batch, Gradient};
#[cfg(feature = "cuda")]
pub(crate) use replay::Replay;
#[cfg(feature = "cuda")]
pub use replay::record;
#[cfg(feature = "cuda")]
pub use token_groups::TokenGroups;
#[cfg(feature = "cuda")]
pub use workspace::{AttentionScratch, NORM_PARTS, NormStatistics, QuantizedGradient};
pub use workspace::{Sizes, Workspace};
