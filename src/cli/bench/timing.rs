//! Timing of one operation, as percentiles over batches of calls.

use std::time::{Duration, Instant};

use crate::Result;

/// Measuring stops after this long, once there are enough samples ...
const BUDGET: Duration = Duration::from_millis(400);
const MIN_SAMPLES: usize = 5;
/// ... or after this many samples.
const MAX_SAMPLES: usize = 101;

/// Seconds a call.
#[derive(Clone, Copy, Debug)]
pub struct Percentiles {
    pub p20: f64,
    pub p50: f64,
    pub p80: f64,
    /// Batches they are taken over; the calls of a batch are timed together.
    pub samples: usize,
}

/// Repeats `batch`, which returns its seconds a call. It must have been warmed up.
pub fn sample(mut batch: impl FnMut() -> Result<f64>) -> Result<Percentiles> {
    let start = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < MIN_SAMPLES || (seconds.len() < MAX_SAMPLES && start.elapsed() < BUDGET) {
        seconds.push(batch()?);
    }
    seconds.sort_by(f64::total_cmp);
    let percentile = |p: usize| seconds[(seconds.len() - 1) * p / 100];
    Ok(Percentiles {
        p20: percentile(20),
        p50: percentile(50),
        p80: percentile(80),
        samples: seconds.len(),
    })
}
