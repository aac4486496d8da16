//! The exact integer product behind a BitLinear layer, on the CPU: `y = x . w^T`.

use rayon::prelude::*;

use super::PackedTernary;
use crate::{Error, Result};

/// Largest inner dimension: up to here `|y| <= 128 K` fits an int32.
pub const MAX_K: usize = (1 << 24) - 1;

/// Weight rows unpacked together: `x` is streamed once for each such block, and the block stays in
/// the first-level cache at the hidden sizes of these models.
const BLOCK: usize = 16;

/// Weight rows multiplied together: each activation loaded serves this many products.
const LANES: usize = 4;

/// `y = x . w^T`: int8 codes `x` of shape (`m`, K) row-major times packed ternary `w` of shape
/// (N, K) gives int32 `y` of shape (`m`, N). Exact; runs on rayon's current thread pool.
///
/// Errors if `x` does not hold `m * K` codes (`m` at least 1) or K is above [`MAX_K`].
pub fn ternary_matmul(x: &[i8], m: usize, w: &PackedTernary) -> Result<Vec<i32>> {
    let (n, k) = (w.rows(), w.cols());
    check_shapes(x.len(), m, k)?;
    let mut transposed = vec![0; n * m];
    transposed
        .par_chunks_mut(BLOCK * m)
        .enumerate()
        .for_each(|(block, out)| block_product(x, w, block * BLOCK, out));
    Ok(transpose(&transposed, n, m))
}

/// The shapes that every implementation of the product takes.
pub(crate) fn check_shapes(x_len: usize, m: usize, k: usize) -> Result<()> {
    if m == 0 || m.checked_mul(k) != Some(x_len) {
        return Err(Error::usage(format!(
            "{x_len} activation codes are not {m} tokens of {k}: the weights have {k} columns"
        )));
    }
    if k > MAX_K {
        return Err(Error::usage(format!(
            "an inner dimension of {k} can overflow the int32 sum: at most {MAX_K} is exact"
        )));
    }
    Ok(())
}

/// Products of all tokens with the weight rows from `first` on; `out` has shape (rows, tokens).
fn block_product(x: &[i8], w: &PackedTernary, first: usize, out: &mut [i32]) {
    let k = w.cols();
    let m = x.len() / k;
    // The last group may have fewer rows than lanes: the missing ones stay zero.
    let mut rows = vec![0; (out.len() / m).next_multiple_of(LANES) * k];
    for (i, row) in rows.chunks_exact_mut(k).take(out.len() / m).enumerate() {
        w.unpack_row(first + i, row);
    }
    for (token, x) in x.chunks_exact(k).enumerate() {
        for (group, rows) in rows.chunks_exact(LANES * k).enumerate() {
            let sums = dot(x, rows);
            let out = out[group * LANES * m..].iter_mut().skip(token).step_by(m);
            for (out, sum) in out.zip(sums) {
                *out = sum;
            }
        }
    }
}

/// Inner products of `x` with `LANES` rows of the same length laid end to end.
fn dot(x: &[i8], rows: &[i8]) -> [i32; LANES] {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has just said that it has AVX2, which is all the callee asks for.
        return unsafe { dot_avx2(x, rows) };
    }
    dot_portable(x, rows)
}

/// The portable loop compiled for AVX2, which is 4 times as fast as for baseline x86-64.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dot_avx2(x: &[i8], rows: &[i8]) -> [i32; LANES] {
    dot_portable(x, rows)
}

/// Written for the auto-vectoriser: the products fit an int16, the sums an int32.
#[inline(always)]
fn dot_portable(x: &[i8], rows: &[i8]) -> [i32; LANES] {
    let k = x.len();
    let rows: [&[i8]; LANES] = std::array::from_fn(|lane| &rows[lane * k..][..k]);
    let mut sums = [0i32; LANES];
    for (i, &x) in x.iter().enumerate() {
        for lane in 0..LANES {
            sums[lane] += i32::from(i16::from(x)) * i32::from(i16::from(rows[lane][i]));
        }
    }
    sums
}

/// (`n`, `m`) to (`m`, `n`), 16 output rows at a time so that each cache line read is used whole.
fn transpose(from: &[i32], n: usize, m: usize) -> Vec<i32> {
    let mut to = vec![0; from.len()];
    to.par_chunks_mut(BLOCK * n)
        .enumerate()
        .for_each(|(block, to)| {
            for (column, from) in from.chunks_exact(m).enumerate() {
                for (row, to) in to.chunks_exact_mut(n).enumerate() {
                    to[column] = from[block * BLOCK + row];
                }
            }
        });
    to
}
