//! Page-locked memory for adapters, in pieces of one size that are set aside and used again and again: to lock memory
//! takes the driver a while, during which no kernel can be launched.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use super::device::{Device, PinnedBuf};
use crate::{Result, lora::blocks::Unfilled};

/// Bytes of a piece: small against an adapter, so that little is wasted and a launch waits for one piece only, and large
/// against what a copy costs.
pub(super) const PIECE: usize = 2 << 20;

/// Steps run if one has begun so recently.
const RECENT: Duration = Duration::from_millis(200);

/// The number of steps that have begun.
#[derive(Default)]
struct Steps {
    count: Mutex<u64>,
    begun: Condvar,
}

impl Steps {
    fn count(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there are more than `seen`. Returns whether there were any soon.
    fn wait_for_more(&self, seen: u64) -> bool {
        let waited = self.begun.wait_timeout_while(self.count(), RECENT, |count| *count == seen);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// Pieces that are locked, in use or not.
pub(super) struct PinnedPool {
    device: Arc<Device>,
    state: Mutex<State>,
    steps: Arc<Steps>,
}

#[derive(Default)]
struct State {
    free: Vec<PinnedBuf>,
    /// Pieces that are locked.
    locked: usize,
    /// Pieces that stay locked when nobody uses them.
    keep: usize,
}

impl PinnedPool {
    pub(super) fn new(device: &Arc<Device>) -> Arc<PinnedPool> {
        let (state, steps) = Default::default();
        Arc::new(PinnedPool { device: device.clone(), state, steps })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks one more piece.
    fn lock(&self) -> Result<PinnedBuf> {
        self.state().locked += 1;
        PinnedBuf::new(&self.device, PIECE).inspect_err(|_| self.state().locked -= 1)
    }

    /// Tells that a step begins.
    pub(super) fn count_step(&self) {
        *self.steps.count() += 1;
        self.steps.begun.notify_one();
    }

    /// Keeps up to `most` bytes locked from now on, and begins to lock `now` of them on a thread of its own: while steps
    /// run, one piece for each step. Where there is less, adapters lock what they need.
    pub(super) fn set_aside(self: &Arc<Self>, most: usize, now: usize) {
        self.state().keep = most / PIECE;
        let (pool, steps, pieces) = (Arc::downgrade(self), self.steps.clone(), most.min(now) / PIECE);
        let work = move || {
            let (mut seen, mut are_running) = (*steps.count(), false);
            while let Some(pool) = pool.upgrade() {
                if pool.state().locked >= pieces {
                    return;
                }
                let Ok(piece) = pool.lock() else { return };
                pool.state().free.push(piece);
                drop(pool);
                if *steps.count() != seen || are_running {
                    seen = *steps.count();
                    are_running = steps.wait_for_more(seen);
                }
            }
        };
        // Without the thread, adapters lock what they need.
        let _ = thread::Builder::new().name("pinned memory".into()).spawn(work);
    }

    /// Memory of `bytes` bytes and unknown contents.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Pieces> {
        let mut taken = Pieces { pool: self.clone(), pieces: Vec::new(), bytes };
        for _ in 0..bytes.div_ceil(PIECE) {
            let free = self.state().free.pop();
            taken.pieces.push(free.map_or_else(|| self.lock(), Ok)?);
        }
        Ok(taken)
    }

    /// Takes pieces back. Those beyond what is kept are unlocked.
    fn give_back(&self, mut pieces: Vec<PinnedBuf>) {
        let mut state = self.state();
        let excess = state.locked.saturating_sub(state.keep).min(pieces.len());
        let unlocked = pieces.split_off(pieces.len() - excess);
        state.locked -= excess;
        state.free.append(&mut pieces);
        drop(state);
        // Without the lock: to unlock memory takes the driver a while.
        drop(unlocked);
    }
}

/// Memory that is consecutive by its offsets.
pub(super) struct Pieces {
    pool: Arc<PinnedPool>,
    pieces: Vec<PinnedBuf>,
    bytes: usize,
}

impl Pieces {
    /// Bytes that were asked for.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of the memory, to be given away from the front to the end.
    pub(super) fn unfilled(&mut self) -> Unfilled<'_> {
        Unfilled::new(self.pieces.iter_mut().map(PinnedBuf::as_mut_slice))
    }

    /// All pieces and their offsets.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let used = |at: usize| PIECE.min(self.bytes - at);
        self.pieces
            .iter()
            .enumerate()
            .map(move |(i, piece)| (i * PIECE, &piece.as_slice()[..used(i * PIECE)]))
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.pieces));
    }
}
