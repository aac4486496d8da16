//! The two quantisers of BitNet b1.58 on plain slices ("The Era of 1-bit LLMs: Training Tips, Code
//! and FAQ", Microsoft 2024). Rounding is half to even throughout; inputs must be finite.

/// Floor of both scales, so that an all-zero tensor does not divide by zero.
pub const EPSILON: f32 = 1e-5;

/// Scale of a weight tensor, `b = max(mean |W|, 1e-5)`; the mean is summed in f64.
pub fn absmean(weight: &[f32]) -> f32 {
    let sum: f64 = weight.iter().map(|w| f64::from(w.abs())).sum();
    let mean = sum / weight.len().max(1) as f64;
    (mean as f32).max(EPSILON)
}

/// Ternary codes of a weight tensor, `clamp(round(W / scale), -1, 1)`.
pub fn ternary_codes(weight: &[f32], scale: f32) -> Vec<i8> {
    weight
        .iter()
        .map(|w| (w / scale).round_ties_even().clamp(-1.0, 1.0) as i8)
        .collect()
}

/// Int8 codes of activations of shape (tokens, `hidden`), and a scale for each token:
/// `s = 127 / max(absmax(x), 1e-5)`, `codes = clamp(round(x * s), -128, 127)`.
///
/// Panics if `x` is not whole tokens of `hidden` values.
pub fn quantize_tokens(x: &[f32], hidden: usize) -> (Vec<i8>, Vec<f32>) {
    assert!(
        hidden > 0 && x.len().is_multiple_of(hidden),
        "{} activations are not whole tokens of {hidden}",
        x.len()
    );
    let scales: Vec<f32> = x
        .chunks_exact(hidden)
        .map(|token| 127.0 / token.iter().fold(EPSILON, |max, v| max.max(v.abs())))
        .collect();
    let codes = x
        .chunks_exact(hidden)
        .zip(&scales)
        .flat_map(|(token, scale)| token.iter().map(move |v| int8_code(v * scale)))
        .collect();
    (codes, scales)
}

fn int8_code(scaled: f32) -> i8 {
    scaled.round_ties_even().clamp(-128.0, 127.0) as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absmean_of_a_hand_worked_tensor() {
        assert_eq!(absmean(&[1.0, -2.0, 3.0, 0.0]), 1.5);
        assert_eq!(absmean(&[0.25; 7]), 0.25);
    }

    #[test]
    fn zeros_get_the_floor_and_code_zero() {
        assert_eq!(absmean(&[0.0; 5]), EPSILON);
        assert_eq!(absmean(&[]), EPSILON);
        assert_eq!(ternary_codes(&[0.0, -0.0], EPSILON), [0, 0]);
        let (codes, scales) = quantize_tokens(&[0.0; 3], 3);
        assert_eq!(codes, [0, 0, 0]);
        assert_eq!(scales, [127.0 / EPSILON]);
    }

    #[test]
    fn weights_round_half_to_even_and_clamp() {
        // Scale 2: quotients 0.5, -0.5, 0.75, -0.75, 1.5, -100; the ties go to the even 0 and +-2.
        let weight = [1.0, -1.0, 1.5, -1.5, 3.0, -200.0];
        assert_eq!(ternary_codes(&weight, 2.0), [0, 0, 1, -1, 1, -1]);
    }

    #[test]
    fn equal_weights_all_become_one() {
        let weight = [-0.02; 9];
        assert_eq!(ternary_codes(&weight, absmean(&weight)), [-1; 9]);
    }

    #[test]
    fn each_token_has_its_own_scale() {
        let (codes, scales) = quantize_tokens(&[127.0, -1.0, 0.0, -0.5, 0.25, 0.5], 3);
        assert_eq!(scales, [1.0, 254.0]);
        // Second token: -127, 63.5 (a tie, to the even 64), 127.
        assert_eq!(codes, [127, -1, 0, -127, 64, 127]);
    }

    #[test]
    fn activation_ties_go_to_the_even_code() {
        let (codes, _) = quantize_tokens(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], 7);
        assert_eq!(codes, [127, 0, 2, 2, 0, -2, -2]);
    }

    #[test]
    #[should_panic(expected = "not whole tokens")]
    fn a_partial_token_is_refused() {
        quantize_tokens(&[1.0, 2.0, 3.0], 2);
    }
}
