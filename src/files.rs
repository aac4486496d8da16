//! Files and directories that appear whole or not at all: written under a temporary name, made
//! durable, renamed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::View;

use crate::error::IoContext;
use crate::{Error, Result};

/// Removes its file or directory when dropped, unless it was published.
pub(crate) struct Temporary(PathBuf);

impl Temporary {
    /// The name `path`, which is to be created, or was just now.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// An empty directory at `path`, instead of what an earlier run that died may have left there.
    ///
    /// # Errors
    /// `Io` when it cannot be made.
    pub fn directory(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        remove_dir(&path)?;
        fs::create_dir(&path).at("create", &path)?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Gives it the name `target`, beside it, in place of what has that name.
    ///
    /// # Errors
    /// `Io` when the system refuses; the old one is then there, or whole as `.NAME.replaced`.
    pub fn publish(self, target: &Path) -> Result<()> {
        if !(self.0.is_dir() && target.exists()) {
            fs::rename(&self.0, target).at("replace", target)?;
            return sync_dir(directory_of(target));
        }
        // No directory can be renamed over another: the old one makes way, and is deleted last.
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let replaced = target.with_file_name(format!(".{name}.replaced"));
        remove_dir(&replaced)?;
        fs::rename(target, &replaced).at("rename", target)?;
        fs::rename(&self.0, target).at("rename", &self.0)?;
        sync_dir(directory_of(target))?;
        remove_dir(&replaced)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing left under this name, and on a failure path the first
        // error is the one to report.
        let _ = fs::remove_file(&self.0).or_else(|_| fs::remove_dir_all(&self.0));
    }
}

/// Writes `bytes` to `path` so that the old file or the whole new one is there, whatever happens.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = Temporary::new(temporary_name(path));
    write_file(temporary.path(), bytes)?;
    temporary.publish(path)
}

/// Writes `bytes` to `path` and makes them durable.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).at("create", path)?;
    file.write_all(bytes).at("write", path)?;
    file.sync_all().at("write", path)
}

/// Writes a safetensors file and makes it durable.
pub(crate) fn write_tensors<N, V>(
    path: &Path,
    tensors: impl IntoIterator<Item = (N, V)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()>
where
    N: AsRef<str> + Ord + std::fmt::Display,
    V: View,
{
    // The library's file is for its owner alone; this one is for whom the user lets read files.
    let created = File::create(path).at("create", path)?;
    let permissions = created.metadata().at("inspect", path)?.permissions();
    safetensors::serialize_to_file(tensors, metadata, path)
        .map_err(|e| Error::from_safetensors("write", path, e))?;
    fs::set_permissions(path, permissions).at("write", path)?;
    sync_file(path)
}

pub(crate) fn sync_file(path: &Path) -> Result<()> {
    let file = File::options().write(true).open(path).at("open", path)?;
    file.sync_all().at("write", path)
}

/// Makes the names in a directory last through a power cut, as far as its file system can.
#[cfg(unix)]
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    let directory = File::open(path).at("open", path)?;
    match directory.sync_all() {
        // Some network file systems know no such thing, which is no reason to stop.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::InvalidInput | ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        outcome => outcome.at("write", path),
    }
}

/// Only Unix opens a directory like a file; elsewhere the system alone decides when a name lasts.
#[cfg(not(unix))]
pub(crate) fn sync_dir(_path: &Path) -> Result<()> {
    Ok(())
}

/// The directory that `path` lies in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// `NAME.tmp` beside `NAME`.
pub(crate) fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Removes a directory and all in it, if it is there.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).at("remove", path),
        _ => Ok(()),
    }
}

/// Removes a file, if it is there.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).at("remove", path),
        _ => Ok(()),
    }
}
