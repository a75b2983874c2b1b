//! `embed`: the first value of the residual stream, from rows of tables and what adapters change of them.

use std::ops::Range;

use super::{
    CpuBackend, CpuSampler,
    elementwise::each_row,
    lora::{OwnRows, SiteChange},
    memory::CpuMat,
    pool::Shards,
};
use crate::{
    Batch, Embedding, Error, LinearLora, Matrix, Result, SiteKind,
    batch::{ensembles, is_ensemble},
};

/// The origin of a row of the step.
#[derive(Clone)]
struct Source<'a> {
    token: usize,
    /// The row that an adapter has in place of the table's.
    own: Option<(&'a OwnRows, usize)>,
    /// The changes of the row's adapters in [`Sources::changes`].
    changes: Range<usize>,
}

/// The origins of all rows.
struct Sources<'a> {
    rows: Vec<Source<'a>>,
    /// Changes, each with the weight of its adapter.
    changes: Vec<(&'a SiteChange, f32)>,
}

pub(super) fn embed(
    be: &CpuBackend,
    batch: &Batch,
    sampler: &CpuSampler,
    by: Embedding<'_, CpuBackend>,
    y: &mut CpuMat,
) -> Result<()> {
    let op = "embed";
    let (cols, rows, table) = (y.cols(), batch.rows(), by.table);
    if table.inputs != cols {
        return Err(Error::Shape { op, what: "columns of the table", got: table.inputs, expected: cols });
    }
    if let Some((positions, first)) = by.positions {
        if positions.inputs != cols {
            let (got, expected) = (positions.inputs, cols);
            return Err(Error::Shape { op, what: "columns of the positions", got, expected });
        }
        let index = batch.positions.iter().max().map_or(0, |&last| first + last as usize);
        if index >= positions.outputs {
            return Err(Error::Index { op, what: "position", index, limit: positions.outputs });
        }
    }
    let sources = sources(batch, sampler, &by, cols)?;
    y.resize(op, rows)?;
    let y = Shards(y.used_mut().as_mut_ptr());
    each_row(be, rows, cols, |i| {
        // SAFETY: row i is this call's own.
        let row = unsafe { y.slice(i * cols, cols) };
        let Source { token, own, changes } = &sources.rows[i];
        match own {
            Some((rows, own)) => rows.values.read_row(*own, row),
            None => by.table.read_row(*token, row),
        }
        sources.changes[changes.clone()].iter().for_each(|change| apply(*change, *token, row));
        if by.scale != 1.0 {
            row.iter_mut().for_each(|x| *x *= by.scale);
        }
        if let Some((positions, first)) = by.positions {
            positions.each_of_row(first + batch.positions[i] as usize, cols, |k, x| row[k] += x);
        }
    });
    Ok(())
}

/// Changes a row as an adapter does.
fn apply((change, weight): (&SiteChange, f32), token: usize, row: &mut [f32]) {
    if let Some(delta) = &change.lookup {
        delta.add(token, weight, row);
    }
    for (i, vectors) in change.vectors.iter().enumerate() {
        if let Some(gain) = change.gains().and_then(|gains| gains.0[i].as_ref()) {
            row.iter_mut().zip(gain).for_each(|(x, gain)| *x *= gain);
        }
        if let Some(bias) = &vectors.bias {
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x += weight * bias);
        }
    }
}

/// Finds the origin of each row of a step. Errors: a token has no row.
fn sources<'a>(
    batch: &Batch,
    sampler: &CpuSampler,
    by: &Embedding<'a, CpuBackend>,
    cols: usize,
) -> Result<Sources<'a>> {
    let op = "embed";
    let mut rows = Vec::with_capacity(batch.rows());
    for &token in &batch.tokens {
        let token = match usize::try_from(token) {
            Ok(token) => token,
            Err(_) => sampler.last(op, (-1 - i64::from(token)) as usize)? as usize,
        };
        rows.push(Source { token, own: None, changes: 0..0 });
    }
    let mut sources = Sources { rows, changes: Vec::new() };
    if let Some(lora) = &by.lora {
        find_changes(lora, [by.table.outputs, cols], &mut sources)?;
    }
    let limit = by.table.outputs;
    match sources.rows.iter().find(|source| source.token >= limit && source.own.is_none()) {
        Some(source) => Err(Error::Index { op, what: "token", index: source.token, limit }),
        None => Ok(sources),
    }
}

/// Finds the changes of the rows' adapters.
fn find_changes<'a>(
    lora: &LinearLora<'a, CpuBackend>,
    [tokens, cols]: [usize; 2],
    sources: &mut Sources<'a>,
) -> Result<()> {
    let op = "embed";
    let site = lora.slots.site(op, lora.site)?;
    for (what, got, expected) in [
        ("sites of a table", usize::from(site.kind == SiteKind::Lookup), 1),
        ("outputs of the site", site.outputs.iter().sum(), cols),
        ("inputs of the site", site.inputs.max(tokens), site.inputs),
    ] {
        if got != expected {
            return Err(Error::Shape { op, what, got, expected });
        }
    }
    let limit = sources.rows.len();
    for members in ensembles(&lora.batch.segments) {
        let first = sources.changes.len();
        for segment in members {
            let Some(change) = lora.slots.resident(op, segment.slot)?.site(lora.site) else { continue };
            if is_ensemble(members) && !change.is_sum() {
                return Err(Error::NoMember { op, slot: segment.slot as usize });
            }
            sources.changes.push((change, segment.weight));
        }
        let changes = first..sources.changes.len();
        let Some(segment) = members.first().filter(|_| !changes.is_empty()) else { continue };
        let own = sources.changes[first].0.rows.as_ref();
        let rows = segment.start as usize..segment.end as usize;
        let index = rows.end.saturating_sub(1);
        let of_segment = sources.rows.get_mut(rows);
        for source in of_segment.ok_or(Error::Index { op, what: "row of a segment", index, limit })? {
            source.changes = changes.clone();
            let Some(own) = own else { continue };
            let found = own.find(source.token);
            let (what, index) = ("token of an adapter", source.token);
            let found = found.map_err(|limit| Error::Index { op, what, index, limit })?;
            source.own = found.map(|found| (own, found));
        }
    }
    Ok(())
}
