//! The products that are measured when none is named: projections of the published sizes.

use candle_core::Device;

use crate::Result;
use crate::model::BitNetConfig;

/// A weight (n, k), and where it stands in a model.
#[derive(Clone, Debug)]
pub struct Shape {
    pub name: String,
    pub n: usize,
    pub k: usize,
}

/// Collections of shapes by name.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Suite {
    /// Every projection of every published size; those that share their input as one
    Bitnet,
}

impl Suite {
    pub fn shapes(self) -> Result<Vec<Shape>> {
        let sizes = BitNetConfig::PRESETS.iter().map(|size| projections(size));
        Ok(sizes.collect::<Result<Vec<_>>>()?.concat())
    }
}

/// The projections of a published size, as inference runs them: fused where they share their input.
pub fn projections(size: &str) -> Result<Vec<Shape>> {
    let config = BitNetConfig::preset(size)?;
    let [q, k, v, o, gate, up, down] = config.projections();
    let fused = |name: &str, parts: &[&crate::model::Projection]| Shape {
        name: format!("{size} {name}"),
        n: parts.iter().map(|part| part.rows).sum(),
        k: parts[0].cols,
    };
    Ok(vec![
        fused("qkv", &[&q, &k, &v]),
        fused("o", &[&o]),
        fused("gate+up", &[&gate, &up]),
        fused("down", &[&down]),
    ])
}

/// Numbers of tokens: decoding, small batches, prefill and, on a GPU, training.
pub fn tokens(device: &Device) -> Vec<usize> {
    match device {
        Device::Cpu => vec![1, 4, 16, 128],
        _ => vec![1, 4, 16, 64, 256, 1024, 4096, 16384],
    }
}
