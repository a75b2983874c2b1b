//! The argument structs of launchers. The C side asserts the same layout.

use std::mem::{offset_of, size_of};

use crate::{DType, MAX_MEMBER_RANKS, MAX_MEMBERS, Segment};

/// Mirrors `NormArgs` in `norm.cuh`. A weight of 0 stands for no norm.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(in crate::cuda) struct NormArgs {
    pub(in crate::cuda) weight: u64,
    pub(in crate::cuda) bias: u64,
    pub(in crate::cuda) eps: f32,
    /// 0: RMS norm, else layer norm.
    pub(in crate::cuda) layer: i32,
}

/// Mirrors `SinkArgs` in `norm.cuh`: what becomes of products, or of their sums over the ranks.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(in crate::cuda) struct SinkArgs {
    pub(in crate::cuda) post: NormArgs,
    pub(in crate::cuda) next: NormArgs,
    pub(in crate::cuda) stream: u64,
    pub(in crate::cuda) y: u64,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) wide: i32,
}

impl SinkArgs {
    /// The part from a row of `cols` columns on. `dtype`: of y unless it is wide.
    pub(in crate::cuda) fn behind(self, row: usize, cols: usize, dtype: DType) -> SinkArgs {
        let size = if self.wide == 0 { dtype.size() } else { DType::F32.size() };
        let at =
            |address: u64, size: usize| if address == 0 { 0 } else { address + (row * cols * size) as u64 };
        SinkArgs { stream: at(self.stream, DType::F32.size()), y: at(self.y, size), ..self }
    }
}

/// `kMaxRanks` in `peers.cuh`.
pub(in crate::cuda) const MAX_RANKS: usize = 8;

/// Mirrors `PeerArgs` in `peers.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(in crate::cuda) struct PeerArgs {
    /// Addresses of the arenas, by rank.
    pub(in crate::cuda) arenas: [u64; MAX_RANKS],
    pub(in crate::cuda) control: u64,
    /// A `Host` in host memory.
    pub(in crate::cuda) host: u64,
    pub(in crate::cuda) box_bytes: u64,
    pub(in crate::cuda) rank: i32,
    pub(in crate::cuda) ranks: i32,
}

/// Mirrors `QkvArgs` in `rope.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(in crate::cuda) struct QkvArgs {
    pub(in crate::cuda) qkv: u64,
    pub(in crate::cuda) k: u64,
    pub(in crate::cuda) v: u64,
    pub(in crate::cuda) positions: u64,
    pub(in crate::cuda) store_at: u64,
    pub(in crate::cuda) lengths: u64,
    pub(in crate::cuda) table: u64,
    pub(in crate::cuda) inv_freq: u64,
    pub(in crate::cuda) query_norm: NormArgs,
    pub(in crate::cuda) key_norm: NormArgs,
    pub(in crate::cuda) rows: i32,
    pub(in crate::cuda) query_heads: i32,
    pub(in crate::cuda) kv_heads: i32,
    pub(in crate::cuda) dim: i32,
    pub(in crate::cuda) norm_span: i32,
    pub(in crate::cuda) pairs: i32,
    pub(in crate::cuda) neighbours: i32,
    pub(in crate::cuda) table_rows: i32,
    pub(in crate::cuda) stretch: i32,
    pub(in crate::cuda) original: u32,
    pub(in crate::cuda) factor: f32,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) clamp: f32,
    pub(in crate::cuda) unused: i32,
}

/// Mirrors `EmbedArgs` in `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(in crate::cuda) struct EmbedArgs {
    pub(in crate::cuda) tokens: u64,
    pub(in crate::cuda) last: u64,
    pub(in crate::cuda) positions: u64,
    pub(in crate::cuda) slots: u64,
    pub(in crate::cuda) table: u64,
    pub(in crate::cuda) learned: u64,
    pub(in crate::cuda) entries: u64,
    pub(in crate::cuda) ensembles: u64,
    pub(in crate::cuda) y: u64,
    pub(in crate::cuda) entry_stride: i32,
    pub(in crate::cuda) rows: i32,
    pub(in crate::cuda) cols: i32,
    pub(in crate::cuda) vocab: i32,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) unused: i32,
}

/// Mirrors `LoraEntry` in `lora.cuh`: what one adapter has at one slice of one site.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(in crate::cuda) struct LoraEntry {
    pub(in crate::cuda) a: u64,
    pub(in crate::cuda) b: u64,
    pub(in crate::cuda) gain: u64,
    pub(in crate::cuda) bias: u64,
    pub(in crate::cuda) ids: u64,
    pub(in crate::cuda) rows: u64,
    pub(in crate::cuda) lora_rank: u32,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) num_rows: u32,
    pub(in crate::cuda) a_cols: u32,
}

impl LoraEntry {
    /// Words of an entry on the device.
    pub(in crate::cuda) const WORDS: usize = size_of::<LoraEntry>() / 4;

    pub(in crate::cuda) fn words(self) -> [u32; Self::WORDS] {
        let mut words = [0; Self::WORDS];
        for (i, at) in [self.a, self.b, self.gain, self.bias, self.ids, self.rows].into_iter().enumerate() {
            (words[2 * i], words[2 * i + 1]) = (at as u32, (at >> 32) as u32);
        }
        words[12..].copy_from_slice(&[self.lora_rank, self.scale.to_bits(), self.num_rows, self.a_cols]);
        words
    }
}

/// Mirrors `Ensemble` in `lora.cuh`: adapters whose deltas are added.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(in crate::cuda) struct Ensemble {
    members: u32,
    slots: [u32; MAX_MEMBERS],
    weights: [f32; MAX_MEMBERS],
}

impl Ensemble {
    /// Words of an ensemble on the device.
    pub(in crate::cuda) const WORDS: usize = size_of::<Ensemble>() / 4;

    /// The ensemble of segments with the same rows, at most [`MAX_MEMBERS`].
    pub(in crate::cuda) fn new(members: &[Segment]) -> Ensemble {
        let mut ensemble = Ensemble { members: members.len() as u32, ..Ensemble::default() };
        for (i, member) in members.iter().enumerate() {
            (ensemble.slots[i], ensemble.weights[i]) = (member.slot, member.weight);
        }
        ensemble
    }

    pub(in crate::cuda) fn slots(&self) -> &[u32] {
        &self.slots[..self.members as usize]
    }

    pub(in crate::cuda) fn words(&self) -> [u32; Self::WORDS] {
        let mut words = [self.members; Self::WORDS];
        words[1..=MAX_MEMBERS].copy_from_slice(&self.slots);
        words[1 + MAX_MEMBERS..].copy_from_slice(&self.weights.map(f32::to_bits));
        words
    }
}

/// Mirrors `AttentionArgs` in `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(in crate::cuda) struct AttentionArgs {
    pub(in crate::cuda) qkv: u64,
    pub(in crate::cuda) y: u64,
    pub(in crate::cuda) k: u64,
    pub(in crate::cuda) v: u64,
    pub(in crate::cuda) items: u64,
    pub(in crate::cuda) num_items: u64,
    pub(in crate::cuda) blocks: u64,
    pub(in crate::cuda) partial_out: u64,
    pub(in crate::cuda) partial_scale: u64,
    pub(in crate::cuda) arrived: u64,
    pub(in crate::cuda) sinks: u64,
    pub(in crate::cuda) slopes: u64,
    pub(in crate::cuda) query_heads: i32,
    pub(in crate::cuda) kv_heads: i32,
    pub(in crate::cuda) dim: i32,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) softcap: f32,
    pub(in crate::cuda) window: i32,
    pub(in crate::cuda) causal: i32,
    pub(in crate::cuda) unused: i32,
}

/// `kMaxLoraRank` in `lora.cuh`.
pub(in crate::cuda) const MAX_LORA_RANK: usize = 512;
/// `kOutBlock` in `lora.cuh`.
pub(in crate::cuda) use crate::lora::blocks::OUT_BLOCK;
/// `kMaxOutputs` in `expand_norm_hopper.cu`.
pub(in crate::cuda) const MAX_NORMED: usize = 8192;
/// `kMaxSlices` in `lora.cuh`.
pub(in crate::cuda) const MAX_SLICES: usize = 4;

/// Mirrors `LoraArgs` in `lora.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(in crate::cuda) struct LoraArgs {
    pub(in crate::cuda) entries: u64,
    pub(in crate::cuda) ensembles: u64,
    pub(in crate::cuda) tiles: u64,
    pub(in crate::cuda) num_tiles: u64,
    pub(in crate::cuda) x: u64,
    pub(in crate::cuda) y: u64,
    pub(in crate::cuda) mid: u64,
    pub(in crate::cuda) parts: u64,
    pub(in crate::cuda) arrived: u64,
    pub(in crate::cuda) bias: u64,
    pub(in crate::cuda) entry_stride: i32,
    pub(in crate::cuda) rows: i32,
    pub(in crate::cuda) inputs: i32,
    pub(in crate::cuda) out_cols: i32,
    pub(in crate::cuda) slices: i32,
    pub(in crate::cuda) splits: i32,
    pub(in crate::cuda) base_cols: i32,
    pub(in crate::cuda) first_out: [i32; MAX_SLICES + 1],
}

/// Mirrors `LinearArgs` in `linear.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(in crate::cuda) struct LinearArgs {
    pub(in crate::cuda) x: u64,
    pub(in crate::cuda) w: u64,
    pub(in crate::cuda) bias: u64,
    pub(in crate::cuda) y: u64,
    pub(in crate::cuda) rows: i32,
    pub(in crate::cuda) inputs: i32,
    pub(in crate::cuda) outputs: i32,
    /// Not 0: added to what y, of f32, holds.
    pub(in crate::cuda) add: i32,
    /// Of the rows of y.
    pub(in crate::cuda) stride: i32,
    pub(in crate::cuda) unused: i32,
}

/// Mirrors `SampleArgs` in `sample.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(in crate::cuda) struct SampleArgs {
    pub(in crate::cuda) logits: u64,
    pub(in crate::cuda) rows: u64,
    pub(in crate::cuda) params: u64,
    pub(in crate::cuda) biases: u64,
    pub(in crate::cuda) seen: u64,
    pub(in crate::cuda) draws: u64,
    pub(in crate::cuda) last: u64,
    pub(in crate::cuda) scratch: u64,
    pub(in crate::cuda) masks: u64,
    pub(in crate::cuda) choices: u64,
    pub(in crate::cuda) tops: u64,
    pub(in crate::cuda) vocab: i32,
    pub(in crate::cuda) seen_stride: i32,
    pub(in crate::cuda) max_biases: i32,
    pub(in crate::cuda) max_top: i32,
    pub(in crate::cuda) mask_words: i32,
    pub(in crate::cuda) unused: i32,
}

// The same numbers are asserted in `csrc`.
const _: () = {
    assert!(size_of::<NormArgs>() == 24 && offset_of!(NormArgs, eps) == 16);
    assert!(size_of::<SinkArgs>() == 72 && offset_of!(SinkArgs, stream) == 48);
    assert!(size_of::<PeerArgs>() == 96 && offset_of!(PeerArgs, control) == 64);
    assert!(size_of::<QkvArgs>() == 168 && offset_of!(QkvArgs, query_norm) == 64);
    assert!(offset_of!(QkvArgs, rows) == 112);
    assert!(size_of::<EmbedArgs>() == 96 && offset_of!(EmbedArgs, entry_stride) == 72);
    assert!(size_of::<LoraEntry>() == 64 && offset_of!(LoraEntry, lora_rank) == 48);
    assert!(offset_of!(LoraEntry, num_rows) == 56);
    assert!(size_of::<Ensemble>() == 36 && MAX_LORA_RANK == MAX_MEMBER_RANKS);
    assert!(size_of::<AttentionArgs>() == 128 && offset_of!(AttentionArgs, query_heads) == 96);
    assert!(size_of::<LoraArgs>() == 128 && offset_of!(LoraArgs, entry_stride) == 80);
    assert!(offset_of!(LoraArgs, first_out) == 108);
    assert!(size_of::<LinearArgs>() == 56 && offset_of!(LinearArgs, rows) == 32);
    assert!(size_of::<SampleArgs>() == 112 && offset_of!(SampleArgs, vocab) == 88);
};
