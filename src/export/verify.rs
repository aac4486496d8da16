//! Whether what was written is the model that it was written from.

use std::path::Path;

use candle_core::Device;

use crate::inference::{Model, PackedWeights, Projections, Table};
use crate::model::BitNetConfig;
use crate::{Error, Result};

/// Tokens that both models are run on.
const TOKENS: usize = 64;

/// Scales may be off by the rounding of one operation, such as 1 / (1 / b).
const SCALE_TOLERANCE: f32 = f32::EPSILON;

/// An embedding that is rounded, however little, moves activations across the thresholds of their int8
/// codes: logits of the quickstart's model move by 0.2% of their norm, those of random weights by 6% to
/// 7% (125M) and 10% to 11% (1.3B). Those of another model would differ by 140%.
pub const LOGITS_TOLERANCE: f64 = 0.3;

/// How far a format may be from the model: ||difference|| / ||value||.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Of the embedding and of the LM head.
    pub tables: f64,
    /// Of the logits, [`LOGITS_TOLERANCE`] where embeddings are rounded.
    pub logits: f64,
}

/// What was compared.
#[derive(Clone, Copy, Debug)]
pub struct Verified {
    /// Ternary codes, all the same.
    pub codes: usize,
    /// Projections, each with a scale.
    pub scales: usize,
    /// Tokens whose logits were compared.
    pub tokens: usize,
    /// ||difference|| / ||logits||
    pub logits_error: f64,
    /// Largest difference between two logits.
    pub largest_difference: f32,
}

/// Compares a model with what was read from `path`, to which it was written: codes and norms must be
/// the same, scales to the last bit or so, embeddings and logits within `tolerance`.
///
/// # Errors
/// `Format` naming the first thing that differs.
pub fn verify(
    path: &Path,
    (config, original): (&BitNetConfig, PackedWeights),
    (read_config, read): (BitNetConfig, PackedWeights),
    tolerance: Tolerance,
) -> Result<Verified> {
    let differs = |what: String| {
        let advice = "nothing was exported: choose another format, and report this";
        Err(Error::format(
            path,
            format!("the check failed, {what}; {advice}"),
        ))
    };
    if !is_same_shape(config, &read_config) {
        return differs("it holds a model of another shape".into());
    }
    if let Some(what) = weights_difference(&original, &read, tolerance.tables) {
        return differs(what);
    }
    let layers = &original.layers;
    let projections = layers.iter().flat_map(|layer| layer.projections());
    let codes = projections.map(|(_, p)| p.packed.rows() * p.packed.cols());
    let codes = codes.sum();
    let scales = layers.len() * config.projections().len();

    let tokens = TOKENS.min(config.max_seq_len);
    let original = logits(config, original, tokens)?;
    let read = logits(&read_config, read, tokens)?;
    let logits_error = relative_error(read.iter().zip(&original));
    let is_near = logits_error <= tolerance.logits;
    if !is_near {
        return differs(format!("logits differ by {logits_error:.1e} of their norm"));
    }
    let differences = read.iter().zip(&original).map(|(a, b)| (a - b).abs());
    Ok(Verified {
        codes,
        scales,
        tokens,
        logits_error,
        largest_difference: differences.fold(0.0, f32::max),
    })
}

/// Constants may be in f32; the initialisation is of no use to anybody else.
fn is_same_shape(config: &BitNetConfig, read: &BitNetConfig) -> bool {
    let is_near = |a: f64, b: f64| (a - b).abs() <= f64::from(f32::EPSILON) * a.abs();
    is_near(config.rope_theta, read.rope_theta)
        && is_near(config.rms_norm_eps, read.rms_norm_eps)
        && *config
            == BitNetConfig {
                rope_theta: config.rope_theta,
                rms_norm_eps: config.rms_norm_eps,
                init_std: config.init_std,
                ..read.clone()
            }
}

/// The first weight that differs.
fn weights_difference(
    original: &PackedWeights,
    read: &PackedWeights,
    tables: f64,
) -> Option<String> {
    for (name, a, b) in [
        (
            "the embedding",
            Some(&original.embed_tokens),
            Some(&read.embed_tokens),
        ),
        (
            "the LM head",
            original.lm_head.as_ref(),
            read.lm_head.as_ref(),
        ),
    ] {
        let error = match (a, b) {
            (Some(a), Some(b)) => table_error(a, b),
            (None, None) => continue,
            _ => return Some(format!("{name} is there in one of the two only")),
        };
        let is_near = error <= tables;
        if !is_near {
            return Some(format!("{name} differs by {error:.1e} of its norm"));
        }
    }
    if original.norm != read.norm {
        return Some("model.norm.weight differs".into());
    }
    for (i, (a, b)) in original.layers.iter().zip(&read.layers).enumerate() {
        for ((name, a), (_, b)) in a.norms().into_iter().zip(b.norms()) {
            if a != b {
                return Some(format!("model.layers.{i}.{name}.weight differs"));
            }
        }
        for ((name, a), (_, b)) in a.projections().into_iter().zip(b.projections()) {
            if let Some(what) = projections_difference(a, b) {
                return Some(format!("{what} of model.layers.{i}.{name} differ"));
            }
        }
    }
    None
}

fn projections_difference(original: &Projections, read: &Projections) -> Option<String> {
    if original.packed != read.packed {
        let codes = original
            .packed
            .unpack()
            .into_iter()
            .zip(read.packed.unpack());
        return Some(format!("{} codes", codes.filter(|(a, b)| a != b).count()));
    }
    let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= SCALE_TOLERANCE * a.abs();
    let mut scales = original.scales.iter().zip(&read.scales);
    let (a, b) = scales.find(|scales| !is_near(*scales))?;
    Some(format!("scales ({a:e} and {b:e})"))
}

fn table_error(original: &Table, read: &Table) -> f64 {
    let values = |table: &Table| {
        let mut values = vec![0f32; table.rows() * table.cols()];
        table.read_rows(0, &mut values);
        values
    };
    let (original, read) = (values(original), values(read));
    relative_error(read.iter().zip(&original))
}

/// ||a - b|| / ||b||, 0 if they are the same.
fn relative_error<'a>(pairs: impl Iterator<Item = (&'a f32, &'a f32)>) -> f64 {
    let (difference, norm) = pairs.fold((0.0, 0.0), |(difference, norm), (a, b)| {
        let (a, b) = (f64::from(*a), f64::from(*b));
        (difference + (a - b).powi(2), norm + b.powi(2))
    });
    match difference == 0.0 {
        true => 0.0,
        false => (difference / norm).sqrt(),
    }
}

/// Logits (tokens, vocab) of tokens from all over the vocabulary.
fn logits(config: &BitNetConfig, weights: PackedWeights, tokens: usize) -> Result<Vec<f32>> {
    let vocab = config.vocab_size;
    let ids: Vec<u32> = (0..tokens)
        .map(|i| ((i * i + 3 * i + 1) * 7919 % vocab) as u32)
        .collect();
    let model = Model::new(config, weights, &Device::Cpu)?;
    model.session().logits(&ids)
}
