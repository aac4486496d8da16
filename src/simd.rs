//! Vector arithmetic of the CPU paths. A function made by [`vectorized!`] is compiled once per
//! instruction set and the widest that the processor has is picked at run time. Sums keep a fixed
//! number of lanes and nothing is fused, so that results do not depend on the vector width.

/// Defines `fn name(args) { body }` compiled for AVX-512, AVX2 and the baseline. What the body
/// calls is compiled along if it is `#[inline(always)]`.
macro_rules! vectorized {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn portable($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $type),*) $(-> $result)? {
                    portable($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $type),*) $(-> $result)? {
                    portable($($arg),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has the instructions, as just asked.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    };
}

pub(crate) use vectorized;

const LANES: usize = 16;

/// Folds `term(x, y)` over two slices of equal length.
#[inline(always)]
fn sum_lanes(x: &[f32], y: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let tail: f32 = xs
        .remainder()
        .iter()
        .zip(ys.remainder())
        .map(|(x, y)| term(*x, *y))
        .sum();
    for (x, y) in xs.zip(ys) {
        for lane in 0..LANES {
            lanes[lane] += term(x[lane], y[lane]);
        }
    }
    // By fours: a chain of sums would take longer than the sums of a short slice. Other orders keep
    // LLVM from using whole vectors in the loop.
    let fours = lanes.as_chunks::<4>().0;
    let [a, b, c, d] =
        [0, 1, 2, 3].map(|i| (fours[i][0] + fours[i][1]) + (fours[i][2] + fours[i][3]));
    (a + b) + (c + d) + tail
}

#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    sum_lanes(x, y, |x, y| x * y)
}

#[inline(always)]
pub fn abs_sum(x: &[f32]) -> f32 {
    sum_lanes(x, x, |x, _| x.abs())
}

#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    sum_lanes(x, x, |x, _| x)
}

/// Largest value of `key(x)`; NaN if any is NaN.
#[inline(always)]
pub fn max_by(x: &[f32], key: impl Fn(f32) -> f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], key(chunk[lane]));
        }
    }
    let lanes = lanes.into_iter().chain(tail.iter().map(|x| key(*x)));
    lanes.reduce(larger).unwrap_or(f32::NEG_INFINITY)
}

/// e^x to 2 ulp for x in [-87, 88], 0 below, saturating above; NaN stays NaN. Branch-free, so
/// that loops over it vectorise: 2^n by exponent bits, the rest by a Taylor polynomial on
/// [-ln2/2, ln2/2].
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let bounded = x.clamp(-87.0, 88.0);
    let shifted = bounded * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (bounded - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits());
    let two_to_n = f32::from_bits(exponent.wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * two_to_n }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_f64() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (exp(x) as f64, (x as f64).exp());
            assert!(
                (got - want).abs() <= 2.0 * f32::EPSILON as f64 * want,
                "{x}"
            );
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(100.0) > 1e38);
    }

    #[test]
    fn reductions_cover_lanes_and_tail() {
        let x: Vec<f32> = (0..37).map(|i| i as f32 - 18.0).collect();
        assert_eq!(sum(&x), 0.0);
        assert_eq!(abs_sum(&x), 342.0);
        assert_eq!(dot(&x, &x), 4218.0);
        assert_eq!(max_by(&x, |x| -x), 18.0);
        assert!(max_by(&[1.0, f32::NAN, 2.0], f32::abs).is_nan());
    }
}
