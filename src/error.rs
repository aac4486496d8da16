//! The crate's one error type. Every message is one line: what is wrong, where, and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user asked for something that cannot be: a flag, a config value, a missing file.
    #[error("{0}")]
    Usage(String),
    /// The operating system refused: the path, what was being done, and why.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// A file's content is not what its format says.
    #[error("{}: {what}", path.display())]
    Format { path: PathBuf, what: String },
    /// Training cannot go on (too many rollbacks, no usable checkpoint, ...).
    #[error("{0}")]
    Training(String),
    /// Only the first line: candle appends a backtrace when RUST_BACKTRACE is set.
    #[error("tensor operation failed: {}", .0.to_string().lines().next().unwrap_or_default())]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::Usage(message.to_string())
    }

    pub fn training(message: impl fmt::Display) -> Self {
        Self::Training(message.to_string())
    }

    pub fn format(path: impl AsRef<Path>, what: impl fmt::Display) -> Self {
        Self::Format {
            path: path.as_ref().to_path_buf(),
            what: what.to_string(),
        }
    }

    /// Of reading or writing a safetensors file.
    pub fn from_safetensors(
        action: &'static str,
        path: &Path,
        error: safetensors::SafeTensorError,
    ) -> Self {
        match error {
            safetensors::SafeTensorError::IoError(source) => Self::Io {
                action,
                path: path.to_path_buf(),
                source,
            },
            other => Self::format(path, other),
        }
    }

    /// Exit code of the binary: 2 for usage, 1 for failures at run time.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            _ => 1,
        }
    }
}

/// Adds the path and the attempted action to an I/O error:
/// `File::open(p).at("open", p)?` prints `cannot open p: No such file or directory`.
pub trait IoContext<T> {
    /// # Errors
    /// `Io`, for the error that it is called on.
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.as_ref().to_path_buf(),
            source,
        })
    }
}

/// serde's message with what a user may write in place of Rust's types.
pub(crate) fn in_words(error: &impl fmt::Display) -> String {
    let message = error.to_string();
    let Some((what, expected)) = message.rsplit_once("expected ") else {
        return message;
    };
    let expected = match expected {
        "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a Value::Tagged enum" => "a word",
        other => other,
    };
    // YAML reads an empty value as none at all.
    let what = what.replace("unit value", "no value (\"\" is an empty text)");
    format!("{what}expected {expected}")
}
