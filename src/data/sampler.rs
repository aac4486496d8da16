//! Which window is sample number `i`: a pure function of the seed and `i`, so that the position
//! alone resumes a run exactly, and skipping data is arithmetic.

use super::dataset::{Batch, TokenSet};
use crate::{Error, Result};

/// Samples over which the shares of a mixture are exact.
pub const MIXTURE_BLOCK: u64 = 10_000;

/// Where a sample comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WindowRef {
    /// Number of the data set.
    pub set: usize,
    /// How often the set has been gone through before.
    pub epoch: u64,
    /// Number of the window in the set.
    pub window: u64,
}

/// Data sets sampled in fixed proportions, each in a new random order every epoch.
pub struct Mixture {
    sets: Vec<MixtureSet>,
    seq_len: usize,
    vocab_size: u32,
    seed: u64,
}

struct MixtureSet {
    tokens: TokenSet,
    windows: u64,
    /// Samples of each block that come from this set.
    quota: u64,
}

impl Mixture {
    /// `weights` need not add up to one. Ids are checked against the model's `vocab_size` when a
    /// batch is made.
    ///
    /// # Errors
    /// `Usage` when a weight is not a positive number or too small to ever be drawn, when
    /// `seq_len` is longer than a set, when a set was made with a larger vocabulary, or
    /// when sets were made with different tokenizers.
    pub fn new(
        weighted_sets: Vec<(TokenSet, f64)>,
        seq_len: usize,
        vocab_size: u32,
        seed: u64,
    ) -> Result<Self> {
        let weights: Vec<f64> = weighted_sets.iter().map(|(_, weight)| *weight).collect();
        let quotas = quotas(&weights)?;
        for (set, _) in &weighted_sets[1..] {
            weighted_sets[0].0.check_same_tokenizer(set)?;
        }
        let sets = weighted_sets
            .into_iter()
            .zip(quotas)
            .map(|((tokens, _), quota)| {
                tokens.check_vocab(vocab_size)?;
                Ok(MixtureSet {
                    windows: tokens.windows(seq_len)?,
                    tokens,
                    quota,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            sets,
            seq_len,
            vocab_size,
            seed,
        })
    }

    /// Where sample `index` comes from.
    pub fn window(&self, index: u64) -> WindowRef {
        let (number, running) = self.set_and_running_index(index);
        let windows = self.sets[number].windows;
        let epoch = running / windows;
        let key = mix(mix(mix(self.seed, 1), number as u64), epoch);
        WindowRef {
            set: number,
            epoch,
            window: permute(running % windows, windows, key),
        }
    }

    /// Samples `first .. first + rows`, each checked against the vocabulary.
    ///
    /// # Errors
    /// As [`TokenSet::batch`].
    pub fn batch(&self, first: u64, rows: usize) -> Result<Batch> {
        let mut batch = Batch::empty(first, self.seq_len);
        for index in first..first + rows as u64 {
            let WindowRef { set, window, .. } = self.window(index);
            self.sets[set]
                .tokens
                .push_window(window, self.vocab_size, &mut batch)?;
        }
        Ok(batch)
    }

    /// The set that sample `index` comes from, and how many samples came from that set before.
    /// Each block is divided by the quotas, then shuffled.
    fn set_and_running_index(&self, index: u64) -> (usize, u64) {
        let block = index / MIXTURE_BLOCK;
        let key = mix(mix(self.seed, 2), block);
        let mut place = match self.sets.len() {
            // A permutation of one set's samples would only be a second shuffle.
            1 => index % MIXTURE_BLOCK,
            _ => permute(index % MIXTURE_BLOCK, MIXTURE_BLOCK, key),
        };
        for (number, set) in self.sets.iter().enumerate() {
            if place < set.quota {
                return (number, block * set.quota + place);
            }
            place -= set.quota;
        }
        unreachable!("the quotas add up to a block");
    }
}

/// Divides a block among the weights, by largest remainder.
fn quotas(weights: &[f64]) -> Result<Vec<u64>> {
    if weights.is_empty() {
        return Err(Error::usage("training needs at least one data set"));
    }
    for (number, weight) in weights.iter().enumerate() {
        if !(weight.is_finite() && *weight > 0.0) {
            return Err(Error::usage(format!(
                "the weight of data set {number} is {weight}: it must be a positive number"
            )));
        }
    }
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights
        .iter()
        .map(|weight| weight / total * MIXTURE_BLOCK as f64)
        .collect();
    let mut quotas: Vec<u64> = exact.iter().map(|share| share.floor() as u64).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let missing = MIXTURE_BLOCK.saturating_sub(quotas.iter().sum());
    for &number in by_remainder.iter().cycle().take(missing as usize) {
        quotas[number] += 1;
    }
    if let Some(number) = quotas.iter().position(|&quota| quota == 0) {
        return Err(Error::usage(format!(
            "the weight {} of data set {number} is less than 1 in {MIXTURE_BLOCK} of the mixture: \
             raise it or leave the set out",
            weights[number]
        )));
    }
    Ok(quotas)
}

/// A keyed permutation of `0..n`: a Feistel network on the next even power of two, walked until
/// it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
pub fn permute(index: u64, n: u64, key: u64) -> u64 {
    debug_assert!(index < n);
    let bits = u64::BITS - (n - 1).leading_zeros();
    let half = bits.div_ceil(2);
    if half == 0 {
        return index;
    }
    let mask = (1u64 << half) - 1;
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..6 {
            (left, right) = (right, left ^ (mix(key ^ round, right) & mask));
        }
        value = (left << half) | right;
        if value < n {
            return value;
        }
    }
}

/// Mixes a value into a key (the finaliser of SplitMix64).
fn mix(key: u64, value: u64) -> u64 {
    let mut z = key
        .wrapping_add(value.wrapping_mul(0xd1b5_4a32_d192_ed03))
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
