//! A micro-batch's way to the GPU: through pinned memory, on a stream of its own, while the GPU
//! still computes on the one before.

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

/// Batches under way: one that is computed on, one that is copied.
const SLOTS: usize = 2;

/// A micro-batch in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceBatch {
    pub ids: DevicePtr<u32>,
    pub labels: DevicePtr<u32>,
    pub groups: TokenGroups<DevicePtr<u32>>,
}

struct Slot {
    host: PinnedHostSlice<u32>,
    device: CudaSlice<u32>,
    copied: CudaEvent,
    /// The GPU is done with the batch that was here.
    used: CudaEvent,
}

pub struct Input {
    slots: Vec<Slot>,
    next: usize,
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
        let words = Self::words(tokens);
        let slot = || {
            Ok(Slot {
                // SAFETY: it is written before it is read.
                host: unsafe { context.alloc_pinned(words) }.w()?,
                device: compute.alloc_zeros(words).w()?,
                copied: copy.record_event(None).w()?,
                used: compute.record_event(None).w()?,
            })
        };
        let slots = (0..SLOTS).map(|_| slot()).collect::<Result<_>>()?;
        compute.synchronize().w()?;
        Ok(Self {
            slots,
            next: 0,
            vocab,
            compute,
            copy,
        })
    }

    /// Words that a batch takes.
    fn words(tokens: usize) -> usize {
        let groups = TokenGroups::capacity(tokens);
        let parts = [
            tokens,
            tokens,
            groups.order,
            groups.pieces,
            groups.split,
            groups.counts,
        ];
        parts
            .into_iter()
            .map(|words| words.next_multiple_of(4))
            .sum()
    }

    /// Starts copying a batch, and lets the compute stream wait for it.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn send(&mut self, ids: &[u32], labels: &[u32]) -> Result<DeviceBatch> {
        let groups = TokenGroups::of(ids, self.vocab);
        self.next = (self.next + 1) % SLOTS;
        let slot = &mut self.slots[self.next];
        // The host may write once the copy before is done, the copy start once the GPU is.
        slot.copied.synchronize().w()?;
        let start = address(&slot.device);
        let host = slot.host.as_mut_slice().w()?;
        let mut at = 0;
        let mut place = |words: &[u32]| {
            let begin = at;
            host[begin..][..words.len()].copy_from_slice(words);
            at = (begin + words.len()).next_multiple_of(4);
            DevicePtr::<u32>::new(start).offset(begin)
        };
        let batch = DeviceBatch {
            ids: place(ids),
            labels: place(labels),
            groups: TokenGroups {
                order: place(&groups.order),
                pieces: place(&groups.pieces),
                split: place(&groups.split),
                counts: place(&groups.counts),
            },
        };
        self.copy.wait(&slot.used).w()?;
        let mut target = slot.device.slice_mut(..at);
        self.copy.memcpy_htod(&host[..at], &mut target).w()?;
        slot.copied.record(&self.copy).w()?;
        self.compute.wait(&slot.copied).w()?;
        Ok(batch)
    }

    /// Marks the end of the work on the batch sent last.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub fn done(&mut self) -> Result<()> {
        let slot = &self.slots[self.next];
        slot.used.record(&self.compute).w()?;
        Ok(())
    }
}
