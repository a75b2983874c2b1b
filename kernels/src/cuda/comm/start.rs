//! The start: whether the ranks reach each other's memory, and which way is the fastest for each size.

use std::{sync::Arc, time::Duration};

use super::{
    Comm, Message,
    bands::{self, Bands, Way},
};
use crate::{
    DType, Error, Result,
    cuda::{
        BACKEND, convert,
        device::{Device, DeviceBuf, Event, Stream},
        ffi::SinkArgs,
        graph,
    },
};

/// How long ranks wait for each other when they try each other's memory.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);
/// Columns of the matrices that are summed at the start.
const COLS: usize = 4096;
/// Bytes of such a matrix of f32.
const TRIAL: usize = bands::LARGEST * 2;
/// Sums of one timed graph, and how often it is replayed.
const TIMED: usize = 8;
const REPLAYS: usize = 3;

/// What rank r adds at an element: a small integer, so that sums are exact.
fn trial(rank: usize, element: usize) -> f32 {
    (rank as f32 + 1.0) * (element % 7) as f32 - 3.0
}

impl Comm {
    /// Whether sums through the ranks' memory are right: writes to memory of other GPUs can get lost where the machine's
    /// settings do not allow for them.
    pub(super) fn probe(&self, device: &Arc<Device>, on: &Stream) -> Result<bool> {
        let Some(arena) = &self.arena else { return Ok(false) };
        let (rows, ranks) = (16, self.group.ranks());
        let expected: Vec<f32> =
            (0..rows * COLS).map(|i| (0..ranks).map(|rank| trial(rank, i)).sum()).collect();
        let own: Vec<u8> = (0..rows * COLS).flat_map(|i| trial(self.group.rank(), i).to_le_bytes()).collect();
        let x = DeviceBuf::new(device, own.len(), "a trial")?;
        let message = Message { at: x.at(), rows, cols: COLS };
        let mut sums = vec![0; own.len()];
        // Nobody allocates any more, which the driver may delay while kernels of this process wait for others.
        self.group.barrier(self.group.patience())?;
        arena.wait_within(PROBE_PATIENCE);
        // Both halves of the arenas, and each once more, when it was emptied.
        for shots in [1, 1, 2, 2] {
            // SAFETY: the buffer has as many bytes; both copies are waited for.
            unsafe { on.copy_in(x.at(), &own)? };
            let to = SinkArgs::default();
            self.sum_in(arena, on, (message, shots), &to)?;
            // SAFETY: as above.
            unsafe { on.copy_out(&mut sums, x.at())? };
            on.synchronize()?;
            let sums = convert::to_f32(DType::F32, &sums);
            if arena.lost().is_some() || sums != expected {
                return Ok(false);
            }
        }
        arena.wait_as_the_group();
        Ok(true)
    }

    /// The way of every size: the only one there is, or what rank 0 finds fastest.
    pub(super) fn choose(&self, device: &Arc<Device>, on: &Stream) -> Result<Bands> {
        let ways = match (&self.arena, &self.library) {
            (None, None) => {
                let reason = self.no_library.as_deref().unwrap_or_default();
                let missing = format!(
                    "the GPUs of the ranks cannot reach each other's memory, and without that NCCL is needed: {reason}"
                );
                return Err(Error::Unavailable { backend: BACKEND, missing });
            }
            (None, Some(_)) => return Ok(Bands::only(Way::Nccl)),
            (Some(_), _) if self.group.ranks() == 2 => return Ok(Bands::only(Way::OneShot)),
            (Some(_), None) => vec![Way::OneShot, Way::TwoShots],
            (Some(_), Some(_)) => vec![Way::OneShot, Way::TwoShots, Way::Nccl],
        };
        let x = DeviceBuf::zeroed(device, TRIAL, "a trial")?;
        let measured = Bands::measure(&ways, |way, bytes| self.seconds(way, bytes, x.at(), on))?;
        let said = self.group.exchange(&measured.bytes())?;
        Bands::of(&said[0])
    }

    /// Seconds of one sum of so many bytes in a captured step.
    fn seconds(&self, way: Way, bytes: usize, x: u64, on: &Stream) -> Result<f64> {
        let message = Message { at: x, rows: 1, cols: COLS };
        let message = Message { rows: bytes / message.bytes(self.dtype), ..message };
        let sum = || self.sum_by(way, on, message, &SinkArgs::default()).map(|_| ());
        // Loads the kernels, which a capture must not.
        sum()?;
        let (from, to) = (Event::timed()?, Event::timed()?);
        to.record(on)?;
        self.wait_for("time sums", &to)?;
        let graph = graph::capture(on, || (0..TIMED).try_for_each(|_| sum()))?;
        graph::launch(on, &graph)?;
        from.record(on)?;
        (0..REPLAYS).try_for_each(|_| graph::launch(on, &graph))?;
        to.record(on)?;
        self.wait_for("time sums", &to)?;
        Ok(to.seconds_since(&from)? / (TIMED * REPLAYS) as f64)
    }
}
