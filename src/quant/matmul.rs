//! The exact integer product behind a BitLinear layer, on the CPU: `y = x . w^T`.
//!
//! A kernel multiplies the packed bits as they lie: of a vector of packed bytes, `v >> 2j & 3` holds
//! the codes 4b + j of its bytes b, plus one. So the activations of a token are put in that order once
//! (`activations.rs`), the kernels sum `(code + 1) * x`, and the token's sum of x is subtracted.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod kernel;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
mod neon;
mod portable;

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(crate) use self::activations::Activations;
pub use self::kernel::Kernel;
use self::kernel::{ROWS, Tile};
use super::PackedTernary;
use crate::{Error, Result};

/// Largest inner dimension: up to here `|y| <= 128 K` fits an int32.
pub const MAX_K: usize = (1 << 24) - 1;

/// Weight rows of one task, whose packed bits stay in the second-level cache while the tokens pass
/// by; a multiple of [`ROWS`].
const ROW_BLOCK: usize = 64;

/// Bytes of activations that stay in the second-level cache while the weight rows pass by.
const TOKEN_BLOCK_BYTES: usize = 384 << 10;

/// Products of a code and an activation that are worth handing to another thread.
const PRODUCTS_PER_TASK: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The caller's only, for callers that are parallel themselves.
    One,
    /// Those of rayon's current pool.
    All,
}

/// How to multiply. Every choice gives the same result.
#[derive(Clone, Copy, Debug)]
pub struct TernaryMatmul {
    pub kernel: Kernel,
    pub threads: Threads,
}

/// `y = x . w^T`: int8 codes `x` of shape (`m`, K) row-major times packed ternary `w` of shape
/// (N, K) gives int32 `y` of shape (`m`, N). Exact; runs on rayon's current thread pool.
///
/// # Errors
/// `Usage` if `x` does not hold `m * K` codes (`m` at least 1) or K is above [`MAX_K`].
pub fn ternary_matmul(x: &[i8], m: usize, w: &PackedTernary) -> Result<Vec<i32>> {
    check_shapes(x.len(), m, w.cols())?;
    let mut y = vec![0; m * w.rows()];
    TernaryMatmul::new(Threads::All).exact(&mut y, x, w)?;
    Ok(y)
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

impl TernaryMatmul {
    /// With the fastest kernel that this processor has.
    pub fn new(threads: Threads) -> Self {
        Self {
            kernel: Kernel::detect(),
            threads,
        }
    }

    /// `y = x . w^T`: codes `x` (M, K) and weights `w` (N, K) -> sums `y` (M, N), all row-major.
    ///
    /// # Errors
    /// `Usage` if the lengths of `x` and `y` are not M * K and M * N for one M of at least 1, or K
    /// is above [`MAX_K`].
    pub fn exact(&self, y: &mut [i32], x: &[i8], w: &PackedTernary) -> Result<()> {
        self.product(y, x, w, |y, sums, _, _| y.copy_from_slice(sums))
    }

    /// [`Self::exact`] as a BitLinear layer uses it: `y[i][j] = sum * b[j] / s[i]` in f32 and in this
    /// order, with scales `b` (N,) of the weight rows and `s` (M,) of the tokens.
    ///
    /// # Errors
    /// As [`Self::exact`], and `Usage` if `b` or `s` has another length.
    pub fn scaled(
        &self,
        y: &mut [f32],
        x: &[i8],
        s: &[f32],
        w: &PackedTernary,
        b: &[f32],
    ) -> Result<()> {
        let m = y.len() / w.rows();
        if (b.len(), s.len()) != (w.rows(), m) {
            return Err(Error::usage(format!(
                "{} weight scales and {} token scales do not fit {} weight rows and {m} tokens",
                b.len(),
                s.len(),
                w.rows()
            )));
        }
        self.product(y, x, w, |y, sums, token, row| {
            for ((y, &sum), b) in y.iter_mut().zip(sums).zip(&b[row..]) {
                *y = sum as f32 * b / s[token];
            }
        })
    }

    /// Codes `x` (M, `k`) in the order that [`Self::rows`] needs.
    pub(crate) fn arrange(&self, x: &[i8], k: usize) -> Activations {
        Activations::new(x, k, self.kernel.vector(), self.threads)
    }

    /// Sums of the one token of `x` with the rows of `w` from `first` on, as many as `sums` holds.
    pub(crate) fn rows(&self, sums: &mut [i32], x: &Activations, w: &PackedTernary, first: usize) {
        assert_eq!(x.tokens(), 1);
        let rows = sums.len();
        self.kernel.run(Blocks {
            x,
            w,
            first_row: first,
            y: Columns::new(sums, rows),
            finish: |y: &mut [i32], sums: &[i32], _, _| y.copy_from_slice(sums),
            threads: self.threads,
        });
    }

    /// Writes `y` (M, N) through `finish(part of y, its sums, token, first row)`.
    fn product<T: Send>(
        &self,
        y: &mut [T],
        x: &[i8],
        w: &PackedTernary,
        finish: impl Fn(&mut [T], &[i32], usize, usize) + Sync,
    ) -> Result<()> {
        let (n, k) = (w.rows(), w.cols());
        let m = y.len() / n;
        check_shapes(x.len(), m, k)?;
        if y.len() != m * n {
            return Err(Error::usage(format!(
                "an output of {} values is not {m} tokens of {n} weight rows",
                y.len()
            )));
        }
        let x = Activations::new(x, k, self.kernel.vector(), self.threads);
        let y = Columns::new(y, n);
        self.kernel.run(Blocks {
            x: &x,
            w,
            first_row: 0,
            y,
            finish,
            threads: self.threads,
        });
        Ok(())
    }
}

/// One product, cut into blocks of tokens and weight rows; generic over the kernel's [`Tile`].
pub(crate) struct Blocks<'a, T, F> {
    x: &'a Activations,
    w: &'a PackedTernary,
    /// Of `w`, the one whose products are the first column of `y`.
    first_row: usize,
    y: Columns<'a, T>,
    finish: F,
    threads: Threads,
}

impl<T: Send, F: Fn(&mut [T], &[i32], usize, usize) + Sync> Blocks<'_, T, F> {
    /// # Safety
    /// The processor has the instructions of `K`.
    unsafe fn run<K: Tile>(&self) {
        let (m, n, k) = (self.x.tokens(), self.y.cols, self.w.cols());
        // Of equal size, so that no task is left with a few tokens.
        let most = (TOKEN_BLOCK_BYTES / self.x.stride()).max(1);
        let tokens = m.div_ceil(m.div_ceil(most)).next_multiple_of(K::TOKENS);
        let row_blocks = n.div_ceil(ROW_BLOCK);
        let task = |task: usize| {
            let first = task / row_blocks * tokens;
            let row = task % row_blocks * ROW_BLOCK;
            for token in (first..m.min(first + tokens)).step_by(K::TOKENS) {
                // SAFETY: the caller's promise, and each task has its own tokens and rows.
                unsafe {
                    match K::TOKENS.min(m - token) {
                        1 => self.row_block::<K, 1>(token, row),
                        2 => self.row_block::<K, 2>(token, row),
                        3 => self.row_block::<K, 3>(token, row),
                        4 => self.row_block::<K, 4>(token, row),
                        5 => self.row_block::<K, 5>(token, row),
                        _ => self.row_block::<K, 6>(token, row),
                    }
                }
            }
        };
        let tasks = m.div_ceil(tokens) * row_blocks;
        let together = PRODUCTS_PER_TASK.div_ceil(tokens.min(m) * ROW_BLOCK * k);
        for_each(tasks, together, self.threads, task);
    }

    /// `TOKENS` tokens times up to [`ROW_BLOCK`] weight rows.
    ///
    /// # Safety
    /// The processor has the instructions of `K`, and no other thread writes this part of `y`.
    unsafe fn row_block<K: Tile, const TOKENS: usize>(&self, token: usize, first: usize) {
        let rows = ROW_BLOCK.min(self.y.cols - first);
        let w_row = |row: usize| self.w.row_bytes(self.first_row + first + row);
        let x = std::array::from_fn(|i| self.x.token(token + i));
        let mut sums = [[0; ROW_BLOCK]; TOKENS];
        for row in (0..rows).step_by(ROWS) {
            // Past the last row that row again; its sums are not used.
            let w = std::array::from_fn(|i| w_row((row + i).min(rows - 1)));
            // SAFETY: the caller's promise.
            let tile = unsafe { K::tile::<TOKENS>(w, x) };
            for (sums, tile) in sums.iter_mut().zip(tile) {
                sums[row..row + ROWS].copy_from_slice(&tile);
            }
        }
        for (token, sums) in (token..).zip(&mut sums) {
            let sums = &mut sums[..rows];
            let too_much = self.x.sum(token);
            sums.iter_mut()
                .for_each(|sum| *sum = sum.wrapping_sub(too_much));
            // SAFETY: in range, and the caller's promise.
            let y = unsafe { self.y.part(token, first, rows) };
            (self.finish)(y, sums, token, first);
        }
    }
}

/// Runs tasks 0 to `tasks`, `together` one after the other. The calling thread takes part at once, while
/// the others wake up: a product with one token takes little longer than that.
fn for_each(tasks: usize, together: usize, threads: Threads, task: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let first = next.fetch_add(together, Ordering::Relaxed);
            if first >= tasks {
                break;
            }
            (first..tasks.min(first + together)).for_each(&task);
        }
    };
    let helpers = match threads {
        Threads::One => 0,
        Threads::All => rayon::current_num_threads().min(tasks.div_ceil(together)) - 1,
    };
    rayon::in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// A row-major matrix of which several threads write different columns.
struct Columns<'a, T> {
    data: *mut T,
    cols: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`; `part` has its callers keep apart what they write.
unsafe impl<T: Send> Sync for Columns<'_, T> {}

impl<'a, T> Columns<'a, T> {
    fn new(data: &'a mut [T], cols: usize) -> Self {
        Self {
            data: data.as_mut_ptr(),
            cols,
            borrow: PhantomData,
        }
    }

    /// `len` values of a row from column `first` on.
    ///
    /// # Safety
    /// The part lies inside the matrix and no other part in use overlaps it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, row: usize, first: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise, on a slice borrowed exclusively for 'a.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.cols + first), len) }
    }
}
