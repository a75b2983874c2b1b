//! How a step is divided into work for the kernels: items of attention, split-K, tiles of rows with one adapter. Pure.

use super::ffi::Ensemble;
use crate::{
    BLOCK_SIZE, Heads, Segment, SequenceRows, Span,
    batch::{ensembles, is_ensemble},
};

/// Rows of one item of prefill attention, `kPrefillRows` in `attention.cuh`.
const PREFILL_ROWS: u32 = 128;
/// Pairs of a row and a query head that one block of prefill attention computes on Hopper, `kPairs` there.
const PREFILL_PAIRS: u32 = 128;
/// Pairs of one tile of decode attention.
const DECODE_PAIRS: u32 = 16;
/// Rows of a sequence that are always computed as decode rows are, and how many pairs they may be beyond that.
const FEW_ROWS: u32 = 8;
const FEW_PAIRS: u32 = 64;
/// Keys of one split, at least: of few rows, and of prefill.
const MIN_SPLIT: u32 = 64;
const MIN_PREFILL_SPLIT: u32 = 512;
/// How often one item is split at most; `kMaxSplits` in `attention.cuh`.
const MAX_SPLITS: u32 = 64;
/// Blocks of decode attention for each multiprocessor: as many as it holds of those for heads of 128. Three made decode
/// steps of an 8B model on an H200 3 % slower: 32 rows were cut in two and their blocks took two waves.
const BLOCKS_EACH: u32 = 2;
/// Elements of f32, and pairs, that the parts of split items have room for.
pub(super) const PART_ELEMENTS: usize = 8 << 20;
pub(super) const PART_PAIRS: usize = 1 << 17;

/// Mirrors `AttentionItem` in `attention.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AttentionItem {
    pub(super) row: u32,
    pub(super) rows: u32,
    pub(super) position: u32,
    pub(super) table: u32,
    pub(super) kv_begin: u32,
    pub(super) kv_end: u32,
    pub(super) splits: u32,
    pub(super) partial: u32,
    pub(super) split: u32,
}

impl AttentionItem {
    /// Words of an item on the device.
    pub(super) const WORDS: usize = 9;

    pub(super) fn words(self) -> [u32; Self::WORDS] {
        let AttentionItem { row, rows, position, table, kv_begin, kv_end, splits, partial, split } = self;
        [row, rows, position, table, kv_begin, kv_end, splits, partial, split]
    }
}

/// What the division of attention depends on besides the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Cut {
    /// About how many pieces the keys of few rows are split into, all sequences together.
    pub(super) pieces: u32,
    multiprocessors: u32,
    kv_heads: u32,
    /// Query heads of a key head.
    group: u32,
    /// Rows that the parts of split items have room for.
    part_rows: u32,
}

impl Cut {
    pub(super) fn new(heads: Heads, multiprocessors: u32) -> Cut {
        let (query, kv) = (heads.query.max(1), heads.kv.max(1));
        let part_rows = (PART_ELEMENTS / (query * heads.dim.max(1))).min(PART_PAIRS / query);
        Cut {
            pieces: (BLOCKS_EACH * multiprocessors / kv as u32).clamp(1, MAX_SPLITS),
            multiprocessors,
            kv_heads: kv as u32,
            group: (query / kv) as u32,
            part_rows: part_rows as u32,
        }
    }

    fn is_few(&self, s: &SequenceRows) -> bool {
        s.rows <= FEW_ROWS || s.rows * self.group <= FEW_PAIRS
    }

    /// Tiles of the pairs of so many rows.
    fn tiles(&self, rows: u32, pairs: u32) -> u32 {
        (rows * self.group).div_ceil(pairs)
    }

    /// The most items that [`Self::few_items`] makes of so many rows: a piece more for every row but the first, as keys
    /// do not divide evenly. One item too many for a wave of blocks costs a second wave in every captured step.
    pub(super) fn max_few_items(&self, rows: usize) -> usize {
        rows.saturating_sub(1) + self.pieces as usize
    }
}

/// The most items of any cut of so many rows: of few rows, and of prefill.
pub(super) fn max_items(rows: usize, multiprocessors: u32) -> usize {
    rows + MAX_SPLITS as usize + rows / 2 + 1 + multiprocessors as usize
}

/// The items of one launch, and the rows of parts that its split ones leave.
#[derive(Debug, Default)]
pub(super) struct Items {
    pub(super) items: Vec<AttentionItem>,
    pub(super) parts: u32,
}

impl Items {
    /// Adds an item with its keys split into pieces: the last one has the keys behind `visible`, which the first row of
    /// the item does not see, as well.
    fn add(&mut self, item: AttentionItem, visible: u32, piece: u32, cut: &Cut) {
        let keys = visible - item.kv_begin;
        let mut splits = keys.div_ceil(piece).max(1);
        if self.parts + splits * item.rows > cut.part_rows {
            splits = 1;
        }
        for split in 0..splits {
            let kv_begin = item.kv_begin + split * piece;
            let kv_end = if split + 1 == splits { item.kv_end } else { kv_begin + piece };
            self.items.push(AttentionItem { kv_begin, kv_end, splits, partial: self.parts, split, ..item });
        }
        if splits > 1 {
            self.parts += splits * item.rows;
        }
    }
}

/// The first key of a whole block that a row at a position sees.
pub(super) fn first_key(span: Span, position: u32) -> u32 {
    match span {
        Span::Window(window) => (position + 1).saturating_sub(window) / BLOCK_SIZE as u32 * BLOCK_SIZE as u32,
        Span::Causal | Span::Bidirectional => 0,
    }
}

/// Rows `first` to `first + rows` of a sequence as one item, and the end of the keys that all of them see.
fn item(s: &SequenceRows, span: Span, first: u32, rows: u32) -> (AttentionItem, u32) {
    let position = s.kv_len - s.rows + first;
    let (visible, kv_end) = match span {
        Span::Bidirectional => (s.kv_len, s.kv_len),
        Span::Causal | Span::Window(_) => (position + 1, position + rows),
    };
    let item = AttentionItem {
        row: s.start + first,
        rows,
        position,
        table: s.first_block,
        kv_begin: first_key(span, position),
        kv_end,
        splits: 1,
        partial: 0,
        split: 0,
    };
    (item, visible)
}

/// Items of the sequences with few rows each. Their keys are split so that few sequences fill the GPU.
pub(super) fn few_items(sequences: &[SequenceRows], span: Span, cut: &Cut) -> Items {
    let whole: Vec<_> =
        sequences.iter().filter(|s| cut.is_few(s)).map(|s| item(s, span, 0, s.rows)).collect();
    let work = |(item, _): &(AttentionItem, u32)| {
        u64::from(item.kv_end - item.kv_begin) * u64::from(cut.tiles(item.rows, DECODE_PAIRS))
    };
    let total: u64 = whole.iter().map(work).sum();
    let piece = total.div_ceil(u64::from(cut.pieces)).next_multiple_of(u64::from(MIN_SPLIT)) as u32;
    let mut items = Items::default();
    for (item, visible) in whole {
        items.add(item, visible, piece.max(MIN_SPLIT), cut);
    }
    items
}

/// Items of the sequences with more rows, the longest first. Where they would leave multiprocessors idle, their keys are
/// split into one wave of blocks.
pub(super) fn prefill_items(sequences: &[SequenceRows], span: Span, cut: &Cut) -> Items {
    let mut whole: Vec<(AttentionItem, u32)> = Vec::new();
    for s in sequences.iter().filter(|s| !cut.is_few(s)) {
        let firsts = (0..s.rows).step_by(PREFILL_ROWS as usize);
        whole.extend(firsts.map(|first| item(s, span, first, PREFILL_ROWS.min(s.rows - first))));
    }
    whole.sort_by_key(|(item, _)| std::cmp::Reverse(item.kv_end - item.kv_begin));
    let keys = |(item, visible): &(AttentionItem, u32)| u64::from(visible - item.kv_begin);
    let blocks = |item: &AttentionItem| u64::from(cut.tiles(item.rows, PREFILL_PAIRS) * cut.kv_heads);
    let total: u64 = whole.iter().map(|both| keys(both) * blocks(&both.0)).sum();
    let mut items = Items::default();
    for both in whole {
        let wanted = u64::from(cut.multiprocessors) * keys(&both) / total.max(1);
        let most = (keys(&both) / u64::from(MIN_PREFILL_SPLIT)).min(u64::from(MAX_SPLITS));
        let piece = keys(&both).div_ceil(wanted.min(most).max(1)).next_multiple_of(u64::from(MIN_SPLIT));
        items.add(both.0, both.1, piece as u32, cut);
    }
    items
}

/// Most rows of a tile, for a step of so many rows: as many as one tensor core tile takes when rows are few, enough to
/// read an adapter seldom when they are many.
pub(super) fn tile_rows(rows: usize) -> u32 {
    match rows {
        0..=8 => 8,
        9..=256 => 16,
        _ => 64,
    }
}

/// Rows that have the same adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u32,
    pub(super) end: u32,
    /// The slot of their adapter; [`FIRST_ENSEMBLE`] and the index of their ensemble; or [`NO_SLOT`].
    pub(super) slot: u32,
}

/// The slot of rows without an adapter; `kNoSlot` in `lora.cuh`.
pub(super) const NO_SLOT: u32 = u32::MAX;
/// What stands in place of a slot for ensemble 0; `kFirstEnsemble` in `lora.cuh`.
pub(super) const FIRST_ENSEMBLE: u32 = 1 << 31;

/// The runs of rows with adapters. Ensembles that are not known yet are added to `known`.
pub(super) fn runs(segments: &[Segment], known: &mut Vec<Ensemble>) -> Vec<Run> {
    let run = |members: &[Segment]| {
        let [Segment { start, end, slot, .. }, ..] = *members else { return None };
        if !is_ensemble(members) {
            return Some(Run { start, end, slot });
        }
        let ensemble = Ensemble::new(members);
        let index = known.iter().position(|other| *other == ensemble).unwrap_or_else(|| {
            known.push(ensemble);
            known.len() - 1
        });
        Some(Run { start, end, slot: FIRST_ENSEMBLE + index as u32 })
    };
    ensembles(segments).filter_map(run).collect()
}

/// Runs cut into tiles of at most `rows` rows: start, rows, slot.
pub(super) fn lora_tiles(runs: &[Run], rows: u32) -> Vec<[u32; 3]> {
    let cut = |run: &Run| {
        let Run { start, end, slot } = *run;
        (start..end).step_by(rows as usize).map(move |start| [start, rows.min(end - start), slot])
    };
    runs.iter().flat_map(cut).collect()
}

/// Rows that one block of a shrink multiplies; `kRows` in `lora.cu`.
const SHRINK_ROWS: u32 = 16;

/// Pieces of so many rows in all tiles.
pub(super) fn shrink_pieces(tiles: &[[u32; 3]]) -> usize {
    tiles.iter().map(|[_, rows, _]| rows.div_ceil(SHRINK_ROWS) as usize).sum()
}

/// Tiles of the rows, `all` in number, that lie in no run.
pub(super) fn bare_tiles(runs: &[Run], all: u32, rows: u32) -> Vec<[u32; 3]> {
    let starts = std::iter::once(0).chain(runs.iter().map(|run| run.end));
    let ends = runs.iter().map(|run| run.start).chain([all]);
    let gaps: Vec<_> = starts.zip(ends).map(|(start, end)| Run { start, end, slot: NO_SLOT }).collect();
    lora_tiles(&gaps, rows)
}

/// The slot of each of `all` rows, or what stands in its place.
pub(super) fn row_slots(runs: &[Run], all: usize) -> Vec<u32> {
    let mut slots = vec![NO_SLOT; all];
    for run in runs {
        slots[run.start as usize..run.end as usize].fill(run.slot);
    }
    slots
}

#[cfg(test)]
mod tests;
