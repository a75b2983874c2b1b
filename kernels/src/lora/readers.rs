//! The threads that fill the memory of adapters. They are apart from those that compute, and their number is bounded
//! over all adapters that are staged at the same time: by a small number, or by that of the adapters if there are more.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};

use super::source::MatrixSource;
use crate::DType;

/// The largest number of threads. It is also bounded by half of the cores.
const THREADS: usize = 8;
/// Bytes of an adapter for which a further thread is worth its start.
const BYTES_PER_THREAD: usize = 1 << 20;
/// Bytes that a thread reads at a time: what it has read is still in the core's cache when it is checked and moved.
const CHUNK: usize = 64 << 10;

/// The number of rows of a matrix that are read at a time, a multiple of `unit`.
pub(crate) fn rows_at_a_time<M: MatrixSource>(dtype: DType, matrix: &M, unit: usize) -> usize {
    let width = matrix.shape()[1] * dtype.size();
    (CHUNK / width.max(1)).max(1).next_multiple_of(unit)
}

/// Counts the threads that read.
#[derive(Debug)]
pub(crate) struct Readers {
    /// Permits that are left. A thread that stages an adapter needs none, but counts: then fewer are left than none.
    left: Mutex<isize>,
}

/// Permits that return when they are dropped.
struct Permits<'a> {
    readers: &'a Readers,
    count: usize,
}

impl Drop for Permits<'_> {
    fn drop(&mut self) {
        *lock(&self.readers.left) += self.count.cast_signed();
    }
}

/// Locks a value that is whole at all times, whoever has panicked.
fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The jobs of one adapter, and the first fault of those that have been done.
struct Queue<J, E> {
    jobs: std::iter::Enumerate<std::vec::IntoIter<J>>,
    fault: Option<(usize, E)>,
}

impl Readers {
    pub(crate) fn new() -> Readers {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Readers::of((cores / 2).clamp(1, THREADS))
    }

    /// As many threads.
    pub(crate) fn of(threads: usize) -> Readers {
        Readers { left: Mutex::new(threads.cast_signed()) }
    }

    /// One permit for the calling thread, and further ones up to `wanted` as far as there are. Nobody waits: a file that
    /// cannot be read would hold its permits for ever.
    fn permits(&self, wanted: usize) -> Permits<'_> {
        let mut left = lock(&self.left);
        let count = wanted.min(usize::try_from(*left).unwrap_or(0)).max(1);
        *left -= count.cast_signed();
        Permits { readers: self, count }
    }

    /// Does jobs that read `bytes` bytes together, in their order, on this thread and on as many others as are free. Each
    /// thread has memory of its own that jobs may use as they like. Errors: that of the first job that failed, whatever
    /// the order in which threads got to them. Jobs behind a failed one are left out.
    pub(crate) fn run<J: Send, E: Send>(
        &self,
        bytes: usize,
        jobs: Vec<J>,
        work: impl Fn(J, &mut Vec<u8>) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let queue = Mutex::new(Queue { jobs: jobs.into_iter().enumerate(), fault: None });
        let next = || {
            let mut queue = lock(&queue);
            if queue.fault.is_some() { None } else { queue.jobs.next() }
        };
        let read = &|_permit: Permits<'_>| {
            let mut scratch = Vec::new();
            while let Some((index, job)) = next() {
                let Err(fault) = work(job, &mut scratch) else { continue };
                let first = &mut lock(&queue).fault;
                if first.as_ref().is_none_or(|(other, _)| index < *other) {
                    *first = Some((index, fault));
                }
            }
        };
        let mut permits = self.permits(1 + bytes / BYTES_PER_THREAD);
        thread::scope(|scope| {
            while permits.count > 1 {
                permits.count -= 1;
                let own = Permits { readers: self, count: 1 };
                // Without a thread, the others do its part.
                let _ = thread::Builder::new().name("adapters".into()).spawn_scoped(scope, move || read(own));
            }
            read(permits);
        });
        let queue = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
        queue.fault.map_or(Ok(()), |(_, fault)| Err(fault))
    }
}
