//! Comparisons, which print what they measure.

use crate::gpu::Value;

/// Largest relative error of a value rounded to bf16, and a little for what was rounded.
pub const BF16: f64 = 1.01 / 256.0;

pub fn f64s<T: Into<f64> + Copy>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| (*x).into()).collect()
}

/// ||got - want|| / ||want||; infinite where that is not a number.
fn error(got: &[f64], want: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
    let size = norm(&mut want.iter().copied());
    match off / size {
        _ if off == 0.0 => 0.0,
        error if error.is_nan() => f64::INFINITY,
        error => error,
    }
}

/// Checks the error of every `group` of values by itself: large rows would hide small ones.
#[track_caller]
pub fn close<T: Into<f64> + Copy>(what: &str, got: &[T], want: &[f64], group: usize, bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let got = f64s(got);
    let errors = got.chunks(group).zip(want.chunks(group));
    let errors: Vec<f64> = errors.map(|(got, want)| error(got, want)).collect();
    let (worst, largest) = errors
        .iter()
        .enumerate()
        .max_by(|a, b| a.1.total_cmp(b.1))
        .unwrap();
    println!("{what}: error {largest:.2e}, bound {bound:.0e}");
    if *largest < bound {
        return;
    }
    let wrong = errors.iter().filter(|error| **error >= bound).count();
    println!(
        "  {wrong} of {} groups are off, most of all {worst}",
        errors.len()
    );
    let (got, want) = (
        &got[worst * group..(worst + 1) * group],
        &want[worst * group..(worst + 1) * group],
    );
    let rms = (want.iter().map(|x| x * x).sum::<f64>() / group as f64).sqrt();
    let within = |got: f64, want: f64| (got - want).abs() <= bound * (want.abs() + rms);
    let all = got.iter().zip(want).enumerate();
    for (at, (got, want)) in all
        .filter(|(_, (got, want))| !within(**got, **want))
        .take(6)
    {
        println!("  value {at} of it: {got:e}, not {want:e}");
    }
    panic!("{what}: error {largest:.2e}");
}

/// Checks values one by one: |got - want| <= bound (|want| + 1).
#[track_caller]
pub fn near<T: Into<f64> + Copy>(what: &str, got: &[T], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let mut largest = 0f64;
    for (at, (got, want)) in f64s(got).iter().zip(want).enumerate() {
        let error = (got - want).abs() / (want.abs() + 1.0);
        assert!(
            error <= bound,
            "{what}: value {at} is {got:e}, not {want:e}"
        );
        largest = largest.max(error);
    }
    println!("{what}: error {largest:.2e}, bound {bound:.0e}");
}

/// Checks that all bits are as wanted; 0 and -0 are the same, and so are all NaN.
#[track_caller]
pub fn exact<T: Into<f64> + Copy>(what: &str, got: &[T], want: &[T]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (at, (got, want)) in f64s(got).iter().zip(f64s(want)).enumerate() {
        let same = *got == want || got.is_nan() && want.is_nan();
        assert!(same, "{what}: value {at} is {got:e}, not {want:e}");
    }
    println!("{what}: exact");
}

/// Checks that the values `of` says are NaN and that the others have the bits of `before`.
#[track_caller]
pub fn only_these_are_nan<T: Value + Into<f64>>(
    what: &str,
    got: &[T],
    before: &[T],
    of: impl Fn(usize) -> bool,
) {
    for (at, (got, before)) in got.iter().zip(before).enumerate() {
        let value: f64 = (*got).into();
        match of(at) {
            true => assert!(value.is_nan(), "{what}: value {at} is {value:e}, not NaN"),
            false => assert!(
                got.bits() == before.bits(),
                "{what}: value {at} has become {value:e}"
            ),
        }
    }
}

/// Checks int8 codes: `values` rounded, those near a tie (a thousandth) perhaps to the other side.
/// f32 arithmetic brings few over a tie.
#[track_caller]
pub fn codes(what: &str, got: &[i8], values: &[f64]) {
    assert_eq!(got.len(), values.len(), "{what}");
    let mut other_side = 0;
    for (at, (code, value)) in f64s(got).iter().zip(values).enumerate() {
        let off = (code - value).abs();
        assert!(
            off <= 0.501,
            "{what}: code {at} is {code}, the value {value}"
        );
        other_side += usize::from(*code != value.round_ties_even());
    }
    println!("{what}: {other_side} of {} codes beyond a tie", got.len());
    assert!(other_side <= 2 + got.len() / 2000, "{what}");
}

/// Checks values that come out of `round`: of numbers between the first and the last of each range,
/// most of them of the second.
#[track_caller]
pub fn rounded(what: &str, got: &[f64], ranges: &[[f64; 3]], round: fn(f64) -> f64) {
    assert_eq!(got.len(), ranges.len(), "{what}");
    let mut other_side = 0;
    for (at, (got, range)) in got.iter().zip(ranges).enumerate() {
        let [low, value, high] = range.map(round);
        assert!(
            (low..=high).contains(got),
            "{what}: value {at} is {got}, that of {}",
            range[1]
        );
        // Values of few bits may be ties themselves, and many of them.
        let is_tie = round(range[1] * (1.0 - 1e-6)) != round(range[1] * (1.0 + 1e-6));
        other_side += usize::from(*got != value && !is_tie);
    }
    println!("{what}: {other_side} of {} beyond a tie", got.len());
    assert!(other_side <= 2 + got.len() / 2000, "{what}");
}
