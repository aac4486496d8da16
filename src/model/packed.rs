//! Inference: the network with its projections packed to 2 bits a weight.

use candle_core::Tensor;

use super::decoder::{BitLinear, Decoder};
use super::transformer::check_ids;
use super::{BitNetConfig, BitNetTransformer};
use crate::Result;
use crate::quant::{Backend, PackedBitLinear};

impl BitLinear for PackedBitLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.forward(x)
    }
}

/// A model for inference: packed ternary projections, int8 activations, exact sums, as in
/// [`BitNetTransformer`], whose logits it gives to float tolerance.
#[derive(Debug)]
pub struct PackedTransformer {
    config: BitNetConfig,
    decoder: Decoder<PackedBitLinear>,
}

impl PackedTransformer {
    /// Quantises and packs the projections of `model`; shares its other weights.
    ///
    /// # Errors
    /// `Tensor` if memory runs out.
    pub fn new(model: &BitNetTransformer) -> Result<Self> {
        let weights = model.weights().map(Tensor::detach);
        let config = model.config().clone();
        let backend = Backend::new(model.device())?;
        let pack = |masters: &[&Tensor]| backend.quantize(masters);
        let decoder = Decoder::new(&config, &weights, model.rope(), pack)?;
        Ok(Self { config, decoder })
    }

    pub fn config(&self) -> &BitNetConfig {
        &self.config
    }

    /// ids (batch, seq) u32 -> logits (batch, seq, vocab).
    ///
    /// # Errors
    /// As [`BitNetTransformer::forward`].
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        check_ids(&self.config, ids, None)?;
        let (batch, seq) = ids.dims2()?;
        let logits = self.decoder.logits(ids)?;
        Ok(logits.reshape((batch, seq, self.config.vocab_size))?)
    }
}
