//! A micro-batch's way to the GPU: through pinned memory, on a stream of its own, while the GPU
//! still computes on the one before; then to the place where the kernels read every batch.

use std::ops::Range;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, PinnedHostSlice,
};

use super::arena::DevicePtr;
use super::kernels::address;
use super::token_groups::TokenGroups;
use crate::Result;

/// A micro-batch in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceBatch {
    pub ids: DevicePtr<u32>,
    pub labels: DevicePtr<u32>,
    pub groups: TokenGroups<DevicePtr<u32>>,
}

pub struct Input {
    host: PinnedHostSlice<u32>,
    arrived: CudaSlice<u32>,
    current: CudaSlice<u32>,
    /// `arrived` is written, and read.
    copied: CudaEvent,
    taken: CudaEvent,
    tokens: usize,
    vocab: usize,
    compute: Arc<CudaStream>,
    copy: Arc<CudaStream>,
}

impl Input {
    /// For batches of up to `tokens` tokens with ids below `vocab`.
    ///
    /// # Errors
    /// `Tensor` if memory runs out.
    pub fn new(device: &CudaDevice, tokens: usize, vocab: usize) -> Result<Self> {
        let compute = device.cuda_stream();
        let context = compute.context();
        let copy = context.new_stream().w()?;
        let words = Self::places(tokens)[5].end;
        let input = Self {
            // SAFETY: it is written before it is read.
            host: unsafe { context.alloc_pinned(words) }.w()?,
            arrived: compute.alloc_zeros(words).w()?,
            current: compute.alloc_zeros(words).w()?,
            copied: copy.record_event(None).w()?,
            taken: compute.record_event(None).w()?,
            tokens,
            vocab,
            compute: Arc::clone(&compute),
            copy,
        };
        compute.synchronize().w()?;
        Ok(input)
    }

    /// Where the parts of a batch lie, in words: always the same, so that launches can be replayed.
    /// The longest part is the last, as its length varies.
    fn places(tokens: usize) -> [Range<usize>; 6] {
        let groups = TokenGroups::capacity(tokens);
        let mut next = 0;
        [
            tokens,
            tokens,
            groups.order,
            groups.split,
            groups.counts,
            groups.pieces,
        ]
        .map(|words| {
            let begin = next;
            next = (begin + words).next_multiple_of(4);
            begin..begin + words
        })
    }

    /// Starts copying a batch, and lets the compute stream wait for it.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn send(&mut self, ids: &[u32], labels: &[u32]) -> Result<DeviceBatch> {
        let groups = TokenGroups::of(ids, self.vocab);
        let places = Self::places(self.tokens).map(|place| place.start);
        // The host may write once the copy before is done, the copy start once that was taken.
        self.copied.synchronize().w()?;
        let host = self.host.as_mut_slice().w()?;
        let parts = [
            ids,
            labels,
            &groups.order,
            &groups.split,
            &groups.counts,
            &groups.pieces,
        ];
        for (begin, words) in places.into_iter().zip(parts) {
            host[begin..][..words.len()].copy_from_slice(words);
        }
        let end = places[5] + groups.pieces.len();
        self.copy.wait(&self.taken).w()?;
        let mut arrived = self.arrived.slice_mut(..end);
        self.copy.memcpy_htod(&host[..end], &mut arrived).w()?;
        self.copied.record(&self.copy).w()?;
        self.compute.wait(&self.copied).w()?;
        let mut current = self.current.slice_mut(..end);
        self.compute
            .memcpy_dtod(&self.arrived.slice(..end), &mut current)
            .w()?;
        self.taken.record(&self.compute).w()?;
        let start = DevicePtr::<u32>::new(address(&self.current));
        let [ids, labels, order, split, counts, pieces] = places.map(|place| start.offset(place));
        Ok(DeviceBatch {
            ids,
            labels,
            groups: TokenGroups {
                order,
                pieces,
                split,
                counts,
            },
        })
    }
}
