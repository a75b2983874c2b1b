//! The launchers of `csrc`, and the argument structs that they share with it. Each returns 0 or the runtime's error.

use std::ffi::c_void;

use cudarc::driver::sys::CUstream;

use crate::DType;

/// Mirrors `Elem` in `common.cuh`.
pub(super) fn elem(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
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
    pub(super) query_heads: i32,
    pub(super) kv_heads: i32,
    pub(super) dim: i32,
    pub(super) scale: f32,
    pub(super) softcap: f32,
    pub(super) window: i32,
}

/// `kMaxLoraRank` in `lora.cuh`.
pub(super) const MAX_LORA_RANK: usize = 512;
/// `kOutBlock` in `lora.cuh`.
pub(super) const OUT_BLOCK: usize = 64;
/// `kMaxOutputs` in `expand_norm_hopper.cu`.
pub(super) const MAX_NORMED: usize = 8192;
/// `kMaxSlices` in `lora.cuh`.
pub(super) const MAX_SLICES: usize = 4;

/// Mirrors `LoraArgs` in `lora.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LoraArgs {
    pub(super) entries: u64,
    pub(super) tiles: u64,
    pub(super) num_tiles: u64,
    pub(super) x: u64,
    pub(super) y: u64,
    pub(super) mid: u64,
    pub(super) parts: u64,
    pub(super) arrived: u64,
    pub(super) entry_stride: i32,
    pub(super) rows: i32,
    pub(super) inputs: i32,
    pub(super) out_cols: i32,
    pub(super) slices: i32,
    pub(super) splits: i32,
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
    pub(super) choices: u64,
    pub(super) tops: u64,
    pub(super) vocab: i32,
    pub(super) seen_stride: i32,
    pub(super) max_biases: i32,
    pub(super) max_top: i32,
}

unsafe extern "C" {
    pub(super) fn lorax_embed(
        elem: i32,
        tokens: u64,
        last: u64,
        table: u64,
        y: u64,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_gather(
        elem: i32,
        x: u64,
        from: u64,
        y: u64,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_silu_mul(elem: i32, x: u64, y: u64, rows: i32, cols: i32, stream: CUstream) -> i32;
    pub(super) fn lorax_add_bias(
        elem: i32,
        wide: i32,
        y: u64,
        bias: u64,
        rows: i32,
        cols: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_rms_norm(
        elem: i32,
        x: u64,
        w: u64,
        y: u64,
        rows: i32,
        cols: i32,
        eps: f32,
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
    pub(super) fn lorax_rope_and_store(
        elem: i32,
        qkv: u64,
        table: u64,
        positions: u64,
        store_at: u64,
        k: u64,
        v: u64,
        rows: i32,
        query_heads: i32,
        kv_heads: i32,
        dim: i32,
        stream: CUstream,
    ) -> i32;
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
        max_tiles: i32,
        stream: CUstream,
    ) -> i32;
    pub(super) fn lorax_lora_expand_silu_mul(
        args: *const LoraArgs,
        act: u64,
        elem: i32,
        tiles: i32,
        stream: CUstream,
    ) -> i32;
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

/// A launcher of attention for one head size.
pub(super) type AttentionLauncher =
    unsafe extern "C" fn(*const AttentionArgs, i32, i32, i32, CUstream) -> i32;

unsafe extern "C" {
    pub(super) fn lorax_attention_64(
        a: *const AttentionArgs,
        elem: i32,
        prefill: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
    pub(super) fn lorax_attention_96(
        a: *const AttentionArgs,
        elem: i32,
        prefill: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
    pub(super) fn lorax_attention_128(
        a: *const AttentionArgs,
        elem: i32,
        prefill: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
    pub(super) fn lorax_attention_256(
        a: *const AttentionArgs,
        elem: i32,
        prefill: i32,
        items: i32,
        s: CUstream,
    ) -> i32;
}

unsafe extern "C" {
    /// Adds the deltas of one slice to y, of f32, and norms it.
    pub(super) fn lorax_expand_norm_hopper(
        args: *const LoraArgs,
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
