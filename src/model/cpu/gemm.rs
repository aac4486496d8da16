//! f32 matrix products on slices, by the `gemm` crate.

use gemm::Parallelism;

use crate::quant::matmul::Threads;

/// A strided view of a matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major (rows, cols), without gaps.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(rows * cols <= data.len());
        Self {
            data,
            rows,
            cols,
            row_stride: cols,
            col_stride: 1,
        }
    }

    /// The transpose, without moving data.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// How a product meets what the destination holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Write {
    Replace,
    Add,
}

/// `dst = scale * lhs . rhs`, or `dst += ...`; dst is row-major, without gaps.
pub fn matmul(dst: &mut [f32], write: Write, scale: f32, lhs: Mat, rhs: Mat, threads: Threads) {
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    assert_eq!(k, rhs.rows);
    if m == 0 || n == 0 {
        return;
    }
    assert!(m * n <= dst.len());
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    // SAFETY: the views checked that their last element lies inside their slices, the assertion
    // above does so for dst, and dst is borrowed exclusively, so that nothing overlaps it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            n as isize,
            write == Write::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}
