//! Activations in the order in which the kernels meet the packed weights.

use rayon::prelude::*;

use super::Threads;
use crate::simd::vectorized;

/// Codes that take longer to put in order than threads to wake up.
const WORTH_A_THREAD: usize = 1 << 19;

/// Codes of each token in blocks of four vectors: the codes 4b, b = 0, 1, .. of the block, then the
/// codes 4b + 1, 4b + 2 and 4b + 3, as do the fields of a vector of packed weights. The last block is
/// padded with zeros.
pub(crate) struct Activations {
    codes: Vec<i8>,
    /// Codes of a token with its padding.
    stride: usize,
    /// Sum of each token's codes: what the kernels sum too much for fields of code + 1.
    sums: Vec<i32>,
}

impl Activations {
    /// Of `x` (tokens, `k`), for vectors of `vector` bytes.
    pub fn new(x: &[i8], k: usize, vector: usize, threads: Threads) -> Self {
        let stride = k.next_multiple_of(4 * vector);
        let mut codes = vec![0; x.len() / k * stride];
        let mut sums = vec![0; x.len() / k];
        let token = |((codes, sum), x): ((&mut [i8], &mut i32), &[i8])| {
            *sum = token_sum(x);
            reorder(codes, x, vector);
        };
        match threads {
            Threads::All if x.len() >= WORTH_A_THREAD => (codes.par_chunks_exact_mut(stride))
                .zip(&mut sums)
                .zip(x.par_chunks_exact(k))
                .for_each(token),
            _ => (codes.chunks_exact_mut(stride).zip(&mut sums))
                .zip(x.chunks_exact(k))
                .for_each(token),
        }
        Self {
            codes,
            stride,
            sums,
        }
    }

    pub fn tokens(&self) -> usize {
        self.sums.len()
    }

    /// Bytes of a token.
    pub fn stride(&self) -> usize {
        self.stride
    }

    pub fn token(&self, token: usize) -> &[i8] {
        &self.codes[token * self.stride..][..self.stride]
    }

    pub fn sum(&self, token: usize) -> i32 {
        self.sums[token]
    }
}

vectorized! {
    fn token_sum(x: &[i8]) -> i32 {
        x.iter().map(|&x| i32::from(x)).sum()
    }
}

vectorized! {
    /// One token, `x` as it comes and `codes` as the kernels take it; shorter by the padding.
    fn reorder(codes: &mut [i8], x: &[i8], vector: usize) {
        for (block, x) in codes.chunks_exact_mut(4 * vector).zip(x.chunks(4 * vector)) {
            let (fours, rest) = x.as_chunks::<4>();
            for (j, codes) in block.chunks_exact_mut(vector).enumerate() {
                for (code, four) in codes.iter_mut().zip(fours) {
                    *code = (u32::from_le_bytes(four.map(|x| x as u8)) >> (8 * j)) as i8;
                }
            }
            for (j, &code) in rest.iter().enumerate() {
                block[j * vector + fours.len()] = code;
            }
        }
    }
}
