//! From YAML text to a checked [`Config`]: presets, overrides, unknown keys.

use std::path::Path;

use serde_yaml::{Mapping, Value};

use super::{Config, Prepare};
use crate::error::IoContext;
use crate::model::BitNetConfig;
use crate::{Error, Result};

pub fn from_file(path: &Path, overrides: &[String]) -> Result<Config> {
    if !path.exists() {
        return Err(Error::usage(format!(
            "config {} does not exist: start from configs/quickstart.yaml or configs/default.yaml",
            path.display()
        )));
    }
    let text = std::fs::read_to_string(path).at("read", path)?;
    from_text(&text, path, overrides)
}

pub fn from_text(text: &str, origin: &Path, overrides: &[String]) -> Result<Config> {
    let located = |what: String| Error::usage(format!("{}: {what}", origin.display()));
    let mut tree: Value = serde_yaml::from_str(text).map_err(|e| located(e.to_string()))?;
    if tree.is_null() {
        tree = Value::Mapping(Mapping::new());
    }
    check_keys(&tree, &known_keys()?, "").map_err(&located)?;
    for assignment in overrides {
        apply_override(&mut tree, assignment)?;
        check_keys(&tree, &known_keys()?, "")
            .map_err(|what| Error::usage(format!("--set {assignment}: {what}")))?;
    }
    expand_preset(&mut tree).map_err(|e| located(e.to_string()))?;
    let config: Config = serde_path_to_error::deserialize(tree)
        .map_err(|e| located(format!("{}: {}", e.path(), in_words(e.inner()))))?;
    config.validate().map_err(|e| located(e.to_string()))?;
    Ok(config)
}

/// serde's message with what a user may write in place of Rust's types.
fn in_words(error: &serde_yaml::Error) -> String {
    let message = error.to_string();
    let Some((what, expected)) = message.rsplit_once("expected ") else {
        return message;
    };
    let expected = match expected {
        "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        other => other,
    };
    format!("{what}expected {expected}")
}

/// The default configuration as a tree, with the optional parts filled in: every key there is.
fn known_keys() -> Result<Value> {
    let mut config = Config::default();
    config.data.prepare = Some(Prepare {
        input: Vec::new(),
        ext: Vec::new(),
        sample_mb: None,
        train_vocab: 0,
        val_fraction: 0.0,
    });
    let mut tree = serde_yaml::to_value(config).map_err(Error::usage)?;
    if let Some(model) = tree.get_mut("model").and_then(Value::as_mapping_mut) {
        model.insert("preset".into(), Value::Null);
    }
    Ok(tree)
}

/// Refuses a key of `tree` that `known` lacks, naming the nearest that it has.
fn check_keys(tree: &Value, known: &Value, path: &str) -> std::result::Result<(), String> {
    let Some(known) = known.as_mapping() else {
        return Ok(());
    };
    let tree = match tree {
        Value::Mapping(tree) => tree,
        Value::Null => return Ok(()),
        _ if path.is_empty() => return Err("the file must hold sections of keys".into()),
        _ => return Err(format!("{path} must be a section of keys")),
    };
    for (key, value) in tree {
        let name = key.as_str().unwrap_or("(not a word)");
        let full = match path {
            "" => name.to_string(),
            _ => format!("{path}.{name}"),
        };
        match known.get(name) {
            Some(inner) => check_keys(value, inner, &full)?,
            None => {
                let nearest = known
                    .keys()
                    .filter_map(Value::as_str)
                    .max_by(|a, b| {
                        let closeness = |k: &str| strsim::jaro_winkler(k, name);
                        closeness(a).total_cmp(&closeness(b))
                    })
                    .unwrap_or_default();
                let nearest = match path {
                    "" => nearest.to_string(),
                    _ => format!("{path}.{nearest}"),
                };
                return Err(format!("unknown key `{full}`: did you mean `{nearest}`?"));
            }
        }
    }
    Ok(())
}

/// Sets `section.key=value`; the value is read as YAML. A preset takes the place of the shape that
/// the file spells out.
fn apply_override(tree: &mut Value, assignment: &str) -> Result<()> {
    let malformed = |why: &str| {
        Error::usage(format!(
            "--set {assignment}: {why}, expected section.key=value"
        ))
    };
    let (path, value) = assignment
        .split_once('=')
        .ok_or_else(|| malformed("no `=`"))?;
    let value: Value = serde_yaml::from_str(value).map_err(|e| malformed(&e.to_string()))?;
    if path == "model.preset"
        && let Some(model) = tree.get_mut("model").and_then(Value::as_mapping_mut)
    {
        for key in PRESET_KEYS {
            model.remove(key);
        }
    }
    let mut place = tree;
    for key in path.split('.') {
        if key.is_empty() {
            return Err(malformed("an empty key"));
        }
        if place.is_null() {
            *place = Value::Mapping(Mapping::new());
        }
        place = place
            .as_mapping_mut()
            .ok_or_else(|| malformed("the path leads through a value"))?
            .entry(key.into())
            .or_insert(Value::Null);
    }
    *place = value;
    Ok(())
}

/// What tells the presets apart.
const PRESET_KEYS: [&str; 5] = [
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "intermediate_size",
];

/// Replaces `model.preset` by the values it stands for, under those given beside it.
fn expand_preset(tree: &mut Value) -> Result<()> {
    let Some(model) = tree.get_mut("model").and_then(Value::as_mapping_mut) else {
        return Ok(());
    };
    let Some(preset) = model.remove("preset").filter(|p| !p.is_null()) else {
        return Ok(());
    };
    let name = preset
        .as_str()
        .ok_or_else(|| Error::usage("model.preset must be a name, like 125M"))?;
    let preset =
        BitNetConfig::preset(name).map_err(|e| Error::usage(format!("model.preset: {e}")))?;
    let preset = serde_yaml::to_value(preset).map_err(Error::usage)?;
    for (key, value) in preset.as_mapping().into_iter().flatten() {
        if !model.contains_key(key) {
            model.insert(key.clone(), value.clone());
        }
    }
    Ok(())
}
