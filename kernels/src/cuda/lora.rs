//! Adapters: staged in pinned memory as the card holds them, copied beside the steps, found through a table.

use std::sync::Arc;

use super::{
    CudaBackend, convert,
    device::{DeviceBuf, Event, PoolBuf},
    ffi::{MAX_LORA_RANK, MAX_SLICES, OUT_BLOCK},
    memory::expect,
    pinned::Pieces,
    unsupported,
};
use crate::{Error, LoraPart, LoraSite, Result};

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
        let (first, size) = (first_slices(sites), be.dtype.size());
        let mut bytes = 0;
        let mut reserve = |elements: usize| {
            let at = bytes;
            bytes += (elements * size).next_multiple_of(ALIGN);
            at
        };
        let mut placed = Vec::with_capacity(parts.len());
        for part in parts {
            check_part(sites, part)?;
            let slice = first[part.site] + part.slice;
            let outputs = sites[part.site].outputs[part.slice].next_multiple_of(OUT_BLOCK);
            let (a, b) = (reserve(part.a.len()), reserve(outputs * part.lora_rank));
            placed.push(Placed { slice, lora_rank: part.lora_rank as u32, a, b });
        }
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

/// B in the order of [`CudaAdapter`].
fn blocked(part: &LoraPart) -> impl Iterator<Item = f32> {
    let rank = part.lora_rank;
    part.b.chunks(OUT_BLOCK * rank).flat_map(move |block| {
        let element = move |r, output| block.get(output * rank + r).copied().unwrap_or_default();
        (0..rank).flat_map(move |r| (0..OUT_BLOCK).map(move |output| element(r, output)))
    })
}

fn check_part(sites: &[LoraSite], part: &LoraPart) -> Result<()> {
    let op = "stage";
    let site = sites.get(part.site);
    let site = site.ok_or(Error::Index { op, what: "site", index: part.site, limit: sites.len() })?;
    let limit = site.outputs.len();
    let outputs = site.outputs.get(part.slice);
    let outputs = *outputs.ok_or(Error::Index { op, what: "slice", index: part.slice, limit })?;
    expect(op, "ranks above 0", part.lora_rank.min(1), 1)?;
    expect(op, "elements of A", part.a.len(), part.lora_rank * site.inputs)?;
    expect(op, "elements of B", part.b.len(), part.lora_rank * outputs)?;
    if part.lora_rank > MAX_LORA_RANK {
        return Err(unsupported(format!("an adapter of rank {}, above {MAX_LORA_RANK},", part.lora_rank)));
    }
    Ok(())
}

/// Index of every site's first slice when all slices are counted.
fn first_slices(sites: &[LoraSite]) -> Vec<usize> {
    let slices = sites.iter().map(|site| site.outputs.len());
    slices.scan(0, |next, slices| Some(std::mem::replace(next, *next + slices))).collect()
}

/// An adapter on the card.
struct Resident {
    memory: PoolBuf,
    adapter: Arc<CudaAdapter>,
}

/// An adapter on its way to the card.
struct Loading {
    slot: u32,
    resident: Resident,
    copied: Event,
    /// The slot was emptied or reused before the copy ended.
    abandoned: bool,
}

/// The resident adapters and the table by which kernels find them.
pub struct CudaSlots {
    pub(super) sites: Vec<LoraSite>,
    first: Vec<usize>,
    entries: DeviceBuf,
    slots: Vec<Option<Resident>>,
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

    pub(super) fn load(&mut self, be: &CudaBackend, slot: u32, adapter: &Arc<CudaAdapter>) -> Result<()> {
        self.unload(slot)?;
        let memory = PoolBuf::new(&be.copies, &be.stream, adapter.bytes(), "an adapter")?;
        let copied = Event::new()?;
        for (at, piece) in adapter.memory.iter() {
            // SAFETY: the memory was just allocated on this stream; `Loading` keeps the source until the copy ended.
            unsafe { be.copies.copy_in(memory.at() + at as u64, piece)? };
        }
        copied.record(&be.copies)?;
        let resident = Resident { memory, adapter: adapter.clone() };
        self.loading.push(Loading { slot, resident, copied, abandoned: false });
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
        for Loading { slot, resident, .. } in ready {
            self.publish(be, slot, &resident)?;
            self.slots[slot as usize] = Some(resident);
            slots.push(slot);
        }
        Ok(slots)
    }

    /// Writes a slot's entries, behind the steps already launched.
    fn publish(&self, be: &CudaBackend, slot: u32, resident: &Resident) -> Result<()> {
        let stride = self.entry_stride();
        let at = resident.memory.at();
        let mut entries = vec![[0_u64; ENTRY / 8]; stride];
        for piece in &resident.adapter.parts {
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
