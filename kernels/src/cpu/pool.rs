//! A thread pool with work stealing, which runs one job at a time.
//!
//! A job is a number of chunks and a function of the chunk's index. Every thread has a share of consecutive chunks,
//! which it claims from the front. So it reads memory in order, and gets the same chunks in every job of the same size.
//! A thread whose share is empty steals from the backs of the others' shares, so that a core that is busy elsewhere
//! delays a job by one chunk at most. Data that a thread writes often has a cache line of its own, because a line may
//! take longer from one core to another than memory takes to answer.
//!
//! The operations of a step follow each other within microseconds. Workers therefore spin for a while between jobs
//! before they park.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::{self, JoinHandle, Thread},
};

/// The number of polls before a worker parks, which take some tens of microseconds.
const SPINS: u32 = 20_000;
/// The number of polls after which a caller that waits for the last chunk yields its core.
const SPINS_BEFORE_YIELD: u32 = 2_000;

type Call = unsafe fn(*const (), usize);

/// A thread's share of the present job.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    /// The chunks that are not claimed yet, as `first << 32 | end`. A chunk is claimed by a compare-exchange, after
    /// which `call` and `data` are read: they are those of the chunk's job, which cannot end before the chunk is done.
    left: AtomicU64,
    call: AtomicPtr<()>,
    data: AtomicPtr<()>,
    done: Done,
}

/// The number of chunks that a thread has finished, of all shares and all jobs. Only the thread itself writes it.
#[derive(Default)]
#[repr(align(128))]
struct Done(AtomicUsize);

struct Shared {
    /// The shares of the caller and of the workers.
    shares: Vec<Share>,
    sleepers: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// A thread pool.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    wakers: Vec<Thread>,
    /// The number of chunks of all jobs so far. It is locked until a job has ended, so that callers on several threads
    /// take turns.
    chunks: Mutex<usize>,
}

impl Pool {
    /// Makes a pool that computes on `threads` threads, including the caller.
    pub(super) fn new(threads: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            shares: (0..threads).map(|_| Share::default()).collect(),
            sleepers: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads)
            .map(|i| {
                let shared = shared.clone();
                thread::Builder::new().name(format!("kernel-{i}")).spawn(move || shared.work(i))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let wakers = workers.iter().map(|worker| worker.thread().clone()).collect();
        Ok(Pool { shared, workers, wakers, chunks: Mutex::new(0) })
    }

    /// The number of threads that compute, including the caller.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0) … f(chunks - 1)`, each once, on all threads, and returns when all calls have returned. `chunks` is
    /// below 2³².
    pub(super) fn run<F: Fn(usize) + Sync>(&self, chunks: usize, f: F) {
        if chunks <= 1 || self.workers.is_empty() {
            (0..chunks).for_each(f);
            return;
        }
        let mut all = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        *all = all.wrapping_add(chunks);
        let shared = &*self.shared;
        // The workers' shares are published first, since the caller takes its own without a delay.
        for (i, share) in shared.shares.iter().enumerate().rev() {
            let bound = |i: usize| (i * chunks / self.threads()) as u64;
            share.call.store(call::<F> as Call as *mut (), Relaxed);
            share.data.store((&raw const f).cast_mut().cast(), Relaxed);
            share.left.store(bound(i) << 32 | bound(i + 1), Release);
        }
        // A worker that is about to park may be missed. The others steal its share then.
        if shared.sleepers.load(Relaxed) > 0 {
            self.wakers.iter().for_each(Thread::unpark);
        }
        shared.work_off(0);
        let mut spins = 0;
        while shared.done() != *all {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { thread::yield_now() }
        }
        if shared.panicked.swap(false, Relaxed) {
            resume_unwind(Box::new("a chunk of a parallel operation panicked"));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.wakers.iter().for_each(Thread::unpark);
        for worker in self.workers.drain(..) {
            // A worker catches panics of its chunks, and does not panic otherwise.
            let _ = worker.join();
        }
    }
}

/// # Safety
/// `data` points to a live `F`.
unsafe fn call<F: Fn(usize) + Sync>(data: *const (), chunk: usize) {
    // SAFETY: the caller's promise.
    unsafe { (*data.cast::<F>())(chunk) }
}

impl Share {
    fn is_empty(&self) -> bool {
        let left = self.left.load(Relaxed);
        left >> 32 >= left & u64::from(u32::MAX)
    }

    /// Claims a chunk from the front or the back.
    fn claim(&self, front: bool) -> Option<usize> {
        let mut left = self.left.load(Relaxed);
        loop {
            let (first, end) = (left >> 32, left & u64::from(u32::MAX));
            if first >= end {
                return None;
            }
            let (chunk, rest) = if front { (first, left + (1 << 32)) } else { (end - 1, left - 1) };
            match self.left.compare_exchange_weak(left, rest, Acquire, Relaxed) {
                Ok(_) => return Some(chunk as usize),
                Err(now) => left = now,
            }
        }
    }
}

impl Shared {
    /// The number of chunks that all threads have finished.
    fn done(&self) -> usize {
        self.shares.iter().fold(0, |sum, share| sum.wrapping_add(share.done.0.load(Acquire)))
    }

    /// Runs worker `me` until the pool is dropped.
    fn work(&self, me: usize) {
        let mut spins = 0;
        while !self.stop.load(Relaxed) {
            if !self.shares[me].is_empty() {
                spins = 0;
                self.work_off(me);
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                spins = 0;
                self.sleepers.fetch_add(1, SeqCst);
                if self.shares[me].is_empty() && !self.stop.load(SeqCst) {
                    thread::park();
                }
                self.sleepers.fetch_sub(1, SeqCst);
            }
        }
    }

    /// Runs chunks until none is left: those of the thread's own share, then those of the others.
    fn work_off(&self, me: usize) {
        let done = &self.shares[me].done.0;
        for i in 0..self.shares.len() {
            let share = &self.shares[(me + i) % self.shares.len()];
            while let Some(chunk) = share.claim(i == 0) {
                let (call, data) = (share.call.load(Relaxed), share.data.load(Relaxed));
                // SAFETY: the claim succeeded, so the job of this chunk has not ended. `call` and `data` are its
                // function: they were stored before the `left` that the claim acquired, and live until all chunks are
                // done.
                let result = catch_unwind(AssertUnwindSafe(|| unsafe {
                    let call = std::mem::transmute::<*mut (), Call>(call);
                    call(data, chunk);
                }));
                if result.is_err() {
                    self.panicked.store(true, Relaxed);
                }
                done.store(done.load(Relaxed).wrapping_add(1), Release);
            }
        }
    }
}

/// A pointer through which chunks write to elements that do not overlap.
#[derive(Clone, Copy)]
pub(super) struct Shards<T>(pub(super) *mut T);

// SAFETY: the callers of `slice` say why the elements are theirs alone.
unsafe impl<T> Send for Shards<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shards<T> {}

impl<T> Shards<T> {
    /// `len` elements from `start`.
    ///
    /// # Safety
    /// The elements are inside of the memory that the pointer was made from, and nothing else uses them meanwhile.
    #[expect(clippy::mut_from_ref, reason = "the places of different chunks do not overlap")]
    pub(super) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once() {
        let pool = Pool::new(3).unwrap();
        for chunks in [0, 1, 2, 7, 1000] {
            let counts: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(chunks, |i| {
                counts[i].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Relaxed) == 1));
        }
    }

    #[test]
    fn many_short_jobs_follow_each_other() {
        let pool = Pool::new(4).unwrap();
        let sum = AtomicUsize::new(0);
        for _ in 0..20_000 {
            pool.run(4, |i| {
                sum.fetch_add(i, Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 20_000 * 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives() {
        let pool = Pool::new(2).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(8, |i| assert_ne!(i, 5))));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(8, |i| {
            sum.fetch_add(i, Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }
}
