//! Adapters: staged in pinned memory as the card holds them, copied beside the steps, found through a table.

use std::sync::Arc;

use super::{
    CudaBackend, convert,
    device::{DeviceBuf, Event, PoolBuf},
    ffi::{MAX_LORA_RANK, MAX_SLICES, OUT_BLOCK},
    pinned::{PIECE, Pieces},
    unsupported,
};
use crate::{DType, Error, LoraPart, LoraShape, LoraSite, Result};

/// Every matrix begins at a multiple of so many bytes.
const ALIGN: usize = 256;
/// Bytes of a `LoraEntry` in `lora.cuh`.
const ENTRY: usize = 24;

/// Where the delta of one slice lies in an adapter.
#[derive(Debug, Clone, Copy)]
struct Placed {
    /// Index of the slice when those of all sites are counted.
    slice: usize,
    lora_rank: u32,
    a: usize,
    b: usize,
}

/// An adapter in pinned memory: for each part A `[lora_rank, inputs]`, then B transposed in blocks of outputs,
/// `[blocks, lora_rank, OUT_BLOCK]`, with zeros behind the last output.
pub struct CudaAdapter {
    memory: Pieces,
    parts: Vec<Placed>,
}

impl CudaAdapter {
    pub(super) fn new(be: &CudaBackend, sites: &[LoraSite], parts: &[LoraPart]) -> Result<CudaAdapter> {
        parts.iter().try_for_each(|part| part.check(sites))?;
        let shapes: Vec<_> = parts.iter().map(LoraPart::shape).collect();
        let (placed, bytes) = layout(be.dtype, sites, &shapes)?;
        let mut memory = be.pinned.take(bytes)?;
        for (part, placed) in parts.iter().zip(&placed) {
            memory.write(placed.a, &convert::from_f32(be.dtype, part.a.iter().copied()));
            memory.write(placed.b, &convert::from_f32(be.dtype, blocked(part)));
        }
        Ok(CudaAdapter { memory, parts: placed })
    }

    pub(super) fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

/// Where the parts of an adapter lie, and its bytes.
fn layout(dtype: DType, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<(Vec<Placed>, usize)> {
    let (first, mut bytes) = (first_slices(sites), 0);
    let mut reserve = |elements: usize| {
        let at = bytes;
        bytes += (elements * dtype.size()).next_multiple_of(ALIGN);
        at
    };
    let mut placed = Vec::with_capacity(shapes.len());
    for &shape in shapes {
        let LoraShape { site, slice, lora_rank } = shape;
        let [inputs, outputs] = shape.of(sites)?;
        if lora_rank > MAX_LORA_RANK {
            return Err(unsupported(format!("an adapter of rank {lora_rank}, above {MAX_LORA_RANK},")));
        }
        let (a, b) = (reserve(inputs * lora_rank), reserve(outputs.next_multiple_of(OUT_BLOCK) * lora_rank));
        placed.push(Placed { slice: first[site] + slice, lora_rank: lora_rank as u32, a, b });
    }
    Ok((placed, bytes))
}

/// Pinned memory that an adapter takes: whole pieces.
pub(super) fn host_bytes(dtype: DType, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
    Ok(layout(dtype, sites, shapes)?.1.next_multiple_of(PIECE))
}

/// B in the order of [`CudaAdapter`].
fn blocked(part: &LoraPart) -> impl Iterator<Item = f32> {
    let rank = part.lora_rank;
    part.b.chunks(OUT_BLOCK * rank).flat_map(move |block| {
        let element = move |r, output| block.get(output * rank + r).copied().unwrap_or_default();
        (0..rank).flat_map(move |r| (0..OUT_BLOCK).map(move |output| element(r, output)))
    })
}

/// Index of every site's first slice when all slices are counted.
fn first_slices(sites: &[LoraSite]) -> Vec<usize> {
    let slices = sites.iter().map(|site| site.outputs.len());
    slices.scan(0, |next, slices| Some(std::mem::replace(next, *next + slices))).collect()
}

/// An adapter on its way to the card.
struct Loading {
    slot: u32,
    memory: PoolBuf,
    /// Read until the copy has ended. From then on, host memory may forget the adapter.
    adapter: Arc<CudaAdapter>,
    copied: Event,
    /// The slot was emptied or reused before the copy ended.
    abandoned: bool,
}

/// The resident adapters and the table by which kernels find them.
pub struct CudaSlots {
    pub(super) sites: Vec<LoraSite>,
    first: Vec<usize>,
    entries: DeviceBuf,
    slots: Vec<Option<PoolBuf>>,
    loading: Vec<Loading>,
}

impl CudaSlots {
    pub(super) fn new(be: &CudaBackend, sites: &[LoraSite], slots: usize) -> Result<CudaSlots> {
        if let Some(site) = sites.iter().find(|site| site.outputs.len() > MAX_SLICES) {
            return Err(unsupported(format!("a site of {} slices, above {MAX_SLICES},", site.outputs.len())));
        }
        let stride: usize = sites.iter().map(|site| site.outputs.len()).sum();
        Ok(CudaSlots {
            sites: sites.to_vec(),
            first: first_slices(sites),
            entries: DeviceBuf::zeroed(&be.device, slots * stride * ENTRY, "the table of adapters")?,
            slots: (0..slots).map(|_| None).collect(),
            loading: Vec::new(),
        })
    }

    /// Entries of one slot.
    pub(super) fn entry_stride(&self) -> usize {
        self.sites.iter().map(|site| site.outputs.len()).sum()
    }

    /// The entry of slot 0 for a site's first slice.
    pub(super) fn entries_at(&self, site: usize) -> u64 {
        self.entries.at() + (self.first[site] * ENTRY) as u64
    }

    pub(super) fn expect_resident(&self, op: &'static str, slot: u32) -> Result<()> {
        match self.slots.get(slot as usize) {
            Some(Some(_)) => Ok(()),
            Some(None) => Err(Error::EmptySlot { op, slot: slot as usize }),
            None => Err(Error::Index { op, what: "slot", index: slot as usize, limit: self.slots.len() }),
        }
    }

    /// Errors: without memory on the card, the slot is empty and nothing was begun.
    pub(super) fn load(&mut self, be: &CudaBackend, slot: u32, adapter: &Arc<CudaAdapter>) -> Result<()> {
        self.unload(slot)?;
        let memory = PoolBuf::new(&be.copies, &be.stream, adapter.bytes(), "an adapter")?;
        let copied = Event::new()?;
        for (at, piece) in adapter.memory.iter() {
            // SAFETY: the memory was just allocated on this stream; `Loading` keeps the source until the copy ended.
            unsafe { be.copies.copy_in(memory.at() + at as u64, piece)? };
        }
        copied.record(&be.copies)?;
        self.loading.push(Loading { slot, memory, adapter: adapter.clone(), copied, abandoned: false });
        Ok(())
    }

    /// Slots that became usable since the last call.
    pub(super) fn loaded(&mut self, be: &CudaBackend) -> Result<Vec<u32>> {
        be.device.bind()?;
        let mut ready = Vec::new();
        let mut still = Vec::new();
        for loading in self.loading.drain(..) {
            if !loading.copied.reached()? {
                still.push(loading);
            } else if !loading.abandoned {
                ready.push(loading);
            }
        }
        self.loading = still;
        let mut slots = Vec::with_capacity(ready.len());
        for Loading { slot, memory, adapter, .. } in ready {
            self.publish(be, slot, &adapter.parts, memory.at())?;
            self.slots[slot as usize] = Some(memory);
            slots.push(slot);
        }
        Ok(slots)
    }

    /// Writes a slot's entries for an adapter at an address, behind the steps already launched.
    fn publish(&self, be: &CudaBackend, slot: u32, parts: &[Placed], at: u64) -> Result<()> {
        let stride = self.entry_stride();
        let mut entries = vec![[0_u64; ENTRY / 8]; stride];
        for piece in parts {
            entries[piece.slice] = [at + piece.a as u64, at + piece.b as u64, u64::from(piece.lora_rank)];
        }
        let to = self.entries.at() + (slot as usize * stride * ENTRY) as u64;
        // SAFETY: `slot` was checked when the load began.
        unsafe { be.staging().copy(&be.stream, to, &convert::bytes_of(entries.as_flattened())) }
    }

    pub(super) fn unload(&mut self, slot: u32) -> Result<()> {
        let limit = self.slots.len();
        let place = self.slots.get_mut(slot as usize);
        let place = place.ok_or(Error::Index { op: "unload", what: "slot", index: slot as usize, limit })?;
        self.loading.iter_mut().filter(|l| l.slot == slot).for_each(|l| l.abandoned = true);
        // Steps launched from now on are refused the slot; those before are ahead of the memory's release.
        *place = None;
        Ok(())
    }
}

impl Drop for CudaSlots {
    fn drop(&mut self) {
        for loading in &self.loading {
            // A failure is the device's end, which the next operation reports.
            let _ = loading.copied.synchronize();
        }
    }
}
