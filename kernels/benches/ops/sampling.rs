//! Sampling and scoring.

use kernels::{
    SampleRow, Sampled, SamplingParams, TokenMask,
    prelude::*,
    reference::{self, Table},
    testing::Numbers,
};

use crate::{Bench, Cost, Machine, Outcome, wide_mat};

pub(crate) fn all<M: Machine>(bench: &Bench<M>) -> Outcome<()> {
    let warm = SamplingParams { temperature: 0.8, seed: 3, ..Default::default() };
    for (name, params) in [
        ("greedy", SamplingParams::default()),
        ("greedy, top 5 reported", SamplingParams { num_top: 5, ..Default::default() }),
        ("temperature", warm.clone()),
        ("top-k 40", SamplingParams { top_k: 40, ..warm.clone() }),
        ("top-p 0.9", SamplingParams { top_p: 0.9, ..warm.clone() }),
    ] {
        for &rows in &bench.shapes.sampled {
            sample(bench, name, (&params, false), rows)?;
        }
    }
    for (name, params) in [("greedy, masks", SamplingParams::default()), ("temperature, masks", warm)] {
        for &rows in &bench.shapes.sampled {
            sample(bench, name, (&params, true), rows)?;
        }
    }
    bench.shapes.sampled.iter().try_for_each(|rows| score(bench, *rows))
}

/// Logits in [-10, 10), few of them equal.
fn logits(rows: usize, vocab: usize) -> Table {
    let mut numbers = Numbers(4);
    let mut table = numbers.table(rows, vocab);
    table.data.iter_mut().for_each(|x| *x = 10.0 * *x + 0.04 * numbers.number());
    table
}

/// Refuses log-probabilities other than the reference's.
fn check(name: &str, sampled: &Sampled, logits: &[f32]) {
    let expected = reference::log_softmax(logits);
    for (token, logprob) in sampled.top.iter().copied().chain([(sampled.token, sampled.logprob)]) {
        assert!((logprob - expected[token as usize]).abs() < 1e-3, "{name}: token {token}, {logprob}");
    }
}

fn cost(rows: usize, vocab: usize) -> Cost {
    Cost { bytes: rows * vocab * 4, flops: rows * vocab * 10 }
}

/// Times sampling or scoring. The results of a call are collected during the next one, so that its launch does not
/// wait.
fn time<M: Machine>(
    bench: &Bench<M>,
    name: &str,
    cost: Cost,
    mut launch: impl FnMut() -> kernels::Result<<M::Ops as Sampling>::Pending>,
) -> Outcome<()> {
    let (mut before, mut out) = (None, Vec::new());
    bench.time(name, cost, |_| {
        out.clear();
        before.replace(launch()?).map_or(Ok(()), |pending| bench.ops().collect(pending, &mut out))
    })?;
    Ok(before.map_or(Ok(()), |pending| bench.ops().collect(pending, &mut out))?)
}

/// Times sampling with these parameters, and whether every row has a mask that allows half of the tokens.
fn sample<M: Machine>(
    bench: &Bench<M>,
    how: &str,
    (params, masked): (&SamplingParams, bool),
    rows: usize,
) -> Outcome<()> {
    let (ops, vocab) = (bench.ops(), bench.shapes.vocab);
    let name = format!("sample {rows}x{vocab} {how}");
    if !bench.wants(&name) {
        return Ok(());
    }
    let table = logits(rows, vocab);
    let x = wide_mat(ops, &table)?;
    let mut sampler = ops.sampler(rows, vocab)?;
    let places: Vec<_> = (0..rows as u32).map(|i| SampleRow { row: i, seat: i }).collect();
    for place in &places {
        ops.seat(&mut sampler, place.seat, params, &[1], &[])?;
    }
    let mask = TokenMask::new(&vec![0b0101_0101; vocab.div_ceil(8)], vocab).filter(|_| masked);
    let masks = vec![mask.as_ref(); rows];
    let mut launch = || match masked {
        true => ops.sample_masked(&x, &places, &masks, &mut sampler),
        false => ops.sample(&x, &places, &mut sampler),
    };
    let mut choices = Vec::new();
    ops.collect(launch()?, &mut choices)?;
    for sampled in &choices {
        let row = table.row(sampled.seat as usize);
        check(&name, sampled, row);
        let chosen = row[sampled.token as usize];
        let mut allowed = row.iter().step_by(if masked { 2 } else { 1 });
        assert!(params.temperature > 0.0 || allowed.all(|logit| *logit <= chosen), "{name}: {chosen}");
    }
    time(bench, &name, cost(rows, vocab), launch)
}

fn score<M: Machine>(bench: &Bench<M>, rows: usize) -> Outcome<()> {
    let (ops, vocab) = (bench.ops(), bench.shapes.vocab);
    let name = format!("score {rows}x{vocab} top 5 reported");
    if !bench.wants(&name) {
        return Ok(());
    }
    let table = logits(rows, vocab);
    let x = wide_mat(ops, &table)?;
    let targets: Vec<_> = (0..rows as u32).map(|row| (row, 7 * row)).collect();
    let mut scores = Vec::new();
    ops.collect(ops.score(&x, &targets, 5)?, &mut scores)?;
    for (row, sampled) in scores.iter().enumerate() {
        check(&name, sampled, table.row(row));
    }
    time(bench, &name, cost(rows, vocab), || ops.score(&x, &targets, 5))
}
