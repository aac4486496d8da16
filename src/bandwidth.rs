//! How fast this machine's memory can be read: the bound of a product with one token.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::simd::vectorized;

/// Reading is repeated for this long, and at least so often.
const BUDGET: Duration = Duration::from_millis(500);
const MIN_PASSES: usize = 5;

/// Bytes a second at which the threads of rayon's current pool read `bytes` of memory, each its own
/// part from end to end: the median of several passes. Allocates that much; for memory rather than
/// a cache, take several times the last cache's size.
pub fn read_bandwidth(bytes: usize) -> f64 {
    let data = vec![1u64; bytes.div_ceil(size_of::<u64>()).max(1)];
    let part = data.len().div_ceil(rayon::current_num_threads());
    let pass = || {
        let start = Instant::now();
        black_box(
            data.par_chunks(part)
                .map(sum)
                .reduce(|| 0, u64::wrapping_add),
        );
        start.elapsed().as_secs_f64()
    };
    pass();
    let start = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < MIN_PASSES || start.elapsed() < BUDGET {
        seconds.push(pass());
    }
    seconds.sort_by(f64::total_cmp);
    size_of_val(data.as_slice()) as f64 / seconds[seconds.len() / 2]
}

vectorized! {
    fn sum(data: &[u64]) -> u64 {
        data.iter().fold(0, |sum, x| sum.wrapping_add(*x))
    }
}
