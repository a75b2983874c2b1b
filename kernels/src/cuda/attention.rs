//! Launching RoPE and attention.

use std::sync::Arc;

use super::{
    BACKEND, CudaBackend, CudaBatch, CudaKv, CudaMat, CudaVector,
    batch::SpanSizes,
    device::{Device, DeviceBuf},
    ffi,
    memory::expect,
    norm, plan, unsupported,
};
use crate::{Attention, BLOCK_SIZE, Error, Heads, Matrix, NormSpan, Pairs, Qkv, Result, RowSet, Span};

/// Elements of all query heads, and query heads, that attention is planned for.
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

/// Whether a step's prefill is computed by the kernel for Hopper, which has no ALiBi.
fn suits_hopper(be: &CudaBackend, by: &Attention<'_, CudaBackend>, sizes: &SpanSizes) -> bool {
    let heads = by.shape.heads;
    let pairs = sizes.prefill_rows * (heads.query / heads.kv);
    let full = pairs >= sizes.whole_items * HOPPER_PAIRS;
    be.hopper && by.slopes.is_none() && heads.dim <= HOPPER_DIM && full
}

/// Refuses heads that no kernel computes.
pub(super) fn check_heads(heads: Heads) -> Result<()> {
    let known = launcher(heads.dim).is_some() && heads.kv > 0 && heads.query.is_multiple_of(heads.kv);
    if !known || heads.query > MAX_QUERY_HEADS || heads.query * heads.dim > MAX_QUERY_COLS {
        return Err(Error::Unsupported { backend: BACKEND, what: format!("attention with {heads:?}") });
    }
    Ok(())
}

/// What the parts of split items leave until they are merged.
pub(super) struct Partials {
    out: DeviceBuf,
    scale: DeviceBuf,
    arrived: DeviceBuf,
}

impl Partials {
    pub(super) fn new(device: &Arc<Device>) -> Result<Partials> {
        let what = "parts of attention";
        Ok(Partials {
            out: DeviceBuf::new(device, plan::PART_ELEMENTS * 4, what)?,
            scale: DeviceBuf::new(device, plan::PART_PAIRS * 8, what)?,
            arrived: DeviceBuf::zeroed(device, plan::PART_PAIRS * 4, what)?,
        })
    }
}

/// Refuses more parts than there is room for: the plan was made for other heads.
fn expect_room(heads: Heads, parts: usize) -> Result<()> {
    let pairs = parts * heads.query;
    if pairs <= plan::PART_PAIRS && pairs * heads.dim <= plan::PART_ELEMENTS {
        return Ok(());
    }
    Err(unsupported(format!("splitting attention with {heads:?} into {parts} rows")))
}

fn refuse_beyond(op: &'static str, what: &'static str, largest: Option<usize>, limit: usize) -> Result<()> {
    match largest {
        Some(index) if index >= limit => Err(Error::Index { op, what, index, limit }),
        _ => Ok(()),
    }
}

/// The arguments of the norms of queries and keys, and `NormSpan` in `rope.cu`.
fn qk_norms(op: &'static str, by: &Qkv<'_, CudaBackend>) -> Result<(ffi::NormArgs, ffi::NormArgs, i32)> {
    let Some(norms) = &by.norms else { return Ok(Default::default()) };
    let Heads { query, kv, dim } = by.heads;
    let (shared, own, row) = (0, 1, 2);
    let span = match norms.over {
        NormSpan::Head if norms.query.weight.len == dim && norms.key.weight.len == dim => shared,
        NormSpan::Head => own,
        NormSpan::Row => row,
    };
    let [query, kv] = if span == shared { [dim; 2] } else { [query * dim, kv * dim] };
    Ok((norm::args(op, &norms.query, query)?, norm::args(op, &norms.key, kv)?, span))
}

pub(super) fn rope_and_store(
    be: &CudaBackend,
    qkv: &mut CudaMat,
    by: Qkv<'_, CudaBackend>,
    batch: &CudaBatch,
    kv: &mut CudaKv,
) -> Result<()> {
    let (op, heads) = ("rope_and_store", kv.heads);
    if by.heads != heads {
        return Err(unsupported(format!("storing {:?} in memory for {heads:?}", by.heads)));
    }
    qkv.expect_half(op)?;
    qkv.expect_cols(op, "columns of qkv", heads.qkv_cols())?;
    batch.expect_rows(op, RowSet::All, qkv.rows())?;
    refuse_beyond(op, "place in KV memory", batch.largest.store_at, kv.blocks * BLOCK_SIZE)?;
    let (query_norm, key_norm, norm_span) = qk_norms(op, &by)?;
    let mut args = ffi::QkvArgs {
        qkv: qkv.at(),
        k: kv.k(),
        v: kv.v(),
        positions: batch.at.positions,
        store_at: batch.at.store_at,
        lengths: batch.at.lengths,
        table: 0,
        inv_freq: 0,
        query_norm,
        key_norm,
        rows: qkv.rows() as i32,
        query_heads: heads.query as i32,
        kv_heads: heads.kv as i32,
        dim: heads.dim as i32,
        norm_span,
        pairs: 0,
        neighbours: 0,
        table_rows: 0,
        stretch: 0,
        original: 0,
        factor: 1.0,
        scale: 1.0,
        clamp: by.clamp.unwrap_or(f32::INFINITY),
        unused: 0,
    };
    if let Some(rotation) = by.rope {
        let rope = rotation.table;
        refuse_beyond(op, "position", batch.largest.position, rope.positions)?;
        refuse_beyond(op, "rotary pairs", Some(rope.pairs), heads.dim / 2 + 1)?;
        args = ffi::QkvArgs {
            table: rope.table.at(),
            inv_freq: rope.inv_freq.buffer.at(),
            pairs: rope.pairs as i32,
            neighbours: i32::from(rotation.pairs == Pairs::Neighbours),
            table_rows: rope.positions as i32,
            stretch: rope.stretch,
            original: rope.original,
            factor: rope.factor,
            scale: rope.scale,
            ..args
        };
    }
    // SAFETY: shapes and indices were checked against what they point into.
    be.launch(op, qkv.rows(), |elem, stream| unsafe {
        ffi::lorax_rope_and_store(&raw const args, elem, stream)
    })
}

/// The address of a vector with an element for every query head, or 0.
fn by_head(what: &'static str, vector: Option<&CudaVector>, heads: Heads) -> Result<u64> {
    let Some(vector) = vector else { return Ok(0) };
    expect("paged_attention", what, vector.len, heads.query)?;
    Ok(vector.buffer.at())
}

pub(super) fn paged_attention(
    be: &CudaBackend,
    qkv: &CudaMat,
    by: Attention<'_, CudaBackend>,
    batch: &CudaBatch,
    kv: &CudaKv,
    y: &mut CudaMat,
) -> Result<()> {
    let (op, shape) = ("paged_attention", by.shape);
    let heads = shape.heads;
    let launcher = launcher(heads.dim).filter(|_| heads == kv.heads);
    let launcher = launcher.ok_or_else(|| unsupported(format!("{op} with {heads:?}")))?;
    let span = batch.span(shape.span)?;
    qkv.expect_half(op)?;
    y.expect_half(op)?;
    qkv.expect_cols(op, "columns of qkv", heads.qkv_cols())?;
    y.expect_cols(op, "columns of y", heads.query * heads.dim)?;
    batch.expect_rows(op, RowSet::All, qkv.rows())?;
    refuse_beyond(op, "block", batch.largest.blocks[span], kv.blocks)?;
    let sizes = batch.sizes().spans[span];
    expect_room(heads, sizes.few_parts.max(sizes.prefill_parts))?;
    y.resize(op, qkv.rows())?;
    let mut args = ffi::AttentionArgs {
        qkv: qkv.at(),
        y: y.at(),
        k: kv.k(),
        v: kv.v(),
        items: batch.at.few_items[span],
        num_items: batch.at.num_few_items(span),
        blocks: batch.at.blocks,
        partial_out: be.partials.out.at(),
        partial_scale: be.partials.scale.at(),
        arrived: be.partials.arrived.at(),
        sinks: by_head("sinks", by.sinks, heads)?,
        slopes: by_head("slopes", by.slopes, heads)?,
        query_heads: heads.query as i32,
        kv_heads: heads.kv as i32,
        dim: heads.dim as i32,
        scale: shape.scale,
        softcap: shape.softcap.unwrap_or(0.0),
        window: if let Span::Window(window) = shape.span { window as i32 } else { 0 },
        causal: i32::from(shape.span != Span::Bidirectional),
        unused: 0,
    };
    // SAFETY: shapes, blocks and the room for parts were checked.
    be.launch(op, sizes.few_items, |elem, stream| unsafe {
        launcher(&raw const args, elem, 0, sizes.few_rows as i32, sizes.few_items as i32, stream)
    })?;
    args.items = batch.at.prefill_items[span];
    args.num_items = batch.at.num_prefill_items(span);
    let (items, hopper) = (sizes.prefill_items as i32, suits_hopper(be, &by, &sizes));
    // SAFETY: as above; the kernel for Hopper is launched where it runs.
    be.launch(op, sizes.prefill_items, |elem, stream| unsafe {
        if hopper {
            ffi::lorax_attention_hopper(&raw const args, elem, items, stream)
        } else {
            launcher(&raw const args, elem, 1, 0, items, stream)
        }
    })?;
    // SAFETY: as above.
    be.launch(op, sizes.prefill_parts, |elem, stream| unsafe {
        ffi::lorax_attention_merge(&raw const args, elem, sizes.most_prefill_rows as i32, items, stream)
    })
}
