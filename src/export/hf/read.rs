//! Reading such a directory back, without `transformers`.

use std::fs;
use std::path::Path;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use safetensors::tensor::Dtype;

use super::config::{ModelConfig, Storage};
use super::{CONFIG, TOKENIZER, WEIGHTS, check_packed, packed};
use crate::error::IoContext;
use crate::inference::tensor_file::TensorFile;
use crate::inference::weights::TableValues;
use crate::inference::{Loaded, PackedWeights, Projections, Table, WeightSource};
use crate::model::Projection;
use crate::quant::PackedTernary;
use crate::quant::ternary::{absmean, ternary_codes};
use crate::values::Values;
use crate::{Error, Result};

/// Whether `dir` holds a model for `transformers`.
pub fn is_model(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}

/// The model in `dir`, as [`super::write_masters`] or [`super::write_packed`] wrote it.
///
/// # Errors
/// `Format` on what is no such model; `Io` when it cannot be read.
pub fn read(dir: &Path) -> Result<Loaded> {
    let path = dir.join(CONFIG);
    let text = fs::read(&path).at("read", &path)?;
    let config: ModelConfig = serde_json::from_slice(&text).map_err(|e| {
        Error::format(
            &path,
            format!("not the configuration of a bitnet model ({e})"),
        )
    })?;
    let (config, storage) = config.model().map_err(|e| Error::format(&path, e))?;
    if storage == Storage::Packed {
        check_packed(&config).map_err(|e| Error::format(&path, e))?;
    }

    let path = dir.join(WEIGHTS);
    let file = TensorFile::open(&path)?
        .ok_or_else(|| Error::format(&path, "not a whole safetensors file"))?;
    let weights = PackedWeights::read(&config, &Source { file, storage })?;

    let path = dir.join(TOKENIZER);
    let tokenizer = match path.is_file() {
        true => Some(fs::read_to_string(&path).at("read", &path)?),
        false => None,
    };
    Ok(Loaded {
        config,
        weights,
        tokenizer,
        kind: match storage {
            Storage::Masters => "model for transformers".into(),
            Storage::Packed => "packed model for transformers".into(),
        },
    })
}

struct Source {
    file: TensorFile,
    storage: Storage,
}

impl Source {
    /// A bf16 tensor as f32.
    fn bf16s(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values: Values<bf16> = self.file.values(name, Dtype::BF16, shape)?;
        let mut widened = vec![0f32; values.len()];
        values.convert_to_f32_slice(&mut widened);
        Ok(widened)
    }

    fn projection(&self, name: &str, part: &Projection) -> Result<(PackedTernary, f32)> {
        let (rows, cols) = (part.rows, part.cols);
        let (codes, b) = match self.storage {
            Storage::Masters => {
                let master = self.bf16s(name, &[rows, cols])?;
                let b = absmean(&master);
                (ternary_codes(&master, b), b)
            }
            Storage::Packed => {
                let shape = [rows / packed::CODES_PER_BYTE, cols];
                let bytes: Values<u8> = self.file.values(name, Dtype::U8, &shape)?;
                let codes = packed::unpack(&bytes).ok_or_else(|| {
                    let what = format!("tensor `{name}` has bits that are no ternary code");
                    Error::format(self.file.path(), what)
                })?;
                let scale = format!("{name}_scale");
                let scale: Values<f32> = self.file.values(&scale, Dtype::F32, &[1])?;
                (codes, packed::weight_scale(scale[0]))
            }
        };
        Ok((PackedTernary::pack(&codes, rows, cols)?, b))
    }
}

impl WeightSource for Source {
    fn norm(&self, name: &str, features: usize) -> Result<Vec<f32>> {
        Ok(self.file.values(name, Dtype::F32, &[features])?.to_vec())
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Table> {
        let values = self.bf16s(name, &[rows, cols])?;
        Ok(Table::new(rows, cols, TableValues::F32(values.into())))
    }

    fn projections(&self, layer: usize, _name: &str, parts: &[Projection]) -> Result<Projections> {
        Projections::stack(layer, parts, |name, part| self.projection(name, part))
    }
}
