//! Running a model: packed ternary weights, int8 activations, a cache of keys and values.
//!
//! [`load`] reads a checkpoint or an exported model, [`Model`] puts its weights on a device,
//! [`Session`] feeds tokens to it.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod generate;
mod graph;
mod load;
mod model;
pub mod packed_file;
mod sampling;
pub(crate) mod tensor_file;
mod text;
pub mod weights;

pub use generate::{End, Generated, Request, generate};
pub use load::{Loaded, checkpoint_of, load};
pub use model::{Model, Session};
pub use sampling::{Sampler, Sampling, likeliest};
pub use text::{Piece, TextStream};
pub use weights::{PackedLayer, PackedWeights, Projections, Table, WeightSource};
