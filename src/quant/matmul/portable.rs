//! Plain Rust, written for the auto-vectoriser.

use super::kernel::{ROWS, Sums, Tile, padded};

const VECTOR: usize = 16;

pub(super) struct Portable;

impl Tile for Portable {
    const VECTOR: usize = VECTOR;
    const TOKENS: usize = 1;

    unsafe fn tile<const TOKENS: usize>(w: [&[u8]; ROWS], x: [&[i8]; TOKENS]) -> Sums<TOKENS> {
        x.map(|x| w.map(|w| dot(w, x)))
    }
}

fn dot(w: &[u8], x: &[i8]) -> i32 {
    let (words, tail) = w.as_chunks::<VECTOR>();
    let (blocks, _) = x.as_chunks::<{ 4 * VECTOR }>();
    let mut sums = [0; VECTOR];
    for (words, x) in words.iter().zip(blocks) {
        add_products(&mut sums, words, x);
    }
    if !tail.is_empty() {
        add_products(&mut sums, &padded(tail), &blocks[words.len()]);
    }
    sums.iter()
        .fold(0, |sum: i32, &lane| sum.wrapping_add(lane))
}

#[inline(always)]
fn add_products(sums: &mut [i32; VECTOR], words: &[u8; VECTOR], x: &[i8; 4 * VECTOR]) {
    // Four products of at most 2 * -128 fit in 16 bits.
    let mut products = [0i16; VECTOR];
    for (j, x) in x.as_chunks::<VECTOR>().0.iter().enumerate() {
        for lane in 0..VECTOR {
            let field = words[lane] >> (2 * j) & 3;
            products[lane] += i16::from(field) * i16::from(x[lane]);
        }
    }
    for (sum, products) in sums.iter_mut().zip(products) {
        *sum = sum.wrapping_add(i32::from(products));
    }
}
