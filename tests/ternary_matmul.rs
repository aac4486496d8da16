//! The CPU's ternary products, with every kernel that this machine can run, against an i64 reference.

mod common;

use common::exact_product;
use proptest::prelude::*;
use titanbit::quant::matmul::{Kernel, MAX_K, TernaryMatmul, Threads};
use titanbit::quant::{PackedTernary, ternary_matmul};

/// Every kernel with one thread and with all.
fn ways() -> impl Iterator<Item = TernaryMatmul> {
    Kernel::available().into_iter().flat_map(|kernel| {
        [Threads::One, Threads::All].map(|threads| TernaryMatmul { kernel, threads })
    })
}

#[derive(Clone, Debug)]
struct Problem {
    m: usize,
    n: usize,
    k: usize,
    x: Vec<i8>,
    w: Vec<i8>,
}

impl Problem {
    fn packed(&self) -> PackedTernary {
        PackedTernary::pack(&self.w, self.n, self.k).unwrap()
    }

    fn reference(&self) -> Vec<i64> {
        exact_product(&self.x, &self.w, self.k)
    }
}

/// Random codes, all the smallest or all the largest.
fn problem(m: usize, n: usize, k: usize) -> impl Strategy<Value = Problem> {
    (1..=m, 1..=n, 1..=k).prop_flat_map(|(m, n, k)| {
        let x = prop_oneof![
            4 => prop::collection::vec(any::<i8>(), m * k),
            1 => Just(vec![-128; m * k]),
            1 => Just(vec![127; m * k]),
        ];
        let w = prop_oneof![
            4 => prop::collection::vec(-1i8..=1, n * k),
            1 => Just(vec![-1; n * k]),
            1 => Just(vec![1; n * k]),
        ];
        (x, w).prop_map(move |(x, w)| Problem { m, n, k, x, w })
    })
}

fn check(problem: &Problem) -> Result<(), TestCaseError> {
    let (w, reference) = (problem.packed(), problem.reference());
    for way in ways() {
        let mut y = vec![0; problem.m * problem.n];
        way.exact(&mut y, &problem.x, &w).unwrap();
        let y: Vec<i64> = y.into_iter().map(i64::from).collect();
        prop_assert_eq!(&y, &reference, "{:?}", way);
    }
    Ok(())
}

proptest! {
    #[test]
    fn small_shapes_are_exact(problem in problem(19, 70, 90)) {
        check(&problem)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn deep_shapes_are_exact(problem in problem(8, 9, 9000)) {
        check(&problem)?;
    }

    #[test]
    fn scaled_sums_are_the_sums_scaled(problem in problem(9, 70, 600)) {
        let scales = |len: usize| (0..len).map(|i| 0.3 + i as f32 * 0.7).collect::<Vec<_>>();
        let (s, b) = (scales(problem.m), scales(problem.n));
        let w = problem.packed();
        let want: Vec<f32> = problem.reference().iter().enumerate()
            .map(|(i, &sum)| sum as f32 * b[i % problem.n] / s[i / problem.n])
            .collect();
        for way in ways() {
            let mut y = vec![f32::NAN; want.len()];
            way.scaled(&mut y, &problem.x, &s, &w, &b).unwrap();
            prop_assert_eq!(&y, &want, "{:?}", way);
        }
    }
}

#[test]
fn several_blocks_of_tokens_and_rows_are_exact() {
    // Large enough for threads to share it, with a part of a block left over on each side.
    for (m, n, k) in [(301, 131, 4100), (1, 3001, 1030)] {
        let code = |i: usize| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as i8;
        let x: Vec<i8> = (0..m * k).map(code).collect();
        let w: Vec<i8> = (0..n * k).map(|i| code(i + 7).rem_euclid(3) - 1).collect();
        check(&Problem { m, n, k, x, w }).unwrap();
    }
}

#[test]
fn the_deepest_sums_are_exact() {
    // Deep enough that an int16 sum would wrap many times over, up to the int32's range.
    for (k, n) in [(300_001, 5), (MAX_K, 1)] {
        for (x, w) in [(-128, -1), (-128, 1), (127, 1), (127, -1)] {
            let packed = PackedTernary::pack(&vec![w; n * k], n, k).unwrap();
            let codes = vec![x; k];
            for way in ways() {
                let mut y = vec![0; n];
                way.exact(&mut y, &codes, &packed).unwrap();
                assert_eq!(
                    y,
                    vec![i32::from(x) * i32::from(w) * k as i32; n],
                    "{way:?}"
                );
            }
        }
    }
}

#[test]
fn the_default_is_the_fastest_available() {
    assert_eq!(Kernel::detect(), Kernel::available()[0]);
    assert_eq!(Kernel::available().last().unwrap().name(), "portable");
}

#[test]
fn shapes_that_do_not_match_are_errors() {
    let w = PackedTernary::pack(&[1, -1, 0, 1, 1, 1], 2, 3).unwrap();
    for (len, m) in [(5, 2), (0, 0), (3, 2)] {
        let error = ternary_matmul(&vec![1; len], m, &w).unwrap_err();
        assert!(error.to_string().contains("3 columns"), "{error}");
    }
    let way = TernaryMatmul::new(Threads::One);
    for (y, x) in [(4, 3), (0, 0), (3, 3)] {
        assert!(
            way.exact(&mut vec![0; y], &vec![1; x], &w).is_err(),
            "{y} {x}"
        );
    }
    for (s, b) in [(1, 2), (2, 1), (3, 2)] {
        let (s, b) = (vec![1.0; s], vec![1.0; b]);
        let error = way.scaled(&mut [0.0; 4], &[1; 6], &s, &w, &b).unwrap_err();
        assert!(error.to_string().contains("scales"), "{error}");
    }
}

#[test]
fn an_inner_dimension_that_could_overflow_is_refused() {
    let k = MAX_K + 1;
    let w = PackedTernary::pack(&vec![-1; k], 1, k).unwrap();
    let error = ternary_matmul(&vec![-128; k], 1, &w).unwrap_err();
    assert!(error.to_string().contains("overflow"), "{error}");
}
