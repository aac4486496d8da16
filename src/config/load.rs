//! From YAML text to a checked [`Config`]: presets, overrides, unknown keys.

use std::path::Path;

use serde_yaml::{Mapping, Value};

use super::{Config, Prepare};
use crate::error::{IoContext, in_words};
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
    let overridden = |what: String| match overrides {
        [] => located(what),
        all => located(format!("with --set {}: {what}", all.join(" --set "))),
    };
    let mut tree: Value = serde_yaml::from_str(text).map_err(|e| located(e.to_string()))?;
    if tree.is_null() {
        tree = Value::Mapping(Mapping::new());
    }
    let known = known_keys()?;
    let names = paths(&known, "");
    check_keys(&tree, &known, "", &names).map_err(&located)?;
    for assignment in overrides {
        apply_override(&mut tree, assignment)?;
        check_keys(&tree, &known, "", &names)
            .map_err(|what| Error::usage(format!("--set {assignment}: {what}")))?;
    }
    expand_preset(&mut tree).map_err(|e| overridden(e.to_string()))?;
    let config: Config = serde_path_to_error::deserialize(tree)
        .map_err(|e| overridden(format!("{}: {}", e.path(), in_words(e.inner()))))?;
    config.validate().map_err(|e| overridden(e.to_string()))?;
    Ok(config)
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

/// The full names of all keys in `tree`, sections included.
fn paths(tree: &Value, path: &str) -> Vec<String> {
    let mut all = Vec::new();
    for (key, value) in tree.as_mapping().into_iter().flatten() {
        let name = join(path, key.as_str().unwrap_or_default());
        all.extend(paths(value, &name));
        all.push(name);
    }
    all
}

fn join(path: &str, name: &str) -> String {
    match path {
        "" => name.to_string(),
        _ => format!("{path}.{name}"),
    }
}

/// The key most like `name` in the section `path`, which may be in another section.
fn nearest<'a>(names: &'a [String], path: &str, name: &str) -> &'a str {
    let closeness = |full: &str| {
        let (section, key) = full.rsplit_once('.').unwrap_or(("", full));
        let here = if section == path { 0.1 } else { 0.0 };
        here + strsim::jaro_winkler(key, name)
    };
    let names = names.iter().map(String::as_str);
    let nearest = names.max_by(|a, b| closeness(a).total_cmp(&closeness(b)));
    nearest.unwrap_or_default()
}

/// Refuses a key of `tree` that `known` lacks, naming the nearest of all `names`.
fn check_keys(
    tree: &Value,
    known: &Value,
    path: &str,
    names: &[String],
) -> std::result::Result<(), String> {
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
        let Some(name) = key.as_str() else {
            let place = if path.is_empty() { "the file" } else { path };
            let key = serde_yaml::to_string(key).unwrap_or_default();
            return Err(format!("{place}: keys are words, not `{}`", key.trim()));
        };
        let full = join(path, name);
        match known.get(name) {
            Some(inner) => check_keys(value, inner, &full, names)?,
            None => {
                let nearest = nearest(names, path, name);
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
