//! 2-bit packing of ternary codes: 16 values in a 32-bit word.
//!
//! Layout: a matrix of `rows` x `cols` codes is stored row by row, each row in `ceil(cols / 16)`
//! words. Value `i` of a word sits in bits `2i` and `2i + 1` (little end first) as `code + 1`:
//!
//! | code | -1 | 0 | +1 |
//! |---|---|---|---|
//! | bits | 00 | 01 | 10 |
//!
//! Bits 11 never occur. The tail of a row's last word is padded with code 0, which adds nothing to
//! a product, so a kernel may run over whole words.

use crate::values::Values;
use crate::{Error, Result};

#[cfg(target_endian = "big")]
compile_error!("the kernels read packed words byte by byte, the first values first");

/// Values in one word.
pub const VALUES_PER_WORD: usize = 32 / BITS;
const BITS: usize = 2;

/// A `rows` x `cols` matrix of ternary codes, 2 bits each (layout: see the module).
#[derive(Clone, Debug)]
pub struct PackedTernary {
    rows: usize,
    cols: usize,
    words: Values<u32>,
}

impl PartialEq for PackedTernary {
    fn eq(&self, other: &Self) -> bool {
        (self.rows, self.cols, self.words()) == (other.rows, other.cols, other.words())
    }
}

impl PackedTernary {
    /// Packs row-major `codes` (each -1, 0 or 1) of shape (`rows`, `cols`), both at least 1.
    ///
    /// # Errors
    /// `Usage` on a length other than `rows * cols` and on any other value, naming its place.
    pub fn pack(codes: &[i8], rows: usize, cols: usize) -> Result<Self> {
        if rows == 0 || cols == 0 || rows.checked_mul(cols) != Some(codes.len()) {
            return Err(Error::usage(format!(
                "cannot pack {} codes as a matrix of {rows} x {cols}: \
                 the shape must be non-empty and hold exactly the codes given",
                codes.len()
            )));
        }
        if let Some(at) = codes.iter().position(|code| !(-1..=1).contains(code)) {
            return Err(Error::usage(format!(
                "cannot pack the value {} at row {}, column {}: ternary codes are -1, 0 and 1",
                codes[at],
                at / cols,
                at % cols
            )));
        }
        let words = codes
            .chunks_exact(cols)
            .flat_map(|row| row.chunks(VALUES_PER_WORD).map(pack_word))
            .collect::<Vec<_>>();
        Ok(Self {
            rows,
            cols,
            words: words.into(),
        })
    }

    /// A matrix of `rows` x `cols` codes, packed already: each row by [`pack_fields`].
    pub(crate) fn from_words(words: impl Into<Values<u32>>, rows: usize, cols: usize) -> Self {
        let words = words.into();
        assert_eq!(words.len(), rows * cols.div_ceil(VALUES_PER_WORD));
        Self { rows, cols, words }
    }

    /// Matrices of one width, one above the other.
    pub(crate) fn stack(parts: &[Self]) -> Self {
        let cols = parts[0].cols;
        assert!(parts.iter().all(|part| part.cols == cols));
        let words: Vec<u32> = parts
            .iter()
            .flat_map(|part| part.words())
            .copied()
            .collect();
        Self::from_words(words, parts.iter().map(Self::rows).sum(), cols)
    }

    /// The codes, row-major, of shape (`rows`, `cols`).
    pub fn unpack(&self) -> Vec<i8> {
        let mut codes = vec![0; self.rows * self.cols];
        for (row, codes) in codes.chunks_exact_mut(self.cols).enumerate() {
            self.unpack_row(row, codes);
        }
        codes
    }

    /// Writes the codes of one row into `codes`, whose length is `cols`.
    #[inline]
    pub fn unpack_row(&self, row: usize, codes: &mut [i8]) {
        assert_eq!(codes.len(), self.cols, "a row has `cols` codes");
        let stride = self.words_per_row();
        let words = &self.words[row * stride..][..stride];
        for (codes, &word) in codes.chunks_mut(VALUES_PER_WORD).zip(words) {
            for (i, code) in codes.iter_mut().enumerate() {
                *code = ((word >> (BITS * i) & 0b11) as i8).wrapping_sub(1);
            }
        }
    }

    /// The same with columns of code 0 added, `cols` in all.
    pub fn padded(&self, cols: usize) -> Self {
        assert!(cols >= self.cols);
        let (from, to) = (self.words_per_row(), cols.div_ceil(VALUES_PER_WORD));
        let mut words = vec![pack_word(&[]); self.rows * to];
        for (row, old) in words
            .chunks_exact_mut(to)
            .zip(self.words.chunks_exact(from))
        {
            row[..from].copy_from_slice(old);
        }
        Self {
            rows: self.rows,
            cols,
            words: words.into(),
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Words a row: `ceil(cols / 16)`.
    pub fn words_per_row(&self) -> usize {
        self.cols.div_ceil(VALUES_PER_WORD)
    }

    /// The packed words, `rows * words_per_row()` of them.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The packed bytes of one row, `4 * words_per_row()` of them.
    pub(super) fn row_bytes(&self, row: usize) -> &[u8] {
        let words = &self.words[row * self.words_per_row()..][..self.words_per_row()];
        // SAFETY: words are bytes without padding, and no byte is a misaligned one.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
    }

    /// Bytes of the packed matrix.
    pub fn bytes(&self) -> usize {
        size_of_val(self.words())
    }
}

/// Packs up to 16 codes; missing ones become code 0.
fn pack_word(codes: &[i8]) -> u32 {
    (0..VALUES_PER_WORD).fold(0, |word, i| {
        let code = codes.get(i).copied().unwrap_or(0);
        word | ((code + 1) as u32) << (BITS * i)
    })
}

/// Packs 16 values of code + 1.
#[inline(always)]
pub(crate) fn pack_fields(fields: &[u8; VALUES_PER_WORD]) -> u32 {
    let bytes: [u8; 4] = std::array::from_fn(|i| {
        let [a, b, c, d] = [0, 1, 2, 3].map(|j| fields[4 * i + j]);
        a | b << 2 | c << 4 | d << 6
    });
    u32::from_le_bytes(bytes)
}
