//! Batches made ahead of time on another thread.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use super::dataset::Batch;
use super::sampler::Mixture;
use crate::{Error, Result};

/// Batches waiting to be taken.
const DEPTH: usize = 3;

/// Hands out consecutive batches of a mixture, prefetched by a background thread. Dropping it
/// ends the thread.
pub struct Loader {
    mixture: Arc<Mixture>,
    rows: usize,
    position: u64,
    prefetch: Prefetch,
}

impl Loader {
    /// Starts at sample `first`, in batches of `rows` samples.
    ///
    /// # Errors
    /// `Usage` when `rows` is zero, `Training` when no thread can be started.
    pub fn new(mixture: Arc<Mixture>, first: u64, rows: usize) -> Result<Self> {
        if rows == 0 {
            return Err(Error::usage("a batch needs at least one row"));
        }
        let prefetch = Prefetch::start(Arc::clone(&mixture), first, rows)?;
        Ok(Self {
            mixture,
            rows,
            position: first,
            prefetch,
        })
    }

    /// The next batch. After an error the loader stays at the batch that failed.
    ///
    /// # Errors
    /// As [`Mixture::batch`]; from then on `Training`, until a [`Loader::seek`].
    #[allow(clippy::should_implement_trait)] // it never ends, and an iterator hides the error
    pub fn next(&mut self) -> Result<Batch> {
        let batch = self.prefetch.take()?;
        self.position += batch.rows as u64;
        Ok(batch)
    }

    /// Index of the sample that the next batch starts with.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes on from sample `first`; batches already made are thrown away.
    ///
    /// # Errors
    /// `Training` when no thread can be started; the loader then stays where it was.
    pub fn seek(&mut self, first: u64) -> Result<()> {
        self.prefetch = Prefetch::start(Arc::clone(&self.mixture), first, self.rows)?;
        self.position = first;
        Ok(())
    }
}

/// The thread and its end of the channel.
struct Prefetch {
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetch {
    fn start(mixture: Arc<Mixture>, first: u64, rows: usize) -> Result<Self> {
        let (sender, receiver) = sync_channel(DEPTH);
        let thread = std::thread::Builder::new()
            .name("loader".into())
            .spawn(move || {
                for first in (first..).step_by(rows) {
                    let batch = mixture.batch(first, rows);
                    let failed = batch.is_err();
                    if sender.send(batch).is_err() || failed {
                        return;
                    }
                }
            })
            .map_err(|error| Error::training(format!("cannot start the data loader: {error}")))?;
        Ok(Self {
            batches: Some(receiver),
            thread: Some(thread),
        })
    }

    fn take(&self) -> Result<Batch> {
        match self.batches.as_ref().map(Receiver::recv) {
            Some(Ok(batch)) => batch,
            _ => Err(Error::training(
                "the data loader has stopped: start it again with a seek",
            )),
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        // A sender without a receiver fails, which ends the thread.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
