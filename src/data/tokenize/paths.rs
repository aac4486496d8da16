//! Input paths as configs write them: `~`, `${VAR}`, `${VAR:-default}` and `*` in a component.

use std::env;
use std::path::{Component, Path, PathBuf};

use crate::error::IoContext;
use crate::{Error, Result};

/// The paths that `input` stands for, in order of name. A path that exists as written stands for
/// itself.
///
/// # Errors
/// `Usage` when a variable is not set and has no default, or when nothing matches.
pub fn expand(input: &str) -> Result<Vec<PathBuf>> {
    if Path::new(input).exists() {
        return Ok(vec![input.into()]);
    }
    let path = home(&variables(input)?)?;
    let mut found = vec![PathBuf::new()];
    for component in path.components() {
        match component {
            Component::Normal(name) if name.to_string_lossy().contains('*') => {
                found = matching_children(&found, &name.to_string_lossy())?;
            }
            _ => found.iter_mut().for_each(|path| path.push(component)),
        }
    }
    found.retain(|path| path.exists());
    if found.is_empty() {
        let meant = path.display();
        return Err(Error::usage(if path.as_os_str() == input {
            format!("no input {meant}: there is no such file or directory")
        } else {
            format!("no input {input}: it stands for {meant}, which does not exist")
        }));
    }
    Ok(found)
}

/// Replaces `${VAR}` and `${VAR:-default}`.
fn variables(input: &str) -> Result<String> {
    let mut output = String::new();
    let mut rest = input;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((expression, after)) = after.split_once('}') else {
            return Err(Error::usage(format!(
                "input {input}: a `${{` has no closing `}}`"
            )));
        };
        let (name, default) = match expression.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (expression, None),
        };
        let value = env::var(name).ok().filter(|value| !value.is_empty());
        let Some(value) = value.as_deref().or(default) else {
            return Err(Error::usage(format!(
                "input {input}: the environment variable {name} is not set; set it or give a \
                 default, ${{{name}:-DIRECTORY}}"
            )));
        };
        output.push_str(before);
        output.push_str(value);
        rest = after;
    }
    output.push_str(rest);
    Ok(output)
}

/// Replaces a leading `~` by the home directory.
fn home(path: &str) -> Result<PathBuf> {
    match path.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            let home = env::home_dir().ok_or_else(|| {
                Error::usage(format!("input {path}: the home directory is not known"))
            })?;
            Ok(home.join(rest.trim_start_matches('/')))
        }
        _ => Ok(path.into()),
    }
}

fn matching_children(directories: &[PathBuf], pattern: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for directory in directories {
        let listed = match directory.as_os_str().is_empty() {
            true => Path::new("."),
            false => directory,
        };
        if !listed.is_dir() {
            continue;
        }
        for entry in listed.read_dir().at("list", listed)? {
            let name = entry.at("list", listed)?.file_name();
            if matches(pattern, &name.to_string_lossy()) {
                found.push(directory.join(name));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Whether `name` is `pattern` with each `*` replaced by any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((prefix, pattern)) => name.strip_prefix(prefix).is_some_and(|name| {
            (0..=name.len())
                .filter(|&at| name.is_char_boundary(at))
                .any(|at| matches(pattern, &name[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_match_any_text() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("*.rs", "lib.rs", true),
            ("*.rs", "lib.rst", false),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxcyyb", false),
            ("ü*", "über", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
