//! Training: what a run records about itself.

pub mod gpu_stats;
pub mod tensorboard;
