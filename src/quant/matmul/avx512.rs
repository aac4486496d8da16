//! AVX-512 with VNNI: `vpdpbusd` adds four products of an unsigned field and a signed activation to
//! each 32-bit lane.

use std::arch::x86_64::*;

use super::kernel::{PREFETCH_AHEAD, ROWS, Sums, Tile, check, padded};

const VECTOR: usize = 64;

pub(super) struct Avx512Vnni;

impl Tile for Avx512Vnni {
    const VECTOR: usize = VECTOR;
    /// 24 sums, 4 fields, an activation and the mask in 32 registers.
    const TOKENS: usize = 6;

    unsafe fn tile<const TOKENS: usize>(w: [&[u8]; ROWS], x: [&[i8]; TOKENS]) -> Sums<TOKENS> {
        // SAFETY: the caller says that the processor has the instructions.
        unsafe { tile(w, x) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<const TOKENS: usize>(w: [&[u8]; ROWS], x: [&[i8]; TOKENS]) -> Sums<TOKENS> {
    check(&w, &x, VECTOR);
    let bytes = w[0].len();
    let whole = bytes / VECTOR * VECTOR;
    let ahead = w[0].as_ptr().wrapping_add(PREFETCH_AHEAD.max(ROWS * bytes));
    let x = x.map(<[i8]>::as_ptr);

    let mut sums = [[_mm512_setzero_si512(); TOKENS]; ROWS];
    for at in (0..whole).step_by(VECTOR) {
        for line in 0..ROWS {
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(ROWS * at + line * VECTOR).cast());
        }
        // SAFETY: `whole` bytes are whole vectors of each row, for which `check` saw activations.
        unsafe {
            add_products(
                &mut sums,
                w.map(|w| w.as_ptr().add(at)),
                x.map(|x| x.add(4 * at)),
            )
        };
    }
    if whole < bytes {
        let tails = w.map(|w| padded::<VECTOR>(&w[whole..]));
        let tails = std::array::from_fn(|row| tails[row].as_ptr());
        // SAFETY: each tail is a vector, for which `check` saw activations.
        unsafe { add_products(&mut sums, tails, x.map(|x| x.add(4 * whole))) };
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
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn add_products<const TOKENS: usize>(
    sums: &mut [[__m512i; TOKENS]; ROWS],
    w: [*const u8; ROWS],
    x: [*const i8; TOKENS],
) {
    // SAFETY: the caller's promise.
    let mut words = w.map(|w| unsafe { _mm512_loadu_si512(w.cast()) });
    for j in 0..4 {
        let fields = words.map(|words| _mm512_and_si512(words, _mm512_set1_epi8(3)));
        words = words.map(|words| _mm512_srli_epi16::<2>(words));
        for token in 0..TOKENS {
            // SAFETY: the caller's promise.
            let x = unsafe { _mm512_loadu_si512(x[token].add(j * VECTOR).cast()) };
            for row in 0..ROWS {
                sums[row][token] = _mm512_dpbusd_epi32(sums[row][token], fields[row], x);
            }
        }
    }
}

/// The sum of all lanes of each vector.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_lanes(v: [__m512i; ROWS]) -> [i32; ROWS] {
    let low = _mm512_add_epi32(
        _mm512_unpacklo_epi32(v[0], v[1]),
        _mm512_unpackhi_epi32(v[0], v[1]),
    );
    let high = _mm512_add_epi32(
        _mm512_unpacklo_epi32(v[2], v[3]),
        _mm512_unpackhi_epi32(v[2], v[3]),
    );
    // Four lanes for the four vectors, four times.
    let quarters = _mm512_add_epi32(
        _mm512_unpacklo_epi64(low, high),
        _mm512_unpackhi_epi64(low, high),
    );
    let halves = _mm256_add_epi32(
        _mm512_castsi512_si256(quarters),
        _mm512_extracti64x4_epi64::<1>(quarters),
    );
    let sums = _mm_add_epi32(
        _mm256_castsi256_si128(halves),
        _mm256_extracti128_si256::<1>(halves),
    );
    // SAFETY: both are 16 bytes without padding.
    unsafe { std::mem::transmute(sums) }
}
