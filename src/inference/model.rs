//! A model on a device, and what is fed to it.

use std::ops::Range;

use candle_core::Device;
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::weights::PackedWeights;
use super::{cpu, graph};
use crate::model::BitNetConfig;
use crate::model::cpu::lm_loss::log_likelihood;
use crate::{Error, Result};

/// The weights of a model on the device that runs it.
pub struct Model {
    config: BitNetConfig,
    network: Network,
}

enum Network {
    /// Passes over slices.
    Cpu(cpu::Network),
    /// Kernels of our own.
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::Network>),
    /// candle operations, for any device.
    Graph(graph::Network),
}

/// What a session asks of a device: one sequence, whose keys and values it keeps.
pub(super) trait Pass {
    /// Runs `ids` after all tokens before them. Their final activations stay for [`Self::logits`].
    fn feed(&mut self, ids: &[u32]) -> Result<()>;

    /// Logits (rows, vocab) of some of the tokens last fed.
    fn logits(&mut self, rows: Range<usize>) -> Result<Vec<f32>>;

    /// The natural log of the probability of `targets[i]` after the i-th of the tokens last fed, for
    /// all of them.
    fn log_likelihoods(&mut self, targets: &[u32]) -> Result<Vec<f32>> {
        let mut likelihoods = Vec::with_capacity(targets.len());
        for (i, targets) in targets.chunks(LOGITS_ROWS).enumerate() {
            let first = i * LOGITS_ROWS;
            let mut logits = self.logits(first..first + targets.len())?;
            let vocab = logits.len() / targets.len();
            let rows = logits.par_chunks_exact_mut(vocab).zip(targets);
            likelihoods.par_extend(rows.map(|(row, target)| log_likelihood(row, *target as usize)));
        }
        Ok(likelihoods)
    }

    /// Forgets all tokens but the first `len`.
    fn truncate(&mut self, len: usize);
}

/// Logits rows that exist at a time where only their likelihoods are wanted.
const LOGITS_ROWS: usize = 64;

impl Model {
    /// # Errors
    /// `Usage` on a configuration that cannot be; `Tensor` if the device refuses or memory runs out.
    pub fn new(config: &BitNetConfig, weights: PackedWeights, device: &Device) -> Result<Self> {
        config.validate()?;
        let network = match device {
            Device::Cpu => Network::Cpu(cpu::Network::new(config, weights)),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) if cuda::takes(config) => {
                Network::Cuda(cuda::Network::new(config, &weights, device)?.into())
            }
            _ => Network::Graph(graph::Network::new(config, &weights, device)?),
        };
        Ok(Self {
            config: config.clone(),
            network,
        })
    }

    /// The same in candle operations on any device, the CPU too: what the other is compared with.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn as_graph(
        config: &BitNetConfig,
        weights: &PackedWeights,
        device: &Device,
    ) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config: config.clone(),
            network: Network::Graph(graph::Network::new(config, weights, device)?),
        })
    }

    pub fn config(&self) -> &BitNetConfig {
        &self.config
    }

    /// A sequence without tokens.
    pub fn session(&self) -> Session<'_> {
        Session {
            config: &self.config,
            pass: match &self.network {
                Network::Cpu(network) => Box::new(cpu::Pass::new(network)),
                #[cfg(feature = "cuda")]
                Network::Cuda(network) => Box::new(cuda::Pass::new(network)),
                Network::Graph(network) => Box::new(graph::Pass::new(network)),
            },
            len: 0,
        }
    }
}

/// One sequence of tokens, which grows: keys and values of those before are kept.
pub struct Session<'a> {
    config: &'a BitNetConfig,
    pass: Box<dyn Pass + 'a>,
    len: usize,
}

impl Session<'_> {
    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that there is still room for.
    pub fn room(&self) -> usize {
        self.config.max_seq_len - self.len
    }

    /// Goes back to the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pass.truncate(self.len);
    }

    /// Appends tokens in one pass -> logits (vocab,) of the token that follows the last.
    ///
    /// # Errors
    /// `Usage` on no tokens, more than there is room for, or ids outside the vocabulary; `Tensor`
    /// if the device refuses.
    pub fn next_logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.feed(ids)?;
        self.pass.logits(ids.len() - 1..ids.len())
    }

    /// Appends tokens in one pass -> logits (ids.len(), vocab). Errors as [`Self::next_logits`].
    pub fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.feed(ids)?;
        self.pass.logits(0..ids.len())
    }

    /// Appends tokens in one pass -> the natural log of the probability of `targets[i]` after
    /// `ids[i]`, for each i. Errors as [`Self::next_logits`], and `Usage` on other targets.
    pub fn log_likelihoods(&mut self, ids: &[u32], targets: &[u32]) -> Result<Vec<f32>> {
        if ids.len() != targets.len() {
            return Err(Error::usage(format!(
                "{} targets for {} tokens",
                targets.len(),
                ids.len()
            )));
        }
        self.check_vocabulary(targets)?;
        self.feed(ids)?;
        self.pass.log_likelihoods(targets)
    }

    /// Appends tokens in one pass. Errors as [`Self::next_logits`].
    pub fn feed(&mut self, ids: &[u32]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::usage("no tokens to run the model on"));
        }
        if ids.len() > self.room() {
            return Err(Error::usage(format!(
                "{} tokens after {} exceed the model's context of {}",
                ids.len(),
                self.len,
                self.config.max_seq_len
            )));
        }
        self.check_vocabulary(ids)?;
        self.pass.feed(ids)?;
        self.len += ids.len();
        Ok(())
    }

    fn check_vocabulary(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.config.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::usage(format!(
                "token id {id} is outside the model's vocabulary of {vocab}"
            ))),
            None => Ok(()),
        }
    }
}
