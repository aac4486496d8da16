//! The packed format: one safetensors file that is mapped, not read, to run a model.
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `model.embed_tokens.weight`, `lm_head.weight` | F16 | (vocab, hidden) |
//! | norms, named as in `transformers` | F32 | (features,) |
//! | `model.layers.N.self_attn.{qkv_proj,o_proj}.weight`, `model.layers.N.mlp.{gate_up_proj,down_proj}.weight` | U32 | (rows, ceil(cols / 16)) |
//! | the same, `.weight_scale` instead of `.weight` | F32 | one scale for each projection in it |
//!
//! Projections that share their input are one tensor, q above k above v and gate above up; 16 codes a
//! word, as in [`crate::quant::packing`]. The header's metadata has `format` ([`FORMAT`]), `config`
//! (JSON, the keys of a configuration's `model` section) and `tokenizer` (a `tokenizer.json`).

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::Dtype;

use super::tensor_file::{NewTensor, TensorFile};
use super::weights::{PackedWeights, Projections, Table, TableValues, WeightSource};
use crate::files::write_tensors;
use crate::model::{BitNetConfig, Projection};
use crate::quant::PackedTernary;
use crate::quant::packing::VALUES_PER_WORD;
use crate::values::Values;
use crate::{Error, Result};

/// What `format` says in a file of the first and so far only version.
pub const FORMAT: &str = "titanbit-packed-1";

/// A packed file, mapped.
pub struct PackedFile {
    pub config: BitNetConfig,
    pub weights: PackedWeights,
    /// The `tokenizer.json` it came with.
    pub tokenizer: Option<String>,
}

/// The scale of each of `parts`, of which `scales` has one for each row.
fn part_scales(scales: &[f32], parts: &[Projection]) -> Vec<f32> {
    let mut row = 0;
    let scale = |part: &Projection| {
        let scale = scales[row];
        row += part.rows;
        scale
    };
    parts.iter().map(scale).collect()
}

/// Writes `weights`, embedding and LM head in 16 bits, to a new file at `path`.
///
/// # Errors
/// `Usage` on an embedding or head that 16 bits cannot hold; `Io` when it cannot be written.
pub fn write(
    path: &Path,
    config: &BitNetConfig,
    weights: &PackedWeights,
    tokenizer: Option<&str>,
) -> Result<()> {
    let embed_tokens = half_table("model.embed_tokens.weight", &weights.embed_tokens)?;
    let lm_head = weights.lm_head.as_ref();
    let lm_head = lm_head
        .map(|head| half_table("lm_head.weight", head))
        .transpose()?;
    let [q, k, v, o, gate, up, down] = config.projections();
    let scales: Vec<[Vec<f32>; 4]> = (weights.layers.iter())
        .map(|layer| {
            [
                part_scales(&layer.qkv.scales, &[q, k, v]),
                part_scales(&layer.o.scales, &[o]),
                part_scales(&layer.gate_up.scales, &[gate, up]),
                part_scales(&layer.down.scales, &[down]),
            ]
        })
        .collect();

    let mut tensors = Vec::new();
    let tables = [
        ("model.embed_tokens", Some(&embed_tokens)),
        ("lm_head", lm_head.as_ref()),
    ];
    for (name, table) in tables {
        if let Some((shape, values)) = table {
            let tensor = NewTensor::over(Dtype::F16, shape, values);
            tensors.push((format!("{name}.weight"), tensor));
        }
    }
    tensors.push(("model.norm.weight".into(), NewTensor::vector(&weights.norm)));
    for (i, (layer, scales)) in weights.layers.iter().zip(&scales).enumerate() {
        for (name, norm) in layer.norms() {
            tensors.push((
                format!("model.layers.{i}.{name}.weight"),
                NewTensor::vector(norm),
            ));
        }
        for ((name, projections), scales) in layer.projections().into_iter().zip(scales) {
            let name = format!("model.layers.{i}.{name}.weight");
            let packed = &projections.packed;
            let shape = [packed.rows(), packed.words_per_row()];
            tensors.push((format!("{name}_scale"), NewTensor::vector(scales)));
            tensors.push((name, NewTensor::over(Dtype::U32, &shape, packed.words())));
        }
    }
    let json = serde_json::to_string(config).map_err(Error::training)?;
    let mut metadata = HashMap::from([
        ("format".to_string(), FORMAT.to_string()),
        ("config".to_string(), json),
    ]);
    if let Some(tokenizer) = tokenizer {
        metadata.insert("tokenizer".to_string(), tokenizer.to_string());
    }
    write_tensors(path, tensors, Some(metadata))
}

/// Shape and values of a table in 16 bits.
pub(crate) fn half_table(name: &str, table: &Table) -> Result<([usize; 2], Values<half::f16>)> {
    let table = table.to_f16();
    match table.values() {
        TableValues::F16(values) if values.iter().all(|x| x.is_finite()) => {
            Ok(([table.rows(), table.cols()], values.clone()))
        }
        _ => Err(Error::usage(format!(
            "{name} has values beyond 65504, which 16 bits cannot hold: export as hf"
        ))),
    }
}

impl PackedFile {
    /// Maps the file at `path`, or says `None` if it is of another format.
    ///
    /// # Errors
    /// `Io` when it cannot be read; `Format` when it is cut short, or not what its header says.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let Some(file) = TensorFile::open(path)? else {
            return Ok(None);
        };
        if file.text("format") != Some(FORMAT) {
            return Ok(None);
        }
        let config = file.text("config").unwrap_or_default();
        let config: BitNetConfig = serde_json::from_str(config)
            .map_err(|e| Error::format(path, format!("its header has no configuration ({e})")))?;
        config
            .validate()
            .map_err(|e| Error::format(path, format!("the configuration in its header: {e}")))?;
        Ok(Some(Self {
            weights: PackedWeights::read(&config, &file)?,
            tokenizer: file.text("tokenizer").map(str::to_string),
            config,
        }))
    }
}

/// Tensors as [`write`] names them.
impl WeightSource for TensorFile {
    fn norm(&self, name: &str, features: usize) -> Result<Vec<f32>> {
        Ok(self.values(name, Dtype::F32, &[features])?.to_vec())
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Table> {
        let values = self.values(name, Dtype::F16, &[rows, cols])?;
        Ok(Table::new(rows, cols, TableValues::F16(values)))
    }

    fn projections(&self, layer: usize, name: &str, parts: &[Projection]) -> Result<Projections> {
        let name = format!("model.layers.{layer}.{name}.weight");
        let (rows, cols) = (parts.iter().map(|part| part.rows).sum(), parts[0].cols);
        let shape = [rows, cols.div_ceil(VALUES_PER_WORD)];
        let words: Values<u32> = self.values(&name, Dtype::U32, &shape)?;
        let scales: Values<f32> =
            self.values(&format!("{name}_scale"), Dtype::F32, &[parts.len()])?;
        let scales = parts.iter().zip(&scales[..]);
        let scales = scales.flat_map(|(part, b)| std::iter::repeat_n(*b, part.rows));
        Ok(Projections {
            packed: PackedTernary::from_words(words, rows, cols),
            scales: scales.collect(),
        })
    }
}
