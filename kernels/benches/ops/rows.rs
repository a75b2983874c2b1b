//! Operations that touch each row, attention, and sampling.

use kernels::{
    Attention, Backend, Heads, SampleRow, SamplingParams,
    reference::{self, Memory},
    testing::{Numbers, assert_close, batch},
};

use crate::{Bench, Cost, Outcome, mat};

const HEADS: Heads = Heads { query: 9, kv: 3, dim: 64 };

pub(crate) fn all(bench: &Bench) -> Outcome<()> {
    elementwise(bench)?;
    for (sequences, before) in [(1, 511), (8, 511), (8, 2047)] {
        attention(bench, &vec![(1, before); sequences])?;
    }
    attention(bench, &[(512, 0)])?;
    attention(bench, &[(512, 1536)])?;
    sampling(bench)
}

fn elementwise(bench: &Bench) -> Outcome<()> {
    let ops = &bench.ops;
    let mut numbers = Numbers(2);
    for rows in [1, 8, 512] {
        let name = format!("add_rms_norm {rows}x576");
        if bench.wants(&name) {
            let (table, before) = (numbers.table(rows, 576), numbers.table(rows, 576));
            let weights = numbers.table(1, 576).data;
            let (mut x, mut residual) = (mat(ops, &table)?, mat(ops, &before)?);
            let w = ops.vector(&weights)?;
            ops.add_rms_norm(&mut x, &mut residual, &w, 1e-5)?;
            let mut expected = table.clone();
            reference::rms_norm(&mut expected, Some(&before), &weights, 1e-5);
            assert_close("norm", &ops.download(&x)?, &expected.data, ops.dtype());
            let cost = Cost { bytes: rows * 576 * 16, flops: rows * 576 * 5 };
            bench.time(&name, cost, |_| ops.rms_norm(&mut x, &mut residual, &w, 1e-5))?;
        }
        let name = format!("silu_mul {rows}x1536");
        if bench.wants(&name) {
            let table = numbers.table(rows, 3072);
            let (x, mut y) = (mat(ops, &table)?, ops.mat(rows, 1536)?);
            ops.silu_mul(&x, &mut y)?;
            assert_close("silu_mul", &ops.download(&y)?, &reference::silu_mul(&table).data, ops.dtype());
            let cost = Cost { bytes: rows * 1536 * 12, flops: rows * 1536 * 16 };
            bench.time(&name, cost, |_| ops.silu_mul(&x, &mut y))?;
        }
    }
    Ok(())
}

/// Attention of sequences `(rows, tokens before them)`, and the rotation and storing of their rows.
fn attention(bench: &Bench, sequences: &[(usize, usize)]) -> Outcome<()> {
    let ops = &bench.ops;
    let shape = format!("{}x{}, {} before", sequences.len(), sequences[0].0, sequences[0].1);
    let (store, attend) = (format!("rope_and_store {shape}"), format!("paged_attention {shape}"));
    if !bench.wants(&store) && !bench.wants(&attend) {
        return Ok(());
    }
    let host = batch(sequences, &[]);
    let blocks = host.blocks.iter().max().map_or(0, |block| *block as usize + 1);
    let inv_freq: Vec<f32> = (0..32).map(|j| 0.8_f32.powi(j)).collect();
    let (rope, mut kv) = (ops.rope(&inv_freq, 8192, 1.0)?, ops.kv(blocks, HEADS)?);
    let mut memory = Memory::new(blocks, HEADS);
    let mut numbers = Numbers(3);
    let attention = Attention { heads: HEADS, scale: 0.125, window: None, softcap: None };
    // What comes before, then the rows themselves.
    let before: Vec<_> = sequences.iter().map(|(rows, before)| (before + rows, 0)).collect();
    for host in [batch(&before, &[]), host.clone()] {
        let table = numbers.table(host.rows(), HEADS.qkv_cols());
        let mut x = mat(ops, &table)?;
        ops.rope_and_store(&mut x, HEADS, &rope, &host, &mut kv)?;
        let mut expected = table;
        reference::rope_and_store(&mut expected, HEADS, &inv_freq, &host, &mut memory);
        assert_close("rope_and_store", &ops.download(&x)?, &expected.data, ops.dtype());
    }
    let mut x = mat(ops, &numbers.table(host.rows(), HEADS.qkv_cols()))?;
    let mut y = ops.mat(host.rows(), HEADS.query * HEADS.dim)?;
    ops.paged_attention(&x, &attention, &host, &kv, &mut y)?;
    let table = reference::Table { cols: HEADS.qkv_cols(), data: ops.download(&x)? };
    let expected = reference::paged_attention(&table, &attention, &host, &memory);
    assert_close("paged_attention", &ops.download(&y)?, &expected.data, ops.dtype());
    let seen: usize = sequences.iter().map(|(rows, before)| rows * before + rows * (rows + 1) / 2).sum();
    let tokens: usize = sequences.iter().map(|(rows, before)| rows + before).sum();
    let cost = Cost {
        bytes: 2 * tokens * HEADS.kv * HEADS.dim * ops.dtype().size(),
        flops: 4 * seen * HEADS.query * HEADS.dim,
    };
    if bench.wants(&attend) {
        bench.time(&attend, cost, |_| ops.paged_attention(&x, &attention, &host, &kv, &mut y))?;
    }
    if bench.wants(&store) {
        let elements = host.rows() * HEADS.qkv_cols();
        let cost = Cost { bytes: elements * 8, flops: elements * 3 };
        bench.time(&store, cost, |_| ops.rope_and_store(&mut x, HEADS, &rope, &host, &mut kv))?;
    }
    Ok(())
}

fn sampling(bench: &Bench) -> Outcome<()> {
    let ops = &bench.ops;
    let vocab = 49152;
    let warm = SamplingParams { temperature: 0.8, seed: 3, ..Default::default() };
    for (name, params) in [
        ("greedy", SamplingParams::default()),
        ("greedy, top 5 reported", SamplingParams { num_top: 5, ..Default::default() }),
        ("temperature", warm.clone()),
        ("top-k 40", SamplingParams { top_k: 40, ..warm.clone() }),
        ("top-p 0.9", SamplingParams { top_p: 0.9, ..warm.clone() }),
    ] {
        for rows in [1, 8] {
            let name = format!("sample {rows}x{vocab} {name}");
            if !bench.wants(&name) {
                continue;
            }
            let mut table = Numbers(4).table(rows, vocab);
            table.data.iter_mut().for_each(|x| *x *= 10.0);
            let logits = mat(ops, &table)?;
            let mut sampler = ops.sampler(rows, vocab)?;
            let places: Vec<_> = (0..rows as u32).map(|i| SampleRow { row: i, seat: i }).collect();
            for place in &places {
                ops.seat(&mut sampler, place.seat, &params, &[1], &[])?;
            }
            for sampled in ops.sample(&logits, &places, &mut sampler)? {
                let expected = reference::log_softmax(table.row(sampled.seat as usize));
                assert!((sampled.logprob - expected[sampled.token as usize]).abs() < 1e-3, "{name}");
            }
            let cost = Cost { bytes: rows * vocab * 4, flops: rows * vocab * 10 };
            bench.time(&name, cost, |_| ops.sample(&logits, &places, &mut sampler).map(drop))?;
        }
    }
    Ok(())
}
