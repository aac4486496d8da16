//! The instruction sets that the product is written for, and the choice among them.

use super::Blocks;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
use super::neon::Neon;
use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512Vnni};

/// Weight rows of a tile.
pub(super) const ROWS: usize = 4;

/// Bytes by which weights are prefetched, into the second-level cache: as far as it takes to reach the
/// memory's bandwidth when the rows are met one tile after the other. At least a tile, see the kernels.
#[cfg(target_arch = "x86_64")]
pub(super) const PREFETCH_AHEAD: usize = 16 << 10;

/// Sums of a tile of weight rows and tokens.
pub(super) type Sums<const TOKENS: usize> = [[i32; ROWS]; TOKENS];

/// A kernel: the products of [`ROWS`] weight rows with a few tokens, summed in registers.
pub(super) trait Tile {
    /// Bytes of packed weights in a vector.
    const VECTOR: usize;
    /// Most tokens of a tile, 1 to 6.
    const TOKENS: usize;

    /// Sums of `(code + 1) * x`, wrapping, for rows of packed bytes and for tokens as
    /// [`super::Activations`] lays them out for [`Self::VECTOR`]. All rows are of one length, and so
    /// are all tokens; the rows usually follow each other in memory.
    ///
    /// # Safety
    /// The processor has the kernel's instructions.
    unsafe fn tile<const TOKENS: usize>(w: [&[u8]; ROWS], x: [&[i8]; TOKENS]) -> Sums<TOKENS>;
}

/// One way to compute the product that this processor can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel(Set);

/// Not public: a [`Kernel`] exists only for instructions that the processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
    NeonDot,
    #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
    Neon,
    Portable,
}

impl Kernel {
    /// Without special instructions.
    pub const PORTABLE: Self = Self(Set::Portable);

    /// All that this processor can run, the fastest first.
    pub fn available() -> Vec<Self> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni") {
                sets.push(Set::Avx512Vnni);
            }
            if is_x86_feature_detected!("avx2") {
                sets.push(Set::Avx2);
            }
        }
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        {
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                sets.push(Set::NeonDot);
            }
            sets.push(Set::Neon);
        }
        sets.push(Set::Portable);
        sets.into_iter().map(Self).collect()
    }

    /// The fastest that this processor can run.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Vnni => "AVX-512 VNNI",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "AVX2",
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Set::NeonDot => "NEON dot product",
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Set::Neon => "NEON",
            Set::Portable => "portable",
        }
    }

    /// [`Tile::VECTOR`] of this kernel.
    pub(super) fn vector(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Vnni => Avx512Vnni::VECTOR,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => Avx2::VECTOR,
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Set::NeonDot => Neon::<true>::VECTOR,
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Set::Neon => Neon::<false>::VECTOR,
            Set::Portable => Portable::VECTOR,
        }
    }

    pub(super) fn run<T, F>(self, blocks: Blocks<T, F>)
    where
        T: Send,
        F: Fn(&mut [T], &[i32], usize, usize) + Sync,
    {
        // SAFETY: `available`, which alone makes kernels, asked the processor.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Set::Avx512Vnni => blocks.run::<Avx512Vnni>(),
                #[cfg(target_arch = "x86_64")]
                Set::Avx2 => blocks.run::<Avx2>(),
                #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
                Set::NeonDot => blocks.run::<Neon<true>>(),
                #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
                Set::Neon => blocks.run::<Neon<false>>(),
                Set::Portable => blocks.run::<Portable>(),
            }
        }
    }
}

/// The last bytes of a row as a whole vector. The fields added meet activations of zero.
pub(super) fn padded<const VECTOR: usize>(bytes: &[u8]) -> [u8; VECTOR] {
    let mut vector = [0; VECTOR];
    vector[..bytes.len()].copy_from_slice(bytes);
    vector
}

/// Panics unless all rows and all tokens are of one length, and the tokens have four vectors of
/// activations for each vector that a row begins.
#[inline(always)]
pub(super) fn check(w: &[&[u8]; ROWS], x: &[&[i8]], vector: usize) {
    let (bytes, codes) = (w[0].len(), x[0].len());
    assert!(w.iter().all(|w| w.len() == bytes) && x.iter().all(|x| x.len() == codes));
    assert!(bytes.div_ceil(vector) * 4 * vector <= codes);
}
