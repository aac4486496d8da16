//! Masters rounded to bf16 keep the codes and the scale of the f32 ones.

use half::bf16;
use proptest::prelude::*;
use titanbit::export::bf16_masters::{MARGIN, to_bf16};
use titanbit::quant::ternary::{EPSILON, absmean, ternary_codes};

fn widened(rounded: &[bf16]) -> Vec<f32> {
    rounded.iter().map(|w| w.to_f32()).collect()
}

/// As `WeightQuant` of `transformers` computes it, with an f32 sum from left to right, the least
/// exact one there is.
fn codes_of_transformers(weight: &[f32]) -> Vec<i8> {
    let mean = weight.iter().map(|w| w.abs()).sum::<f32>() / weight.len() as f32;
    let scale = 1.0 / mean.max(EPSILON);
    let code = |w: &f32| (w * scale).round_ties_even().clamp(-1.0, 1.0) as i8;
    weight.iter().map(code).collect()
}

/// Checks the codes, by the scale there is and by those a little beside it.
#[track_caller]
fn assert_same_codes(weight: &[f32], rounded: &[f32]) {
    let b = absmean(weight);
    let codes = ternary_codes(weight, b);
    for factor in [1.0, 1.0 - 0.99 * MARGIN, 1.0 + 0.99 * MARGIN] {
        let scale = (f64::from(b) * factor) as f32;
        assert_eq!(ternary_codes(rounded, scale), codes, "at {factor} b");
    }
}

#[track_caller]
fn assert_same(weight: &[f32]) -> Vec<f32> {
    let rounded = widened(&to_bf16(weight));
    assert_same_codes(weight, &rounded);
    assert_eq!(absmean(&rounded), absmean(weight), "the scale b");
    assert_eq!(
        codes_of_transformers(&rounded),
        ternary_codes(weight, absmean(weight))
    );
    rounded
}

/// Largest distance from a master, in units of the larger of b and the master.
fn largest_move(weight: &[f32], rounded: &[f32]) -> f32 {
    let b = absmean(weight);
    let moves = weight.iter().zip(rounded);
    moves
        .map(|(w, v)| (w - v).abs() / w.abs().max(b))
        .fold(0.0, f32::max)
}

/// Sums of uniform numbers: near enough to trained weights.
fn bell(count: usize, scale: f32, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count)
        .map(|_| scale * (uniform() + uniform() + uniform() + uniform()))
        .collect()
}

#[test]
fn weights_like_trained_ones_keep_codes_and_scale() {
    for (count, scale) in [(64, 1.0), (1 << 10, 0.02), (1 << 16, 3e-4), (1 << 21, 1e3)] {
        for seed in 0..3 {
            let weight = bell(count, scale, seed);
            let rounded = assert_same(&weight);
            // Half a step rounds, a step corrects the mean: a step is 2^-7 at most.
            let moved = largest_move(&weight, &rounded);
            assert!(
                count < 1 << 10 || moved < 1.5 / 128.0,
                "{count} weights moved by {moved}"
            );
            let nearest = weight.iter().map(|w| bf16::from_f32(*w).to_f32());
            let nudged = nearest.zip(&rounded).filter(|(a, b)| a != *b).count();
            println!("{count} x {scale}: {nudged} are not the nearest, largest move {moved:.1e}");
            assert!(
                count < 1 << 16 || nudged * 50 < count,
                "{nudged} of {count}"
            );
        }
    }
}

/// What the module is for: to round to nearest is not enough.
#[test]
fn rounding_to_nearest_would_flip_codes() {
    let weight = bell(1 << 20, 0.02, 1);
    let nearest: Vec<f32> = weight.iter().map(|w| bf16::from_f32(*w).to_f32()).collect();
    let codes = |weight: &[f32]| ternary_codes(weight, absmean(weight));
    let flipped = codes(&weight)
        .iter()
        .zip(codes(&nearest))
        .filter(|(a, b)| **a != *b)
        .count();
    assert!(flipped > 10, "{flipped}");
    assert_ne!(absmean(&nearest), absmean(&weight));
}

#[test]
fn zeros_and_weights_below_the_floor_stay_there() {
    assert_eq!(assert_same(&[0.0; 40]), [0.0; 40]);
    // b is the floor: 1e-5 decides, although the mean is far below it.
    let tiny = bell(5000, 1e-6, 2);
    assert_eq!(absmean(&tiny), EPSILON);
    assert_same(&tiny);
    let mut one_large = vec![1e-9; 999];
    one_large.push(0.007);
    assert_eq!(absmean(&one_large), EPSILON);
    assert_same(&one_large);
    // A mean just at the floor, on either side.
    for scale in [0.99999, 1.0, 1.00001] {
        let weight = bell(1 << 14, 1.0, 3);
        let to_floor = scale * EPSILON / absmean(&weight);
        assert_same(&weight.iter().map(|w| w * to_floor).collect::<Vec<_>>());
    }
}

#[test]
fn ties_stay_zero_and_their_neighbours_one() {
    // b is 1: half of it rounds to even, which is zero; the next f32 above is one.
    let above = 0.5f32.next_up();
    let mut weight = [0.5, -0.5, above, -above, 0.25, 0.0].repeat(50);
    let rest = 400.0 - weight.iter().map(|w| w.abs()).sum::<f32>();
    weight.extend([rest / 100.0; 100]);
    assert_eq!(absmean(&weight), 1.0);
    let rounded = assert_same(&weight);
    assert!(rounded[0] < 0.5 && rounded[2] > 0.5);
}

#[test]
fn huge_weights_and_a_tensor_that_hangs_on_one() {
    let huge = bell(1 << 12, 1e38, 4);
    let rounded = widened(&to_bf16(&huge));
    assert_same_codes(&huge, &rounded);
    assert_eq!(absmean(&rounded), absmean(&huge));
    assert!(rounded.iter().all(|w| w.is_finite()));
    let largest = to_bf16(&[f32::MAX, 1.0, 0.0, -f32::MAX]);
    assert!(largest.iter().all(|w| w.is_finite()), "{largest:?}");
    for (place, outlier) in [(0, 1.001e6), (500, -1.003e6), (999, 1.0019e6)] {
        let mut weight = bell(1000, 0.01, 5);
        weight[place] = outlier;
        assert_same(&weight);
    }
}

/// Without zero codes nothing small is left to correct the mean with: the codes stay, the mean is
/// within a step of one weight.
#[test]
fn equal_weights_keep_their_codes() {
    let weight = [-0.02; 48];
    let rounded = widened(&to_bf16(&weight));
    assert_same_codes(&weight, &rounded);
    let b = absmean(&rounded);
    assert!((b / 0.02 - 1.0).abs() < 1.0 / 128.0 / 48.0, "{b}");
}

proptest! {
    /// Any mixture of magnitudes, with enough zero codes.
    #[test]
    fn mixtures_keep_codes_and_scale(
        weight in prop::collection::vec(
            prop_oneof![
                4 => -1.0f32..1.0,
                1 => -1e-3f32..1e-3,
                1 => -6.0f32..6.0,
                1 => Just(0.0f32),
            ],
            64..2000,
        ),
        exponent in -12i32..24,
    ) {
        let scale = 2f32.powi(exponent);
        let weight: Vec<f32> = weight.iter().map(|w| w * scale).collect();
        assert_same(&weight);
    }

    /// Whatever the numbers are, the codes are kept.
    #[test]
    fn any_finite_weights_keep_their_codes(
        weight in prop::collection::vec(
            any::<f32>().prop_filter("finite", |w| w.is_finite()),
            1..300,
        ),
    ) {
        assert_same_codes(&weight, &widened(&to_bf16(&weight)));
    }
}
