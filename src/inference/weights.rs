//! The weights of a model for inference, on the host: projections of 2 bits a weight, an embedding
//! and an LM head in 16 or 32 bits, norms in 32.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::Result;
use crate::model::{BitNetConfig, BitNetTransformer, Projection};
use crate::quant::PackedTernary;
use crate::quant::ternary::{absmean, ternary_codes};
use crate::values::Values;

/// All weights of a model, by their place in it.
#[derive(Clone, Debug)]
pub struct PackedWeights {
    /// (vocab, hidden)
    pub embed_tokens: Table,
    pub layers: Vec<PackedLayer>,
    pub norm: Vec<f32>,
    /// (vocab, hidden); `None` where the embedding serves as LM head.
    pub lm_head: Option<Table>,
}

/// Norms (features,) and projections of a layer, those that share their input as one.
#[derive(Clone, Debug)]
pub struct PackedLayer {
    pub input_layernorm: Vec<f32>,
    pub qkv: Projections,
    pub attn_sub_norm: Vec<f32>,
    pub o: Projections,
    pub post_attention_layernorm: Vec<f32>,
    pub gate_up: Projections,
    pub ffn_sub_norm: Vec<f32>,
    pub down: Projections,
}

/// Ternary projections that share their input, one above the other.
#[derive(Clone, Debug)]
pub struct Projections {
    /// Codes, (N, K).
    pub packed: PackedTernary,
    /// Scale b of each row, (N,).
    pub scales: Vec<f32>,
}

/// A matrix (rows, cols) in floating point.
#[derive(Clone, Debug)]
pub struct Table {
    rows: usize,
    cols: usize,
    values: TableValues,
}

#[derive(Clone, Debug)]
pub enum TableValues {
    F32(Values<f32>),
    F16(Values<f16>),
}

impl Table {
    /// # Panics
    /// If there are not `rows * cols` values.
    pub fn new(rows: usize, cols: usize, values: TableValues) -> Self {
        let count = match &values {
            TableValues::F32(values) => values.len(),
            TableValues::F16(values) => values.len(),
        };
        assert_eq!(count, rows * cols);
        Self { rows, cols, values }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn values(&self) -> &TableValues {
        &self.values
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        match &self.values {
            TableValues::F32(values) => size_of_val(&values[..]),
            TableValues::F16(values) => size_of_val(&values[..]),
        }
    }

    /// Writes rows from `first` on, as many as `target` holds, as f32.
    pub fn read_rows(&self, first: usize, target: &mut [f32]) {
        let start = first * self.cols;
        match &self.values {
            TableValues::F32(values) => target.copy_from_slice(&values[start..][..target.len()]),
            TableValues::F16(values) => {
                values[start..][..target.len()].convert_to_f32_slice(target);
            }
        }
    }

    /// The same matrix in 16 bits, rounded to nearest even.
    pub fn to_f16(&self) -> Self {
        let values = match &self.values {
            TableValues::F32(values) => {
                let values: Vec<f16> = values.par_iter().map(|x| f16::from_f32(*x)).collect();
                values.into()
            }
            TableValues::F16(values) => values.clone(),
        };
        Self::new(self.rows, self.cols, TableValues::F16(values))
    }
}

impl PackedLayer {
    /// Norms by their names in the layer.
    pub fn norms(&self) -> [(&'static str, &Vec<f32>); 4] {
        [
            ("input_layernorm", &self.input_layernorm),
            ("self_attn.attn_sub_norm", &self.attn_sub_norm),
            ("post_attention_layernorm", &self.post_attention_layernorm),
            ("mlp.ffn_sub_norm", &self.ffn_sub_norm),
        ]
    }

    /// Projections by what those that share their input are called together.
    pub fn projections(&self) -> [(&'static str, &Projections); 4] {
        [
            ("self_attn.qkv_proj", &self.qkv),
            ("self_attn.o_proj", &self.o),
            ("mlp.gate_up_proj", &self.gate_up),
            ("mlp.down_proj", &self.down),
        ]
    }
}

impl Projections {
    /// `parts` of `layer`, each by its name from `projection`: codes (rows, cols) and scale b.
    ///
    /// # Errors
    /// Those of `projection`.
    pub fn stack(
        layer: usize,
        parts: &[Projection],
        projection: impl Fn(&str, &Projection) -> Result<(PackedTernary, f32)>,
    ) -> Result<Self> {
        let (mut packed, mut scales) = (Vec::new(), Vec::new());
        for part in parts {
            let name = format!("model.layers.{layer}.{}.weight", part.name);
            let (codes, b) = projection(&name, part)?;
            packed.push(codes);
            scales.extend(std::iter::repeat_n(b, part.rows));
        }
        Ok(Self {
            packed: PackedTernary::stack(&packed),
            scales,
        })
    }
}

/// Where the weights of a model come from. Names are those of `transformers`' bitnet model:
/// `model.layers.0.self_attn.q_proj.weight`.
pub trait WeightSource {
    /// A norm (features,).
    fn norm(&self, name: &str, features: usize) -> Result<Vec<f32>>;

    /// The embedding or the LM head, (rows, cols).
    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Table>;

    /// Projections of `layer` that share their input; `name` is what they are called together, as
    /// in `self_attn.qkv_proj`.
    fn projections(&self, layer: usize, name: &str, parts: &[Projection]) -> Result<Projections>;
}

impl PackedWeights {
    /// Takes every weight of `config` from `source`.
    ///
    /// # Errors
    /// Those of the source.
    pub fn read(config: &BitNetConfig, source: &impl WeightSource) -> Result<Self> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let [q, k, v, o, gate, up, down] = config.projections();
        let layer = |layer: usize| {
            let norm = |name: &str, features: usize| {
                source.norm(&format!("model.layers.{layer}.{name}.weight"), features)
            };
            let projections =
                |name: &str, parts: &[Projection]| source.projections(layer, name, parts);
            Ok(PackedLayer {
                input_layernorm: norm("input_layernorm", hidden)?,
                qkv: projections("self_attn.qkv_proj", &[q, k, v])?,
                attn_sub_norm: norm("self_attn.attn_sub_norm", hidden)?,
                o: projections("self_attn.o_proj", &[o])?,
                post_attention_layernorm: norm("post_attention_layernorm", hidden)?,
                gate_up: projections("mlp.gate_up_proj", &[gate, up])?,
                ffn_sub_norm: norm("mlp.ffn_sub_norm", config.intermediate_size)?,
                down: projections("mlp.down_proj", &[down])?,
            })
        };
        Ok(Self {
            embed_tokens: source.table("model.embed_tokens.weight", vocab, hidden)?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            norm: source.norm("model.norm.weight", hidden)?,
            lm_head: match config.tie_embeddings {
                true => None,
                false => Some(source.table("lm_head.weight", vocab, hidden)?),
            },
        })
    }

    pub fn lm_head(&self) -> &Table {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// Bytes that one decoded token reads: all weights but the embedding, of which it takes a row.
    pub fn bytes_per_token(&self) -> usize {
        let layers = self.layers.iter().map(|layer| {
            let packed = layer.projections().map(|(_, p)| p.packed.bytes());
            let norms = layer.norms().map(|(_, norm)| size_of_val(&norm[..]));
            packed.iter().chain(&norms).sum::<usize>()
        });
        layers.sum::<usize>() + size_of_val(&self.norm[..]) + self.lm_head().bytes()
    }
}

/// Masters in training, quantised as BitLinear does at each use.
impl WeightSource for BitNetTransformer {
    fn norm(&self, name: &str, _features: usize) -> Result<Vec<f32>> {
        Ok(self.parameters().get(name)?.flatten_all()?.to_vec1()?)
    }

    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Table> {
        let values: Vec<f32> = self.parameters().get(name)?.flatten_all()?.to_vec1()?;
        Ok(Table::new(rows, cols, TableValues::F32(values.into())))
    }

    fn projections(&self, layer: usize, _name: &str, parts: &[Projection]) -> Result<Projections> {
        Projections::stack(layer, parts, |name, part| {
            let master: Vec<f32> = self.parameters().get(name)?.flatten_all()?.to_vec1()?;
            let b = absmean(&master);
            let codes = ternary_codes(&master, b);
            Ok((PackedTernary::pack(&codes, part.rows, part.cols)?, b))
        })
    }
}
