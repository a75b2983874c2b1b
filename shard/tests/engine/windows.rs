//! Blocks before the attention window, which belong to others while their sequence goes on.

use kernels::{BLOCK_SIZE, DType, cpu::CpuBackend};
use lorax_shard::{
    memory::kv_window,
    step::{NewSequence, Rows, Step},
};
use model::testing;
use serde_json::json;

use crate::harness::{Router, Shard};

/// Positions of the longest sequence here.
const LEN: usize = 250;

fn shard(window: u32) -> Shard<CpuBackend> {
    let mut files = testing::model();
    files.config["architectures"] = json!(["MistralForCausalLM"]);
    files.config["sliding_window"] = json!(window);
    Shard::of(&files, CpuBackend::new(DType::F32, 2).unwrap())
}

fn prompt(sequence: u64, len: usize) -> NewSequence {
    let tokens = (0..len as u32).map(|i| (i * 7 + i * i % 11) % 96).collect();
    NewSequence { sequence, tokens, prompt_len: len, ..NewSequence::default() }
}

/// Steps of a sequence to its last position: the prompt in chunks, then single rows.
fn spans(prompt: usize, chunk: usize) -> Vec<(usize, usize)> {
    let chunks = (0..prompt).step_by(chunk).map(|at| (at, chunk.min(prompt - at)));
    chunks.chain((prompt..LEN).map(|at| (at, 1))).collect()
}

/// Overwrites blocks with the keys of another sequence, of as many rows as they hold.
async fn overwrite(router: &mut Router<'_, CpuBackend>, blocks: &[u32]) {
    for (other, &block) in (1000..).zip(blocks) {
        let rows = Rows { sequence: other, rows: BLOCK_SIZE, new_blocks: vec![block], ..Rows::default() };
        router
            .send(Step { added: vec![prompt(other, BLOCK_SIZE)], rows: vec![rows], ..Step::default() })
            .await;
        router.result().await;
        router.send(Step { dropped: vec![other], ..Step::default() }).await;
        router.result().await;
    }
}

/// Greedy tokens of a prompt. With `window`, blocks before it are released, and others overwrite them.
async fn generate(
    shard: &Shard<CpuBackend>,
    (len, chunk): (usize, usize),
    window: Option<usize>,
) -> (Vec<u32>, usize) {
    let mut router = shard.attach().await;
    let (mut sent, mut released) = (0, 0);
    let mut tokens = Vec::new();
    for (position, rows) in spans(len, chunk) {
        let end = (position + rows).div_ceil(BLOCK_SIZE);
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window) / BLOCK_SIZE);
        let added = if position == 0 { vec![prompt(1, len)] } else { vec![] };
        let sample = position + rows >= len;
        let new_blocks = (sent as u32..end as u32).collect();
        let sample = sample.into();
        let rows = Rows {
            sequence: 1,
            position,
            rows,
            new_blocks,
            sample,
            released_blocks: first,
            ..Rows::default()
        };
        router.send(Step { added, rows: vec![rows], ..Step::default() }).await;
        tokens.extend(router.tokens().await);
        let behind: Vec<u32> = (released as u32..first as u32).collect();
        overwrite(&mut router, &behind).await;
        (sent, released) = (end, first);
    }
    (tokens, released)
}

#[tokio::test]
async fn released_blocks_are_not_read() {
    // Windows, lengths of prompts, and rows of a chunk.
    for (window, len, chunk) in [
        (1, 20, 20),
        (5, 20, 20),
        (16, 20, 7),
        (17, 200, 32),
        (30, 180, 31),
        (31, 240, 1),
        (64, 100, 32),
        (65, 248, 16),
        (90, 33, 32),
        (100, 230, 32),
    ] {
        let shard = shard(window);
        let (expected, none) = generate(&shard, (len, chunk), None).await;
        let (tokens, released) = generate(&shard, (len, chunk), Some(kv_window(Some(window)) as usize)).await;
        assert_eq!(tokens, expected, "window {window}");
        assert!(none == 0 && released > 0, "window {window}: {released} blocks were released");
        // The same with blocks of the window itself, which shows that a difference would be seen.
        if window > 60 {
            let (tokens, _) = generate(&shard, (len, chunk), Some(window as usize / 4)).await;
            assert_ne!(tokens, expected, "window {window}");
        }
    }
}

#[test]
fn a_window_leaves_the_tile_around_it() {
    assert_eq!(kv_window(None), 0, "all blocks are needed");
    for window in [1, 16, 4095, 4096, 1 << 20, u32::MAX - 200] {
        assert_eq!(kv_window(Some(window)), window + 128);
    }
    assert_eq!(kv_window(Some(u32::MAX)), u32::MAX);
}

#[tokio::test]
async fn rotary_scaling_goes_by_the_tokens_at_admission_or_up_to_the_row() {
    let (shard, script) = Shard::scripted();
    let mut router = shard.attach().await;
    let new_blocks = vec![3, 9, 12];
    // Tokens that the sequence is added with, and how many of them are the prompt.
    for (len, prompt_len) in
        [(1, 1), (2, 1), (15, 15), (16, 3), (17, 17), (20, 20), (20, 1), (25, 20), (31, 31), (32, 16)]
    {
        let added = vec![NewSequence { prompt_len, ..prompt(1, len) }];
        let rows = |position, rows, sample| Rows { sequence: 1, position, rows, sample, ..Rows::default() };
        let first =
            Rows { new_blocks: new_blocks.clone(), ..rows(0, len.div_ceil(2), usize::from(len == 1)) };
        router.send(Step { added, rows: vec![first], ..Step::default() }).await;
        router.result().await;
        assert_eq!(script.lengths(), vec![len as u32; len.div_ceil(2)]);
        if len > 1 {
            let second = rows(len.div_ceil(2), len / 2, 1);
            router.send(Step { rows: vec![second], ..Step::default() }).await;
            router.result().await;
            assert_eq!(script.lengths(), vec![len as u32; len / 2]);
        }
        for position in len..len + 3 {
            router.send(Step { rows: vec![rows(position, 1, 1)], ..Step::default() }).await;
            router.result().await;
            assert_eq!(script.lengths(), [position as u32 + 1]);
        }
        router.send(Step { dropped: vec![1], ..Step::default() }).await;
        router.result().await;
    }
}
