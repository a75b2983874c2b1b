//! Operations on one row at a time.

use kernels::{
    Activation, Embedding, Norm, NormKind,
    prelude::*,
    reference::{self, Table},
    testing::{Numbers, assert_close, batch},
};

use crate::{Bench, Cost, Machine, Outcome, mat, tensor, uploaded, wide_mat};

const EPS: f32 = 1e-5;

pub(crate) fn all<M: Machine>(bench: &Bench<M>) -> Outcome<()> {
    for &rows in &bench.shapes.rows {
        norms(bench, rows)?;
        gate(bench, rows)?;
    }
    embed(bench)?;
    bench.shapes.rows.iter().try_for_each(|rows| gather(bench, *rows))
}

fn norms<M: Machine>(bench: &Bench<M>, rows: usize) -> Outcome<()> {
    let (ops, cols) = (bench.ops(), bench.shapes.hidden);
    let mut numbers = Numbers(2);
    let name = format!("normalize {rows}x{cols}");
    if !bench.wants(&name) {
        return Ok(());
    }
    let (table, weights) = (numbers.table(rows, cols), numbers.table(1, cols).data);
    let (x, mut y, w) = (wide_mat(ops, &table)?, ops.mat(rows, cols)?, ops.vector(&weights)?);
    let norm = Norm { kind: NormKind::Rms, weight: &w, bias: None, eps: EPS };
    ops.normalize(&x, norm, &mut y)?;
    let expected = reference::rms_norm(&table, &weights, EPS);
    assert_close("norm", &ops.download(&y)?, &expected.data, ops.dtype());
    let cost = Cost { bytes: rows * cols * (4 + M::ELEMENT), flops: rows * cols * 4 };
    bench.time(&name, cost, |_| ops.normalize(&x, norm, &mut y))
}

fn gate<M: Machine>(bench: &Bench<M>, rows: usize) -> Outcome<()> {
    let (ops, cols) = (bench.ops(), bench.shapes.inner);
    let name = format!("gate {rows}x{cols}");
    if !bench.wants(&name) {
        return Ok(());
    }
    let table = Numbers(2).table(rows, 2 * cols);
    let (x, mut y) = (mat(ops, &table)?, ops.mat(rows, cols)?);
    ops.gate(&x, Activation::Silu, &mut y)?;
    assert_close("gate", &ops.download(&y)?, &reference::gate(&table, Activation::Silu).data, ops.dtype());
    let cost = Cost { bytes: rows * cols * 3 * M::ELEMENT, flops: rows * cols * 16 };
    bench.time(&name, cost, |_| ops.gate(&x, Activation::Silu, &mut y))
}

/// Looks up rows of a table that is large enough to spread them.
fn embed<M: Machine>(bench: &Bench<M>) -> Outcome<()> {
    let (ops, cols, tokens) = (bench.ops(), bench.shapes.hidden, bench.shapes.vocab / 8);
    let name = |rows: usize| format!("embed {rows}x{cols}");
    if !bench.shapes.rows.iter().any(|rows| bench.wants(&name(*rows))) {
        return Ok(());
    }
    let table = Numbers(6).table(tokens, cols);
    let (weight, sampler) = (ops.weight(&[tensor(&table)])?, ops.sampler(1, tokens)?);
    let by = Embedding { table: &weight, scale: 1.0, positions: None, lora: None };
    for &rows in bench.shapes.rows.iter().filter(|rows| bench.wants(&name(**rows))) {
        let mut host = batch(&[(rows, 0)], &[]);
        host.tokens = (0..rows).map(|i| (997 * i % tokens) as i32).collect();
        let (device, mut y) = (uploaded(ops, &host)?, ops.wide_mat(rows, cols)?);
        ops.embed(&device, &sampler, by, &mut y)?;
        let expected: Vec<f32> = host.tokens.iter().flat_map(|&t| table.row(t as usize)).copied().collect();
        assert_close("embed", &ops.download(&y)?, &expected, ops.dtype());
        let cost = Cost { bytes: rows * cols * (ops.dtype().size() + 4), flops: 0 };
        bench.time(&name(rows), cost, |_| ops.embed(&device, &sampler, by, &mut y))?;
    }
    Ok(())
}

/// Gathers every second row.
fn gather<M: Machine>(bench: &Bench<M>, rows: usize) -> Outcome<()> {
    let (ops, cols) = (bench.ops(), bench.shapes.hidden);
    let name = format!("gather_logit_rows {rows}x{cols}");
    if !bench.wants(&name) {
        return Ok(());
    }
    let host = batch(&vec![(2, 0); rows], &[]);
    let table = Numbers(5).table(host.rows(), cols);
    let (device, x, mut y) = (uploaded(ops, &host)?, mat(ops, &table)?, ops.mat(rows, cols)?);
    ops.gather_logit_rows(&x, &device, &mut y)?;
    let expected = gathered(&table, &host.logit_rows);
    assert_close("gather_logit_rows", &ops.download(&y)?, &expected.data, ops.dtype());
    let cost = Cost { bytes: rows * cols * 2 * M::ELEMENT, flops: 0 };
    bench.time(&name, cost, |_| ops.gather_logit_rows(&x, &device, &mut y))
}

/// Some rows of a table.
pub(crate) fn gathered(table: &Table, rows: &[u32]) -> Table {
    let data = rows.iter().flat_map(|row| table.row(*row as usize)).copied().collect();
    Table { cols: table.cols, data }
}
