//! Directories that `transformers` loads as `BitNetForCausalLM`.
//!
//! | file | what |
//! |---|---|
//! | `config.json` | shape, and how the projections are stored: [`Storage`] |
//! | `generation_config.json` | the tokens that begin and end a text |
//! | `model.safetensors` | weights, named as in training |
//! | `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` | the tokenizer, if there is one |
//!
//! Embedding and LM head are bf16, norms f32; `from_pretrained` converts both to the type it is
//! asked for.

mod config;
mod packed;
mod read;
mod tokenizer;

use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use safetensors::tensor::Dtype;

pub use config::Storage;
pub use read::{is_model, read};

use super::bf16_masters;
use super::tokenizer::Tokenizer;
use crate::files::{sync_dir, write_file, write_tensors};
use crate::inference::tensor_file::NewTensor;
use crate::inference::{PackedWeights, Table};
use crate::model::{BitNetConfig, BitNetTransformer};
use crate::{Error, Result};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";

/// All files of such a directory.
pub const FILES: [&str; 6] = [
    CONFIG,
    "generation_config.json",
    WEIGHTS,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
];

type Tensors = Vec<(String, NewTensor<'static>)>;

/// Writes `model` into the empty directory `dir`, projections in bf16 for quantisation at each use.
///
/// # Errors
/// `Io` when it cannot be written.
pub fn write_masters(
    dir: &Path,
    model: &BitNetTransformer,
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    let projections = model.config().projections();
    let is_projection = |name: &str| {
        let name = name.strip_suffix(".weight").unwrap_or(name);
        projections.iter().any(|p| name.ends_with(p.name))
    };
    let parameters: Vec<_> = model.parameters().iter().collect();
    let tensors = parameters.par_iter().map(|parameter| {
        let values: Vec<f32> = parameter.var.flatten_all()?.to_vec1()?;
        let shape = parameter.var.dims();
        let tensor = if shape.len() == 1 {
            NewTensor::vector(&values).into_owned()
        } else if is_projection(&parameter.name) {
            bf16_tensor(shape, &bf16_masters::to_bf16(&values))
        } else {
            bf16_tensor(shape, &nearest_bf16(&values))
        };
        Ok((parameter.name.clone(), tensor))
    });
    let tensors = tensors.collect::<Result<Tensors>>()?;
    write(dir, model.config(), Storage::Masters, tensors, tokenizer)
}

/// Writes a model into the empty directory `dir`, projections as packed codes with a scale.
///
/// # Errors
/// As [`check_packed`] says; `Io` when it cannot be written.
pub fn write_packed(
    dir: &Path,
    config: &BitNetConfig,
    weights: &PackedWeights,
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    check_packed(config)?;
    let mut tensors = vec![
        table("model.embed_tokens.weight", &weights.embed_tokens),
        vector("model.norm.weight".into(), &weights.norm),
    ];
    if let Some(head) = &weights.lm_head {
        tensors.push(table("lm_head.weight", head));
    }
    let [q, k, v, o, gate, up, down] = config.projections();
    for (i, layer) in weights.layers.iter().enumerate() {
        let name = |name: &str| format!("model.layers.{i}.{name}.weight");
        for (norm, values) in layer.norms() {
            tensors.push(vector(name(norm), values));
        }
        let parts = [vec![q, k, v], vec![o], vec![gate, up], vec![down]];
        for ((_, stacked), parts) in layer.projections().into_iter().zip(parts) {
            let mut row = 0;
            for part in parts {
                let codes = packed::pack(&stacked.packed, row..row + part.rows);
                let shape = [part.rows / packed::CODES_PER_BYTE, part.cols];
                let codes = NewTensor::over(Dtype::U8, &shape, &codes).into_owned();
                let scale = packed::weight_scale(stacked.scales[row]);
                tensors.push((name(part.name), codes));
                tensors.push(vector(format!("{}_scale", name(part.name)), &[scale]));
                row += part.rows;
            }
        }
    }
    write(dir, config, Storage::Packed, tensors, tokenizer)
}

/// # Errors
/// `Usage` on a projection whose rows cannot be packed four to a byte.
pub fn check_packed(config: &BitNetConfig) -> Result<()> {
    let mut projections = config.projections().into_iter();
    match projections.find(|p| !p.rows.is_multiple_of(packed::CODES_PER_BYTE)) {
        Some(p) => Err(Error::usage(format!(
            "hf-packed cannot hold this model: {} has {} rows, and transformers packs {} to a \
             byte: export as hf",
            p.name,
            p.rows,
            packed::CODES_PER_BYTE
        ))),
        None => Ok(()),
    }
}

fn write(
    dir: &Path,
    config: &BitNetConfig,
    storage: Storage,
    tensors: Tensors,
    tokenizer: Option<&Tokenizer>,
) -> Result<()> {
    // `transformers` reads files for PyTorch only.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    write_tensors(&dir.join(WEIGHTS), tensors, Some(metadata))?;
    let end_of_text = tokenizer.and_then(|tokenizer| tokenizer.end_of_text.as_ref());
    let mut files = config::files(config, storage, end_of_text.map(|token| token.id));
    if let Some(tokenizer) = tokenizer {
        write_file(&dir.join(TOKENIZER), tokenizer.json.as_bytes())?;
        files.extend(tokenizer::files(config, end_of_text));
    }
    for (name, content) in files {
        let mut text = serde_json::to_vec_pretty(&content).map_err(Error::training)?;
        text.push(b'\n');
        write_file(&dir.join(name), &text)?;
    }
    sync_dir(dir)
}

fn nearest_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|x| bf16::from_f32(*x)).collect()
}

fn bf16_tensor(shape: &[usize], values: &[bf16]) -> NewTensor<'static> {
    NewTensor::over(Dtype::BF16, shape, values).into_owned()
}

fn table(name: &str, table: &Table) -> (String, NewTensor<'static>) {
    let (rows, cols) = (table.rows(), table.cols());
    let mut values = vec![0f32; rows * cols];
    table.read_rows(0, &mut values);
    let tensor = bf16_tensor(&[rows, cols], &nearest_bf16(&values));
    (name.to_string(), tensor)
}

fn vector(name: String, values: &[f32]) -> (String, NewTensor<'static>) {
    (name, NewTensor::vector(values).into_owned())
}
