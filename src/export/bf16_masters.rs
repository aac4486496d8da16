//! Master weights in bf16 that BitLinear quantises as the f32 ones: the same codes and the same scale.
//!
//! Rounding a weight to bf16 may carry it across the threshold b/2, and moves mean |W|, which is b. So
//! a weight is rounded to the nearest value on the side of its code, with a margin in which an f32 mean
//! summed in another order may move the threshold; then some weights go one step up or down until the
//! mean is b again. What that leaves is taken up by the four zero codes of smallest magnitude, each of
//! which holds what the one before could not.
//!
//! The codes are those of the f32 weights for every scale within [`MARGIN`] of b. The mean, summed in
//! f64 and rounded to f32, is b wherever it can be: where a few weights have code zero, or there are so
//! many weights that a step of one no longer matters (2^18). A tensor whose b is the floor of 1e-5
//! keeps a mean below it.

use half::bf16;
use rayon::prelude::*;

use crate::quant::ternary::{EPSILON, absmean, ternary_codes};

/// Relative distance that a weight keeps from the threshold of its code.
pub const MARGIN: f64 = 1.0 / 1024.0;

/// Relative error of a mean that still rounds to b: an f32's step is at least 2^-24 of it.
const MEAN_TOLERANCE: f64 = 1.0 / (1 << 26) as f64;

/// Zero codes that take up what single steps leave: each has 8 bits.
const SINKS: usize = 4;

/// Rounds finite weights to bf16 (see the module).
pub fn to_bf16(weight: &[f32]) -> Vec<bf16> {
    let b = absmean(weight);
    let ranges = Ranges::new(b);
    let codes = ternary_codes(weight, b);
    let mut magnitudes: Vec<Magnitude> = (weight.par_iter().zip(&codes))
        .map(|(w, code)| ranges.of(*code).clamp(Magnitude::nearest(*w)))
        .collect();
    correct_mean(&mut magnitudes, &codes, b, &ranges);
    (weight.par_iter().zip(&magnitudes))
        .map(|(w, magnitude)| magnitude.with_sign_of(*w))
        .collect()
}

/// Moves magnitudes, each within the range of its code, until their mean is b.
fn correct_mean(magnitudes: &mut [Magnitude], codes: &[i8], b: f32, ranges: &Ranges) {
    let count = magnitudes.len() as f64;
    let sum: f64 = magnitudes.iter().map(|m| m.value()).sum();
    let tolerance = count * f64::from(b) * MEAN_TOLERANCE;
    let mut missing = count * f64::from(b) - sum;
    let below_floor = b == EPSILON && missing >= 0.0;
    if below_floor || missing.abs() <= tolerance {
        return;
    }
    let sinks = smallest_zeros(magnitudes, codes);
    for &i in &sinks {
        missing += magnitudes[i].value();
        magnitudes[i] = Magnitude::ZERO;
    }
    // The sinks, which hold what is left, shall move no further than a step either.
    let enough = tolerance.min(f64::from(b) / 256.0);
    let room = ranges.zero.largest.value();
    // One step each; only a tensor that hangs on a few huge weights needs a second, longer pass.
    for longest in [1, u16::MAX] {
        for (i, (magnitude, code)) in magnitudes.iter_mut().zip(codes).enumerate() {
            if missing.abs() <= enough || sinks.contains(&i) {
                continue;
            }
            let reach = ranges.of(*code).around(*magnitude, longest);
            let moved = reach.clamp(Magnitude::floor(magnitude.value() + missing));
            missing -= moved.value() - magnitude.value();
            *magnitude = moved;
        }
        if (0.0..=room).contains(&missing) {
            break;
        }
    }
    for i in sinks {
        magnitudes[i] = ranges.zero.clamp(Magnitude::floor(missing));
        missing -= magnitudes[i].value();
    }
}

/// Places of the weights of code zero that are nearest to zero, at most [`SINKS`].
fn smallest_zeros(magnitudes: &[Magnitude], codes: &[i8]) -> Vec<usize> {
    let mut smallest: Vec<usize> = Vec::with_capacity(SINKS + 1);
    for (i, magnitude) in magnitudes
        .iter()
        .enumerate()
        .filter(|(i, _)| codes[*i] == 0)
    {
        let place = smallest.partition_point(|&other| magnitudes[other] <= *magnitude);
        if place < SINKS {
            smallest.insert(place, i);
            smallest.truncate(SINKS);
        }
    }
    smallest
}

/// A bf16 without its sign: as bits it counts up with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Magnitude(u16);

impl Magnitude {
    const ZERO: Self = Self(0);
    const MAX: Self = Self(bf16::MAX.to_bits());
    const SIGN: u16 = 1 << 15;

    fn nearest(w: f32) -> Self {
        Self(bf16::from_f32(w.abs()).to_bits())
    }

    /// The largest that is not above `x`; zero for negative ones.
    fn floor(x: f64) -> Self {
        let nearest = Self::nearest(x.max(0.0) as f32).min(Self::MAX);
        match nearest.value() > x {
            true => Self(nearest.0.saturating_sub(1)),
            false => nearest,
        }
    }

    fn value(self) -> f64 {
        f64::from(bf16::from_bits(self.0).to_f32())
    }

    fn with_sign_of(self, w: f32) -> bf16 {
        let sign = bf16::from_f32(w).to_bits() & Self::SIGN;
        bf16::from_bits(self.0 | sign)
    }
}

/// Magnitudes from `smallest` to `largest`.
#[derive(Clone, Copy)]
struct Range {
    smallest: Magnitude,
    largest: Magnitude,
}

impl Range {
    fn clamp(&self, magnitude: Magnitude) -> Magnitude {
        magnitude.clamp(self.smallest, self.largest)
    }

    /// The part of it that is at most `steps` from `magnitude`.
    fn around(&self, magnitude: Magnitude, steps: u16) -> Self {
        Self {
            smallest: Magnitude(magnitude.0.saturating_sub(steps)).max(self.smallest),
            largest: Magnitude(magnitude.0.saturating_add(steps)).min(self.largest),
        }
    }
}

/// The magnitudes that get a code, clear of the threshold between them.
struct Ranges {
    zero: Range,
    one: Range,
}

impl Ranges {
    fn new(b: f32) -> Self {
        let threshold = f64::from(b) / 2.0;
        let above = Magnitude::floor(threshold * (1.0 + MARGIN)).0 + 1;
        Self {
            zero: Range {
                smallest: Magnitude::ZERO,
                largest: Magnitude::floor(threshold * (1.0 - MARGIN)),
            },
            one: Range {
                smallest: Magnitude(above),
                largest: Magnitude::MAX,
            },
        }
    }

    fn of(&self, code: i8) -> &Range {
        match code {
            0 => &self.zero,
            _ => &self.one,
        }
    }
}
