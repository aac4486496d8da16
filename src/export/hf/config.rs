//! `config.json` and `generation_config.json`.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::model::{Activation, BitNetConfig};

/// How the projections of a model are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// As bf16 masters, quantised at each use: the class `AutoBitLinear`, online.
    Masters,
    /// As packed codes: the class `BitLinear`.
    Packed,
}

/// What of `config.json` makes a model; other keys are written, and ignored.
#[derive(Serialize, Deserialize)]
pub struct ModelConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    rope_parameters: RopeParameters,
    rms_norm_eps: f64,
    hidden_act: Activation,
    tie_word_embeddings: bool,
    initializer_range: f64,
    quantization_config: Quantization,
}

#[derive(Serialize, Deserialize)]
struct RopeParameters {
    rope_type: String,
    rope_theta: f64,
}

#[derive(Serialize, Deserialize)]
struct Quantization {
    quant_method: String,
    linear_class: String,
    quantization_mode: String,
}

const MODEL_TYPE: &str = "bitnet";
const QUANT_METHOD: &str = "bitnet";
const ROPE_TYPE: &str = "default";

impl Storage {
    const ALL: [Self; 2] = [Self::Masters, Self::Packed];

    /// `linear_class` and `quantization_mode`.
    fn names(self) -> [&'static str; 2] {
        match self {
            Self::Masters => ["autobitlinear", "online"],
            Self::Packed => ["bitlinear", "offline"],
        }
    }
}

impl ModelConfig {
    fn new(config: &BitNetConfig, storage: Storage) -> Self {
        let [linear_class, quantization_mode] = storage.names().map(str::to_string);
        Self {
            model_type: MODEL_TYPE.into(),
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            num_hidden_layers: config.layers,
            num_attention_heads: config.heads,
            num_key_value_heads: config.kv_heads,
            intermediate_size: config.intermediate_size,
            max_position_embeddings: config.max_seq_len,
            rope_parameters: RopeParameters {
                rope_type: ROPE_TYPE.into(),
                rope_theta: config.rope_theta,
            },
            rms_norm_eps: config.rms_norm_eps,
            hidden_act: config.activation,
            tie_word_embeddings: config.tie_embeddings,
            initializer_range: config.init_std,
            quantization_config: Quantization {
                quant_method: QUANT_METHOD.into(),
                linear_class,
                quantization_mode,
            },
        }
    }

    /// The model and how its projections are stored, or what of it titanbit cannot run.
    pub fn model(self) -> Result<(BitNetConfig, Storage), String> {
        let ours = [
            ("model_type", &self.model_type, MODEL_TYPE),
            ("rope_type", &self.rope_parameters.rope_type, ROPE_TYPE),
            (
                "quant_method",
                &self.quantization_config.quant_method,
                QUANT_METHOD,
            ),
        ];
        if let Some((key, value, ours)) = ours.into_iter().find(|(_, value, ours)| value != ours) {
            return Err(format!("{key} is `{value}`: titanbit runs `{ours}` only"));
        }
        let Quantization {
            linear_class,
            quantization_mode,
            ..
        } = self.quantization_config;
        let names = [linear_class.as_str(), quantization_mode.as_str()];
        let storage = Storage::ALL.into_iter().find(|s| s.names() == names);
        let storage = storage.ok_or_else(|| {
            format!(
                "linear_class is `{linear_class}`, {quantization_mode}: titanbit runs \
                 `autobitlinear`, online, and `bitlinear`, offline"
            )
        })?;
        let config = BitNetConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            intermediate_size: self.intermediate_size,
            max_seq_len: self.max_position_embeddings,
            rope_theta: self.rope_parameters.rope_theta,
            rms_norm_eps: self.rms_norm_eps,
            activation: self.hidden_act,
            tie_embeddings: self.tie_word_embeddings,
            init_std: self.initializer_range,
        };
        config.validate().map_err(|e| e.to_string())?;
        Ok((config, storage))
    }
}

/// Both files by name. A text begins as in training, behind the end of the one before.
pub fn files(
    config: &BitNetConfig,
    storage: Storage,
    end_of_text: Option<u32>,
) -> Vec<(&'static str, Value)> {
    let mut model = json!({
        "architectures": ["BitNetForCausalLM"],
        "dtype": "bfloat16",
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        // Where transformers 4 looks for it.
        "rope_theta": config.rope_theta,
    });
    let shape = json!(ModelConfig::new(config, storage));
    let keys = shape.as_object().into_iter().flatten();
    for (key, value) in keys {
        model[key] = value.clone();
    }
    model["quantization_config"]["modules_to_not_convert"] = json!(["lm_head"]);
    let generation = json!({
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    });
    vec![
        (super::CONFIG, model),
        ("generation_config.json", generation),
    ]
}
