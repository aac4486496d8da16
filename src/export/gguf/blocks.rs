//! ggml's blocks (ggml-common.h, ggml-quants.c of llama.cpp), as far as they hold ternary codes
//! exactly. Every block has a 16-bit scale d, which is 1 here.

use half::f16;
use rayon::prelude::*;

/// How the values of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    F32,
    F16,
    /// 32 values: d, then 4 bits a value, of which 8 is subtracted.
    Q4_0,
    /// 256 values: 5 or 4 of them a byte, as base-3 digits of a fraction; then d.
    Tq1_0,
    /// 256 values: 2 bits each; then d.
    Tq2_0,
}

impl Encoding {
    const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Q4_0, Self::Tq1_0, Self::Tq2_0];

    /// The number of the type in `enum ggml_type`.
    pub const fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Tq1_0 => 34,
            Self::Tq2_0 => 35,
        }
    }

    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|encoding| encoding.id() == id)
    }

    /// Values of a block.
    pub const fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 => 1,
            Self::Q4_0 => 32,
            Self::Tq1_0 | Self::Tq2_0 => 256,
        }
    }

    const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::Q4_0 => 18,
            Self::Tq1_0 => 54,
            Self::Tq2_0 => 66,
        }
    }

    /// Bytes of `values` values, which must be whole blocks.
    pub fn bytes(self, values: usize) -> Option<usize> {
        let blocks = values.is_multiple_of(self.block());
        blocks.then_some(values / self.block() * self.block_bytes())
    }

    /// Ternary codes, whole blocks of them, to bytes.
    ///
    /// # Panics
    /// If this is not an encoding of ternary codes, or a block is not whole.
    pub fn encode(self, codes: &[i8]) -> Vec<u8> {
        let encode = match self {
            Self::Q4_0 => encode_q4_0,
            Self::Tq1_0 => encode_tq1_0,
            Self::Tq2_0 => encode_tq2_0,
            Self::F32 | Self::F16 => unreachable!("codes are not stored as {self:?}"),
        };
        let mut bytes = vec![0; self.bytes(codes.len()).expect("whole blocks")];
        bytes
            .par_chunks_exact_mut(self.block_bytes())
            .zip(codes.par_chunks_exact(self.block()))
            .for_each(|(bytes, codes)| encode(codes, bytes));
        bytes
    }

    /// The codes in `bytes`, or what is wrong with them.
    pub fn decode(self, bytes: &[u8]) -> Result<Vec<i8>, &'static str> {
        let decode = match self {
            Self::Q4_0 => decode_q4_0,
            Self::Tq1_0 => decode_tq1_0,
            Self::Tq2_0 => decode_tq2_0,
            Self::F32 | Self::F16 => return Err("does not hold ternary codes"),
        };
        let mut codes = vec![0; bytes.len() / self.block_bytes() * self.block()];
        codes
            .par_chunks_exact_mut(self.block())
            .zip(bytes.par_chunks_exact(self.block_bytes()))
            .try_for_each(|(codes, bytes)| match decode(bytes, codes) == f16::ONE {
                true => Ok(()),
                false => Err("has blocks with a scale other than 1"),
            })?;
        match codes.par_iter().all(|code| (-1..=1).contains(code)) {
            true => Ok(codes),
            false => Err("has values other than -1, 0 and 1"),
        }
    }
}

fn encode_q4_0(codes: &[i8], bytes: &mut [u8]) {
    bytes[..2].copy_from_slice(&f16::ONE.to_le_bytes());
    let (low, high) = codes.split_at(16);
    for (byte, (low, high)) in bytes[2..].iter_mut().zip(low.iter().zip(high)) {
        *byte = (low + 8) as u8 | ((high + 8) as u8) << 4;
    }
}

fn decode_q4_0(bytes: &[u8], codes: &mut [i8]) -> f16 {
    let (low, high) = codes.split_at_mut(16);
    for (byte, (low, high)) in bytes[2..].iter().zip(low.iter_mut().zip(high)) {
        *low = (byte & 15) as i8 - 8;
        *high = (byte >> 4) as i8 - 8;
    }
    scale(&bytes[..2])
}

/// 128 values lie in 32 bytes: value `m + 32 n` in the bits 2n of byte m.
fn encode_tq2_0(codes: &[i8], bytes: &mut [u8]) {
    bytes[64..].copy_from_slice(&f16::ONE.to_le_bytes());
    for (codes, bytes) in codes.chunks_exact(128).zip(bytes.chunks_exact_mut(32)) {
        for (m, byte) in bytes.iter_mut().enumerate() {
            *byte = (0..4).fold(0, |byte, n| {
                byte | ((codes[m + 32 * n] + 1) as u8) << (2 * n)
            });
        }
    }
}

fn decode_tq2_0(bytes: &[u8], codes: &mut [i8]) -> f16 {
    for (codes, bytes) in codes.chunks_exact_mut(128).zip(bytes.chunks_exact(32)) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code = (bytes[i % 32] >> (2 * (i / 32)) & 3) as i8 - 1;
        }
    }
    scale(&bytes[64..])
}

/// The three parts of a TQ1_0 block: bytes, and values a byte. Value `m + bytes * n` of a part is
/// digit n, the highest first, of byte m.
const TQ1_0_PARTS: [(usize, usize); 3] = [(32, 5), (16, 5), (4, 4)];

/// Digits q of base 3 are stored as the byte `ceil(256 q / 3^5)`, so that multiplying by 3 brings
/// one digit after the other above 256.
fn encode_tq1_0(codes: &[i8], bytes: &mut [u8]) {
    let (mut value, mut at) = (0, 0);
    for (width, digits) in TQ1_0_PARTS {
        for m in 0..width {
            let digit = |n| match n < digits {
                true => (codes[value + m + width * n] + 1) as u32,
                false => 0,
            };
            let q = (0..5).fold(0, |q, n| 3 * q + digit(n));
            bytes[at + m] = (256 * q).div_ceil(243) as u8;
        }
        value += width * digits;
        at += width;
    }
    bytes[at..].copy_from_slice(&f16::ONE.to_le_bytes());
}

fn decode_tq1_0(bytes: &[u8], codes: &mut [i8]) -> f16 {
    let (mut value, mut at) = (0, 0);
    for (width, digits) in TQ1_0_PARTS {
        for m in 0..width {
            let mut fraction = bytes[at + m];
            for n in 0..digits {
                let shifted = 3 * u16::from(fraction);
                codes[value + m + width * n] = (shifted >> 8) as i8 - 1;
                fraction = shifted as u8;
            }
        }
        value += width * digits;
        at += width;
    }
    scale(&bytes[at..])
}

fn scale(bytes: &[u8]) -> f16 {
    f16::from_le_bytes([bytes[0], bytes[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value of a block, by its place as ggml-common.h and ggml-quants.c describe it.
    fn value(encoding: Encoding, block: &[u8], i: usize) -> i32 {
        let bits =
            |byte: u8, shift: usize, width: usize| i32::from(byte) >> shift & ((1 << width) - 1);
        match encoding {
            Encoding::Q4_0 => bits(block[2 + i % 16], 4 * (i / 16), 4) - 8,
            Encoding::Tq2_0 => bits(block[i / 128 * 32 + i % 32], i % 128 / 32 * 2, 2) - 1,
            _ => {
                let (byte, digit) = match i {
                    0..160 => (i % 32, i / 32),
                    160..240 => (32 + i % 16, (i - 160) / 16),
                    _ => (48 + i % 4, (i - 240) / 4),
                };
                // Digit n of the fraction byte / 256, counted from 0.
                i32::from(block[byte]) * 3_i32.pow(digit as u32 + 1) / 256 % 3 - 1
            }
        }
    }

    #[test]
    fn codes_lie_where_ggml_looks_for_them() {
        // Knuth's MMIX generator; enough blocks for every combination of five digits to be there.
        let mut state = 1u64;
        let codes: Vec<i8> = (0..256 * 300)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005);
                state = state.wrapping_add(1_442_695_040_888_963_407);
                ((state >> 33) % 3) as i8 - 1
            })
            .collect();
        for (encoding, scale) in [
            (Encoding::Q4_0, 0),
            (Encoding::Tq1_0, 52),
            (Encoding::Tq2_0, 64),
        ] {
            let bytes = encoding.encode(&codes);
            assert_eq!(Some(bytes.len()), encoding.bytes(codes.len()));
            let blocks = bytes.chunks_exact(encoding.block_bytes());
            for (block, codes) in blocks.zip(codes.chunks_exact(encoding.block())) {
                assert_eq!(block[scale..][..2], [0x00, 0x3c], "1 in 16 bits");
                for (i, code) in codes.iter().enumerate() {
                    assert_eq!(
                        value(encoding, block, i),
                        i32::from(*code),
                        "{encoding:?} {i}"
                    );
                }
            }
            assert_eq!(encoding.decode(&bytes).unwrap(), codes);
        }
    }

    #[test]
    fn blocks_of_other_programs_are_refused() {
        let zeros = vec![0; 256];
        for (encoding, scale) in [
            (Encoding::Q4_0, 1),
            (Encoding::Tq1_0, 53),
            (Encoding::Tq2_0, 65),
        ] {
            let mut bytes = encoding.encode(&zeros);
            bytes[scale] = 0x38;
            let error = encoding.decode(&bytes).unwrap_err();
            assert!(error.contains("scale other than 1"), "{error}");
        }
        for (encoding, at) in [(Encoding::Q4_0, 2), (Encoding::Tq2_0, 0)] {
            let mut bytes = encoding.encode(&zeros);
            bytes[at] = 0xff;
            let error = encoding.decode(&bytes).unwrap_err();
            assert!(error.contains("other than -1, 0 and 1"), "{error}");
        }
        assert!(Encoding::F16.decode(&[0; 4]).is_err());
        assert_eq!(Encoding::Tq2_0.bytes(255), None);
    }
}
