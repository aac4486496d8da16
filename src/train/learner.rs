//! A model and what changes it: gradients summed over the micro-batches of a step, then AdamW.
//! On a GPU all of it runs in [`crate::cuda::Engine`], on the CPU here.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::checkpoint;
use super::optimizer::{AdamW, UpdateScale, grad_norm};
use crate::Result;
use crate::config::Config;
#[cfg(feature = "cuda")]
use crate::cuda::Engine;
use crate::cuda::profile::Group;
use crate::data::Batch;
use crate::model::BitNetTransformer;

/// A model in training.
pub struct Learner {
    model: BitNetTransformer,
    optimizer: AdamW,
    /// Sums over the micro-batches of this step, on the CPU: empty before the first.
    gradients: Vec<Tensor>,
    loss: f64,
    #[cfg(feature = "cuda")]
    engine: Option<Engine>,
}

impl Learner {
    /// Initial weights.
    ///
    /// # Errors
    /// `Usage` for a model that the device cannot train, `Tensor` when memory runs out.
    pub fn new(config: &Config, device: &Device) -> Result<Self> {
        let model = BitNetTransformer::new(&config.model, config.train.seed, device)?;
        let optimizer = AdamW::new(config, model.parameters())?;
        Self::assemble(config, model, optimizer)
    }

    /// The weights and moments of a checkpoint.
    ///
    /// # Errors
    /// As [`Self::new`]; a checkpoint of a model of another shape.
    pub fn load(config: &Config, device: &Device, dir: &Path) -> Result<Self> {
        let model = checkpoint::load_model(dir, config, device)?;
        let optimizer = checkpoint::load_optimizer(dir, config, model.parameters())?;
        Self::assemble(config, model, optimizer)
    }

    fn assemble(config: &Config, model: BitNetTransformer, optimizer: AdamW) -> Result<Self> {
        let mut learner = Self {
            model,
            optimizer,
            gradients: Vec::new(),
            loss: 0.0,
            #[cfg(feature = "cuda")]
            engine: None,
        };
        learner.start(config)?;
        Ok(learner)
    }

    /// Goes back to a checkpoint, or to the initial weights. What there was goes first: a GPU has
    /// no room for both.
    ///
    /// # Errors
    /// As [`Self::load`]; the learner is then of no more use.
    pub fn restore(&mut self, config: &Config, dir: Option<&Path>) -> Result<()> {
        #[cfg(feature = "cuda")]
        {
            self.engine = None;
        }
        let device = self.model.device().clone();
        self.model = match dir {
            Some(dir) => checkpoint::load_model(dir, config, &device)?,
            None => BitNetTransformer::new(&config.model, config.train.seed, &device)?,
        };
        let parameters = self.model.parameters();
        self.optimizer = match dir {
            Some(dir) => checkpoint::load_optimizer(dir, config, parameters)?,
            None => AdamW::new(config, parameters)?,
        };
        self.start(config)
    }

    /// A step without gradients; on a GPU, the engine that takes it.
    #[cfg_attr(
        not(feature = "cuda"),
        allow(unused_variables, clippy::unnecessary_wraps)
    )]
    fn start(&mut self, config: &Config) -> Result<()> {
        self.gradients.clear();
        self.loss = 0.0;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = self.model.device() {
            let (parameters, moments) = (self.model.parameters(), self.optimizer.moments());
            self.engine = Some(Engine::new(config, device, parameters, moments)?);
        }
        Ok(())
    }

    pub fn model(&self) -> &BitNetTransformer {
        &self.model
    }

    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// Adds `scale` times the loss of a micro-batch and its gradient to this step's.
    ///
    /// # Errors
    /// `Tensor` if the device refuses.
    pub fn accumulate(&mut self, batch: &Batch, scale: f64) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(engine) = &mut self.engine {
            return engine.accumulate(batch, scale);
        }
        let (ids, labels) = to_tensors(batch, self.model.device())?;
        let (loss, gradients) = self.model.loss_and_gradients(&ids, &labels, scale)?;
        self.loss += loss * scale;
        if self.gradients.is_empty() {
            self.gradients = gradients;
        } else {
            for (sum, gradient) in self.gradients.iter_mut().zip(gradients) {
                *sum = (&*sum + gradient)?;
            }
        }
        Ok(())
    }

    /// This step's loss, and the global norm of its gradient; waits for the device.
    ///
    /// # Errors
    /// `Tensor` if the device failed.
    pub fn loss_and_grad_norm(&mut self) -> Result<(f64, f64)> {
        #[cfg(feature = "cuda")]
        if let Some(engine) = &mut self.engine {
            return engine.loss_and_grad_norm();
        }
        let loss = std::mem::take(&mut self.loss);
        Ok((loss, grad_norm(&self.gradients)?))
    }

    /// Update number `t`, counted from 1; the next step starts without gradients.
    ///
    /// # Errors
    /// `Tensor` if the device refuses.
    pub fn update(&mut self, scale: UpdateScale, t: u64) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(engine) = &mut self.engine {
            return engine.update(&self.optimizer.update_at(scale, t), t);
        }
        let gradients = std::mem::take(&mut self.gradients);
        let parameters = self.model.parameters();
        self.optimizer.step(parameters, &gradients, scale, t)
    }

    /// Runs `step` and tells where a GPU's time went; on the CPU nothing is known of that.
    ///
    /// # Errors
    /// Those of `step`; `Tensor` if the device failed.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn profile(
        &mut self,
        config: &Config,
        step: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<Vec<Group>> {
        #[cfg(feature = "cuda")]
        if let Some(engine) = &mut self.engine {
            engine.start_profile(config);
        }
        step(self)?;
        #[cfg(feature = "cuda")]
        if let Some(engine) = &mut self.engine {
            return engine.take_profile();
        }
        Ok(Vec::new())
    }

    /// Mean loss of a batch in nats.
    ///
    /// # Errors
    /// `Tensor` if the device refuses.
    pub fn evaluate(&mut self, batch: &Batch) -> Result<f64> {
        #[cfg(feature = "cuda")]
        if let Some(engine) = &mut self.engine {
            return engine.evaluate(batch);
        }
        let (ids, labels) = to_tensors(batch, self.model.device())?;
        self.model.loss(&ids, &labels)
    }

    /// The logits after the last of `ids`, which are one at least; the newest that fit are read.
    ///
    /// # Errors
    /// `Tensor` if the device refuses.
    pub fn next_logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        #[cfg(feature = "cuda")]
        if let Some(engine) = &mut self.engine {
            return engine.next_logits(ids);
        }
        let context = &ids[ids.len().saturating_sub(self.model.config().max_seq_len)..];
        let input = Tensor::new(context, self.model.device())?.unsqueeze(0)?;
        let logits = self.model.logits(&input)?.squeeze(0)?;
        Ok(logits.get(context.len() - 1)?.to_vec1()?)
    }
}

/// ids and labels (rows, seq_len) u32 on `device`.
fn to_tensors(batch: &Batch, device: &Device) -> Result<(Tensor, Tensor)> {
    let shape = (batch.rows, batch.seq_len);
    Ok((
        Tensor::from_slice(&batch.inputs, shape, device)?,
        Tensor::from_slice(&batch.targets, shape, device)?,
    ))
}
