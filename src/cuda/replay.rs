//! Launches that come again, as CUDA graphs: the GPU goes from kernel to kernel in less time than
//! from launch to launch.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags as Flags, CUstreamCaptureMode_enum as Mode,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream};

use crate::{Error, Result};

/// Graphs of one stream's launches by a key, which must tell all that their arguments depend on.
pub struct Replay<Key> {
    stream: Arc<CudaStream>,
    /// `None` after the first time.
    graphs: RefCell<HashMap<Key, Option<CudaGraph>>>,
}

impl<Key: Eq + Hash> Replay<Key> {
    pub fn new(stream: Arc<CudaStream>) -> Self {
        Self {
            stream,
            graphs: RefCell::default(),
        }
    }

    /// What `launch` puts on the stream: launched the first time, as libraries may load kernels
    /// then, recorded the second, and replayed from then on.
    ///
    /// # Errors
    /// `Tensor` if the driver refuses, or those of `launch`.
    pub fn run(&self, key: Key, launch: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut graphs = self.graphs.borrow_mut();
        let graph = match graphs.entry(key) {
            Entry::Vacant(entry) => {
                launch()?;
                entry.insert(None);
                return Ok(());
            }
            Entry::Occupied(entry) => entry.into_mut(),
        };
        let graph = match graph {
            Some(graph) => graph,
            None => graph.insert(record(&self.stream, launch)?),
        };
        Ok(graph.launch().w()?)
    }
}

/// The launches that `launch` puts on the stream, as a graph; they do not run yet.
///
/// # Errors
/// `Tensor` if the driver refuses or nothing was launched, or those of `launch`.
pub fn record(stream: &Arc<CudaStream>, launch: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let mode = Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).w()?;
    let launched = launch();
    // Whatever happened, the stream must record no longer.
    let graph = stream.end_capture(Flags(0)).w();
    launched?;
    graph?.ok_or_else(|| Error::Tensor(candle_core::Error::msg("CUDA recorded no graph")))
}
