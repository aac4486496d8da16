//! Training: schedule, optimizer, stability, checkpoints, metrics, and the loop that joins them.

pub mod checkpoint;
pub mod gpu_stats;
mod learner;
mod memory;
mod metrics;
mod optimizer;
mod run;
mod sample;
mod schedule;
mod stability;
pub mod tensorboard;
mod trainer;

pub use learner::Learner;
pub use memory::check_memory;
pub use metrics::StepRecord;
pub use optimizer::{AdamW, Moment, Moments, STATE_BLOCK, Update, UpdateScale};
pub use run::{Observer, Resume, RunOptions, Summary, run};
pub use stability::{Anomaly, StabilityState};
pub use trainer::{StepOutcome, Trainer};
