//! The activation quantiser of BitNet b1.58 on plain slices (source: see `ternary.rs`).

use rayon::prelude::*;

use super::ternary::EPSILON;
use crate::simd::{max_by, vectorized};

vectorized! {
    fn quantize_token(codes: &mut [i8], x: &[f32]) -> f32 {
        let absmax = max_by(x, f32::abs);
        // A comparison, not `max`, so that a NaN reaches the result.
        let s = 127.0 / if absmax < EPSILON { EPSILON } else { absmax };
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (x * s).round_ties_even() as i8;
        }
        s
    }
}

/// Int8 codes `round(x s)` and scale `s = 127 / max(absmax(x), 1e-5)` of every token of `x`, whose
/// shape is (tokens, `k`): codes (tokens, `k`), scales (tokens,). Rounds half to even.
pub fn quantize_tokens(x: &[f32], k: usize) -> (Vec<i8>, Vec<f32>) {
    let mut codes = vec![0; x.len()];
    let scales = codes
        .par_chunks_mut(k)
        .zip(x.par_chunks(k))
        .map(|(codes, x)| quantize_token(codes, x))
        .collect();
    (codes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_hand_worked_values() {
        // Scales 127 / 2 and 127 / 127; 1.0 falls on 63.5 and 2.5 on itself: ties go to even.
        let x = [2.0, -1.0, 1.0, 0.0, 127.0, 2.5, -3.5, -127.0];
        let (codes, scales) = quantize_tokens(&x, 4);
        assert_eq!(scales, [63.5, 1.0]);
        assert_eq!(codes, [127, -64, 64, 0, 127, 2, -4, -127]);
    }

    #[test]
    fn zeros_get_the_floor_and_a_nan_stays() {
        let (codes, scales) = quantize_tokens(&[0.0, 0.0, 1.0, f32::NAN], 2);
        assert_eq!(codes[..2], [0, 0]);
        assert_eq!(scales[0], 127.0 / EPSILON);
        assert!(scales[1].is_nan());
    }
}
