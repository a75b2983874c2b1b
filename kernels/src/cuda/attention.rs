//! Launching rotary embeddings and attention.

use std::sync::Arc;

use super::{
    BACKEND, CudaBackend, CudaBatch, CudaKv, CudaMat, CudaRope,
    batch::Sizes,
    device::{Device, DeviceBuf},
    ffi, plan,
};
use crate::{Attention, BLOCK_SIZE, Error, Heads, Matrix, Result, RowSet};

/// Elements of all query heads that split decode rows have room for.
const MAX_QUERY_COLS: usize = 32768;
const MAX_QUERY_HEADS: usize = 512;

/// Head sizes with kernels of their own; others are padded to the next.
const LAUNCHERS: [(usize, ffi::AttentionLauncher); 4] = [
    (64, ffi::lorax_attention_64),
    (96, ffi::lorax_attention_96),
    (128, ffi::lorax_attention_128),
    (256, ffi::lorax_attention_256),
];

fn launcher(dim: usize) -> Option<ffi::AttentionLauncher> {
    LAUNCHERS.iter().find(|(size, _)| dim <= *size && dim.is_multiple_of(8)).map(|(_, launcher)| *launcher)
}

/// The largest heads of the kernel for Hopper.
const HOPPER_DIM: usize = 128;
/// Pairs of a row and a query head that one warpgroup of that kernel computes. It pays where pieces of prefill have as
/// many on average.
const HOPPER_PAIRS: usize = 64;

/// Whether a step's prefill is computed by the kernel for Hopper.
fn suits_hopper(be: &CudaBackend, heads: Heads, sizes: &Sizes) -> bool {
    let pairs = sizes.prefill_rows * (heads.query / heads.kv);
    be.hopper && heads.dim <= HOPPER_DIM && pairs >= sizes.prefill_items * HOPPER_PAIRS
}

/// Refuses heads that no kernel computes.
pub(super) fn check_heads(heads: Heads) -> Result<()> {
    let known = launcher(heads.dim).is_some() && heads.kv > 0 && heads.query.is_multiple_of(heads.kv);
    if !known || heads.query > MAX_QUERY_HEADS || heads.query * heads.dim > MAX_QUERY_COLS {
        return Err(Error::Unsupported { backend: BACKEND, what: format!("attention with {heads:?}") });
    }
    Ok(())
}

/// What the pieces of a split row leave for the last of them.
pub(super) struct Partials {
    out: DeviceBuf,
    scale: DeviceBuf,
    arrived: DeviceBuf,
}

impl Partials {
    pub(super) fn new(device: &Arc<Device>) -> Result<Partials> {
        let what = "parts of attention";
        let heads = plan::MAX_PARTIALS * MAX_QUERY_HEADS;
        Ok(Partials {
            out: DeviceBuf::new(device, plan::MAX_PARTIALS * MAX_QUERY_COLS * 4, what)?,
            scale: DeviceBuf::new(device, heads * 8, what)?,
            arrived: DeviceBuf::zeroed(device, heads * 4, what)?,
        })
    }
}

fn refuse_beyond(op: &'static str, what: &'static str, largest: Option<usize>, limit: usize) -> Result<()> {
    match largest {
        Some(index) if index >= limit => Err(Error::Index { op, what, index, limit }),
        _ => Ok(()),
    }
}

pub(super) fn rope_and_store(
    be: &CudaBackend,
    qkv: &mut CudaMat,
    rope: &CudaRope,
    batch: &CudaBatch,
    kv: &mut CudaKv,
) -> Result<()> {
    let (op, heads) = ("rope_and_store", kv.heads);
    qkv.expect_half(op)?;
    qkv.expect_cols(op, "columns of qkv", heads.qkv_cols())?;
    batch.expect_rows(op, RowSet::All, qkv.rows())?;
    super::memory::expect(op, "rotary pairs", rope.half, heads.dim / 2)?;
    refuse_beyond(op, "position", batch.largest.position, rope.positions)?;
    refuse_beyond(op, "place in KV memory", batch.largest.store_at, kv.blocks * BLOCK_SIZE)?;
    // SAFETY: shapes and indices were checked against what they point into.
    be.launch(op, qkv.rows(), |elem, stream| unsafe {
        ffi::lorax_rope_and_store(
            elem,
            qkv.at(),
            rope.buffer.at(),
            batch.at.positions,
            batch.at.store_at,
            kv.k(),
            kv.v(),
            qkv.rows() as i32,
            heads.query as i32,
            heads.kv as i32,
            heads.dim as i32,
            stream,
        )
    })
}

pub(super) fn paged_attention(
    be: &CudaBackend,
    qkv: &CudaMat,
    attention: &Attention,
    batch: &CudaBatch,
    (kv, y): (&CudaKv, &mut CudaMat),
) -> Result<()> {
    let (op, heads) = ("paged_attention", attention.heads);
    let launcher = launcher(heads.dim).filter(|_| heads == kv.heads);
    let launcher =
        launcher.ok_or(Error::Unsupported { backend: BACKEND, what: format!("{op} with {heads:?}") })?;
    qkv.expect_half(op)?;
    y.expect_half(op)?;
    qkv.expect_cols(op, "columns of qkv", heads.qkv_cols())?;
    y.expect_cols(op, "columns of y", heads.query * heads.dim)?;
    batch.expect_rows(op, RowSet::All, qkv.rows())?;
    refuse_beyond(op, "block", batch.largest.block, kv.blocks)?;
    y.resize(op, qkv.rows())?;
    let sizes = batch.sizes();
    let mut args = ffi::AttentionArgs {
        qkv: qkv.at(),
        y: y.at(),
        k: kv.k(),
        v: kv.v(),
        items: batch.at.decode_items,
        num_items: batch.at.num_decode_items(),
        blocks: batch.at.blocks,
        partial_out: be.partials.out.at(),
        partial_scale: be.partials.scale.at(),
        arrived: be.partials.arrived.at(),
        query_heads: heads.query as i32,
        kv_heads: heads.kv as i32,
        dim: heads.dim as i32,
        scale: attention.scale,
        softcap: attention.softcap.unwrap_or(0.0),
        window: attention.window.unwrap_or(0) as i32,
    };
    // SAFETY: shapes and blocks were checked; the plan has no more parts than there is room for.
    be.launch(op, sizes.decode_items, |elem, stream| unsafe {
        launcher(&raw const args, elem, 0, sizes.decode_items as i32, stream)
    })?;
    args.items = batch.at.prefill_items;
    args.num_items = batch.at.num_prefill_items();
    let (items, hopper) = (sizes.prefill_items as i32, suits_hopper(be, heads, &sizes));
    // SAFETY: as above; the kernel for Hopper is launched where it runs.
    be.launch(op, sizes.prefill_items, |elem, stream| unsafe {
        if hopper {
            ffi::lorax_attention_hopper(&raw const args, elem, items, stream)
        } else {
            launcher(&raw const args, elem, 1, items, stream)
        }
    })
}
