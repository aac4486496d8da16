//! Log-likelihoods of targets: the LM head on tensor cores, and logits that never leave the GPU.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::Network;
use crate::Result;
use crate::cuda::DevicePtr;
use crate::cuda::kernels::address;
use crate::cuda::kernels::bf16_pairs::{Bf16Pairs, SplitBf16, multiply};
use crate::cuda::kernels::gemm::Gemm;
use crate::cuda::kernels::log_likelihood::{LogLikelihood, Logits};

/// Tokens whose logits exist at a time.
const ROWS: usize = 256;
/// Up to so many tokens, the LM head's own kernel takes less.
const FEW_ROWS: usize = 16;
/// Sizes of products step by so many rows: cuBLASLt chooses an algorithm for each.
const ROW_STEP: usize = 64;

pub struct Scorer<'a> {
    network: &'a Network,
    split: SplitBf16,
    gemm: Gemm,
    head: Bf16Pairs,
    x: Bf16Pairs,
    /// (ROWS, stride)
    logits: CudaSlice<f32>,
    stride: usize,
    log_likelihood: LogLikelihood,
}

/// What there is of the tokens to score.
#[derive(Clone, Copy)]
pub enum Scored {
    /// Normalised final activations (tokens, hidden).
    Hidden(DevicePtr<f32>),
    /// Logits (1, vocab).
    Logits(DevicePtr<f32>),
}

impl<'a> Scorer<'a> {
    /// # Errors
    /// `Tensor` if the driver refuses the kernels or memory runs out.
    pub fn new(network: &'a Network) -> Result<Self> {
        let (device, head) = (&network.device, network.lm_head());
        let stream = device.cuda_stream();
        let split = SplitBf16::load(device)?;
        // cuBLASLt is fast where rows begin at multiples of 16 bytes.
        let stride = head.rows().next_multiple_of(4);
        Ok(Self {
            network,
            head: split.table(head)?,
            x: Bf16Pairs::zeros(device, ROWS, head.cols())?,
            // SAFETY: products write what is read.
            logits: unsafe { stream.alloc(ROWS * stride) }.w()?,
            stride,
            log_likelihood: LogLikelihood::load(device)?,
            gemm: Gemm::new(stream)?,
            split,
        })
    }

    /// # Safety
    /// There must be as many tokens as targets, and these below the vocabulary's size.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses.
    pub unsafe fn log_likelihoods(&self, of: Scored, targets: &[u32]) -> Result<Vec<f32>> {
        let stream = self.network.device.cuda_stream();
        let on_gpu = stream.clone_htod(targets).w()?;
        // SAFETY: all of it is written.
        let out = unsafe { stream.alloc::<f32>(targets.len()) }.w()?;
        let at = |first: usize| {
            let targets = DevicePtr::new(address(&on_gpu)).offset(first);
            (targets, DevicePtr::new(address(&out)).offset(first))
        };
        for first in (0..targets.len()).step_by(ROWS) {
            let rows = ROWS.min(targets.len() - first);
            // SAFETY: there are so many tokens from the first on.
            let logits = unsafe { self.logits(of, first, rows) }?;
            let (targets, out) = at(first);
            // SAFETY: as above.
            unsafe { self.log_likelihood.run(logits, targets, out)? };
        }
        Ok(stream.clone_dtoh(&out).w()?)
    }

    unsafe fn logits(&self, of: Scored, first: usize, rows: usize) -> Result<Logits> {
        let head = self.network.lm_head();
        let vocab = head.rows();
        let x = match of {
            Scored::Hidden(x) => x.offset(first * head.cols()),
            Scored::Logits(values) => {
                return Ok(Logits {
                    values,
                    rows,
                    stride: vocab,
                    vocab,
                });
            }
        };
        let values = DevicePtr::new(address(&self.logits));
        let few = rows <= FEW_ROWS;
        // SAFETY: there is room for so many rows, in steps too.
        unsafe {
            if few {
                self.network.vocabulary.head(x, head, values, rows)?;
            } else {
                self.split.rows(x, &self.x, rows)?;
                let rows = rows.next_multiple_of(ROW_STEP);
                multiply(&self.gemm, [&self.x, &self.head], rows, values, self.stride)?;
            }
        }
        Ok(Logits {
            values,
            rows,
            stride: if few { vocab } else { self.stride },
            vocab,
        })
    }
}
