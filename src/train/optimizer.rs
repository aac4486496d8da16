//! AdamW with decoupled weight decay (arXiv 1711.05101) and a global gradient norm.

use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::Result;
use crate::config::{Config, Optimizer, StateDtype};
use crate::model::{Parameter, Parameters};
use crate::simd::{dot, vectorized};

/// Elements one task of a threaded pass handles.
const BLOCK: usize = 1 << 14;

/// First and second moments of one weight.
#[derive(Clone, Debug)]
pub struct Moments {
    pub m: Moment,
    pub v: Moment,
}

/// A moment of one weight in the format that `precision.optimizer_state` says.
#[derive(Clone, Debug)]
pub struct Moment {
    /// f32, bf16, or one byte on a non-linear scale.
    pub values: Tensor,
    /// The largest magnitude of every [`STATE_BLOCK`] bytes, f32.
    pub maxima: Option<Tensor>,
}

/// Elements of an 8-bit moment that share a maximum.
pub const STATE_BLOCK: usize = 256;

impl Moment {
    /// The moment of a weight made of tensors of the shapes and formats it has to have:
    /// `tensor(false, ..)` of the values, `tensor(true, ..)` of the maxima.
    pub fn build(
        parameter: &Parameter,
        config: &Config,
        tensor: impl Fn(bool, Shape, DType) -> Result<Tensor>,
    ) -> Result<Self> {
        let shape = parameter.var.shape();
        // The CPU computes in f32 only.
        let dtype = match parameter.var.device().is_cpu() {
            true => StateDtype::F32,
            false => config.precision.optimizer_state,
        };
        let (values, maxima) = match dtype {
            StateDtype::F32 => (DType::F32, None),
            StateDtype::Bf16 => (DType::BF16, None),
            StateDtype::Int8 => (DType::U8, Some(shape.elem_count().div_ceil(STATE_BLOCK))),
        };
        Ok(Self {
            values: tensor(false, shape.clone(), values)?,
            maxima: maxima
                .map(|blocks| tensor(true, blocks.into(), DType::F32))
                .transpose()?,
        })
    }
}

#[derive(Debug)]
pub struct AdamW {
    config: Optimizer,
    moments: Vec<Moments>,
}

/// Per-step values of an update.
#[derive(Clone, Copy, Debug)]
pub struct UpdateScale {
    /// Factor on every gradient: the clipping coefficient.
    pub gradient: f64,
    pub lr: f64,
    pub weight_decay: f64,
}

impl AdamW {
    /// Moments of 0.
    ///
    /// # Errors
    /// `Tensor` when memory runs out.
    pub fn new(config: &Config, parameters: &Parameters) -> Result<Self> {
        let zeros = |p: &Parameter| {
            let device = p.var.device();
            Moment::build(p, config, |_, shape, dtype| {
                Ok(Tensor::zeros(shape, dtype, device)?)
            })
        };
        let moments = parameters
            .iter()
            .map(|p| {
                Ok(Moments {
                    m: zeros(p)?,
                    v: zeros(p)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self::with_moments(&config.optimizer, moments))
    }

    /// Goes on from saved moments, in the order of the parameters.
    pub fn with_moments(config: &Optimizer, moments: Vec<Moments>) -> Self {
        Self {
            config: config.clone(),
            moments,
        }
    }

    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Clipping coefficient for a gradient norm: `min(1, grad_clip / norm)`.
    pub fn clip_coefficient(&self, grad_norm: f64) -> f64 {
        (self.config.grad_clip / grad_norm).min(1.0)
    }

    /// Update number `t`, counted from 1, of every weight:
    /// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    /// w -= lr (m' / (sqrt(v') + eps) + weight_decay w), m' and v' bias-corrected.
    pub fn step(
        &mut self,
        parameters: &Parameters,
        gradients: &[Tensor],
        scale: UpdateScale,
        t: u64,
    ) -> Result<()> {
        let update = self.update_at(scale, t);
        (parameters.iter().zip(gradients).zip(&self.moments))
            .try_for_each(|((p, gradient), moments)| update.in_place(p, gradient, moments))
    }

    /// The coefficients of update number `t`, counted from 1.
    pub fn update_at(&self, scale: UpdateScale, t: u64) -> Update {
        let (config, t) = (&self.config, t as f64);
        Update {
            gradient: scale.gradient,
            beta1: config.beta1,
            beta2: config.beta2,
            lr: scale.lr,
            eps: config.eps,
            weight_decay: scale.weight_decay,
            correction1: 1.0 / (1.0 - config.beta1.powf(t)),
            correction2: 1.0 / (1.0 - config.beta2.powf(t)),
        }
    }
}

/// sqrt of the sum of squares of all gradients; infinite when a square overflows f32, so that an
/// explosion of that size is an anomaly rather than something to clip.
pub fn grad_norm(gradients: &[Tensor]) -> Result<f64> {
    let mut total = 0f64;
    for gradient in gradients {
        total += sum_of_squares(gradient)?;
    }
    Ok(total.sqrt())
}

/// In blocks of fixed size, so that the sum does not depend on the thread count.
fn sum_of_squares(gradient: &Tensor) -> Result<f64> {
    let gradient = gradient.contiguous()?;
    let (storage, layout) = gradient.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        unreachable!("the caller asked for the device");
    };
    let start = layout.start_offset();
    let values = &storage.as_slice::<f32>()?[start..start + layout.shape().elem_count()];
    let blocks: Vec<f32> = values.par_chunks(BLOCK).map(block_square_sum).collect();
    Ok(blocks.iter().map(|sum| *sum as f64).sum())
}

vectorized! {
    fn block_square_sum(values: &[f32]) -> f32 {
        dot(values, values)
    }
}

/// The coefficients of one update.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Factor on every gradient.
    pub gradient: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub lr: f64,
    pub eps: f64,
    /// Of the weights that take any.
    pub weight_decay: f64,
    /// 1 / (1 - beta1^t), and the same of beta2.
    pub correction1: f64,
    pub correction2: f64,
}

impl Update {
    /// One threaded pass each over m, v and w, where they are.
    fn in_place(&self, parameter: &Parameter, gradient: &Tensor, moments: &Moments) -> Result<()> {
        let gradient = gradient.contiguous()?;
        let mean = MovingMean {
            keep: self.beta1 as f32,
            add: ((1.0 - self.beta1) * self.gradient) as f32,
        };
        let square = MovingSquare {
            keep: self.beta2 as f32,
            add: (1.0 - self.beta2) as f32,
            gradient: self.gradient as f32,
        };
        let (m, v) = (&moments.m.values, &moments.v.values);
        m.inplace_op2(&gradient, &mean)?;
        v.inplace_op2(&gradient, &square)?;
        let weights = UpdateWeights {
            update: *self,
            decay: match parameter.decay {
                true => self.weight_decay,
                false => 0.0,
            },
        };
        Ok(parameter.var.inplace_op3(m, v, &weights)?)
    }
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("optimizer update on a non-contiguous tensor"),
    }
}

fn values_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => bail!("optimizer update on a tensor that is not contiguous f32"),
    }
}

/// Runs `update` on corresponding blocks of both, threaded.
fn for_each_block(dst: &mut [f32], src: &[f32], update: impl Fn(&mut [f32], &[f32]) + Sync) {
    dst.par_chunks_mut(BLOCK)
        .zip(src.par_chunks(BLOCK))
        .for_each(|(dst, src)| update(dst, src));
}

vectorized! {
    /// m = keep * m + add * g
    fn update_mean(m: &mut [f32], gradient: &[f32], keep: f32, add: f32) {
        for (m, g) in m.iter_mut().zip(gradient) {
            *m = keep * *m + add * g;
        }
    }
}

vectorized! {
    /// v = keep * v + add * (scale * g)^2
    fn update_square(v: &mut [f32], gradient: &[f32], keep: f32, add: f32, scale: f32) {
        for (v, g) in v.iter_mut().zip(gradient) {
            let g = scale * g;
            *v = keep * *v + add * g * g;
        }
    }
}

vectorized! {
    fn update_weights(w: &mut [f32], m: &[f32], v: &[f32], weights: UpdateWeights) {
        let UpdateWeights { update, decay } = weights;
        let keep = (1.0 - update.lr * decay) as f32;
        let (lr, eps) = (update.lr as f32, update.eps as f32);
        let correction1 = update.correction1 as f32;
        let correction2 = update.correction2 as f32;
        for ((w, m), v) in w.iter_mut().zip(m).zip(v) {
            let step = m * correction1 / ((v * correction2).sqrt() + eps);
            *w = keep * *w - lr * step;
        }
    }
}

struct MovingMean {
    keep: f32,
    add: f32,
}

impl InplaceOp2 for MovingMean {
    fn name(&self) -> &'static str {
        "adamw_m"
    }

    fn cpu_fwd(
        &self,
        m: &mut CpuStorage,
        m_layout: &Layout,
        gradient: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let (m, gradient) = (values_mut(m, m_layout)?, values(gradient, layout)?);
        for_each_block(m, gradient, |m, g| update_mean(m, g, self.keep, self.add));
        Ok(())
    }
}

struct MovingSquare {
    keep: f32,
    add: f32,
    gradient: f32,
}

impl InplaceOp2 for MovingSquare {
    fn name(&self) -> &'static str {
        "adamw_v"
    }

    fn cpu_fwd(
        &self,
        v: &mut CpuStorage,
        v_layout: &Layout,
        gradient: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        let (v, gradient) = (values_mut(v, v_layout)?, values(gradient, layout)?);
        for_each_block(v, gradient, |v, g| {
            update_square(v, g, self.keep, self.add, self.gradient);
        });
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct UpdateWeights {
    update: Update,
    /// Weight decay of this weight.
    decay: f64,
}

impl InplaceOp3 for UpdateWeights {
    fn name(&self) -> &'static str {
        "adamw_w"
    }

    fn cpu_fwd(
        &self,
        w: &mut CpuStorage,
        w_layout: &Layout,
        m: &CpuStorage,
        m_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<()> {
        let w = values_mut(w, w_layout)?;
        let (m, v) = (values(m, m_layout)?, values(v, v_layout)?);
        w.par_chunks_mut(BLOCK)
            .zip(m.par_chunks(BLOCK))
            .zip(v.par_chunks(BLOCK))
            .for_each(|((w, m), v)| update_weights(w, m, v, *self));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// Two steps of AdamW on two numbers in f64, as the paper writes it.
    #[test]
    fn updates_follow_the_paper() {
        let gradients = [[0.5f64, -2.0], [-0.25, 1.0]];
        let scale = UpdateScale {
            gradient: 0.5,
            lr: 0.01,
            weight_decay: 0.1,
        };
        let (mut w, mut m, mut v) = ([1.0f64, -3.0], [0f64; 2], [0f64; 2]);
        let start = Tensor::new(&[1f32, -3.0], &Device::Cpu).unwrap();
        let parameter = Parameter {
            name: "w".into(),
            var: Var::from_tensor(&start).unwrap(),
            decay: true,
        };
        let zeros = || Moment {
            values: start.zeros_like().unwrap(),
            maxima: None,
        };
        let moments = Moments {
            m: zeros(),
            v: zeros(),
        };
        let optimizer = AdamW::with_moments(&Optimizer::default(), Vec::new());
        for (t, gradient) in gradients.iter().enumerate() {
            let t = t as u64 + 1;
            for i in 0..2 {
                let g = gradient[i] * 0.5;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let m_hat = m[i] / (1.0 - 0.9f64.powi(t as i32));
                let v_hat = v[i] / (1.0 - 0.95f64.powi(t as i32));
                w[i] -= 0.01 * (m_hat / (v_hat.sqrt() + 1e-8) + 0.1 * w[i]);
            }
            let gradient = Tensor::new(&gradient.map(|g| g as f32), &Device::Cpu).unwrap();
            let update = optimizer.update_at(scale, t);
            update.in_place(&parameter, &gradient, &moments).unwrap();
        }
        let got = parameter.var.to_vec1::<f32>().unwrap();
        for i in 0..2 {
            assert!((got[i] as f64 - w[i]).abs() < 1e-6, "{got:?} against {w:?}");
        }
    }

    #[test]
    fn norm_is_global_and_overflows_to_infinity() {
        let tensor = |x: &[f32]| Tensor::new(x, &Device::Cpu).unwrap();
        let norm = grad_norm(&[tensor(&[3.0, 0.0]), tensor(&[4.0])]).unwrap();
        assert_eq!(norm, 5.0);
        assert!(grad_norm(&[tensor(&[1e30])]).unwrap().is_infinite());
        assert!(grad_norm(&[tensor(&[1.0, f32::NAN])]).unwrap().is_nan());
    }
}
