//! 2-bit packing.

use proptest::prelude::*;
use titanbit::quant::PackedTernary;

/// A ternary matrix of up to `rows` x `cols`: random, all -1 or all +1.
fn ternary_matrix(rows: usize, cols: usize) -> impl Strategy<Value = (usize, usize, Vec<i8>)> {
    (1..=rows, 1..=cols).prop_flat_map(|(rows, cols)| {
        let codes = prop_oneof![
            4 => prop::collection::vec(-1i8..=1, rows * cols),
            1 => Just(vec![-1; rows * cols]),
            1 => Just(vec![1; rows * cols]),
        ];
        (Just(rows), Just(cols), codes)
    })
}

proptest! {
    #[test]
    fn unpacking_gives_back_what_was_packed((rows, cols, codes) in ternary_matrix(5, 70)) {
        let packed = PackedTernary::pack(&codes, rows, cols).unwrap();
        prop_assert_eq!(packed.words().len(), rows * cols.div_ceil(16));
        prop_assert_eq!(packed.bytes(), packed.words().len() * 4);
        prop_assert_eq!(packed.unpack(), codes);
    }

    #[test]
    fn one_bad_value_is_refused_by_place(
        (rows, cols, mut codes) in ternary_matrix(4, 40),
        at in any::<prop::sample::Index>(),
        bad in prop_oneof![-128i8..=-2, 2i8..=127],
    ) {
        let at = at.index(codes.len());
        codes[at] = bad;
        let message = PackedTernary::pack(&codes, rows, cols).unwrap_err().to_string();
        let place = format!("the value {bad} at row {}, column {}:", at / cols, at % cols);
        prop_assert!(message.contains(&place), "{}", message);
    }
}

#[test]
fn the_bits_are_as_documented() {
    // code + 1 in 2 bits, the first value lowest; the tail is padded with code 0, that is 01.
    let packed = PackedTernary::pack(&[-1, 0, 1, 1], 2, 2).unwrap();
    let padding = 0x5555_5550;
    assert_eq!(packed.words(), [padding | 0b0100, padding | 0b1010]);

    let mut codes = [0; 17];
    codes[15] = 1;
    codes[16] = -1;
    let packed = PackedTernary::pack(&codes, 1, 17).unwrap();
    assert_eq!(packed.words(), [0x9555_5555, 0x5555_5554]);
}

#[test]
fn shapes_that_do_not_match_are_errors() {
    for (codes, rows, cols) in [(6, 2, 2), (0, 0, 3), (0, 3, 0), (2, usize::MAX, 2)] {
        let error = PackedTernary::pack(&vec![0; codes], rows, cols).unwrap_err();
        assert!(error.to_string().contains("non-empty"), "{error}");
    }
}
