//! The tokens of a micro-batch sorted by id, for the embedding's gradient: its rows are summed in a
//! fixed order and without one frequent token holding up the others (`kernels/embedding.cu`).

/// Tokens of one id that are summed together.
const PIECE: usize = 32;

const NO_PARTIAL: u32 = u32::MAX;

/// The kernel's tables, here or on the device.
#[derive(Clone, Copy, Debug)]
pub struct TokenGroups<T> {
    /// Positions sorted by (id, position), (tokens,).
    pub order: T,
    /// First index in `order`, count, id, and row of partial sums, of up to 32 tokens of one id; of
    /// a single token its position instead of the index.
    pub pieces: T,
    /// Id, first row of partial sums and their number, of ids in more than one piece.
    pub split: T,
    /// Numbers of pieces and of split ids.
    pub counts: T,
}

impl TokenGroups<usize> {
    /// Largest lengths for so many tokens.
    pub fn capacity(tokens: usize) -> Self {
        Self {
            order: tokens,
            pieces: 4 * tokens,
            split: 4 * (tokens / (PIECE + 1) + 1),
            counts: 2,
        }
    }

    /// Largest number of partial rows for so many tokens.
    pub fn partial_rows(tokens: usize) -> usize {
        (tokens / (PIECE / 2)).max(1)
    }
}

impl TokenGroups<Vec<u32>> {
    /// Of ids below `vocab`.
    pub fn of(ids: &[u32], vocab: usize) -> Self {
        // A counting sort: where the tokens of each id start.
        let mut starts = vec![0u32; vocab + 1];
        ids.iter().for_each(|id| starts[*id as usize + 1] += 1);
        for id in 0..vocab {
            starts[id + 1] += starts[id];
        }
        let mut order = vec![0u32; ids.len()];
        let mut next = starts.clone();
        for (position, id) in ids.iter().enumerate() {
            let place = &mut next[*id as usize];
            order[*place as usize] = position as u32;
            *place += 1;
        }
        let mut pieces = Vec::new();
        let (mut split, mut partial_rows) = (Vec::new(), 0u32);
        for (id, range) in starts.windows(2).enumerate() {
            let (start, end, id) = (range[0] as usize, range[1] as usize, id as u32);
            let parts = (end - start).div_ceil(PIECE);
            if parts > 1 {
                split.extend([id, partial_rows, parts as u32, 0]);
            }
            for first in (start..end).step_by(PIECE) {
                let partial = if parts > 1 { partial_rows } else { NO_PARTIAL };
                partial_rows += u32::from(parts > 1);
                let count = (end - first).min(PIECE) as u32;
                let from = if count == 1 {
                    order[first]
                } else {
                    first as u32
                };
                pieces.push([from, count, id, partial]);
            }
        }
        // Long ones first balance the load.
        pieces.sort_by_key(|piece| std::cmp::Reverse(piece[1]));
        let counts = vec![pieces.len() as u32, (split.len() / 4) as u32];
        Self {
            order,
            pieces: pieces.into_flattened(),
            split,
            counts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums by the tables as the kernel does, against a plain loop.
    #[test]
    fn every_token_is_summed_once_under_its_id() {
        let (vocab, tokens) = (7, 1000);
        let ids: Vec<u32> = (0..tokens)
            .map(|i| {
                if i == 500 {
                    5
                } else {
                    [0, 3, 3, 3, 6, (i % 4) as u32][i % 6]
                }
            })
            .collect();
        let values: Vec<u64> = (0..tokens as u64).map(|i| i * i + 1).collect();
        let mut want = vec![0u64; vocab];
        for (id, value) in ids.iter().zip(&values) {
            want[*id as usize] += value;
        }
        let groups = TokenGroups::of(&ids, vocab);
        let capacity = TokenGroups::capacity(tokens);
        assert!(groups.pieces.len() <= capacity.pieces && groups.split.len() <= capacity.split);
        let mut partials = vec![0u64; TokenGroups::partial_rows(tokens)];
        let mut got = vec![0u64; vocab];
        for piece in groups.pieces.chunks(4) {
            let positions = match piece[1] {
                1 => &piece[..1],
                count => &groups.order[piece[0] as usize..][..count as usize],
            };
            assert!(positions.iter().all(|p| ids[*p as usize] == piece[2]));
            let sum: u64 = positions.iter().map(|p| values[*p as usize]).sum();
            match piece[3] {
                NO_PARTIAL => got[piece[2] as usize] += sum,
                row => partials[row as usize] = sum,
            }
        }
        for split in groups.split.chunks(4) {
            let rows = &partials[split[1] as usize..][..split[2] as usize];
            got[split[0] as usize] += rows.iter().sum::<u64>();
        }
        assert_eq!(got, want);
        assert_eq!(groups.counts[0] as usize, groups.pieces.len() / 4);
    }
}
