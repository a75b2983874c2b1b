//! Gains of DoRA where this rank has only some columns of the weight: the squared norms are summed over the ranks.

use crate::{
    Result,
    cuda::{
        CudaBackend, convert,
        device::{Event, PinnedBuf, PoolBuf, launched},
        ffi,
    },
    group::sum_of_posts,
};

/// Where the squares of one slice belong.
struct Slice {
    /// The address of the magnitudes, which become gains.
    gain: u64,
    outputs: usize,
    /// Index of the first square.
    first: usize,
}

/// How far the squares have come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// This rank's are computed, and copied to the host.
    Own,
    /// The other ranks have been told.
    Told,
    /// Those of all ranks are copied to the device, and magnitudes are divided.
    All,
}

/// The squared norms of an adapter's partial weights.
pub(super) struct PartialNorms {
    slices: Vec<Slice>,
    on_device: PoolBuf,
    on_host: PinnedBuf,
    stage: Stage,
}

impl PartialNorms {
    /// Room for squares of slices, each with its magnitudes' address and its number of outputs. `None` without slices.
    pub(super) fn new(be: &CudaBackend, slices: &[(u64, usize)]) -> Result<Option<PartialNorms>> {
        let mut count = 0;
        let slices: Vec<Slice> = slices
            .iter()
            .map(|&(gain, outputs)| {
                count += outputs;
                Slice { gain, outputs, first: count - outputs }
            })
            .collect();
        if slices.is_empty() {
            return Ok(None);
        }
        let bytes = count * size_of::<f32>();
        let on_device = PoolBuf::new(&be.copies, &be.stream, bytes, "norms of an adapter")?;
        let on_host = PinnedBuf::new(&be.device, bytes)?;
        Ok(Some(PartialNorms { slices, on_device, on_host, stage: Stage::Own }))
    }

    /// Where the squares go that belong to the magnitudes at an address; 0: nowhere.
    pub(super) fn squares_of(&self, gain: u64) -> u64 {
        let slice = self.slices.iter().find(|slice| slice.gain == gain);
        slice.map_or(0, |slice| self.at(slice))
    }

    fn at(&self, slice: &Slice) -> u64 {
        self.on_device.at() + (slice.first * size_of::<f32>()) as u64
    }

    /// Begins to copy this rank's squares to the host, behind the kernels that compute them.
    pub(super) fn fetch(&mut self, be: &CudaBackend) -> Result<()> {
        let from = self.on_device.at();
        // SAFETY: the load's event is behind the copy, and this lives as long as the load.
        unsafe { be.copies.copy_out(self.on_host.as_mut_slice(), from) }
    }

    /// Goes on when `event`, which is behind all copies so far, has been reached: returns whether nothing more is to be
    /// done. If a rank cannot load the adapter, it has no squares; then the slot is not used.
    pub(super) fn advance(&mut self, be: &CudaBackend, key: [u64; 2], event: &Event) -> Result<bool> {
        let (group, [place, about]) = (be.comm.group(), key);
        if self.stage == Stage::All {
            return Ok(true);
        }
        if self.stage == Stage::Own {
            group.post(place, about, self.on_host.as_slice())?;
            self.stage = Stage::Told;
        }
        let Some(all) = group.posted(place, about) else { return Ok(false) };
        if all.iter().any(|squares| squares.is_empty()) {
            return Ok(true);
        }
        let sums = sum_of_posts(&all, self.on_host.as_slice().len() / size_of::<f32>())?;
        self.on_host.as_mut_slice().copy_from_slice(&convert::bytes_of(&sums));
        // SAFETY: as in `fetch`, of the same size.
        unsafe { be.copies.copy_in(self.on_device.at(), self.on_host.as_slice())? };
        be.device.bind()?;
        for slice in &self.slices {
            let (squares, outputs) = (self.at(slice), slice.outputs as i32);
            // SAFETY: the adapter has as many magnitudes, and the copy is ahead in the stream.
            launched("load", unsafe {
                ffi::lorax_lora_divide_gains(slice.gain, squares, outputs, be.copies.raw())
            })?;
        }
        event.record(&be.copies)?;
        self.stage = Stage::All;
        Ok(false)
    }
}
