//! `embed`: the first value of the residual stream, from rows of tables and what adapters change of them.

use super::{CpuBackend, CpuSampler, elementwise::each_row, lora::SiteChange, memory::CpuMat, pool::Shards};
use crate::{Batch, Embedding, Error, LinearLora, Matrix, Result, SiteKind};

/// The origin of a row of the step.
#[derive(Clone, Copy)]
struct Source<'a> {
    token: usize,
    /// The change of the row's adapter, and the index of the adapter's own row for the token, if it has one.
    change: Option<(&'a SiteChange, Option<usize>)>,
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
        let Source { token, change } = sources[i];
        match change {
            Some((change, own)) => look_up(change, own, by, token, row),
            None => table.read_row(token, row),
        }
        if by.scale != 1.0 {
            row.iter_mut().for_each(|x| *x *= by.scale);
        }
        if let Some((positions, first)) = by.positions {
            positions.each_of_row(first + batch.positions[i] as usize, cols, |k, x| row[k] += x);
        }
    });
    Ok(())
}

/// Looks up a row of a table that an adapter changes.
fn look_up(
    change: &SiteChange,
    own: Option<usize>,
    by: Embedding<'_, CpuBackend>,
    token: usize,
    row: &mut [f32],
) {
    match change.rows.as_ref().zip(own) {
        Some((rows, own)) => rows.values.read_row(own, row),
        None => by.table.read_row(token, row),
    }
    if let Some(delta) = &change.lookup {
        delta.add(token, row);
    }
    for (i, vectors) in change.vectors.iter().enumerate() {
        if let Some(gain) = change.gains().and_then(|gains| gains.0[i].as_ref()) {
            row.iter_mut().zip(gain).for_each(|(x, gain)| *x *= gain);
        }
        if let Some(bias) = &vectors.bias {
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
    }
}

/// Finds the origin of each row of a step. Errors: a token has no row.
fn sources<'a>(
    batch: &Batch,
    sampler: &CpuSampler,
    by: &Embedding<'a, CpuBackend>,
    cols: usize,
) -> Result<Vec<Source<'a>>> {
    let op = "embed";
    let mut sources = Vec::with_capacity(batch.rows());
    for &token in &batch.tokens {
        let token = match usize::try_from(token) {
            Ok(token) => token,
            Err(_) => sampler.last(op, (-1 - i64::from(token)) as usize)? as usize,
        };
        sources.push(Source { token, change: None });
    }
    if let Some(lora) = &by.lora {
        find_changes(lora, [by.table.outputs, cols], &mut sources)?;
    }
    let limit = by.table.outputs;
    let lost = sources.iter().find(|source| {
        let own = source.change.and_then(|(_, own)| own);
        source.token >= limit && own.is_none()
    });
    match lost {
        Some(source) => Err(Error::Index { op, what: "token", index: source.token, limit }),
        None => Ok(sources),
    }
}

/// Finds the changes of the rows' adapters.
fn find_changes<'a>(
    lora: &LinearLora<'a, CpuBackend>,
    [tokens, cols]: [usize; 2],
    sources: &mut [Source<'a>],
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
    let limit = sources.len();
    for segment in &lora.batch.segments {
        let Some(change) = lora.slots.resident(op, segment.slot)?.site(lora.site) else { continue };
        let rows = segment.start as usize..segment.end as usize;
        let index = rows.end.saturating_sub(1);
        let of_segment =
            sources.get_mut(rows).ok_or(Error::Index { op, what: "row of a segment", index, limit })?;
        for source in of_segment {
            let own = match &change.rows {
                None => None,
                Some(rows) => rows.find(source.token).map_err(|limit| Error::Index {
                    op,
                    what: "token of an adapter",
                    index: source.token,
                    limit,
                })?,
            };
            source.change = Some((change, own));
        }
    }
    Ok(())
}
