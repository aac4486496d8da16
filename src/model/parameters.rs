//! The weights of a model by name (the names of `transformers`' bitnet model), their
//! initialisation, and reading and writing them as safetensors.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::BitNetConfig;
use super::weights::{LayerWeights, Weights};
use crate::random::SplitMix64;
use crate::{Error, Result};

/// One trainable tensor, f32.
#[derive(Clone, Debug)]
pub struct Parameter {
    pub name: String,
    pub var: Var,
    /// Takes weight decay: projections and the LM head, not norms and embeddings.
    pub decay: bool,
}

/// All weights of a model, in the order of use.
#[derive(Clone, Debug)]
pub struct Parameters(Vec<Parameter>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Norm,
    Embedding,
    Matrix,
}

/// Name, shape and kind of every weight of `config`.
fn specifications(config: &BitNetConfig) -> Vec<(String, Vec<usize>, Kind)> {
    let table = vec![config.vocab_size, config.hidden_size];
    let mut all = vec![(
        "model.embed_tokens.weight".to_string(),
        table.clone(),
        Kind::Embedding,
    )];
    for layer in 0..config.layers {
        let mut add = |name: &str, shape: Vec<usize>, kind| {
            all.push((format!("model.layers.{layer}.{name}.weight"), shape, kind));
        };
        for (name, features) in [
            ("input_layernorm", config.hidden_size),
            ("self_attn.attn_sub_norm", config.hidden_size),
            ("post_attention_layernorm", config.hidden_size),
            ("mlp.ffn_sub_norm", config.intermediate_size),
        ] {
            add(name, vec![features], Kind::Norm);
        }
        for projection in config.projections() {
            let shape = vec![projection.rows, projection.cols];
            add(projection.name, shape, Kind::Matrix);
        }
    }
    all.push((
        "model.norm.weight".into(),
        vec![config.hidden_size],
        Kind::Norm,
    ));
    if !config.tie_embeddings {
        all.push(("lm_head.weight".into(), table, Kind::Matrix));
    }
    all
}

/// Name and shape of every weight of a model, in the order of use.
pub fn tensor_shapes(config: &BitNetConfig) -> impl Iterator<Item = (String, Vec<usize>)> {
    specifications(config)
        .into_iter()
        .map(|(name, shape, _)| (name, shape))
}

/// N(0, std) by Box-Muller, a stream of its own per name and block: the same values on every
/// device and with any number of threads.
fn normal(name: &str, count: usize, std: f64, seed: u64) -> Vec<f32> {
    const BLOCK: usize = 1 << 16;
    let stream = xxh3_64_with_seed(name.as_bytes(), seed);
    let mut values = vec![0f32; count];
    values
        .par_chunks_mut(BLOCK)
        .enumerate()
        .for_each(|(block, values)| {
            let key = xxh3_64_with_seed(&(block as u64).to_le_bytes(), stream);
            let mut random = SplitMix64(key);
            // In (0, 1].
            let mut uniform = || ((random.next() >> 11) + 1) as f64 / (1u64 << 53) as f64;
            for pair in values.chunks_mut(2) {
                let radius = std * (-2.0 * uniform().ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * uniform()).sin_cos();
                for (value, part) in pair.iter_mut().zip([cos, sin]) {
                    *value = (radius * part) as f32;
                }
            }
        });
    values
}

impl Parameters {
    /// N(0, `init_std`) matrices and unit norms, the same from the same seed on every device.
    pub fn init(config: &BitNetConfig, seed: u64, device: &Device) -> Result<Self> {
        Self::build(config, |name, shape, kind| {
            let count = shape.iter().product();
            let values = match kind {
                Kind::Norm => vec![1f32; count],
                Kind::Embedding | Kind::Matrix => normal(name, count, config.init_std, seed),
            };
            Ok(Var::from_vec(values, shape, device)?)
        })
    }

    /// Reads every weight of `config` from a safetensors file.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, not floating point, or one too many, by name.
    pub fn load(config: &BitNetConfig, path: &Path, device: &Device) -> Result<Self> {
        let tensors = candle_core::safetensors::load(path, &Device::Cpu)
            .map_err(|e| Error::format(path, format!("not a readable safetensors file ({e})")))?;
        let parameters = Self::from_tensors(config, &tensors, device).map_err(|e| match e {
            Error::Usage(what) => Error::format(path, what),
            other => other,
        })?;
        let known: HashSet<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
        match tensors.keys().filter(|n| !known.contains(n.as_str())).min() {
            Some(extra) => Err(Error::format(
                path,
                format!(
                    "tensor `{extra}` of shape {:?} has no place in the model: check the model \
                     section",
                    tensors[extra].dims()
                ),
            )),
            None => Ok(parameters),
        }
    }

    /// Takes every weight of `config` from `tensors`, by name.
    pub fn from_tensors(
        config: &BitNetConfig,
        tensors: &HashMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        Self::build(config, |name, shape, _| {
            let tensor = checked(tensors, name, &shape)?;
            Ok(Var::from_tensor(&tensor.to_device(device)?)?)
        })
    }

    fn build(
        config: &BitNetConfig,
        make: impl Fn(&str, Vec<usize>, Kind) -> Result<Var>,
    ) -> Result<Self> {
        specifications(config)
            .into_iter()
            .map(|(name, shape, kind)| {
                let var = make(&name, shape, kind)?;
                Ok(Parameter {
                    decay: kind == Kind::Matrix,
                    name,
                    var,
                })
            })
            .collect::<Result<_>>()
            .map(Self)
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Parameter> {
        self.0.iter()
    }

    /// The weight called `name`.
    ///
    /// # Errors
    /// `Usage` if there is none of that name.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        let found = self.0.iter().find(|parameter| parameter.name == name);
        let found = found.map(|parameter| parameter.var.as_tensor());
        found.ok_or_else(|| Error::usage(format!("the model has no weight called `{name}`")))
    }

    /// All weights by their place in the network.
    ///
    /// # Errors
    /// Parameters of a model of another shape.
    pub(crate) fn by_place(&self, config: &BitNetConfig) -> Result<Weights<Tensor>> {
        let weight = |name: &str| self.get(&format!("{name}.weight")).cloned();
        let layers = (0..config.layers).map(|layer| {
            let weight = |name: &str| weight(&format!("model.layers.{layer}.{name}"));
            Ok(LayerWeights {
                input_layernorm: weight("input_layernorm")?,
                attn_sub_norm: weight("self_attn.attn_sub_norm")?,
                post_attention_layernorm: weight("post_attention_layernorm")?,
                ffn_sub_norm: weight("mlp.ffn_sub_norm")?,
                q_proj: weight("self_attn.q_proj")?,
                k_proj: weight("self_attn.k_proj")?,
                v_proj: weight("self_attn.v_proj")?,
                o_proj: weight("self_attn.o_proj")?,
                gate_proj: weight("mlp.gate_proj")?,
                up_proj: weight("mlp.up_proj")?,
                down_proj: weight("mlp.down_proj")?,
            })
        });
        Ok(Weights {
            embed_tokens: weight("model.embed_tokens")?,
            layers: layers.collect::<Result<_>>()?,
            norm: weight("model.norm")?,
            lm_head: match config.tie_embeddings {
                true => None,
                false => Some(weight("lm_head")?),
            },
        })
    }
}

/// The tensor called `name` as f32, if it is floating point and has the shape the model needs.
fn checked(tensors: &HashMap<String, Tensor>, name: &str, shape: &[usize]) -> Result<Tensor> {
    let tensor = tensors.get(name).ok_or_else(|| {
        Error::usage(format!("tensor `{name}` is missing: another model's file?"))
    })?;
    if tensor.dims() != shape {
        return Err(Error::usage(format!(
            "tensor `{name}` has shape {:?}, the model needs {shape:?}: check the model section",
            tensor.dims()
        )));
    }
    if !tensor.dtype().is_float() {
        return Err(Error::usage(format!(
            "tensor `{name}` holds {:?}, the model needs floating point: an exported model?",
            tensor.dtype()
        )));
    }
    Ok(tensor.to_dtype(DType::F32)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initialisation_is_normal_and_seeded() {
        let values = normal("w", 200_001, 0.02, 7);
        let n = values.len() as f64;
        let mean = values.iter().map(|x| *x as f64).sum::<f64>() / n;
        let variance = values
            .iter()
            .map(|x| (*x as f64 - mean).powi(2))
            .sum::<f64>()
            / n;
        // Five standard errors of each estimate.
        assert!(mean.abs() < 5.0 * 0.02 / n.sqrt(), "{mean}");
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 5.0 / (2.0 * n).sqrt());
        let beyond = values.iter().filter(|x| x.abs() > 0.04).count() as f64 / n;
        assert!((beyond - 0.0455).abs() < 0.003, "{beyond}");
        assert_eq!(values, normal("w", 200_001, 0.02, 7));
        assert_ne!(values, normal("w", 200_001, 0.02, 8));
        assert_ne!(values, normal("v", 200_001, 0.02, 7));
    }
}
