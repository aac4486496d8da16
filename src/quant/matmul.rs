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
/// # Errors
/// `Usage` if `x` does not hold `m * K` codes (`m` at least 1) or K is above [`MAX_K`].
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
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has just said that it has AVX2, which is all the callee asks for.
        return unsafe { block_product_avx2(x, w, first, out) };
    }
    portable_block_product(x, w, first, out)
}

/// The portable code compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn block_product_avx2(x: &[i8], w: &PackedTernary, first: usize, out: &mut [i32]) {
    portable_block_product(x, w, first, out)
}

#[inline(always)]
fn portable_block_product(x: &[i8], w: &PackedTernary, first: usize, out: &mut [i32]) {
    let k = w.cols();
    let m = x.len() / k;
    // The last group may have fewer rows than lanes: the missing ones stay zero.
    let mut rows = vec![0; (out.len() / m).next_multiple_of(LANES) * k];
    for (i, row) in rows.chunks_exact_mut(k).take(out.len() / m).enumerate() {
        w.unpack_row(first + i, row);
    }
    for (token, x) in x.chunks_exact(k).enumerate() {
        for (rows, out) in rows.chunks_exact(LANES * k).zip(out.chunks_mut(LANES * m)) {
            for (sum, out) in dot(x, rows).into_iter().zip(out.chunks_exact_mut(m)) {
                out[token] = sum;
            }
        }
    }
}

/// Inner products of `x` with `LANES` rows of the same length laid end to end. Written for the
/// auto-vectoriser; with K up to [`MAX_K`] nothing wraps.
#[inline(always)]
fn dot(x: &[i8], rows: &[i8]) -> [i32; LANES] {
    let k = x.len();
    let rows: [&[i8]; LANES] = std::array::from_fn(|lane| &rows[lane * k..][..k]);
    let mut sums = [0i32; LANES];
    for (i, &x) in x.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum = sum.wrapping_add(i32::from(x).wrapping_mul(i32::from(row[i])));
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
