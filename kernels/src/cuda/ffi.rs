//! FFI: the launchers of `csrc`, and the argument structs that they share with it, whose layout both sides assert. Each
//! launcher returns 0 or the runtime's error.

use std::{
    ffi::c_void,
    mem::{offset_of, size_of},
};

use cudarc::driver::sys::CUstream;

use crate::{Activation, DType, MAX_MEMBER_RANKS, MAX_MEMBERS, Segment};

/// Mirrors `Elem` in `common.cuh`.
pub(super) fn elem(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
    }
}

/// Mirrors `Activation` in `rows.cu`.
pub(super) fn activation(f: Activation) -> i32 {
    match f {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
        Activation::Tanh => 4,
    }
}

/// Mirrors `NormArgs` in `norm.cuh`. A weight of 0 stands for no norm.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct NormArgs {
    pub(super) weight: u64,
    pub(super) bias: u64,
    pub(super) eps: f32,
    /// 0: RMS norm, else layer norm.
    pub(super) layer: i32,
}

/// Mirrors `SinkArgs` in `norm.cuh`: what becomes of products, or of their sums over the ranks.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct SinkArgs {
    pub(super) post: NormArgs,
    pub(super) next: NormArgs,
    pub(super) stream: u64,
    pub(super) y: u64,
    pub(super) scale: f32,
    pub(super) wide: i32,
}

impl SinkArgs {
    /// The part from a row of `cols` columns on. `dtype`: of y unless it is wide.
    pub(super) fn behind(self, row: usize, cols: usize, dtype: DType) -> SinkArgs {
        let size = if self.wide == 0 { dtype.size() } else { DType::F32.size() };
        let at =
            |address: u64, size: usize| if address == 0 { 0 } else { address + (row * cols * size) as u64 };
        SinkArgs { stream: at(self.stream, DType::F32.size()), y: at(self.y, size), ..self }
    }
}

/// `kMaxRanks` in `peers.cuh`.
pub(super) const MAX_RANKS: usize = 8;

/// Mirrors `PeerArgs` in `peers.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct PeerArgs {
    /// Addresses of the arenas, by rank.
    pub(super) arenas: [u64; MAX_RANKS],
    pub(super) control: u64,
    /// A `Host` in host memory.
    pub(super) host: u64,
    pub(super) box_bytes: u64,
    pub(super) rank: i32,
    pub(super) ranks: i32,
}

/// Mirrors `QkvArgs` in `rope.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct QkvArgs {
    pub(super) qkv: u64,
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) positions: u64,
    pub(super) store_at: u64,
    pub(super) lengths: u64,
    pub(super) table: u64,
    pub(super) inv_freq: u64,
    pub(super) query_norm: NormArgs,
    pub(super) key_norm: NormArgs,
    pub(super) rows: i32,
    pub(super) query_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) dim: i32,
    pub(super) norm_span: i32,
    pub(super) pairs: i32,
    pub(super) neighbours: i32,
    pub(super) table_rows: i32,
    pub(super) stretch: i32,
    pub(super) original: u32,
    pub(super) factor: f32,
    pub(super) scale: f32,
    pub(super) clamp: f32,
    pub(super) unused: i32,
}

/// Mirrors `EmbedArgs` in `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct EmbedArgs {
    pub(super) tokens: u64,
    pub(super) last: u64,
    pub(super) positions: u64,
    pub(super) slots: u64,
    pub(super) table: u64,
    pub(super) learned: u64,
    pub(super) entries: u64,
    pub(super) ensembles: u64,
    pub(super) y: u64,
    pub(super) entry_stride: i32,
    pub(super) rows: i32,
    pub(super) cols: i32,
    pub(super) vocab: i32,
    pub(super) scale: f32,
    pub(super) unused: i32,
}

/// Mirrors `LoraEntry` in `lora.cuh`: what one adapter has at one slice of one site.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct LoraEntry {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) gain: u64,
    pub(super) bias: u64,
    pub(super) ids: u64,
    pub(super) rows: u64,
    pub(super) lora_rank: u32,
    pub(super) scale: f32,
    pub(super) num_rows: u32,
    pub(super) a_cols: u32,
}

impl LoraEntry {
    /// Words of an entry on the device.
    pub(super) const WORDS: usize = size_of::<LoraEntry>() / 4;

    pub(super) fn words(self) -> [u32; Self::WORDS] {
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
pub(super) struct Ensemble {
    members: u32,
    slots: [u32; MAX_MEMBERS],
    weights: [f32; MAX_MEMBERS],
}

impl Ensemble {
    /// Words of an ensemble on the device.
    pub(super) const WORDS: usize = size_of::<Ensemble>() / 4;

    /// The ensemble of segments with the same rows, at most [`MAX_MEMBERS`].
    pub(super) fn new(members: &[Segment]) -> Ensemble {
        let mut ensemble = Ensemble { members: members.len() as u32, ..Ensemble::default() };
        for (i, member) in members.iter().enumerate() {
            (ensemble.slots[i], ensemble.weights[i]) = (member.slot, member.weight);
        }
        ensemble
    }

    pub(super) fn slots(&self) -> &[u32] {
        &self.slots[..self.members as usize]
    }

    pub(super) fn words(&self) -> [u32; Self::WORDS] {
        let mut words = [self.members; Self::WORDS];
        words[1..=MAX_MEMBERS].copy_from_slice(&self.slots);
        words[1 + MAX_MEMBERS..].copy_from_slice(&self.weights.map(f32::to_bits));
        words
    }
}

/// Mirrors `AttentionArgs` in `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AttentionArgs {
    pub(super) qkv: u64,
    pub(super) y: u64,
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) items: u64,
    pub(super) num_items: u64,
    pub(super) blocks: u64,
    pub(super) partial_out: u64,
    pub(super) partial_scale: u64,
    pub(super) arrived: u64,
    pub(super) sinks: u64,
    pub(super) slopes: u64,
    pub(super) query_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) dim: i32,
    pub(super) scale: f32,
    pub(super) softcap: f32,
    pub(super) window: i32,
    pub(super) causal: i32,
    pub(super) unused: i32,
}

/// `kMaxLoraRank` in `lora.cuh`.
pub(super) const MAX_LORA_RANK: usize = 512;
/// `kOutBlock` in `lora.cuh`.
pub(super) use crate::lora::blocks::OUT_BLOCK;
/// `kMaxOutputs` in `expand_norm_hopper.cu`.
pub(super) const MAX_NORMED: usize = 8192;
/// `kMaxSlices` in `lora.cuh`.
pub(super) const MAX_SLICES: usize = 4;

/// Mirrors `LoraArgs` in `lora.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LoraArgs {
    pub(super) entries: u64,
    pub(super) ensembles: u64,
    pub(super) tiles: u64,
    pub(super) num_tiles: u64,
    pub(super) x: u64,
    pub(super) y: u64,
    pub(super) mid: u64,
    pub(super) parts: u64,
    pub(super) arrived: u64,
    pub(super) bias: u64,
    pub(super) entry_stride: i32,
    pub(super) rows: i32,
    pub(super) inputs: i32,
    pub(super) out_cols: i32,
    pub(super) slices: i32,
    pub(super) splits: i32,
    pub(super) base_cols: i32,
    pub(super) first_out: [i32; MAX_SLICES + 1],
}

/// Mirrors `LinearArgs` in `linear.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LinearArgs {
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) bias: u64,
    pub(super) y: u64,
    pub(super) rows: i32,
    pub(super) inputs: i32,
    pub(super) outputs: i32,
    /// Not 0: added to what y, of f32, holds.
    pub(super) add: i32,
    /// Of the rows of y.
    pub(super) stride: i32,
    pub(super) unused: i32,
}

/// Mirrors `SampleArgs` in `sample.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SampleArgs {
    pub(super) logits: u64,
    pub(super) rows: u64,
    pub(super) params: u64,
    pub(super) biases: u64,
    pub(super) seen: u64,
    pub(super) draws: u64,
    pub(super) last: u64,
    pub(super) scratch: u64,
    pub(super) masks: u64,
    pub(super) choices: u64,
    pub(super) tops: u64,
    pub(super) vocab: i32,
    pub(super) seen_stride: i32,
    pub(super) max_biases: i32,
    pub(super) max_top: i32,
    pub(super) mask_words: i32,
    pub(super) unused: i32,
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

unsafe extern "C" {
    pub(super) fn lorax_embed(args: *const EmbedArgs, elem: i32, stream: CUstream) -> i32;
    pub(super) fn lorax_gather(
        elem: i32,
        x: u64,
        from: u64,
        y: u64,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_activate(
        elem: i32,
        f: i32,
        gated: i32,
        x: u64,
        y: u64,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_fill_logits(y: u64, rows: i32, first: i32, cols: i32, stream: CUstream) -> i32;
    pub(super) fn lorax_shape_logits(
        y: u64,
        scale: f32,
        cap: f32,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_add_bias(
        elem: i32,
        wide: i32,
        y: u64,
        bias: u64,
        rows: i32,
        cols: i32,
        stride: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_normalize(
        elem: i32,
        wide: i32,
        x: u64,
        norm: *const NormArgs,
        y: u64,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_normalize_stream(
        elem: i32,
        wide: i32,
        x: u64,
        norm: *const NormArgs,
        y: u64,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_add_norm(
        elem: i32,
        x: u64,
        to: *const SinkArgs,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_rope_table(
        inv_freq: u64,
        table: u64,
        positions: i32,
        half: i32,
        scale: f32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_rope_and_store(args: *const QkvArgs, elem: i32, stream: CUstream) -> i32;
    pub(super) fn lorax_lora_shrink(
        args: *const LoraArgs,
        elem: i32,
        max_tiles: i32,
        tile_rows: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_lora_expand(
        args: *const LoraArgs,
        elem: i32,
        wide: i32,
        affine: i32,
        max_tiles: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_lora_expand_silu_mul(
        args: *const LoraArgs,
        act: u64,
        elem: i32,
        affine: i32,
        tiles: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_lora_replace_rows(
        args: *const LoraArgs,
        elem: i32,
        wide: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_lora_gains(
        elem: i32,
        entry: *const LoraEntry,
        gain: u64,
        squares: u64,
        w: u64,
        inputs: i32,
        outputs: i32,
        lookup: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_lora_divide_gains(gain: u64, squares: u64, outputs: i32, stream: CUstream) -> i32;
    pub(super) fn lorax_sample(
        args: *const SampleArgs,
        elem: i32,
        wide: i32,
        rows: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_score(
        args: *const SampleArgs,
        elem: i32,
        wide: i32,
        rows: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_mark_seen(
        seen: u64,
        tokens: u64,
        count: i32,
        generated: i32,
        vocab: i32,
        stream: CUstream,
    ) -> i32;
}

/// A launcher of the product of few rows; `lora` may be null. Arguments: both, the element type, whether y is f32, tiles
/// of deltas, the stream.
pub(super) type LinearLauncher =
    unsafe extern "C" fn(*const LinearArgs, *const LoraArgs, i32, i32, i32, CUstream) -> i32;

unsafe extern "C" {
    pub(super) fn lorax_skinny(
        args: *const LinearArgs,
        lora: *const LoraArgs,
        elem: i32,
        wide: i32,
        max_tiles: i32,
        stream: CUstream,
    ) -> i32;
    /// Up to 64 rows.
    pub(super) fn lorax_linear_hopper(
        args: *const LinearArgs,
        lora: *const LoraArgs,
        elem: i32,
        wide: i32,
        max_tiles: i32,
        stream: CUstream,
    ) -> i32;
}

/// A launcher of attention for one head size. Arguments: the struct, the element type, whether items are those of
/// prefill, the most rows of one where they are not, items, the stream.
pub(super) type AttentionLauncher =
    unsafe extern "C" fn(*const AttentionArgs, i32, i32, i32, i32, CUstream) -> i32;

unsafe extern "C" {
    pub(super) fn lorax_attention_64(
        a: *const AttentionArgs,
        elem: i32,
        prefill: i32,
        max_rows: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
    pub(super) fn lorax_attention_96(
        a: *const AttentionArgs,
        elem: i32,
        prefill: i32,
        max_rows: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
    pub(super) fn lorax_attention_128(
        a: *const AttentionArgs,
        elem: i32,
        prefill: i32,
        max_rows: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
    pub(super) fn lorax_attention_256(
        a: *const AttentionArgs,
        elem: i32,
        prefill: i32,
        max_rows: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
    /// Merges the parts of split prefill items.
    pub(super) fn lorax_attention_merge(
        a: *const AttentionArgs,
        elem: i32,
        max_rows: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
}

// Of several ranks.
unsafe extern "C" {
    /// Sums x over the ranks, in one shot or two.
    pub(super) fn lorax_reduce(
        peers: *const PeerArgs,
        to: *const SinkArgs,
        elem: i32,
        x: u64,
        rows: i32,
        cols: i32,
        shots: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_gather_columns(
        peers: *const PeerArgs,
        x: u64,
        y: u64,
        rows: i32,
        share: i32,
        last: i32,
        stream: CUstream,
    ) -> i32;
    /// f32 to `elem`, or the other way if `widen` is not 0.
    pub(super) fn lorax_convert(elem: i32, widen: i32, x: u64, y: u64, count: usize, stream: CUstream)
    -> i32;
    pub(super) fn lorax_join_columns(
        x: u64,
        y: u64,
        rows: i32,
        share: i32,
        last: i32,
        parts: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_pad_columns(
        x: u64,
        y: u64,
        rows: i32,
        cols: i32,
        width: i32,
        stream: CUstream,
    ) -> i32;
    /// As [`lorax_expand_norm_hopper`], with the sums over the ranks.
    pub(super) fn lorax_expand_norm_ranks_hopper(
        args: *const LoraArgs,
        peers: *const PeerArgs,
        products: u64,
        w: u64,
        eps: f32,
        y: u64,
        elem: i32,
        max_tiles: i32,
        tile_rows: i32,
        stream: CUstream,
    ) -> i32;
}

unsafe extern "C" {
    /// Adds the deltas of one slice to y, of f32, and norms it. `products`: 0, or what is added to y with them.
    pub(super) fn lorax_expand_norm_hopper(
        args: *const LoraArgs,
        products: u64,
        w: u64,
        eps: f32,
        y: u64,
        elem: i32,
        max_tiles: i32,
        tile_rows: i32,
        stream: CUstream,
    ) -> i32;
    /// Whether the current device runs the kernels whose names end in `_hopper`.
    pub(super) fn lorax_is_hopper() -> i32;
    /// Prefill with heads of up to 128.
    pub(super) fn lorax_attention_hopper(a: *const AttentionArgs, elem: i32, items: i32, s: CUstream) -> i32;
}

/// Where `c_void` pointers of a library take device addresses.
pub(super) fn pointer(at: u64) -> *mut c_void {
    at as *mut c_void
}
