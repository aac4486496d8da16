//! Which files to read, in which order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use walkdir::WalkDir;
use xxhash_rust::xxh3::xxh3_64;

use super::paths::expand;
use crate::error::IoContext;
use crate::{Error, Result};

/// Endings that are read from a directory when none are named.
const DEFAULT_EXTENSIONS: [&str; 4] = ["txt", "md", "jsonl", "parquet"];

/// An input file.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: PathBuf,
    pub format: Format,
    pub compression: Compression,
    /// Size on disk.
    pub bytes: u64,
    /// Hash of the path below the input it was found under: the same on every machine.
    path_hash: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is one document.
    Text,
    /// Each line is a JSON object with a document in one field.
    JsonLines,
    /// Each row has a document in one column.
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The files that `inputs` name: a file as it is, a directory with every file below it that has
/// one of the extensions (also followed by `.gz` or `.zst`), in order of name. Links below it that
/// lead nowhere are warned about.
///
/// # Errors
/// `Usage` when an input does not exist or holds no such file.
pub fn find(inputs: &[String], extensions: Option<&[String]>) -> Result<Vec<Source>> {
    let wanted: Vec<&str> = match extensions {
        Some(named) => named.iter().map(|e| e.trim_start_matches('.')).collect(),
        None => DEFAULT_EXTENSIONS.to_vec(),
    };
    let mut sources = Vec::new();
    for input in inputs {
        for root in expand(input)? {
            if root.is_dir() {
                walk(&root, &wanted, &mut sources)?;
            } else {
                let name = root.file_name().unwrap_or_default();
                sources.push(Source::new(&root, Path::new(name))?);
            }
        }
    }
    if sources.is_empty() {
        return Err(Error::usage(
            "no input: name at least one file or directory",
        ));
    }
    Ok(sources)
}

/// A deterministic sample of whole files: in order of the hash of their path, until they hold
/// `bytes` bytes.
pub fn sample(mut sources: Vec<Source>, bytes: u64) -> Vec<Source> {
    sources.sort_by(|a, b| (a.path_hash, &a.path).cmp(&(b.path_hash, &b.path)));
    let mut total = 0;
    let enough = sources.iter().position(|source| {
        total += source.bytes;
        total >= bytes
    });
    if let Some(last) = enough {
        sources.truncate(last + 1);
    }
    sources
}

fn walk(root: &Path, wanted: &[&str], sources: &mut Vec<Source>) -> Result<()> {
    let before = sources.len();
    let mut left_out: BTreeMap<String, usize> = BTreeMap::new();
    for entry in WalkDir::new(root).follow_links(true).sort_by_file_name() {
        let entry = match entry {
            Err(error) if leads_nowhere(&error) => {
                tracing::warn!("left out: {error}");
                continue;
            }
            other => other.map_err(|error| Error::Io {
                action: "list",
                path: error.path().unwrap_or(root).to_path_buf(),
                source: error.into(),
            })?,
        };
        if !entry.file_type().is_file() {
            continue;
        }
        let (extension, _) = extension_and_compression(entry.path());
        if wanted.contains(&extension.as_str()) {
            let below = entry.path().strip_prefix(root).unwrap_or(entry.path());
            sources.push(Source::new(entry.path(), below)?);
        } else {
            *left_out.entry(extension).or_default() += 1;
        }
    }
    if sources.len() == before {
        return Err(Error::usage(nothing_found(root, wanted, &left_out)));
    }
    Ok(())
}

/// A link to nothing, or to a directory that it lies in.
fn leads_nowhere(error: &walkdir::Error) -> bool {
    let missing = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    error.loop_ancestor().is_some() || error.io_error().is_some_and(missing)
}

fn nothing_found(root: &Path, wanted: &[&str], left_out: &BTreeMap<String, usize>) -> String {
    let root = root.display();
    let wanted = wanted.join(", .");
    let most = left_out.iter().max_by_key(|(_, count)| **count);
    match most {
        None => format!("no input: {root} is empty"),
        Some((extension, count)) if !extension.is_empty() => format!(
            "no input: {root} has no .{wanted} files, but {count} .{extension} files: name what to \
             read with --ext {extension}"
        ),
        Some(_) => format!(
            "no input: {root} has no .{wanted} files: name the endings to read with --ext, or the \
             files themselves"
        ),
    }
}

impl Source {
    fn new(path: &Path, below_root: &Path) -> Result<Self> {
        let (extension, compression) = extension_and_compression(path);
        let components: Vec<_> = below_root
            .components()
            .map(|component| component.as_os_str().to_string_lossy())
            .collect();
        Ok(Self {
            path: path.to_path_buf(),
            format: match extension.as_str() {
                "jsonl" => Format::JsonLines,
                "parquet" => Format::Parquet,
                _ => Format::Text,
            },
            compression,
            bytes: path.metadata().at("inspect", path)?.len(),
            path_hash: xxh3_64(components.join("/").as_bytes()),
        })
    }
}

/// `("jsonl", Gzip)` for `a.jsonl.gz`.
fn extension_and_compression(path: &Path) -> (String, Compression) {
    let extension = |path: &Path| {
        let extension = path.extension().unwrap_or_default();
        extension.to_string_lossy().to_ascii_lowercase()
    };
    let inner = || extension(Path::new(path.file_stem().unwrap_or_default()));
    match extension(path).as_str() {
        "gz" => (inner(), Compression::Gzip),
        "zst" => (inner(), Compression::Zstd),
        plain => (plain.to_string(), Compression::None),
    }
}
