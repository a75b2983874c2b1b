//! Adapters: staged in pinned memory as the GPU holds them, copied beside the steps, found through a table.

mod partial;
mod stage;

use std::{ops::BitOr, sync::Arc};

use super::{
    CudaBackend, CudaBatch, CudaWeight, convert,
    device::{DeviceBuf, Event, PoolBuf, launched},
    ffi::{self, LoraEntry, MAX_SLICES},
    memory::expect,
    unsupported,
};
use partial::PartialNorms;
pub use stage::CudaAdapter;
pub(super) use stage::host_bytes;
use stage::{Placed, first_slices};

use crate::{Error, LoraShape, LoraSite, MAX_MEMBER_RANKS, Ops, RANK_STEP, Result, RowSet, SiteKind};

/// Bytes of an entry of the table.
const ENTRY: usize = 4 * LoraEntry::WORDS;

/// What adapters need besides low-rank deltas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// Gains or biases, which change whole products before these are added to the residual stream, or several deltas of a
    /// row. The kernels of all other steps know nothing of them.
    pub(super) affine: bool,
    /// Replaced rows of the output projection.
    pub(super) head_rows: bool,
}

impl BitOr for Needs {
    type Output = Needs;

    fn bitor(self, other: Needs) -> Needs {
        Needs { affine: self.affine || other.affine, head_rows: self.head_rows || other.head_rows }
    }
}

/// An adapter on its way to the GPU.
struct Loading {
    slot: u32,
    memory: PoolBuf,
    /// Read until the copy has ended. From then on, host memory may forget the adapter.
    adapter: Arc<CudaAdapter>,
    copied: Event,
    /// What other ranks have to tell before the load ends.
    norms: Option<PartialNorms>,
    /// The slot was emptied or reused before the copy ended.
    abandoned: bool,
}

impl Loading {
    /// Whether nothing is to be done any more, when the copies so far have ended.
    fn advance(&mut self, be: &CudaBackend) -> Result<bool> {
        let key = [self.slot.into(), self.adapter.content];
        self.norms.as_mut().map_or(Ok(true), |norms| norms.advance(be, key, &self.copied))
    }
}

/// The resident adapters and the table by which kernels find them.
pub struct CudaSlots {
    pub(super) sites: Vec<LoraSite>,
    first: Vec<usize>,
    entries: DeviceBuf,
    slots: Vec<Option<Resident>>,
    loading: Vec<Loading>,
}

/// The base weight of one slice, whose rows have norms.
struct Base {
    at: u64,
    inputs: usize,
    outputs: usize,
    /// Whether it is stored as `[inputs, outputs]`.
    lookup: bool,
}

/// The adapter in a slot.
struct Resident {
    /// Holds what the slot's entries point to.
    _memory: PoolBuf,
    needs: Needs,
    /// Whether it has low-rank deltas and biases alone.
    is_sum: bool,
    /// The largest rank of its deltas, in whole steps.
    ranks: usize,
}

impl Resident {
    fn new(memory: PoolBuf, adapter: &CudaAdapter) -> Resident {
        let shapes = || adapter.parts.iter().map(|part| part.shape);
        let is_sum = shapes().all(|shape| !shape.has_magnitude && shape.rows == 0);
        let ranks = shapes().map(|shape| shape.lora_rank.next_multiple_of(RANK_STEP)).max().unwrap_or(0);
        Resident { _memory: memory, needs: adapter.needs, is_sum, ranks }
    }
}

impl CudaSlots {
    pub(super) fn new(be: &CudaBackend, sites: &[LoraSite], slots: usize) -> Result<CudaSlots> {
        if let Some(site) = sites.iter().find(|site| site.outputs.len() > MAX_SLICES) {
            return Err(unsupported(format!("a site of {} slices, above {MAX_SLICES},", site.outputs.len())));
        }
        if sites.iter().any(|site| site.kind != SiteKind::Linear && site.outputs.len() > 1) {
            return Err(unsupported("an embedding or output projection of several slices".into()));
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

    /// What the launches of a step provide for. In a decode step with adapters, replaced rows are always among it: a
    /// launch that finds none takes 2 µs, and there are half as many CUDA graphs.
    pub(super) fn needs(&self, batch: &CudaBatch) -> Needs {
        let slots = batch.slots(RowSet::All);
        let resident = slots.iter().filter_map(|&slot| self.slots.get(slot as usize)?.as_ref());
        let always = Needs {
            affine: !batch.ensembles().is_empty(),
            head_rows: batch.is_decode() && !slots.is_empty(),
        };
        resident.fold(always, |all, resident| all | resident.needs)
    }

    pub(super) fn expect_resident(&self, op: &'static str, slot: u32) -> Result<()> {
        match self.slots.get(slot as usize) {
            Some(Some(_)) => Ok(()),
            Some(None) => Err(Error::EmptySlot { op, slot: slot as usize }),
            None => Err(Error::Index { op, what: "slot", index: slot as usize, limit: self.slots.len() }),
        }
    }

    /// Refuses ensembles that kernels cannot add.
    pub(super) fn expect_members(&self, op: &'static str, batch: &CudaBatch) -> Result<()> {
        for ensemble in batch.ensembles() {
            let mut ranks = 0;
            for &slot in ensemble.slots() {
                self.expect_resident(op, slot)?;
                let Some(resident) = &self.slots[slot as usize] else { continue };
                if !resident.is_sum {
                    return Err(Error::NoMember { op, slot: slot as usize });
                }
                ranks += resident.ranks;
            }
            if ranks > MAX_MEMBER_RANKS {
                return Err(Error::Index {
                    op,
                    what: "rank of an ensemble",
                    index: ranks - 1,
                    limit: MAX_MEMBER_RANKS,
                });
            }
        }
        Ok(())
    }

    /// Errors: without memory on the GPU, the slot is empty and nothing was begun.
    pub(super) fn load(
        &mut self,
        be: &CudaBackend,
        slot: u32,
        adapter: &Arc<CudaAdapter>,
        weights: &[&CudaWeight],
    ) -> Result<()> {
        self.unload(slot)?;
        let scaled = adapter.parts.iter().filter(|part| part.shape.has_magnitude);
        let scaled: Vec<_> =
            scaled.map(|part| Ok((part, self.weight_of(be, part, weights)?))).collect::<Result<_>>()?;
        let memory = PoolBuf::new(&be.copies, &be.stream, adapter.bytes(), "an adapter")?;
        let is_partial = |part: &Placed| be.ranks() > 1 && self.sites[part.shape.site].is_partial;
        let partial = scaled.iter().filter(|(part, _)| is_partial(part));
        let partial: Vec<_> =
            partial.map(|(part, weight)| (part.entry(memory.at()).gain, weight.outputs)).collect();
        let mut norms = PartialNorms::new(be, &partial)?;
        let copied = Event::new()?;
        // From here on nothing is allocated: a copy that has begun must not lose its memory to an error.
        for (at, piece) in adapter.memory.iter() {
            // SAFETY: the memory was just allocated on this stream; `Loading` keeps the source until the copy ended.
            unsafe { be.copies.copy_in(memory.at() + at as u64, piece)? };
        }
        if !scaled.is_empty() {
            // Weights are sent on the stream of the steps.
            let sent = Event::new()?;
            sent.record(&be.stream)?;
            be.copies.wait_for(&sent)?;
        }
        for (part, weight) in scaled {
            let entry = part.entry(memory.at());
            let squares = norms.as_ref().map_or(0, |norms| norms.squares_of(entry.gain));
            Self::launch_gains(be, &entry, squares, &weight)?;
        }
        norms.as_mut().map_or(Ok(()), |norms| norms.fetch(be))?;
        copied.record(&be.copies)?;
        let (adapter, abandoned) = (adapter.clone(), false);
        self.loading.push(Loading { slot, memory, adapter, copied, norms, abandoned });
        Ok(())
    }

    /// The base weight of a part's slice.
    fn weight_of(&self, be: &CudaBackend, part: &Placed, weights: &[&CudaWeight]) -> Result<Base> {
        let (op, LoraShape { site: index, slice, .. }) = ("load", part.shape);
        let (site, limit) = (&self.sites[index], weights.len());
        let weight = weights.get(index).ok_or(Error::Index { op, what: "weight of a site", index, limit })?;
        let columns = site.columns(slice);
        let at = weight.buffer.at() + (columns.start * site.inputs * be.dtype.size()) as u64;
        let base = match site.kind {
            SiteKind::Linear => Base { at, inputs: weight.inputs, outputs: columns.len(), lookup: false },
            SiteKind::Head => Base { at, inputs: weight.inputs, outputs: weight.outputs, lookup: false },
            SiteKind::Lookup => {
                // Norms are those over the adapter's vocabulary.
                let tokens = if part.shape.lora_rank > 0 { part.a_cols } else { weight.outputs };
                Base { at, inputs: tokens.min(weight.outputs), outputs: weight.inputs, lookup: true }
            }
        };
        if part.shape.lora_rank > 0 {
            expect(op, "columns of A", part.a_cols, base.inputs)?;
        }
        let last = columns.start + base.outputs;
        if !base.lookup && last > weight.outputs {
            return Err(Error::Index {
                op,
                what: "row of a site's weight",
                index: last - 1,
                limit: weight.outputs,
            });
        }
        expect(op, "inputs of a site's weight", base.inputs.min(site.inputs), base.inputs)?;
        expect(op, "outputs of a site's weight", base.outputs.min(columns.len()), base.outputs)?;
        Ok(base)
    }

    /// Turns an entry's magnitudes into gains, behind their copy, or computes the squares of the norms.
    fn launch_gains(be: &CudaBackend, entry: &LoraEntry, squares: u64, base: &Base) -> Result<()> {
        let (inputs, outputs, lookup) = (base.inputs as i32, base.outputs as i32, i32::from(base.lookup));
        let (elem, stream) = (ffi::elem(be.dtype), be.copies.raw());
        be.device.bind()?;
        // SAFETY: the weight's shape was checked; the adapter's memory was laid out for the same site.
        launched("load", unsafe {
            let (entry, gain) = (&raw const *entry, entry.gain);
            ffi::lorax_lora_gains(elem, entry, gain, squares, base.at, inputs, outputs, lookup, stream)
        })
    }

    /// Slots that became usable since the last call.
    pub(super) fn loaded(&mut self, be: &CudaBackend) -> Result<Vec<u32>> {
        be.device.bind()?;
        let mut ready = Vec::new();
        let mut still = Vec::new();
        for mut loading in self.loading.drain(..) {
            if !loading.copied.reached()? {
                still.push(loading);
            } else if !loading.abandoned {
                if loading.advance(be)? { ready.push(loading) } else { still.push(loading) }
            }
        }
        self.loading = still;
        let mut slots = Vec::with_capacity(ready.len());
        for Loading { slot, memory, adapter, .. } in ready {
            self.write_entries(be, slot, &adapter.parts, memory.at())?;
            self.slots[slot as usize] = Some(Resident::new(memory, &adapter));
            slots.push(slot);
        }
        Ok(slots)
    }

    /// Writes a slot's entries for an adapter at an address, behind the steps already launched.
    fn write_entries(&self, be: &CudaBackend, slot: u32, parts: &[Placed], at: u64) -> Result<()> {
        let stride = self.entry_stride();
        let mut entries = vec![[0; LoraEntry::WORDS]; stride];
        for part in parts {
            entries[part.slice] = part.entry(at).words();
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
