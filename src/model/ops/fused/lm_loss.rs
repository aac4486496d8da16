//! LM head and cross-entropy over chunks of tokens: the logits of one chunk at a time, and their
//! gradients at once, as the forward already holds all they need.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::gemm::{Mat, Threads, Write, matmul};
use super::storage::slice;
use crate::simd::{exp, max_by, sum, vectorized};

/// Logits held at a time (16 MiB).
const CHUNK_LOGITS: usize = 4 << 20;

struct Gradients {
    hidden: Vec<f32>,
    weight: Vec<f32>,
}

struct LmLoss {
    gradients: Mutex<Option<Gradients>>,
    keep: bool,
}

vectorized! {
    /// Cross-entropy of one row of logits; leaves (softmax - one_hot) * scale in their place.
    fn row_loss(logits: &mut [f32], target: usize, scale: f32) -> f32 {
        let largest = max_by(logits, |x| x);
        let target_logit = logits[target] - largest;
        for x in logits.iter_mut() {
            *x = exp(*x - largest);
        }
        let total = sum(logits);
        let factor = scale / total;
        for x in logits.iter_mut() {
            *x *= factor;
        }
        logits[target] -= scale;
        total.ln() - target_logit
    }
}

impl CustomOp3 for LmLoss {
    fn name(&self) -> &'static str {
        "lm_loss"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (hidden, weight) = (slice(hidden, hidden_layout)?, slice(weight, weight_layout)?);
        let (tokens, k) = hidden_layout.shape().dims2()?;
        let (vocab, _) = weight_layout.shape().dims2()?;
        let targets = match targets_layout.contiguous_offsets() {
            Some((start, end)) => &targets.as_slice::<u32>()?[start..end],
            None => bail!("lm_loss: targets are not contiguous"),
        };
        if let Some(id) = targets.iter().find(|id| **id as usize >= vocab) {
            bail!("lm_loss: target id {id} is outside the vocabulary of {vocab}");
        }
        if targets.len() != tokens || tokens == 0 {
            bail!("lm_loss: {tokens} tokens meet {} targets", targets.len());
        }

        let mut gradients = self.keep.then(|| Gradients {
            hidden: vec![0f32; hidden.len()],
            weight: vec![0f32; weight.len()],
        });
        let scale = 1.0 / tokens as f32;
        let chunk = (CHUNK_LOGITS / vocab).clamp(16, tokens.max(16));
        let head = Mat::new(weight, vocab, k);
        let mut logits = vec![0f32; chunk.min(tokens) * vocab];
        let mut loss = 0f64;
        for (i, (rows, targets)) in hidden
            .chunks(chunk * k)
            .zip(targets.chunks(chunk))
            .enumerate()
        {
            let count = targets.len();
            let logits = &mut logits[..count * vocab];
            let rows = Mat::new(rows, count, k);
            matmul(
                logits,
                vocab,
                Write::Replace,
                1.0,
                rows,
                head.t(),
                Threads::All,
            );
            let losses: Vec<f32> = logits
                .par_chunks_mut(vocab)
                .zip(targets)
                .map(|(row, target)| row_loss(row, *target as usize, scale))
                .collect();
            loss += losses.iter().map(|l| *l as f64).sum::<f64>();
            if let Some(gradients) = &mut gradients {
                let dlogits = Mat::new(logits, count, vocab);
                let dhidden = &mut gradients.hidden[i * chunk * k..][..count * k];
                let write = if i == 0 { Write::Replace } else { Write::Add };
                matmul(dhidden, k, Write::Replace, 1.0, dlogits, head, Threads::All);
                let dweight = &mut gradients.weight;
                matmul(dweight, k, write, 1.0, dlogits.t(), rows, Threads::All);
            }
        }
        *self.gradients.lock().unwrap_or_else(|e| e.into_inner()) = gradients;
        let mean = (loss / tokens as f64) as f32;
        Ok((CpuStorage::F32(vec![mean]), Shape::from(())))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _targets: &Tensor,
        _loss: &Tensor,
        dloss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradients = self
            .gradients
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take();
        let Some(gradients) = gradients else {
            bail!("lm_loss: backward ran twice, or without a forward that keeps gradients");
        };
        let dloss = dloss.to_scalar::<f32>()?;
        let scaled = |mut values: Vec<f32>, like: &Tensor| {
            if dloss != 1.0 {
                values.par_iter_mut().for_each(|x| *x *= dloss);
            }
            Tensor::from_vec(values, like.shape(), like.device()).map(Some)
        };
        Ok((
            scaled(gradients.hidden, hidden)?,
            scaled(gradients.weight, weight)?,
            None,
        ))
    }
}

pub fn lm_loss(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let op = LmLoss {
        gradients: Mutex::new(None),
        keep: hidden.track_op() || weight.track_op(),
    };
    hidden
        .contiguous()?
        .apply_op3(&weight.contiguous()?, &targets.contiguous()?, op)
}
