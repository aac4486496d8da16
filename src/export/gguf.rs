//! GGUF for llama.cpp (architecture `bitnet`, src/models/bitnet.cpp there).
//!
//! | tensor | type | dimensions |
//! |---|---|---|
//! | `token_embd.weight`, which serves as LM head too | F16 | hidden, vocab |
//! | `output_norm.weight`, `blk.N.{attn_norm,attn_sub_norm,ffn_norm,ffn_sub_norm}.weight` | F32 | features |
//! | `blk.N.{attn_q,attn_k,attn_v,attn_output,ffn_gate,ffn_up,ffn_down}.weight` | TQ2_0 or TQ1_0 | K, N |
//! | the same, `.scale` instead of `.weight` | F32 | 1 |
//!
//! The blocks hold the codes -1, 0 and 1; llama.cpp multiplies the product by `.scale`, which is
//! the scale b in full. Projections whose rows are no multiple of a block's 256 weights are Q4_0,
//! with the same codes in blocks of 32. llama.cpp quantises activations to 8 bits as BitNet does,
//! but in blocks of 256 features instead of whole tokens: logits are close to those of the trained
//! model, not equal.

mod blocks;
mod container;
mod read;
mod reader;
mod tokenizer;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use half::f16;

use self::blocks::Encoding;
use self::container::{Metadata, Tensor, Value, Writer};
pub use self::read::read;
pub use self::reader::is_gguf;
use crate::inference::WeightSource;
use crate::inference::packed_file::half_table;
use crate::model::{Activation, BitNetConfig, BitNetTransformer, Projection, tensor_shapes};
use crate::quant::ternary::{absmean, ternary_codes};
use crate::values::{Values, bytes_of};
use crate::{Error, Result};

/// Keys of the configuration.
const VOCAB_SIZE: &str = "bitnet.vocab_size";
const CONTEXT_LENGTH: &str = "bitnet.context_length";
const EMBEDDING_LENGTH: &str = "bitnet.embedding_length";
const BLOCK_COUNT: &str = "bitnet.block_count";
const FEED_FORWARD_LENGTH: &str = "bitnet.feed_forward_length";
const HEAD_COUNT: &str = "bitnet.attention.head_count";
const HEAD_COUNT_KV: &str = "bitnet.attention.head_count_kv";
const RMS_EPSILON: &str = "bitnet.attention.layer_norm_rms_epsilon";
const ROPE_FREQ_BASE: &str = "bitnet.rope.freq_base";

/// The blocks that hold ternary weights, of 256 each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TernaryType {
    /// 2.06 bits a weight: the faster.
    Tq2_0,
    /// 1.69 bits a weight: the smaller.
    Tq1_0,
}

/// `blk.N.` names of weights, and what they are called in `transformers`.
const NAMES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_sub_norm", "self_attn.attn_sub_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_sub_norm", "mlp.ffn_sub_norm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

impl fmt::Display for TernaryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tq2_0 => "TQ2_0",
            Self::Tq1_0 => "TQ1_0",
        })
    }
}

impl TernaryType {
    fn encoding(self) -> Encoding {
        match self {
            Self::Tq2_0 => Encoding::Tq2_0,
            Self::Tq1_0 => Encoding::Tq1_0,
        }
    }

    /// How rows of `cols` codes are stored: where no whole blocks of 256 fit, in blocks of 32 of
    /// 4.5 bits a weight, which every version of llama.cpp knows.
    fn encoding_of(self, cols: usize) -> Encoding {
        match cols.is_multiple_of(self.encoding().block()) {
            true => self.encoding(),
            false => Encoding::Q4_0,
        }
    }

    /// The number of the type in `enum llama_ftype`.
    fn file_type(self) -> u32 {
        match self {
            Self::Tq1_0 => 36,
            Self::Tq2_0 => 37,
        }
    }
}

/// The name in the file of a weight that is called `name` in `transformers`.
fn gguf_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        _ => {}
    }
    let name = name.strip_prefix("model.layers.").unwrap_or(name);
    let name = NAMES.iter().fold(name.to_string(), |name, (ours, theirs)| {
        name.replace(&format!(".{theirs}."), &format!(".{ours}."))
    });
    format!("blk.{name}")
}

/// The name in the file of the scale of a projection.
fn scale_name(name: &str) -> String {
    gguf_name(name).replace(".weight", ".scale")
}

/// Whether a weight is a ternary projection.
fn is_projection(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// Writes `model`, its projections quantised as BitLinear does, to a new file at `path`, and makes
/// it durable. `tokenizer` is the content of a `tokenizer.json`; without one the file has ids but
/// no text. `name` is for people. Returns what a user should know of the file, a line each.
///
/// # Errors
/// `Usage` on a model or a tokenizer that llama.cpp cannot hold, before anything is written; `Io`
/// when the file cannot be written, which may leave a part of it.
pub fn write(
    path: &Path,
    model: &BitNetTransformer,
    tokenizer: Option<&str>,
    ternary: TernaryType,
    name: &str,
) -> Result<Vec<String>> {
    let config = model.config();
    check(config)?;
    let mut notes = Vec::from_iter(fallback_note(config, ternary));
    let mut metadata = metadata(config, ternary, name);
    match tokenizer {
        Some(json) => {
            let (keys, more_notes) = tokenizer::metadata(json, config.vocab_size)?;
            metadata.extend(keys);
            notes.extend(more_notes);
        }
        None => metadata.push(("tokenizer.ggml.model".into(), Value::String("none".into()))),
    }
    let embed_tokens = embed_tokens(model)?;
    let tensors = tensors(config, ternary);
    let mut writer = Writer::create(path, &metadata, &tensors)?;
    for (name, shape) in tensor_shapes(config) {
        match shape[..] {
            [_, cols] if is_projection(&name) => {
                let master = values(model, &name)?;
                let b = absmean(&master);
                let codes = ternary_codes(&master, b);
                writer.append(&ternary.encoding_of(cols).encode(&codes))?;
                writer.append(&b.to_le_bytes())?;
            }
            [_, _] => writer.append(bytes_of(&embed_tokens))?,
            _ => writer.append(bytes_of(&values(model, &name)?))?,
        }
    }
    writer.finish()?;
    Ok(notes)
}

/// # Errors
/// `Usage` with the reason if llama.cpp cannot run a model of this shape.
pub fn check(config: &BitNetConfig) -> Result<()> {
    let refused = |what: String| {
        let advice = "or export as hf or packed";
        Err(Error::usage(format!(
            "GGUF cannot hold this model: {what}, {advice}"
        )))
    };
    if !config.tie_embeddings {
        return refused(
            "llama.cpp's bitnet architecture takes the embedding as LM head, and this model's head \
             has weights of its own: train with model.tie_embeddings: true"
                .into(),
        );
    }
    if config.activation != Activation::Silu {
        return refused(
            "llama.cpp's bitnet architecture computes SiLU gates, and this model was trained with \
             relu2: train with model.activation: silu"
                .into(),
        );
    }
    let block = Encoding::Q4_0.block();
    let odd = |projection: &Projection| !projection.cols.is_multiple_of(block);
    match config.projections().into_iter().find(odd) {
        Some(projection) => refused(format!(
            "the rows of {} have {} weights, and llama.cpp's blocks hold {block}: train with a \
             multiple",
            projection.name, projection.cols
        )),
        None => Ok(()),
    }
}

/// Says which projections are not stored as asked.
fn fallback_note(config: &BitNetConfig, ternary: TernaryType) -> Option<String> {
    let projections = config.projections();
    let others: Vec<_> = (projections.iter())
        .filter(|projection| ternary.encoding_of(projection.cols) != ternary.encoding())
        .collect();
    let widths: BTreeSet<_> = others.iter().map(|p| p.cols).collect();
    let widths: Vec<_> = widths.iter().map(usize::to_string).collect();
    (!others.is_empty()).then(|| {
        format!(
            "{} of a layer's 7 projections are Q4_0, with the same codes in 4.5 bits a weight: \
             their rows of {} weights are no multiple of {}, the block of {ternary}",
            others.len(),
            widths.join(" and "),
            ternary.encoding().block()
        )
    })
}

fn metadata(config: &BitNetConfig, ternary: TernaryType, name: &str) -> Metadata {
    let count = |n: usize| Value::U32(n as u32);
    let text = |text: &str| Value::String(text.into());
    let keys = [
        ("general.architecture", text("bitnet")),
        ("general.type", text("model")),
        ("general.name", text(name)),
        ("general.file_type", Value::U32(ternary.file_type())),
        ("general.quantization_version", Value::U32(2)),
        (VOCAB_SIZE, count(config.vocab_size)),
        (CONTEXT_LENGTH, count(config.max_seq_len)),
        (EMBEDDING_LENGTH, count(config.hidden_size)),
        (BLOCK_COUNT, count(config.layers)),
        (FEED_FORWARD_LENGTH, count(config.intermediate_size)),
        (HEAD_COUNT, count(config.heads)),
        (HEAD_COUNT_KV, count(config.kv_heads)),
        (RMS_EPSILON, Value::F32(config.rms_norm_eps as f32)),
        (ROPE_FREQ_BASE, Value::F32(config.rope_theta as f32)),
        ("bitnet.rope.dimension_count", count(config.head_dim())),
    ];
    keys.map(|(key, value)| (key.to_string(), value)).into()
}

/// All tensors, in the order of [`tensor_shapes`], each projection followed by its scale.
fn tensors(config: &BitNetConfig, ternary: TernaryType) -> Vec<Tensor> {
    let mut tensors = Vec::new();
    for (name, shape) in tensor_shapes(config) {
        let encoding = match shape[..] {
            [_, cols] if is_projection(&name) => ternary.encoding_of(cols),
            [_, _] => Encoding::F16,
            _ => Encoding::F32,
        };
        tensors.push(Tensor {
            name: gguf_name(&name),
            dims: shape.iter().rev().copied().collect(),
            encoding,
        });
        if is_projection(&name) {
            tensors.push(Tensor {
                name: scale_name(&name),
                dims: vec![1],
                encoding: Encoding::F32,
            });
        }
    }
    tensors
}

fn values(model: &BitNetTransformer, name: &str) -> Result<Vec<f32>> {
    Ok(model.parameters().get(name)?.flatten_all()?.to_vec1()?)
}

fn embed_tokens(model: &BitNetTransformer) -> Result<Values<f16>> {
    let (name, config) = ("model.embed_tokens.weight", model.config());
    let table = model.table(name, config.vocab_size, config.hidden_size)?;
    Ok(half_table(name, &table)?.1)
}
