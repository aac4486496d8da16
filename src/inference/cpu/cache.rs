//! Keys and values of the tokens so far.

use std::sync::Mutex;

use crate::model::ops::Heads;

/// Tokens of a block of keys: a vector.
pub const BLOCK: usize = 16;

/// Of one layer.
pub struct LayerCache {
    pub heads: Vec<HeadCache>,
    head_dim: usize,
}

/// Of one key-value head.
pub struct HeadCache {
    head_dim: usize,
    tokens: usize,
    /// Rotated keys in blocks, (blocks, head_dim, [`BLOCK`]): a query meets [`BLOCK`] of them at once,
    /// and no sum has to be taken within a vector. Anything may lie behind the last token.
    key_blocks: Vec<f32>,
    /// (tokens, head_dim)
    values: Vec<f32>,
}

impl LayerCache {
    pub fn new(heads: Heads) -> Self {
        let head_dim = heads.head_dim;
        Self {
            heads: (0..heads.kv_heads)
                .map(|_| HeadCache::new(head_dim))
                .collect(),
            head_dim,
        }
    }

    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.heads[0].tokens
    }

    /// The heads, each for one thread.
    pub fn lock_heads(&mut self) -> Vec<Mutex<&mut HeadCache>> {
        self.heads.iter_mut().map(Mutex::new).collect()
    }

    /// Forgets all tokens but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        for head in &mut self.heads {
            head.tokens = head.tokens.min(len);
            head.values.truncate(head.tokens * self.head_dim);
            let blocks = head.tokens.div_ceil(BLOCK);
            head.key_blocks.truncate(blocks * self.head_dim * BLOCK);
        }
    }
}

impl HeadCache {
    fn new(head_dim: usize) -> Self {
        Self {
            head_dim,
            tokens: 0,
            key_blocks: Vec::new(),
            values: Vec::new(),
        }
    }

    /// Adds tokens: rotated keys and values, (tokens, head_dim).
    pub fn append(&mut self, keys: &[f32], values: &[f32]) {
        let d = self.head_dim;
        for key in keys.chunks_exact(d) {
            let lane = self.tokens % BLOCK;
            if lane == 0 {
                self.key_blocks
                    .resize(self.key_blocks.len() + d * BLOCK, 0.0);
            }
            let first = self.tokens / BLOCK * d * BLOCK;
            let places = self.key_blocks[first..]
                .iter_mut()
                .skip(lane)
                .step_by(BLOCK);
            places.zip(key).for_each(|(place, x)| *place = *x);
            self.tokens += 1;
        }
        self.values.extend_from_slice(values);
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn key_blocks(&self) -> &[f32] {
        &self.key_blocks
    }

    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The keys one after the other, (tokens, head_dim).
    pub fn keys(&self) -> Vec<f32> {
        let d = self.head_dim;
        let mut keys = Vec::with_capacity(self.tokens * d);
        for token in 0..self.tokens {
            let block = &self.key_blocks[token / BLOCK * d * BLOCK..][..d * BLOCK];
            keys.extend(block.iter().skip(token % BLOCK).step_by(BLOCK));
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_in_order_after_some_are_forgotten() {
        let heads = Heads {
            heads: 2,
            kv_heads: 1,
            head_dim: 6,
        };
        let mut cache = LayerCache::new(heads);
        let rows = |tokens: std::ops::Range<usize>| {
            (tokens.start * 6..tokens.end * 6)
                .map(|x| x as f32)
                .collect::<Vec<_>>()
        };
        cache.heads[0].append(&rows(0..20), &rows(0..20));
        cache.truncate(13);
        assert_eq!(cache.tokens(), 13);
        cache.heads[0].append(&rows(50..90), &rows(50..90));
        let expected = [rows(0..13), rows(50..90)].concat();
        assert_eq!(cache.heads[0].keys(), expected);
        assert_eq!(cache.heads[0].values(), expected);
        assert_eq!(cache.heads[0].key_blocks().len(), 64 * 6);
    }
}
