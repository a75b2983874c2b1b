//! How a step is divided into work for the kernels: pieces of attention, tiles of rows with one adapter. Pure.

use crate::{Segment, SequenceRows};

/// Rows of one piece of prefill attention, `kPrefillRows` in `attention.cuh`.
const PREFILL_ROWS: u32 = 128;
/// A long sequence's decode is split into pieces of at least so many positions.
const MIN_SPLIT: u32 = 64;
/// About how many pieces the decode rows of a step are split into, together, at least.
const DECODE_PIECES: u32 = 32;
/// Parts that split pieces leave behind, at most: below [`DECODE_PIECES`] sequences are longer than a piece, and
/// together they fill so many whole ones. Also how often one row is split at most (`kMaxSplits` in `attention.cuh`).
pub(super) const MAX_PARTIALS: usize = 2 * DECODE_PIECES as usize;

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

/// The most pieces that [`decode_items`] makes of so many rows.
pub(super) fn max_decode_items(rows: usize) -> usize {
    rows + DECODE_PIECES as usize
}

/// The most pieces that [`prefill_items`] makes of so many rows, in sequences of at least 2.
pub(super) fn max_prefill_items(rows: usize) -> usize {
    rows / 2 + 1
}

/// Pieces of the sequences with one row each. Long ones are split so that few sequences fill the card.
pub(super) fn decode_items(sequences: &[SequenceRows]) -> Vec<AttentionItem> {
    let decode = || sequences.iter().filter(|s| s.rows == 1);
    let total: u32 = decode().map(|s| s.kv_len).sum();
    let piece = total.div_ceil(DECODE_PIECES).next_multiple_of(64).max(MIN_SPLIT);
    let mut items = Vec::new();
    let mut partial = 0;
    for s in decode() {
        let splits = s.kv_len.div_ceil(piece);
        for split in 0..splits {
            items.push(AttentionItem {
                row: s.start,
                rows: 1,
                position: s.kv_len - 1,
                table: s.first_block,
                kv_begin: split * piece,
                kv_end: s.kv_len.min((split + 1) * piece),
                splits,
                partial,
                split,
            });
        }
        if splits > 1 {
            partial += splits;
        }
    }
    items
}

/// Pieces of the sequences with several rows, the longest first.
pub(super) fn prefill_items(sequences: &[SequenceRows]) -> Vec<AttentionItem> {
    let mut items = Vec::new();
    for s in sequences.iter().filter(|s| s.rows > 1) {
        for first in (0..s.rows).step_by(PREFILL_ROWS as usize) {
            let rows = PREFILL_ROWS.min(s.rows - first);
            let position = s.kv_len - s.rows + first;
            items.push(AttentionItem {
                row: s.start + first,
                rows,
                position,
                table: s.first_block,
                kv_begin: 0,
                kv_end: position + rows,
                splits: 1,
                partial: 0,
                split: 0,
            });
        }
    }
    items.sort_by_key(|item| std::cmp::Reverse(item.kv_end));
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

/// Segments cut into tiles of at most `rows` rows: start, rows, slot.
pub(super) fn lora_tiles(segments: &[Segment], rows: u32) -> Vec<[u32; 3]> {
    let cut = |s: &Segment| {
        let (end, slot) = (s.end, s.slot);
        (s.start..end).step_by(rows as usize).map(move |start| [start, rows.min(end - start), slot])
    };
    segments.iter().flat_map(cut).collect()
}

/// Rows that one block of a shrink multiplies; `kRows` in `lora.cu`.
const SHRINK_ROWS: u32 = 16;

/// Pieces of so many rows in all tiles.
pub(super) fn shrink_pieces(tiles: &[[u32; 3]]) -> usize {
    tiles.iter().map(|[_, rows, _]| rows.div_ceil(SHRINK_ROWS) as usize).sum()
}

/// The slot of rows without an adapter; `kNoSlot` in `lora.cuh`.
pub(super) const NO_SLOT: u32 = u32::MAX;

/// Tiles of the rows, `all` in number, that lie in no segment.
pub(super) fn bare_tiles(segments: &[Segment], all: u32, rows: u32) -> Vec<[u32; 3]> {
    let starts = std::iter::once(0).chain(segments.iter().map(|s| s.end));
    let ends = segments.iter().map(|s| s.start).chain([all]);
    let gaps: Vec<_> = starts.zip(ends).map(|(start, end)| Segment { start, end, slot: NO_SLOT }).collect();
    lora_tiles(&gaps, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(lens: &[(u32, u32)]) -> Vec<SequenceRows> {
        let (mut start, mut first_block) = (0, 0);
        let mut next = |&(rows, kv_len): &(u32, u32)| {
            let s = SequenceRows { start, rows, kv_len, first_block };
            start += rows;
            first_block += kv_len.div_ceil(16);
            s
        };
        lens.iter().map(&mut next).collect()
    }

    #[test]
    fn decode_pieces_cover_every_position_once() {
        let many = vec![(1, 700); 200];
        let cases: [&[(u32, u32)]; 6] =
            [&[(1, 1)], &[(1, 128)], &[(1, 129)], &[(1, 100_000), (3, 9), (1, 17)], &[(1, 1000); 9], &many];
        for lens in cases {
            let sequences = sequences(lens);
            let items = decode_items(&sequences);
            let rows = sequences.iter().filter(|s| s.rows == 1).count();
            assert!(items.len() <= max_decode_items(rows), "{} items for {rows} rows", items.len());
            let mut partials = 0;
            for s in sequences.iter().filter(|s| s.rows == 1) {
                let own: Vec<_> = items.iter().filter(|i| i.row == s.start).collect();
                let mut end = 0;
                for (split, item) in own.iter().enumerate() {
                    assert_eq!((item.kv_begin, item.split), (end, split as u32));
                    assert_eq!((item.splits as usize, item.kv_begin % 16), (own.len(), 0));
                    end = item.kv_end;
                }
                assert_eq!(end, s.kv_len);
                if own.len() > 1 {
                    assert_eq!(own[0].partial as usize, partials);
                    partials += own.len();
                }
            }
            assert!(partials <= MAX_PARTIALS, "{partials} partials");
        }
    }

    #[test]
    fn prefill_pieces_cover_every_row_once() {
        let sequences = sequences(&[(200, 200), (1, 50), (64, 100), (65, 65), (2, 4000)]);
        let items = prefill_items(&sequences);
        assert!(items.len() <= max_prefill_items(332));
        let mut rows: Vec<u32> = items.iter().flat_map(|i| i.row..i.row + i.rows).collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..200).chain(201..332).collect::<Vec<_>>());
        assert!(items.iter().all(|i| i.kv_end == i.position + i.rows));
    }

    #[test]
    fn tiles_stay_inside_their_segments() {
        let segments = [Segment { start: 2, end: 3, slot: 7 }, Segment { start: 10, end: 50, slot: 1 }];
        assert_eq!(lora_tiles(&segments, 32), [[2, 1, 7], [10, 32, 1], [42, 8, 1]]);
        assert!(lora_tiles(&[], 8).is_empty());
        assert_eq!(shrink_pieces(&lora_tiles(&segments, 32)), 1 + 2 + 1);
        let bare =
            [[0, 2], [3, 7], [50, 64], [114, 64], [178, 22]].map(|[start, rows]| [start, rows, NO_SLOT]);
        assert_eq!(bare_tiles(&segments, 200, 64), bare);
    }
}
