//! AVX2: `vpmaddubsw` adds two products of an unsigned field and a signed activation in a 16-bit lane.

use std::arch::x86_64::*;

use super::kernel::{PREFETCH_AHEAD, ROWS, Sums, Tile, check, padded};

/// Vectors of packed weights whose products are summed in 16 bits. Each adds four times two
/// products of at most 2 and -128..=127: the sums stay within 16 * 4 * 2 * 2 * -128 = -2^15.
const VECTORS_PER_FOLD: usize = 16;

const VECTOR: usize = 32;

pub(super) struct Avx2;

impl Tile for Avx2 {
    const VECTOR: usize = VECTOR;
    /// 8 sums, 4 fields, an activation, a product and the mask in 16 registers.
    const TOKENS: usize = 2;

    unsafe fn tile<const TOKENS: usize>(w: [&[u8]; ROWS], x: [&[i8]; TOKENS]) -> Sums<TOKENS> {
        // SAFETY: the caller says that the processor has the instructions.
        unsafe { tile(w, x) }
    }
}

#[target_feature(enable = "avx2")]
fn tile<const TOKENS: usize>(w: [&[u8]; ROWS], x: [&[i8]; TOKENS]) -> Sums<TOKENS> {
    check(&w, &x, VECTOR);
    let bytes = w[0].len();
    let whole = bytes / VECTOR * VECTOR;
    let ahead = w[0].as_ptr().wrapping_add(PREFETCH_AHEAD.max(ROWS * bytes));
    let x = x.map(<[i8]>::as_ptr);

    let mut sums = [[_mm256_setzero_si256(); TOKENS]; ROWS];
    for first in (0..whole).step_by(VECTORS_PER_FOLD * VECTOR) {
        let mut short = [[_mm256_setzero_si256(); TOKENS]; ROWS];
        for at in (first..whole.min(first + VECTORS_PER_FOLD * VECTOR)).step_by(VECTOR) {
            for line in (0..ROWS * VECTOR).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(ROWS * at + line).cast());
            }
            let w = w.map(|w| w.as_ptr().wrapping_add(at));
            // SAFETY: `whole` bytes are whole vectors of each row, for which `check` saw
            // activations.
            unsafe { add_products(&mut short, w, x.map(|x| x.add(4 * at))) };
        }
        fold(&mut sums, short);
    }
    if whole < bytes {
        let tails = w.map(|w| padded::<VECTOR>(&w[whole..]));
        let tails = std::array::from_fn(|row| tails[row].as_ptr());
        let mut short = [[_mm256_setzero_si256(); TOKENS]; ROWS];
        // SAFETY: each tail is a vector, for which `check` saw activations.
        unsafe { add_products(&mut short, tails, x.map(|x| x.add(4 * whole))) };
        fold(&mut sums, short);
    }

    let mut tile = [[0; ROWS]; TOKENS];
    for (token, tile) in tile.iter_mut().enumerate() {
        *tile = add_lanes(sums.map(|sums| sums[token]));
    }
    tile
}

/// Adds the products of a vector of packed weights of each row with its four of each token.
///
/// # Safety
/// `w` point to a vector each, `x` to four.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_products<const TOKENS: usize>(
    sums: &mut [[__m256i; TOKENS]; ROWS],
    w: [*const u8; ROWS],
    x: [*const i8; TOKENS],
) {
    // SAFETY: the caller's promise.
    let mut words = w.map(|w| unsafe { _mm256_loadu_si256(w.cast()) });
    for j in 0..4 {
        let fields = words.map(|words| _mm256_and_si256(words, _mm256_set1_epi8(3)));
        words = words.map(|words| _mm256_srli_epi16::<2>(words));
        for token in 0..TOKENS {
            // SAFETY: the caller's promise.
            let x = unsafe { _mm256_loadu_si256(x[token].add(j * VECTOR).cast()) };
            for row in 0..ROWS {
                let products = _mm256_maddubs_epi16(fields[row], x);
                sums[row][token] = _mm256_add_epi16(sums[row][token], products);
            }
        }
    }
}

/// Adds 16-bit sums to 32-bit ones.
#[inline]
#[target_feature(enable = "avx2")]
fn fold<const TOKENS: usize>(
    sums: &mut [[__m256i; TOKENS]; ROWS],
    short: [[__m256i; TOKENS]; ROWS],
) {
    for (sum, short) in sums.as_flattened_mut().iter_mut().zip(short.as_flattened()) {
        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*short, _mm256_set1_epi16(1)));
    }
}

/// The sum of all lanes of each vector.
#[inline]
#[target_feature(enable = "avx2")]
fn add_lanes(v: [__m256i; ROWS]) -> [i32; ROWS] {
    // Four lanes for the four vectors, twice.
    let halves = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    let sums = _mm_add_epi32(
        _mm256_castsi256_si128(halves),
        _mm256_extracti128_si256::<1>(halves),
    );
    // SAFETY: both are 16 bytes without padding.
    unsafe { std::mem::transmute(sums) }
}
