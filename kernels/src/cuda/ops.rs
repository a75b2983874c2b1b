//! The operations of a step: checks of their arguments, and launches.

use std::sync::Arc;

use super::{
    CudaBackend, CudaBatch, CudaKv, CudaMat, CudaSampler, CudaSlots, CudaWeight, attention, batch, ffi, gemm,
    linear, norm,
};
use crate::{
    Activation, Attention, CapturedStep, Embedding, Error, Group, LinearLora, LogitShape, Matrix, Norm, Ops,
    Output, Projection, Qkv, Result, RowSet, SiteKind,
};

/// What adapters change of a table.
#[derive(Default)]
struct Changes {
    /// Where the kernel finds the entries of the table's site, and how many a slot has; 0 if no row has an adapter.
    entries: u64,
    entry_stride: i32,
    /// Tokens that there may be rows for.
    tokens: usize,
}

fn changes_of(lora: &LinearLora<'_, CudaBackend>, table: &CudaWeight) -> Result<Changes> {
    let (op, slots, batch) = ("embed", lora.slots, lora.batch);
    let limit = slots.sites.len();
    let site =
        slots.sites.get(lora.site).ok_or(Error::Index { op, what: "site", index: lora.site, limit })?;
    for (what, got, expected) in [
        ("sites of a table", usize::from(site.kind == SiteKind::Lookup), 1),
        ("outputs of the site", site.outputs.iter().sum(), table.inputs),
        ("inputs of the site", site.inputs.max(table.outputs), site.inputs),
    ] {
        super::memory::expect(op, what, got, expected)?;
    }
    for &slot in batch.slots(RowSet::All) {
        slots.expect_resident(op, slot)?;
    }
    let (tiles, ..) = batch.tiles(RowSet::All);
    if tiles == 0 {
        return Ok(Changes { tokens: table.outputs, ..Changes::default() });
    }
    let (entries, entry_stride) = (slots.entries_at(lora.site), slots.entry_stride() as i32);
    Ok(Changes { entries, entry_stride, tokens: site.inputs })
}

/// `y = f(x)`, or `y = f(gate) · up` where x has both side by side.
fn activate(be: &CudaBackend, x: &CudaMat, f: Activation, gated: bool, y: &mut CudaMat) -> Result<()> {
    let op = if gated { "gate" } else { "activate" };
    x.expect_half(op)?;
    y.expect_half(op)?;
    x.expect_cols(op, "columns of x", if gated { 2 * y.cols() } else { y.cols() })?;
    y.resize(op, x.rows())?;
    let (f, rows, cols) = (ffi::activation(f), y.rows() as i32, y.cols() as i32);
    // SAFETY: shapes were checked.
    be.launch(op, y.rows(), |elem, stream| unsafe {
        ffi::lorax_activate(elem, f, i32::from(gated), x.at(), y.at(), rows, cols, stream)
    })
}

impl Ops for CudaBackend {
    fn step(
        &self,
        batch: &CudaBatch,
        slots: Option<&CudaSlots>,
        ops: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.device.bind()?;
        let affine = slots.is_some_and(|slots| slots.needs(batch).affine);
        self.graphs.step(&self.stream, batch, batch.graph_key(affine), ops)
    }

    fn captured_steps(&self) -> Vec<CapturedStep> {
        if self.graphs.is_enabled() { batch::captured_steps() } else { Vec::new() }
    }

    fn warm_up_rows(&self, max_rows: usize) -> Vec<usize> {
        if self.gemm.is_learning() { gemm::classes(max_rows) } else { Vec::new() }
    }

    fn embed(
        &self,
        batch: &CudaBatch,
        sampler: &CudaSampler,
        by: Embedding<'_, Self>,
        y: &mut CudaMat,
    ) -> Result<()> {
        let (op, table) = ("embed", by.table);
        y.expect_wide(op)?;
        y.expect_cols(op, "columns of y", table.inputs)?;
        let changes = by.lora.map(|lora| changes_of(&lora, table)).transpose()?;
        let unchanged = Changes { tokens: table.outputs, ..Changes::default() };
        let Changes { entries, entry_stride, tokens } = changes.unwrap_or(unchanged);
        let largest = batch.largest;
        let mut indices = vec![("token", largest.token, tokens), ("seat", largest.seat, sampler.seats)];
        let mut learned = 0;
        if let Some((positions, first)) = by.positions {
            super::memory::expect(op, "columns of the positions", positions.inputs, table.inputs)?;
            indices.push(("position", largest.position.map(|last| first + last), positions.outputs));
            learned = positions.buffer.at() + (first * positions.inputs * self.dtype.size()) as u64;
        }
        for (what, largest, limit) in indices {
            if let Some(index) = largest.filter(|&index| index >= limit) {
                return Err(Error::Index { op, what, index, limit });
            }
        }
        y.resize(op, batch.rows_within(RowSet::All, y.capacity()))?;
        let args = ffi::EmbedArgs {
            tokens: batch.at.tokens,
            last: sampler.last.at(),
            positions: batch.at.positions,
            slots: batch.at.slots,
            table: table.buffer.at(),
            learned,
            entries,
            ensembles: batch.ensembles_at(),
            y: y.at(),
            entry_stride,
            rows: y.rows() as i32,
            cols: y.cols() as i32,
            vocab: table.outputs as i32,
            scale: by.scale,
            unused: 0,
        };
        // SAFETY: shapes and the largest indices were checked.
        self.launch(op, y.rows(), |elem, stream| unsafe { ffi::lorax_embed(&raw const args, elem, stream) })
    }

    fn linear(&self, x: &CudaMat, by: Projection<'_, Self>, out: Output<'_, Self>) -> Result<()> {
        linear::linear(self, x, by, out)
    }

    fn matmul(&self, x: &CudaMat, by: Projection<'_, Self>, y: &mut CudaMat) -> Result<()> {
        linear::matmul(self, x, by, y)
    }

    fn matmul_add(&self, x: &CudaMat, by: Projection<'_, Self>, y: &mut CudaMat) -> Result<()> {
        linear::matmul_add(self, x, by, y)
    }

    fn add(&self, x: &CudaMat, post: Option<Norm<'_, Self>>, scale: f32, stream: &mut CudaMat) -> Result<()> {
        norm::add(self, x, norm::Added { post, scale, stream, next: None })
    }

    fn normalize(&self, x: &CudaMat, norm: Norm<'_, Self>, y: &mut CudaMat) -> Result<()> {
        norm::normalize(self, x, &norm, y)
    }

    fn normalize_stream(&self, stream: &mut CudaMat, norm: Norm<'_, Self>, y: &mut CudaMat) -> Result<()> {
        norm::normalize_stream(self, stream, &norm, y)
    }

    fn activate(&self, x: &CudaMat, f: Activation, y: &mut CudaMat) -> Result<()> {
        activate(self, x, f, false, y)
    }

    fn gate(&self, x: &CudaMat, f: Activation, y: &mut CudaMat) -> Result<()> {
        activate(self, x, f, true, y)
    }

    fn logits(
        &self,
        x: &CudaMat,
        by: Projection<'_, Self>,
        shape: LogitShape,
        y: &mut CudaMat,
    ) -> Result<()> {
        linear::logits(self, x, by, shape, y)
    }

    fn rope_and_store(
        &self,
        qkv: &mut CudaMat,
        by: Qkv<'_, Self>,
        batch: &CudaBatch,
        kv: &mut CudaKv,
    ) -> Result<()> {
        attention::rope_and_store(self, qkv, by, batch, kv)
    }

    fn paged_attention(
        &self,
        qkv: &CudaMat,
        by: Attention<'_, Self>,
        batch: &CudaBatch,
        kv: &CudaKv,
        y: &mut CudaMat,
    ) -> Result<()> {
        attention::paged_attention(self, qkv, by, batch, kv, y)
    }

    fn gather_logit_rows(&self, x: &CudaMat, batch: &CudaBatch, y: &mut CudaMat) -> Result<()> {
        let op = "gather_logit_rows";
        x.expect_half(op)?;
        y.expect_half(op)?;
        y.expect_cols(op, "columns of y", x.cols())?;
        batch.expect_rows(op, RowSet::All, x.rows())?;
        y.resize(op, batch.rows_within(RowSet::Logits, y.capacity()))?;
        let (rows, cols) = (y.rows() as i32, y.cols() as i32);
        // SAFETY: shapes were checked here, indices at the upload.
        self.launch(op, y.rows(), |elem, stream| unsafe {
            ffi::lorax_gather(elem, x.at(), batch.at.logit_rows, y.at(), rows, cols, stream)
        })
    }

    fn group(&self) -> &Arc<Group> {
        self.comm.group()
    }

    fn all_reduce(&self, x: &mut CudaMat) -> Result<()> {
        self.comm.all_reduce(self, x)
    }

    fn gather_columns(&self, x: &CudaMat, y: &mut CudaMat) -> Result<()> {
        self.comm.gather_columns(self, x, y)
    }
}
