//! A step's index data on the GPU: one buffer, one copy.
//!
//! A decode step (one row for every sequence, logits of all) is laid out for a number of rows from a fixed list, so
//! that all its addresses and grids depend on that number alone and one CUDA graph serves every step of that size. Its
//! spare rows have token 0, store nothing and belong to no sequence.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    CudaBackend,
    device::DeviceBuf,
    ffi::{Ensemble, MAX_LORA_RANK, MAX_SLICES},
    plan::{self, AttentionItem, Cut, Items},
    unsupported,
};
use crate::{BLOCK_SIZE, Batch, CapturedStep, Error, Result, RowSet, Segment, Span};

/// Attention spans of one model, at most.
pub(super) const MAX_SPANS: usize = 4;
/// Words of the section of counts: three of tiles, two for each span.
const COUNTS: usize = 3 + 2 * MAX_SPANS;

/// Where a row that is not stored goes; `kNowhere` in `rope.cu`.
const NOWHERE: u32 = u32::MAX;

/// Numbers of rows that decode steps are captured for.
const CAPTURED_ROWS: [usize; 24] =
    [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256];

/// Numbers of adapter tiles that decode steps are captured for: a step without adapters launches nothing for them.
const CAPTURED_TILES: [usize; 5] = [0, 4, 16, 64, 256];

/// The steps of all graphs: 24 without adapters, and 66 of each kind with them.
pub(super) fn captured_steps() -> Vec<CapturedStep> {
    let mut steps = Vec::new();
    for rows in CAPTURED_ROWS {
        let mut runs = CAPTURED_TILES.map(|tiles| tiles.min(rows)).to_vec();
        runs.dedup();
        for is_affine in [false, true] {
            let of_kind = runs.iter().filter(|&&runs| runs > 0 || !is_affine);
            steps.extend(of_kind.map(|&runs| CapturedStep { rows, runs, is_affine }));
        }
    }
    steps
}

fn at_least(sizes: &[usize], size: usize) -> Option<usize> {
    sizes.iter().copied().find(|&s| s >= size)
}

/// What the launches of attention over one span are sized by.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SpanSizes {
    /// Items of few rows, and the most rows of one.
    pub(super) few_items: usize,
    pub(super) few_rows: usize,
    pub(super) prefill_items: usize,
    /// Prefill items before they were split, their rows, and the most rows of one.
    pub(super) whole_items: usize,
    pub(super) prefill_rows: usize,
    pub(super) most_prefill_rows: usize,
    /// Rows of parts that few rows leave, and prefill.
    pub(super) few_parts: usize,
    pub(super) prefill_parts: usize,
}

/// Numbers that a launch is sized by.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sizes {
    pub(super) rows: usize,
    pub(super) logit_rows: usize,
    pub(super) spans: [SpanSizes; MAX_SPANS],
    pub(super) tiles: [usize; 2],
    /// Pieces that a shrink cuts tiles into.
    pub(super) pieces: [usize; 2],
    /// Tiles of all rows, those without an adapter last.
    pub(super) all_tiles: usize,
}

/// Device addresses of a step's sections.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sections {
    counts: u64,
    pub(super) tokens: u64,
    pub(super) positions: u64,
    pub(super) lengths: u64,
    pub(super) store_at: u64,
    /// The slot of every row.
    pub(super) slots: u64,
    pub(super) logit_rows: u64,
    pub(super) few_items: [u64; MAX_SPANS],
    pub(super) prefill_items: [u64; MAX_SPANS],
    tiles: [u64; 2],
    pub(super) blocks: u64,
}

impl Sections {
    pub(super) fn num_few_items(&self, span: usize) -> u64 {
        self.counts + 12 + 8 * span as u64
    }

    pub(super) fn num_prefill_items(&self, span: usize) -> u64 {
        self.num_few_items(span) + 4
    }

    pub(super) fn tiles(&self, set: RowSet) -> u64 {
        self.tiles[index(set)]
    }

    pub(super) fn num_tiles(&self, set: RowSet) -> u64 {
        self.counts + 4 * index(set) as u64
    }

    /// Of all rows, with and without adapters.
    pub(super) fn num_all_tiles(&self) -> u64 {
        self.counts + 8
    }
}

fn rows(sizes: &Sizes, set: RowSet) -> usize {
    match set {
        RowSet::All => sizes.rows,
        RowSet::Logits => sizes.logit_rows,
    }
}

fn index(set: RowSet) -> usize {
    match set {
        RowSet::All => 0,
        RowSet::Logits => 1,
    }
}

/// The largest indices of a step, for checks against what they index.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Largest {
    pub(super) token: Option<usize>,
    pub(super) seat: Option<usize>,
    pub(super) position: Option<usize>,
    pub(super) store_at: Option<usize>,
    /// Of the blocks that attention over each span reads.
    pub(super) blocks: [Option<usize>; MAX_SPANS],
}

/// Names the CUDA graph that a step can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    /// The batch.
    id: u64,
    rows: usize,
    tiles: usize,
    cut: Option<Cut>,
    /// Whether adapters of the step have gains or biases.
    affine: bool,
}

/// A step on the GPU.
pub struct CudaBatch {
    buffer: DeviceBuf,
    pub(super) sums: Sums,
    id: u64,
    row_capacity: usize,
    spans: Vec<Span>,
    cut: Option<Cut>,
    exact: Sizes,
    captured: Option<Sizes>,
    capturing: Cell<bool>,
    pub(super) at: Sections,
    pub(super) largest: Largest,
    /// Slots in use, ascending.
    pub(super) slots: [Vec<u32>; 2],
    /// The ensembles of the step's rows, which are sent only if there are any.
    ensembles: Vec<Ensemble>,
    ensemble_buffer: DeviceBuf,
    /// Most rows of a tile.
    pub(super) tile_rows: [u32; 2],
    words: Vec<u32>,
}

impl CudaBatch {
    pub(super) fn new(
        backend: &CudaBackend,
        rows: usize,
        blocks: usize,
        spans: &[Span],
    ) -> Result<CudaBatch> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if spans.len() > MAX_SPANS {
            return Err(unsupported(format!("attention over {} spans, above {MAX_SPANS},", spans.len())));
        }
        let items = plan::max_items(rows, backend.multiprocessors) * AttentionItem::WORDS;
        let words = COUNTS + 6 * rows + spans.len() * items + 2 * 3 * rows + blocks;
        Ok(CudaBatch {
            buffer: DeviceBuf::zeroed(&backend.device, words * 4, "a step's indices")?,
            sums: Sums::new(backend, rows)?,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            row_capacity: rows,
            spans: spans.to_vec(),
            cut: None,
            exact: Sizes::default(),
            captured: None,
            capturing: Cell::new(false),
            at: Sections::default(),
            largest: Largest::default(),
            slots: Default::default(),
            ensembles: Vec::new(),
            ensemble_buffer: DeviceBuf::new(&backend.device, rows * size_of::<Ensemble>(), "ensembles")?,
            tile_rows: [0; 2],
            words: Vec::with_capacity(words),
        })
    }

    /// Index of a span among those that attention was planned for.
    pub(super) fn span(&self, span: Span) -> Result<usize> {
        let index = self.spans.iter().position(|&planned| planned == span);
        index.ok_or_else(|| unsupported(format!("attention over {span:?} in a batch for {:?}", self.spans)))
    }

    /// What launches are sized by now.
    pub(super) fn sizes(&self) -> Sizes {
        self.captured.filter(|_| self.capturing.get()).unwrap_or(self.exact)
    }

    /// Rows that operations compute in a matrix of this capacity: spare ones only if they fit.
    pub(super) fn rows_within(&self, set: RowSet, capacity: usize) -> usize {
        rows(&self.sizes(), set).min(capacity).max(rows(&self.exact, set))
    }

    /// Refuses a matrix that does not have a row set's rows, with or without spare ones.
    pub(super) fn expect_rows(&self, op: &'static str, set: RowSet, got: usize) -> Result<()> {
        let (least, most) = (rows(&self.exact, set), rows(&self.sizes(), set));
        if (least..=most).contains(&got) {
            return Ok(());
        }
        Err(Error::Shape { op, what: "rows", got, expected: least })
    }

    /// Tiles of a row set, the most rows of one, and the pieces of a shrink.
    pub(super) fn tiles(&self, set: RowSet) -> (usize, u32, usize) {
        let (sizes, set) = (self.sizes(), index(set));
        (sizes.tiles[set], self.tile_rows[set], sizes.pieces[set])
    }

    /// Tiles of all rows, which lie behind each other from those with adapters on.
    pub(super) fn all_tiles(&self) -> usize {
        self.sizes().all_tiles
    }

    /// Slots that the rows use.
    pub(super) fn slots(&self, set: RowSet) -> &[u32] {
        &self.slots[index(set)]
    }

    /// The ensembles of the rows.
    pub(super) fn ensembles(&self) -> &[Ensemble] {
        &self.ensembles
    }

    /// Where the ensembles are on the device.
    pub(super) fn ensembles_at(&self) -> u64 {
        self.ensemble_buffer.at()
    }

    /// Names the graph that this step can use, if any.
    pub(super) fn graph_key(&self, affine: bool) -> Option<GraphKey> {
        let Self { id, cut, .. } = *self;
        self.captured.map(|sizes| GraphKey { id, rows: sizes.rows, tiles: sizes.tiles[0], cut, affine })
    }

    /// Whether this is a decode step of a size that there are graphs for.
    pub(super) fn is_decode(&self) -> bool {
        self.captured.is_some()
    }

    /// Whether launches are those of a graph.
    pub(super) fn is_capturing(&self) -> bool {
        self.capturing.get()
    }

    /// Sizes launches for a graph from now on, or for exactly this step.
    pub(super) fn set_capturing(&self, on: bool) {
        self.capturing.set(on);
    }

    pub(super) fn upload(&mut self, backend: &CudaBackend, host: &Batch) -> Result<()> {
        host.check()?;
        let limit = self.row_capacity;
        if host.rows() > limit {
            return Err(Error::Index { op: "upload", what: "row", index: host.rows() - 1, limit });
        }
        self.plan(host, backend.cut());
        let (got, limit) = (self.words.len() * 4, self.buffer.bytes());
        if got > limit {
            let (index, limit) = (host.blocks.len(), (limit - (got - host.blocks.len() * 4).min(limit)) / 4);
            return Err(Error::Index { op: "upload", what: "block table entry", index, limit });
        }
        if !self.ensembles.is_empty() {
            let words: Vec<u32> = self.ensembles.iter().flat_map(Ensemble::words).collect();
            // SAFETY: there are at most as many ensembles as rows; steps before this one read the buffer earlier in the same
            // stream.
            unsafe {
                let bytes = super::convert::bytes_of(&words);
                backend.staging().copy(&backend.stream, self.ensemble_buffer.at(), &bytes)?;
            }
        }
        let bytes = super::convert::bytes_of(&self.words);
        // SAFETY: the size was checked; steps before this one read the buffer earlier in the same stream.
        unsafe { backend.staging().copy(&backend.stream, self.buffer.at(), &bytes) }
    }

    /// Lays out the words of a step and notes where they are.
    fn plan(&mut self, host: &Batch, cut: Cut) {
        let rows = host.rows();
        let tile_rows = [rows, host.logit_rows.len()].map(plan::tile_rows);
        self.ensembles.clear();
        let runs =
            [&host.segments, &host.logit_segments].map(|segments| plan::runs(segments, &mut self.ensembles));
        let tiles = [plan::lora_tiles(&runs[0], tile_rows[0]), plan::lora_tiles(&runs[1], tile_rows[1])];
        let bare = plan::bare_tiles(&runs[0], rows as u32, tile_rows[0]);
        let attention: Vec<[Items; 2]> = self
            .spans
            .iter()
            .map(|&span| {
                let sequences = &host.sequences;
                [plan::few_items(sequences, span, &cut), plan::prefill_items(sequences, span, &cut)]
            })
            .collect();
        let mut spans = [SpanSizes::default(); MAX_SPANS];
        spans.iter_mut().zip(&attention).for_each(|(sizes, items)| *sizes = span_sizes(items));
        self.exact = Sizes {
            rows,
            logit_rows: host.logit_rows.len(),
            spans,
            tiles: [tiles[0].len(), tiles[1].len()],
            pieces: [plan::shrink_pieces(&tiles[0]), plan::shrink_pieces(&tiles[1])],
            all_tiles: tiles[0].len() + bare.len(),
        };
        self.cut = Some(cut);
        self.captured = self.captured_sizes(host, &cut);
        let room = self.captured.unwrap_or(self.exact);
        let mut counts = vec![tiles[0].len(), tiles[1].len(), self.exact.all_tiles];
        counts.extend(attention.iter().flatten().map(|items| items.items.len()));
        let mut pack = Pack { words: &mut self.words, base: self.buffer.at() };
        pack.words.clear();
        self.at = Sections {
            counts: pack.section(counts.iter().map(|&c| c as u32), COUNTS, 0),
            tokens: pack.section(host.tokens.iter().map(|&t| t.cast_unsigned()), room.rows, 0),
            positions: pack.section(host.positions.iter().copied(), room.rows, 0),
            lengths: pack.section((0..rows).map(|row| host.length(row)), room.rows, 1),
            store_at: pack.section(host.store_at.iter().copied(), room.rows, NOWHERE),
            slots: pack.section(plan::row_slots(&runs[0], rows), room.rows, plan::NO_SLOT),
            logit_rows: pack.section(host.logit_rows.iter().copied(), room.logit_rows, 0),
            few_items: [0; MAX_SPANS],
            prefill_items: [0; MAX_SPANS],
            tiles: [
                pack.section(tiles[0].iter().chain(&bare).flatten().copied(), 3 * room.all_tiles, 0),
                pack.section(tiles[1].iter().flatten().copied(), 3 * room.tiles[1], 0),
            ],
            blocks: 0,
        };
        for (i, [few, prefill]) in attention.iter().enumerate() {
            self.at.few_items[i] = pack.items(&few.items, room.spans[i].few_items);
            self.at.prefill_items[i] = pack.items(&prefill.items, room.spans[i].prefill_items);
        }
        self.at.blocks = pack.section(host.blocks.iter().copied(), host.blocks.len(), 0);
        self.tile_rows = match self.captured {
            Some(sizes) => [plan::tile_rows(sizes.rows); 2],
            None => tile_rows,
        };
        self.slots = [&host.segments, &host.logit_segments].map(|segments| slots_of(segments));
        self.largest = largest(host, &self.spans);
    }

    /// The sizes of the graph that a decode step uses.
    fn captured_sizes(&self, host: &Batch, cut: &Cut) -> Option<Sizes> {
        let count = host.rows();
        let decode =
            host.sequences.iter().all(|s| s.rows == 1) && host.logit_rows.len() == count && count > 0;
        let rows = at_least(&CAPTURED_ROWS, count).filter(|&r| decode && r <= self.row_capacity)?;
        let tiles = at_least(&CAPTURED_TILES, self.exact.tiles[0].max(self.exact.tiles[1]))?.min(rows);
        let span = |exact: SpanSizes| SpanSizes {
            few_items: cut.max_few_items(rows),
            few_rows: 1,
            few_parts: exact.few_parts,
            ..SpanSizes::default()
        };
        Some(Sizes {
            rows,
            logit_rows: rows,
            spans: self.exact.spans.map(span),
            tiles: [tiles; 2],
            pieces: [tiles; 2],
            all_tiles: rows,
        })
    }
}

/// The slots that segments use, ascending.
fn slots_of(segments: &[Segment]) -> Vec<u32> {
    let mut slots: Vec<u32> = segments.iter().map(|s| s.slot).collect();
    slots.sort_unstable();
    slots.dedup();
    slots
}

fn span_sizes([few, prefill]: &[Items; 2]) -> SpanSizes {
    let whole = || prefill.items.iter().filter(|item| item.split == 0);
    SpanSizes {
        few_items: few.items.len(),
        few_rows: few.items.iter().map(|item| item.rows as usize).max().unwrap_or(0),
        prefill_items: prefill.items.len(),
        whole_items: whole().count(),
        prefill_rows: whole().map(|item| item.rows as usize).sum(),
        most_prefill_rows: whole().map(|item| item.rows as usize).max().unwrap_or(0),
        few_parts: few.parts as usize,
        prefill_parts: prefill.parts as usize,
    }
}

/// What shrinks leave for expands.
pub(super) struct Sums {
    /// `[rows, slices, ranks]`
    pub(super) mid: DeviceBuf,
    /// `[splits, rows, slices, ranks]`
    pub(super) parts: DeviceBuf,
    /// `[pieces of tiles]`
    pub(super) arrived: DeviceBuf,
}

impl Sums {
    /// Rows times splits that there is room for: a few rows are split often, thousands hardly.
    const SPLIT_ROWS: usize = 4096;

    fn new(backend: &CudaBackend, rows: usize) -> Result<Sums> {
        let (what, ranks) = ("low-rank sums", MAX_SLICES * MAX_LORA_RANK);
        Ok(Sums {
            mid: DeviceBuf::new(&backend.device, rows * ranks * 2, what)?,
            parts: DeviceBuf::new(&backend.device, Self::SPLIT_ROWS * ranks * 4, what)?,
            arrived: DeviceBuf::zeroed(&backend.device, 4 * rows * 4, what)?,
        })
    }

    /// How often the inputs of `rows` rows may be split.
    pub(super) fn max_splits(&self, rows: usize) -> usize {
        Self::SPLIT_ROWS / rows.max(1)
    }
}

fn largest(host: &Batch, spans: &[Span]) -> Largest {
    let max = |values: &[u32]| values.iter().max().map(|&v| v as usize);
    let known = host.tokens.iter().filter(|&&t| t >= 0).max();
    let seat = host.tokens.iter().filter(|&&t| t < 0).min();
    let mut blocks = [None; MAX_SPANS];
    for (largest, &span) in blocks.iter_mut().zip(spans) {
        let read = host.sequences.iter().flat_map(|s| {
            let first = plan::first_key(span, s.kv_len - s.rows) as usize / BLOCK_SIZE;
            let end = (s.kv_len as usize).div_ceil(BLOCK_SIZE);
            &host.blocks[s.first_block as usize..][first..end]
        });
        *largest = read.max().map(|&block| block as usize);
    }
    Largest {
        token: known.map(|&t| t as usize),
        seat: seat.map(|&t| (-1 - t) as usize),
        position: max(&host.positions),
        store_at: max(&host.store_at),
        blocks,
    }
}

/// Words on their way to the GPU.
struct Pack<'a> {
    words: &'a mut Vec<u32>,
    base: u64,
}

impl Pack<'_> {
    /// Appends values, filled up to `room`; returns their address.
    fn section(&mut self, values: impl IntoIterator<Item = u32>, room: usize, fill: u32) -> u64 {
        let start = self.words.len();
        self.words.extend(values);
        self.words.resize((start + room).max(self.words.len()), fill);
        self.base + 4 * start as u64
    }

    fn items(&mut self, items: &[AttentionItem], room: usize) -> u64 {
        self.section(items.iter().flat_map(|i| i.words()), room * AttentionItem::WORDS, 0)
    }
}
