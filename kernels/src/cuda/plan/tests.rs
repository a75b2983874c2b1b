use super::*;

const MULTIPROCESSORS: u32 = 132;

fn cut(query: usize, kv: usize) -> Cut {
    Cut::new(Heads { query, kv, dim: 128 }, MULTIPROCESSORS)
}

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

/// Items cover each row's keys once, from the first that a row sees on, and their parts lie behind each other.
fn check(items: &Items, sequences: &[SequenceRows], span: Span, cut: &Cut) {
    let mut parts = 0;
    let mut rest = &items.items[..];
    while let Some(first) = rest.first() {
        let (own, after) = rest.split_at(first.splits as usize);
        rest = after;
        let of = sequences.iter().find(|s| s.start <= first.row && first.row < s.start + s.rows).unwrap();
        assert_eq!(first.position, of.kv_len - of.rows + first.row - of.start);
        assert_eq!(first.kv_begin, first_key(span, first.position));
        let mut end = first.kv_begin;
        for (split, item) in own.iter().enumerate() {
            assert_eq!((item.kv_begin, item.split, item.splits), (end, split as u32, own.len() as u32));
            assert_eq!((item.row, item.rows, item.kv_begin % 16), (first.row, first.rows, 0));
            let seen = span == Span::Bidirectional || item.kv_begin <= item.position;
            assert!(seen, "the first row sees a key of every split");
            assert!(item.kv_begin < item.kv_end);
            end = item.kv_end;
        }
        let last = first.position + first.rows;
        assert_eq!(end, if span == Span::Bidirectional { of.kv_len } else { last });
        assert!(own.len() <= MAX_SPLITS as usize);
        if own.len() > 1 {
            assert_eq!(first.partial, parts);
            parts += first.splits * first.rows;
        }
    }
    assert_eq!(parts, items.parts);
    assert!(parts <= cut.part_rows, "{parts} rows of parts");
}

const SPANS: [Span; 4] = [Span::Causal, Span::Window(1), Span::Window(700), Span::Bidirectional];

#[test]
fn items_cover_every_key_once() {
    let many = vec![(1, 700); 200];
    let cases: [&[(u32, u32)]; 9] = [
        &[(1, 1)],
        &[(1, 128)],
        &[(1, 129)],
        &[(1, 100_000), (3, 9), (1, 17)],
        &[(1, 1000); 9],
        &many,
        &[(64, 32_832)],
        &[(200, 200), (1, 50), (64, 100), (65, 65), (2, 4000)],
        &[(8, 30_000), (9, 30_000), (2048, 2048)],
    ];
    for (lens, span) in cases.iter().flat_map(|lens| SPANS.map(|span| (lens, span))) {
        for (query, kv) in [(32, 8), (8, 8), (71, 1), (64, 64), (4, 2)] {
            let (sequences, cut) = (sequences(lens), cut(query, kv));
            let (few, prefill) = (few_items(&sequences, span, &cut), prefill_items(&sequences, span, &cut));
            check(&few, &sequences, span, &cut);
            check(&prefill, &sequences, span, &cut);
            let all: usize = sequences.iter().map(|s| s.rows as usize).sum();
            let ones = sequences.iter().filter(|s| cut.is_few(s)).count();
            assert!(few.items.len() <= cut.max_few_items(ones), "{} items", few.items.len());
            assert!(few.items.len() + prefill.items.len() <= max_items(all, MULTIPROCESSORS));
            let mut rows: Vec<u32> = [&few.items, &prefill.items]
                .into_iter()
                .flatten()
                .filter(|item| item.split == 0)
                .flat_map(|item| item.row..item.row + item.rows)
                .collect();
            rows.sort_unstable();
            assert_eq!(rows, (0..all as u32).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_short_prompt_behind_a_long_one_fills_the_gpu_once() {
    let (sequences, cut) = (sequences(&[(64, 32_832)]), cut(32, 8));
    let items = prefill_items(&sequences, Span::Causal, &cut);
    let blocks = items.items.len() * 8 * 2;
    assert!((100..=MULTIPROCESSORS as usize).contains(&blocks), "{blocks} blocks");
    assert_eq!(prefill_items(&sequences, Span::Window(400), &cut).parts, 0, "a window is short");
}

#[test]
fn decode_pieces_follow_the_number_of_key_heads() {
    for (kv, pieces) in [(1, 64), (2, 64), (4, 64), (8, 33), (16, 16), (32, 8)] {
        assert_eq!(cut(32, kv).pieces, pieces, "{kv} key heads");
    }
    let windowed = few_items(&sequences(&[(1, 100_000)]), Span::Window(1024), &cut(32, 8));
    assert!(windowed.items.iter().all(|item| item.kv_begin >= 98_960 && item.kv_end <= 100_000));
    assert!(windowed.items.len() > 8, "the window alone is split");
}

#[test]
fn tiles_stay_inside_their_segments() {
    let segments = [Segment::new(2, 3, 7), Segment::new(10, 50, 1)];
    let segments = runs(&segments, &mut Vec::new());
    assert_eq!(lora_tiles(&segments, 32), [[2, 1, 7], [10, 32, 1], [42, 8, 1]]);
    assert!(lora_tiles(&[], 8).is_empty());
    assert_eq!(shrink_pieces(&lora_tiles(&segments, 32)), 1 + 2 + 1);
    let bare = [[0, 2], [3, 7], [50, 64], [114, 64], [178, 22]].map(|[start, rows]| [start, rows, NO_SLOT]);
    assert_eq!(bare_tiles(&segments, 200, 64), bare);
    let slots = row_slots(&segments, 60);
    assert_eq!((slots[1], slots[2], slots[9], slots[11]), (NO_SLOT, 7, NO_SLOT, 1));
}

#[test]
fn equal_ensembles_are_one_and_stand_in_place_of_a_slot() {
    let of = |start, end, slot, weight| Segment { weight, ..Segment::new(start, end, slot) };
    let segments = [
        of(0, 2, 3, 1.0),
        of(2, 5, 3, 1.0),
        of(2, 5, 4, -0.5),
        of(5, 6, 3, 0.5),
        of(8, 9, 3, 1.0),
        of(8, 9, 4, -0.5),
        of(9, 10, 4, -0.5),
        of(9, 10, 3, 1.0),
    ];
    let mut known = Vec::new();
    let slots = runs(&segments, &mut known).iter().map(|run| run.slot).collect::<Vec<_>>();
    assert_eq!(slots, [3, FIRST_ENSEMBLE, FIRST_ENSEMBLE + 1, FIRST_ENSEMBLE, FIRST_ENSEMBLE + 2]);
    assert_eq!(
        known.iter().map(|ensemble| ensemble.slots().to_vec()).collect::<Vec<_>>(),
        [vec![3, 4], vec![3], vec![4, 3]]
    );
    assert_eq!(runs(&segments[..3], &mut known)[1].slot, FIRST_ENSEMBLE);
    assert_eq!(known[0].words(), [2, 3, 4, 0, 0, 1.0_f32.to_bits(), (-0.5_f32).to_bits(), 0, 0]);
}
