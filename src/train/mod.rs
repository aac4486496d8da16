//! Training: schedule, optimizer, stability, checkpoints, metrics, and the loop that joins them.

pub mod gpu_stats;
pub mod tensorboard;
