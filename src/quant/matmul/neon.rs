//! NEON: `sdot` adds four products to each 32-bit lane where the processor has it, else products
//! are summed in 16 bits by pairs.

use std::arch::aarch64::*;
use std::arch::asm;

use super::kernel::{ROWS, Sums, Tile, check, padded};

const VECTOR: usize = 16;

/// With the dot product instructions (`DOT`) or without.
pub(super) struct Neon<const DOT: bool>;

impl<const DOT: bool> Tile for Neon<DOT> {
    const VECTOR: usize = VECTOR;
    /// 16 sums, 4 words, 4 fields, an activation and the mask in 32 registers.
    const TOKENS: usize = 4;

    unsafe fn tile<const TOKENS: usize>(w: [&[u8]; ROWS], x: [&[i8]; TOKENS]) -> Sums<TOKENS> {
        check(&w, &x, VECTOR);
        let bytes = w[0].len();
        let whole = bytes / VECTOR * VECTOR;
        let x = x.map(<[i8]>::as_ptr);

        // SAFETY: the target has NEON; the caller says that the processor has the dot product if
        // `DOT`. `whole` bytes are whole vectors of each row and each tail is one, for which
        // `check` saw activations.
        unsafe {
            let mut sums = [[vdupq_n_s32(0); TOKENS]; ROWS];
            for at in (0..whole).step_by(VECTOR) {
                let w = w.map(|w| w.as_ptr().add(at));
                add_products::<DOT, TOKENS>(&mut sums, w, x.map(|x| x.add(4 * at)));
            }
            if whole < bytes {
                let tails = w.map(|w| padded::<VECTOR>(&w[whole..]));
                let tails = std::array::from_fn(|row| tails[row].as_ptr());
                add_products::<DOT, TOKENS>(&mut sums, tails, x.map(|x| x.add(4 * whole)));
            }
            std::array::from_fn(|token| add_lanes(sums.map(|sums| sums[token])))
        }
    }
}

/// Adds the products of a vector of packed weights of each row with its four of each token.
///
/// # Safety
/// `w` point to a vector each, `x` to four; the processor has the dot product if `DOT`.
#[inline(always)]
unsafe fn add_products<const DOT: bool, const TOKENS: usize>(
    sums: &mut [[int32x4_t; TOKENS]; ROWS],
    w: [*const u8; ROWS],
    x: [*const i8; TOKENS],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut words = w.map(|w| vld1q_u8(w));
        for j in 0..4 {
            let fields = words.map(|w| vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(3))));
            words = words.map(|words| vshrq_n_u8::<2>(words));
            for token in 0..TOKENS {
                let x = vld1q_s8(x[token].add(j * VECTOR));
                for row in 0..ROWS {
                    sums[row][token] = add_dots::<DOT>(sums[row][token], fields[row], x);
                }
            }
        }
    }
}

/// Adds four products to each lane; without the dot product, which four may differ.
///
/// # Safety
/// The processor has the dot product if `DOT`.
#[inline(always)]
unsafe fn add_dots<const DOT: bool>(sum: int32x4_t, fields: int8x16_t, x: int8x16_t) -> int32x4_t {
    if DOT {
        let mut sum = sum;
        // The intrinsic is not stable. SAFETY: an instruction that the processor has, on registers.
        unsafe {
            asm!(
                ".arch_extension dotprod",
                "sdot {sum:v}.4s, {fields:v}.16b, {x:v}.16b",
                sum = inout(vreg) sum,
                fields = in(vreg) fields,
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sum
    } else {
        // SAFETY: the target has NEON. Two products of at most 2 * -128 fit in 16 bits.
        unsafe {
            let low = vmull_s8(vget_low_s8(fields), vget_low_s8(x));
            vpadalq_s16(sum, vmlal_high_s8(low, fields, x))
        }
    }
}

/// The sum of all lanes of each vector.
#[inline(always)]
fn add_lanes(v: [int32x4_t; ROWS]) -> [i32; ROWS] {
    // SAFETY: the target has NEON; the vector and the array are 16 bytes without padding.
    unsafe {
        let sums = vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
        std::mem::transmute(sums)
    }
}
