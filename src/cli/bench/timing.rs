//! Wall-clock timing of one operation.

use std::time::{Duration, Instant};

use crate::Result;

/// Measuring stops after this long, once there are enough samples ...
const BUDGET: Duration = Duration::from_secs(2);
const MIN_SAMPLES: usize = 3;
/// ... or after this many samples.
const MAX_SAMPLES: usize = 101;
/// Calls are timed in batches of at least this long: far above the cost of reading the clock and,
/// on a GPU, of one synchronisation.
const BATCH: Duration = Duration::from_millis(5);
const MAX_CALLS_PER_BATCH: f64 = 1000.0;

pub struct Timing {
    /// Seconds a call: the median over all batches.
    pub median: f64,
    /// Calls timed.
    pub calls: usize,
}

/// Times `call`, after warming it up. `finish` waits for whatever calls have left running.
pub fn measure(
    mut call: impl FnMut() -> Result<()>,
    finish: impl Fn() -> Result<()>,
) -> Result<Timing> {
    let mut batch = |calls: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        finish()?;
        Ok(start.elapsed().as_secs_f64() / calls as f64)
    };
    // The first call pays for loading and page faults, the second shows how long one takes.
    batch(1)?;
    let once = batch(1)?;
    let calls = (BATCH.as_secs_f64() / once).clamp(1.0, MAX_CALLS_PER_BATCH) as usize;
    batch(calls)?;

    let start = Instant::now();
    let mut samples = Vec::new();
    while samples.len() < MIN_SAMPLES || (samples.len() < MAX_SAMPLES && start.elapsed() < BUDGET) {
        samples.push(batch(calls)?);
    }
    samples.sort_by(f64::total_cmp);
    Ok(Timing {
        median: samples[samples.len() / 2],
        calls: calls * samples.len(),
    })
}
