//! Data on its way from the host to the GPU, through a ring of pinned buffers.

use std::sync::Arc;

use super::device::{Device, Event, PinnedBuf, Stream};
use crate::Result;

/// One buffer of the ring and when it is free again.
struct Stage {
    buffer: PinnedBuf,
    copied: Event,
    in_use: bool,
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.in_use {
            // A failure is the device's end, which the next operation reports.
            let _ = self.copied.synchronize();
        }
    }
}

/// A ring of pinned buffers. Copies are in stream order and do not wait for the device, unless all buffers are on
/// their way.
pub(super) struct Staging {
    stages: Vec<Stage>,
    next: usize,
}

impl Staging {
    /// `count` buffers of `bytes`.
    pub(super) fn new(device: &Arc<Device>, count: usize, bytes: usize) -> Result<Staging> {
        let stage =
            || Ok(Stage { buffer: PinnedBuf::new(device, bytes)?, copied: Event::new()?, in_use: false });
        Ok(Staging { stages: (0..count).map(|_| stage()).collect::<Result<_>>()?, next: 0 })
    }

    /// Copies `data` to `to`.
    ///
    /// # Safety
    /// `to` has room.
    pub(super) unsafe fn copy(&mut self, stream: &Stream, to: u64, data: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe {
            self.write(stream, to, data.len(), 1, |at, out| out.copy_from_slice(&data[at..at + out.len()]))
        }
    }

    /// Copies `bytes` bytes to `to`, which `fill(offset, buffer)` writes piece by piece. Pieces are multiples of
    /// `unit` bytes.
    ///
    /// # Safety
    /// `to` has room.
    pub(super) unsafe fn write(
        &mut self,
        stream: &Stream,
        to: u64,
        bytes: usize,
        unit: usize,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<()> {
        let mut done = 0;
        while done < bytes {
            let stage = &mut self.stages[self.next];
            if stage.in_use {
                stream.wait("copy to the device", &stage.copied)?;
            }
            let buffer = stage.buffer.as_mut_slice();
            let size = (buffer.len() / unit * unit).min(bytes - done);
            fill(done, &mut buffer[..size]);
            // SAFETY: the caller's promise; the buffer is written again only after `copied`.
            unsafe { stream.copy_in(to + done as u64, &buffer[..size])? };
            stage.copied.record(stream)?;
            stage.in_use = true;
            self.next = (self.next + 1) % self.stages.len();
            done += size;
        }
        Ok(())
    }
}
