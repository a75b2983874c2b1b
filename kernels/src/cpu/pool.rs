//! Threads that take small chunks of one job at a time.
//!
//! A job is a number of chunks and a function of the chunk's index. Whoever is free claims the next chunk, the calling
//! thread included, so a core that is busy elsewhere costs no more than the chunk it holds. Workers spin for a moment
//! between jobs, since the operations of a step follow each other within microseconds, and park after that.

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

/// The job at hand. `turn` is `epoch << 32 | next chunk`: a chunk is claimed by adding 1 while the epoch still is
/// the one whose function was read, so a worker that comes late never touches a job that has ended.
struct Shared {
    turn: AtomicU64,
    chunks: AtomicUsize,
    done: AtomicUsize,
    call: AtomicPtr<()>,
    data: AtomicPtr<()>,
    sleepers: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

/// A pool of threads; see the module's documentation.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    wakers: Vec<Thread>,
    epoch: Mutex<u32>,
}

impl Pool {
    /// A pool that computes on `threads` threads, the calling one included.
    pub(super) fn new(threads: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            turn: AtomicU64::new(0),
            chunks: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            call: AtomicPtr::default(),
            data: AtomicPtr::default(),
            sleepers: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads)
            .map(|i| {
                let shared = shared.clone();
                thread::Builder::new().name(format!("kernel-{i}")).spawn(move || shared.work())
            })
            .collect::<Result<Vec<_>, _>>()?;
        let wakers = workers.iter().map(|worker| worker.thread().clone()).collect();
        Ok(Pool { shared, workers, wakers, epoch: Mutex::new(0) })
    }

    /// Threads that compute, the calling one included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0) … f(chunks - 1)`, each once, on all threads, and returns when all calls have.
    pub(super) fn run<F: Fn(usize) + Sync>(&self, chunks: usize, f: F) {
        if chunks <= 1 || self.workers.is_empty() {
            (0..chunks).for_each(f);
            return;
        }
        // Held until the job has ended: callers on several threads take turns.
        let mut epoch = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        *epoch = epoch.wrapping_add(1);
        let shared = &*self.shared;
        shared.chunks.store(chunks, Relaxed);
        shared.done.store(0, Relaxed);
        shared.call.store(call::<F> as Call as *mut (), Relaxed);
        shared.data.store((&raw const f).cast_mut().cast(), Relaxed);
        shared.turn.store(u64::from(*epoch) << 32, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            self.wakers.iter().for_each(Thread::unpark);
        }
        shared.take_chunks(*epoch);
        let mut spins = 0;
        while shared.done.load(Acquire) < chunks {
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

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        let mut spins = 0;
        while !self.stop.load(Relaxed) {
            let epoch = (self.turn.load(Acquire) >> 32) as u32;
            if epoch != seen {
                seen = epoch;
                spins = 0;
                self.take_chunks(epoch);
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                spins = 0;
                self.sleepers.fetch_add(1, SeqCst);
                // A job published before the increment is seen here; one published after it unparks.
                if (self.turn.load(SeqCst) >> 32) as u32 == seen && !self.stop.load(SeqCst) {
                    thread::park();
                }
                self.sleepers.fetch_sub(1, SeqCst);
            }
        }
    }

    fn take_chunks(&self, epoch: u32) {
        let (chunks, call, data) =
            (self.chunks.load(Relaxed), self.call.load(Relaxed), self.data.load(Relaxed));
        let mut turn = self.turn.load(Acquire);
        loop {
            let next = (turn & u64::from(u32::MAX)) as usize;
            if (turn >> 32) as u32 != epoch || next >= chunks {
                return;
            }
            match self.turn.compare_exchange_weak(turn, turn + 1, AcqRel, Acquire) {
                Err(now) => turn = now,
                Ok(_) => {
                    // SAFETY: the claim succeeded, so the job of this epoch has not ended: `call` and `data` are its own
                    // function, alive until `done` reaches `chunks`, which this chunk is part of.
                    let result = catch_unwind(AssertUnwindSafe(|| unsafe {
                        let call = std::mem::transmute::<*mut (), Call>(call);
                        call(data, next);
                    }));
                    if result.is_err() {
                        self.panicked.store(true, Relaxed);
                    }
                    self.done.fetch_add(1, Release);
                    turn = self.turn.load(Acquire);
                }
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
