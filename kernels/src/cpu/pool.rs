//! Threads that share the chunks of one job at a time.
//!
//! A job is a number of chunks and a function of the chunk's index. Every thread has a share of neighbouring chunks, which
//! it claims from the front: it streams what they read in order, and jobs of as many chunks give it the same ones. Whoever
//! has none left claims from the backs of others' shares, so a core that is busy elsewhere costs no more than the chunk
//! it holds. What a thread writes often lies on a line of its own: cores may be far apart, and a line takes longer
//! from one to the other than memory takes to answer.
//!
//! Workers spin for a moment between jobs, since the operations of a step follow each other within microseconds, and
//! park after that.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread::{self, JoinHandle, Thread},
};

/// Polls before a worker parks: some tens of microseconds.
const SPINS: u32 = 20_000;
/// Polls before a caller who waits for a last chunk offers its core to others.
const SPINS_BEFORE_YIELD: u32 = 2_000;

type Call = unsafe fn(*const (), usize);

/// A thread's share of the job at hand.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    /// The chunks that nobody claimed: `first << 32 | end`. A claim is a compare-exchange, and the job is read after it:
    /// whatever the claimer saw before, the chunk belongs to the job that is there now, which cannot end before it.
    left: AtomicU64,
    call: AtomicPtr<()>,
    data: AtomicPtr<()>,
    done: Done,
}

/// Chunks that a thread has finished since it began, of whatever share. Only the thread itself stores.
#[derive(Default)]
#[repr(align(128))]
struct Done(AtomicUsize);

struct Shared {
    /// The caller's is the first.
    shares: Vec<Share>,
    sleepers: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// A pool of threads; see the module's documentation.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    wakers: Vec<Thread>,
    /// Chunks of all jobs so far. Held until a job has ended: callers on several threads take turns.
    chunks: Mutex<usize>,
}

impl Pool {
    /// A pool that computes on `threads` threads, the calling one included.
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

    /// Threads that compute, the calling one included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0) … f(chunks - 1)`, each once, on all threads, and returns when all calls have. There are less than
    /// 2³² chunks.
    pub(super) fn run<F: Fn(usize) + Sync>(&self, chunks: usize, f: F) {
        if chunks <= 1 || self.workers.is_empty() {
            (0..chunks).for_each(f);
            return;
        }
        let mut all = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        *all = all.wrapping_add(chunks);
        let shared = &*self.shared;
        // Workers first: the caller is here already.
        for (i, share) in shared.shares.iter().enumerate().rev() {
            let bound = |i: usize| (i * chunks / self.threads()) as u64;
            share.call.store(call::<F> as Call as *mut (), Relaxed);
            share.data.store((&raw const f).cast_mut().cast(), Relaxed);
            share.left.store(bound(i) << 32 | bound(i + 1), Release);
        }
        // A worker that falls asleep right now is not seen: then its share is claimed by others.
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
            // A worker catches the panics of its chunks and has none of its own.
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

    /// A chunk of the front or the back.
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
    /// Chunks finished by all threads.
    fn done(&self) -> usize {
        self.shares.iter().fold(0, |sum, share| sum.wrapping_add(share.done.0.load(Acquire)))
    }

    /// The life of thread `me`.
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

    /// Claims and finishes chunks until there are none: of the thread's own share, then of the shares behind it.
    fn work_off(&self, me: usize) {
        let done = &self.shares[me].done.0;
        for i in 0..self.shares.len() {
            let share = &self.shares[(me + i) % self.shares.len()];
            while let Some(chunk) = share.claim(i == 0) {
                let (call, data) = (share.call.load(Relaxed), share.data.load(Relaxed));
                // SAFETY: the claim succeeded, so the job of this chunk has not ended: `call` and `data` are its own function,
                // stored before the share that the claim acquired, alive until all chunks are done.
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

/// A pointer that chunks may write through at places that do not overlap.
#[derive(Clone, Copy)]
pub(super) struct Shards<T>(pub(super) *mut T);

// SAFETY: whoever dereferences the pointer states why its places are its own.
unsafe impl<T> Send for Shards<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shards<T> {}

impl<T> Shards<T> {
    /// `len` elements from `start` on.
    ///
    /// # Safety
    /// They lie inside the memory that the pointer was made from, and nobody else uses them meanwhile.
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
