//! Reading the models in GGUF files back.

use std::path::Path;

use super::blocks::Encoding;
use super::container::Value;
use super::reader::Reader;
use super::{
    BLOCK_COUNT, CONTEXT_LENGTH, EMBEDDING_LENGTH, FEED_FORWARD_LENGTH, HEAD_COUNT, HEAD_COUNT_KV,
    RMS_EPSILON, ROPE_FREQ_BASE, VOCAB_SIZE, gguf_name, scale_name,
};
use crate::inference::weights::TableValues;
use crate::inference::{PackedWeights, Projections, Table, WeightSource};
use crate::model::{Activation, BitNetConfig, Projection};
use crate::quant::PackedTernary;
use crate::values::{Plain, Values};
use crate::{Error, Result};

/// Reads a file of [`super::write`]: its configuration (except `init_std`, which the file does not
/// have) and its weights.
///
/// # Errors
/// `Io` when it cannot be read; `Format` when it is cut short or not of our kind.
pub fn read(path: &Path) -> Result<(BitNetConfig, PackedWeights)> {
    let file = Reader::open(path)?;
    let architecture = Value::String("bitnet".into());
    if file.get("general.architecture") != Some(&architecture) {
        return Err(Error::format(path, "its architecture is not bitnet"));
    }
    let config = BitNetConfig {
        vocab_size: file.count(VOCAB_SIZE)?,
        hidden_size: file.count(EMBEDDING_LENGTH)?,
        layers: file.count(BLOCK_COUNT)?,
        heads: file.count(HEAD_COUNT)?,
        kv_heads: file.count(HEAD_COUNT_KV)?,
        intermediate_size: file.count(FEED_FORWARD_LENGTH)?,
        max_seq_len: file.count(CONTEXT_LENGTH)?,
        rope_theta: file.number(ROPE_FREQ_BASE)?,
        rms_norm_eps: file.number(RMS_EPSILON)?,
        activation: Activation::Silu,
        tie_embeddings: true,
        init_std: BitNetConfig::default().init_std,
    };
    let valid = config.validate();
    valid.map_err(|e| Error::format(path, format!("the configuration in its header: {e}")))?;
    let weights = PackedWeights::read(&config, &file)?;
    Ok((config, weights))
}

impl Reader {
    fn count(&self, key: &str) -> Result<usize> {
        match self.get(key) {
            Some(Value::U32(x)) => Ok(*x as usize),
            _ => Err(self.error(format!("its header has no count `{key}`"))),
        }
    }

    /// As the decimal number that was meant: 1e-5, not the f32 next to it.
    fn number(&self, key: &str) -> Result<f64> {
        match self.get(key) {
            Some(Value::F32(x)) => Ok(x.to_string().parse().unwrap_or(f64::from(*x))),
            _ => Err(self.error(format!("its header has no number `{key}`"))),
        }
    }

    /// Numbers of a tensor, which must be stored as they are.
    fn numbers<T: Plain>(
        &self,
        name: &str,
        dims: &[usize],
        encoding: Encoding,
    ) -> Result<Values<T>> {
        match self.tensor(name, dims)? {
            (found, data) if found == encoding => Ok(self.values(data)),
            (found, _) => {
                let what = format!("tensor `{name}` is {found:?}, and {encoding:?} is wanted");
                Err(self.error(what))
            }
        }
    }
}

/// Names are those of `transformers`.
impl WeightSource for Reader {
    fn norm(&self, name: &str, features: usize) -> Result<Vec<f32>> {
        let values = self.numbers(&gguf_name(name), &[features], Encoding::F32)?;
        Ok(values.to_vec())
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Table> {
        let values = self.numbers(&gguf_name(name), &[cols, rows], Encoding::F16)?;
        Ok(Table::new(rows, cols, TableValues::F16(values)))
    }

    fn projections(&self, layer: usize, _name: &str, parts: &[Projection]) -> Result<Projections> {
        Projections::stack(layer, parts, |name, part| {
            let weight = gguf_name(name);
            let (encoding, data) = self.tensor(&weight, &[part.cols, part.rows])?;
            let codes = encoding.decode(self.bytes(data));
            let codes = codes.map_err(|what| self.error(format!("tensor `{weight}` {what}")))?;
            let b: Values<f32> = self.numbers(&scale_name(name), &[1], Encoding::F32)?;
            Ok((PackedTernary::pack(&codes, part.rows, part.cols)?, b[0]))
        })
    }
}
