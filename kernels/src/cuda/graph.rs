//! Decode steps captured as CUDA graphs.
//!
//! All that changes between two steps of one size lies in device memory, so a graph serves every such step. On a
//! replay the operations still run on the host, as checks and for the numbers of rows that they set, but launch
//! nothing; then the whole step is one launch.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use cudarc::driver::{
    result::{self, graph},
    sys,
};

use super::{
    CudaBatch,
    batch::GraphKey,
    device::{Stream, failed},
};
use crate::Result;

/// An instantiated graph.
pub(super) struct Graph(sys::CUgraphExec);

// SAFETY: used under the lock of `Graphs`; the driver's calls are thread safe.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated by `capture`. A failure leaks it at the end of the process.
        let _ = unsafe { graph::exec_destroy(self.0) };
    }
}

/// What was captured, to be instantiated.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: a capture made it, and nobody else destroys it. A failure leaks it.
        let _ = unsafe { graph::destroy(self.0) };
    }
}

/// The graphs of a backend.
pub(super) struct Graphs {
    enabled: AtomicBool,
    replaying: AtomicBool,
    /// None: a step of this key was launched once, operation by operation, which loaded its kernels.
    by_key: Mutex<HashMap<GraphKey, Option<Graph>>>,
}

impl Graphs {
    pub(super) fn new() -> Graphs {
        Graphs { enabled: AtomicBool::new(true), replaying: AtomicBool::new(false), by_key: Mutex::default() }
    }

    pub(super) fn enable(&self, on: bool) {
        self.enabled.store(on, Ordering::Relaxed);
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Whether operations only check their arguments now.
    pub(super) fn is_replaying(&self) -> bool {
        self.replaying.load(Ordering::Relaxed)
    }

    /// Runs the operations of a step: one by one the first time, captured the second time, replayed from then on.
    pub(super) fn step(
        &self,
        stream: &Stream,
        batch: &CudaBatch,
        key: Option<GraphKey>,
        ops: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(key) = key.filter(|_| self.is_enabled()) else {
            return ops();
        };
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        batch.set_capturing(true);
        let done = match by_key.get(&key) {
            None => ops().map(|()| {
                by_key.insert(key, None);
            }),
            Some(None) => capture(stream, ops).and_then(|graph| {
                launch(stream, &graph)?;
                by_key.insert(key, Some(graph));
                Ok(())
            }),
            Some(Some(graph)) => {
                self.replaying.store(true, Ordering::Relaxed);
                let checked = ops();
                self.replaying.store(false, Ordering::Relaxed);
                checked.and_then(|()| launch(stream, graph))
            }
        };
        batch.set_capturing(false);
        done
    }
}

/// Replays a graph.
pub(super) fn launch(stream: &Stream, graph: &Graph) -> Result<()> {
    // SAFETY: both live; what the graph reads and writes lives as long as the model's scratch.
    unsafe { graph::launch(graph.0, stream.raw()) }.map_err(failed("replay a step"))
}

/// Captures what `ops` launches, without running it.
pub(super) fn capture(stream: &Stream, ops: impl FnOnce() -> Result<()>) -> Result<Graph> {
    let op = "capture a step";
    // Other threads allocate for adapters meanwhile, which only the relaxed mode permits.
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: the stream lives.
    unsafe { result::stream::begin_capture(stream.raw(), mode) }.map_err(failed(op))?;
    let launched = ops();
    // SAFETY: capture began above.
    let captured = unsafe { result::stream::end_capture(stream.raw()) }.map(Captured);
    launched?;
    let captured = captured.map_err(failed(op))?;
    // SAFETY: the graph lives.
    let instance = unsafe { graph::instantiate(captured.0, sys::CUgraphInstantiate_flags(0)) };
    Ok(Graph(instance.map_err(failed(op))?))
}
