//! Attention over contexts of many thousand tokens, in blocks with large numbers.

use super::*;

/// Blocks of other sequences in front of those that are used.
const FIRST_BLOCK: u32 = 70_000;

/// Stores so many tokens for each sequence, in chunks; then checks a step of the given rows behind them.
fn check(heads: Heads, window: Option<u32>, sequences: &[(usize, usize)]) {
    let (ops, mut numbers) = (backend(), Numbers(31));
    let span = window.map_or(Span::Causal, Span::Window);
    let attention = AttentionShape { scale: 0.1, span, ..AttentionShape::causal(heads) };
    let longest = sequences.iter().map(|(rows, before)| rows + before).max().unwrap();
    let spec = spec(&vec![1e-4; heads.dim / 2], longest);
    let (rope, by) = (ops.rope(&spec).unwrap(), reference::Qkv::rotated(heads, &spec));
    // The tables of the last step are those of all.
    let table = batch(&sequences.iter().map(|(rows, before)| (rows + before, 0)).collect::<Vec<_>>(), &[]);
    let blocks = *table.blocks.iter().max().unwrap() + 1;
    let mut memory = KvMemory::new(blocks as usize, heads);
    let mut cache = ops.kv((FIRST_BLOCK + blocks) as usize, heads).unwrap();
    let mut run = |step: &[(usize, usize)], attend: bool| {
        let mut host = step_of(&table, step);
        let qkv = numbers.table(host.rows(), heads.qkv_cols());
        let mut rotated = qkv.clone();
        reference::rope_and_store(&mut rotated, &by, &host, &mut memory);
        let expected = attend.then(|| reference::paged_attention(&rotated, &attention, &host, &memory));
        host.blocks.iter_mut().for_each(|block| *block += FIRST_BLOCK);
        host.store_at.iter_mut().for_each(|at| *at += FIRST_BLOCK * 16);
        let device = device_batch_for(&ops, &host, &[span]);
        let mut x = mat(&ops, &qkv);
        ops.rope_and_store(&mut x, whole(heads, &rope), &device, &mut cache).unwrap();
        if let Some(expected) = expected {
            let mut y = ops.mat(host.rows(), heads.query * heads.dim).unwrap();
            ops.paged_attention(&x, attention.into(), &device, &cache, &mut y).unwrap();
            let what = format!("{attention:?} of {step:?}");
            assert_close(&what, &ops.download(&y).unwrap(), &expected.data, ops.dtype());
        }
    };
    let most = sequences.iter().map(|(_, before)| *before).max().unwrap();
    for start in (0..most).step_by(1024) {
        // Sequences that are long enough already run a row that is stored again.
        let chunk = |before: usize| match before.saturating_sub(start).min(1024) {
            0 => (1, before.saturating_sub(1)),
            rows => (rows, start),
        };
        run(&sequences.iter().map(|(_, before)| chunk(*before)).collect::<Vec<_>>(), false);
    }
    run(sequences, true);
}

/// One row is cut into as many pieces as there may be, for groups of sixteen heads, too.
#[test]
fn decode_over_more_than_8000_tokens() {
    for (query, kv, dim) in [(16, 1, 128), (8, 2, 128), (4, 4, 64), (32, 2, 96)] {
        let heads = Heads { query, kv, dim };
        check(heads, None, &[(1, 8500)]);
        check(heads, None, &[(1, 9000), (1, 5), (1, 4097)]);
        check(heads, Some(1000), &[(1, 8300), (1, 900)]);
    }
}

#[test]
fn a_few_rows_behind_more_than_8000_tokens() {
    let heads = Heads { query: 8, kv: 2, dim: 128 };
    check(heads, None, &[(5, 8200), (1, 8500)]);
    check(heads, None, &[(70, 8192), (1, 17)]);
    check(heads, Some(4096), &[(130, 8600)]);
}

/// A step of more rows than the sampler and the tables of few rows have room for.
#[test]
fn a_step_of_many_rows() {
    let heads = Heads { query: 4, kv: 2, dim: 64 };
    check(heads, None, &[(700, 0), (1, 40), (513, 100)]);
    check(heads, None, &[(1, 20); 600]);
}
