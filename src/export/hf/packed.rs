//! Four codes a byte, as `integrations/bitnet.py` of `transformers` packs them: row i of quarter j of
//! a matrix is in bits 2j and 2j + 1 of row i of the packed one, as code + 1.
//!
//! The scale is that of its class `BitLinear`, which divides by it: 1 / b. (`AutoBitLinear` multiplies,
//! but `transformers` 5.23 loads it in the file's own type alone, not in float32 on a CPU.)

use std::ops::Range;

use crate::quant::PackedTernary;

pub const CODES_PER_BYTE: usize = 4;

/// The scale of codes with scale `b`, and the other way round.
pub fn weight_scale(b: f32) -> f32 {
    1.0 / b
}

/// Packs some rows of a matrix (a multiple of four) -> (rows / 4, cols).
pub fn pack(codes: &PackedTernary, rows: Range<usize>) -> Vec<u8> {
    let (cols, quarter) = (codes.cols(), rows.len() / CODES_PER_BYTE);
    let mut packed = vec![0; quarter * cols];
    let mut row_codes = vec![0; cols];
    for (i, row) in rows.enumerate() {
        codes.unpack_row(row, &mut row_codes);
        let shift = 2 * (i / quarter);
        let bytes = &mut packed[i % quarter * cols..][..cols];
        for (byte, code) in bytes.iter_mut().zip(&row_codes) {
            *byte |= ((code + 1) as u8) << shift;
        }
    }
    packed
}

/// The codes (4 rows, cols) of packed bytes (rows, cols), or `None` if some bits are no code.
pub fn unpack(bytes: &[u8]) -> Option<Vec<i8>> {
    let quarter = |j: usize| bytes.iter().map(move |byte| byte >> (2 * j) & 0b11);
    let codes = (0..CODES_PER_BYTE).flat_map(quarter);
    codes
        .map(|code| (code < 3).then_some(code as i8 - 1))
        .collect()
}
