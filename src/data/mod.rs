//! Token files, datasets and tokenisation.
//!
//! [`tokenize::run`] turns text into token files; [`TokenSet`] opens them, [`Mixture`] says which
//! window of which set is sample number `i`, and [`Loader`] prefetches batches of windows.

pub mod bin_format;
pub mod bin_writer;
pub mod dataset;
pub mod loader;
pub mod prepare;
pub mod sampler;
pub mod tokenize;

pub use bin_format::{Sidecar, TokenDtype, TokenFile};
pub use bin_writer::TokenWriter;
pub use dataset::{Batch, TokenSet};
pub use loader::Loader;
pub use sampler::Mixture;
