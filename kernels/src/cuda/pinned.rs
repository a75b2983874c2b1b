//! Page-locked memory for adapters, in pieces of one size that are set aside at start and used again and again: to lock
//! memory takes the driver a while, during which no kernel can be launched.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::device::{Device, PinnedBuf};
use crate::Result;

/// Bytes of a piece: small against an adapter, so that little is wasted, and large against what a copy costs.
const PIECE: usize = 2 << 20;

/// Bytes that are set aside at most before somebody needs them.
const SET_ASIDE: usize = 4 << 30;

/// Pieces that nobody uses now.
pub(super) struct PinnedPool {
    device: Arc<Device>,
    free: Mutex<Vec<PinnedBuf>>,
}

impl PinnedPool {
    pub(super) fn new(device: &Arc<Device>) -> Arc<PinnedPool> {
        Arc::new(PinnedPool { device: device.clone(), free: Mutex::default() })
    }

    fn free(&self) -> MutexGuard<'_, Vec<PinnedBuf>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to set memory aside for `bytes` bytes of adapters, on a thread of its own. Where there is less, adapters
    /// lock what they need.
    pub(super) fn set_aside(self: &Arc<Self>, bytes: usize) {
        let pool = Arc::downgrade(self);
        let work = move || {
            for _ in 0..bytes.min(SET_ASIDE) / PIECE {
                let Some(pool) = pool.upgrade() else { return };
                let Ok(piece) = PinnedBuf::new(&pool.device, PIECE) else { return };
                pool.free().push(piece);
            }
        };
        // Without the thread, adapters lock what they need.
        let _ = thread::Builder::new().name("pinned memory".into()).spawn(work);
    }

    /// Memory of `bytes` bytes and unknown contents.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Pieces> {
        let mut taken = Pieces { pool: self.clone(), pieces: Vec::new(), bytes };
        for _ in 0..bytes.div_ceil(PIECE) {
            let free = self.free().pop();
            taken.pieces.push(free.map_or_else(|| PinnedBuf::new(&self.device, PIECE), Ok)?);
        }
        Ok(taken)
    }
}

/// Memory that is consecutive by its offsets.
pub(super) struct Pieces {
    pool: Arc<PinnedPool>,
    pieces: Vec<PinnedBuf>,
    bytes: usize,
}

impl Pieces {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes `data` at an offset.
    ///
    /// # Panics
    /// If there is no room.
    pub(super) fn write(&mut self, mut at: usize, mut data: &[u8]) {
        while !data.is_empty() {
            let room = &mut self.pieces[at / PIECE].as_mut_slice()[at % PIECE..];
            let size = room.len().min(data.len());
            room[..size].copy_from_slice(&data[..size]);
            at += size;
            data = &data[size..];
        }
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
        self.pool.free().append(&mut self.pieces);
    }
}
