//! The weight quantiser of BitNet b1.58 on plain slices ("The Era of 1-bit LLMs: Training Tips, Code
//! and FAQ", Microsoft 2024). Rounding is half to even; inputs must be finite.

/// Floor of the scales of weights and of activations, so that an all-zero tensor does not divide by zero.
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
}
