//! FFI: the launchers of `csrc`, and the argument structs that they share with it, whose layout both sides assert. Each
//! launcher returns 0 or the runtime's error.

mod args;

use std::ffi::c_void;

use cudarc::driver::sys::CUstream;

pub(super) use args::*;

use crate::{Activation, DType};

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
