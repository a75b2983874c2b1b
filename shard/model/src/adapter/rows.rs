//! An adapter's own rows of the embedding table or of the output projection: whole tables that were trained
//! (`modules_to_save`), tables that PEFT has copied because the vocabulary was resized, and rows of some tokens
//! (`trainable_token_indices`).

use std::{collections::HashMap, ops::Range};

use kernels::{DType, HostTensor, MatrixSource};

use super::{
    AdapterError,
    base::{BaseWeights, ROWS},
    change::Delta,
    values::{Values, check, encode},
};
use crate::{decoder::Module, load::transposed};

/// An adapter's own rows of one module.
pub(super) struct Rows {
    /// The rows that replace the model's, ascending. `None`: they replace the whole table.
    ids: Option<Vec<u32>>,
    /// The number of rows.
    pub(super) count: usize,
    /// Columns of the weight.
    cols: usize,
    /// The tensor that is the whole weight.
    pub(super) table: Option<String>,
    /// The tensor of some tokens' rows, and the tokens in its order.
    tokens: Option<(String, Vec<u32>)>,
    /// Whether the module has a delta, too. It is added to the rows, because backends do not add deltas to replaced
    /// rows.
    pub(super) has_delta: bool,
}

/// The tensors from which the rows of a module are read.
pub(super) struct Sources {
    /// The tensor that is the whole weight.
    pub(super) table: Option<String>,
    /// The tensor of some tokens' rows, and the tokens in its order.
    pub(super) tokens: Option<(String, Vec<u32>)>,
    /// Whether there is a delta, too.
    pub(super) has_delta: bool,
    /// The largest number of rows that there is room for.
    pub(super) limit: usize,
}

impl Rows {
    /// Compares an adapter's rows with the model's. `None` if they are the same.
    pub(super) fn find(
        module: &Module,
        from: Sources,
        file: &Values,
        base: &BaseWeights<'_>,
    ) -> Result<Option<Rows>, AdapterError> {
        let Sources { table, tokens, has_delta, limit } = from;
        let mut ids = Vec::new();
        let mut all = module.outputs;
        if let Some(name) = &table {
            let [rows, cols] = file.file.matrix_shape(name)?;
            if cols != module.inputs || rows == 0 {
                file.expect_shape(name, &[module.outputs, module.inputs])?;
            }
            if rows > limit {
                return Err(AdapterError::TooManyTokens { name: name.clone(), rows, limit });
            }
            ids = base.differing(file, name, module)?;
            all = rows;
        }
        if let Some((name, tokens)) = &tokens {
            file.expect_shape(name, &[tokens.len(), module.inputs])?;
            ids.extend(tokens);
        }
        ids.sort_unstable();
        ids.dedup();
        // The logits of tokens that the adapter's vocabulary lacks must be -∞. Such tokens are never looked up.
        let is_short = all < module.outputs && !module.is_lookup();
        if ids.is_empty() && !is_short {
            return Ok(None);
        }
        if let Some(name) = table.as_ref().filter(|_| is_short || has_delta) {
            ids = (0..file.file.matrix_shape(name)?[0] as u32).collect();
        }
        let count = ids.len();
        let ids = (!is_short && count < all.max(module.outputs)).then_some(ids);
        Ok(Some(Rows { ids, count, cols: module.inputs, table, tokens, has_delta }))
    }

    /// The rows that replace the model's; `None` if they replace the whole table.
    pub(super) fn ids(&self) -> Option<&[u32]> {
        self.ids.as_deref()
    }

    /// The end of the range of rows.
    pub(super) fn end(&self) -> usize {
        match &self.ids {
            Some(ids) => ids.last().map_or(0, |id| *id as usize + 1),
            None => self.count,
        }
    }

    /// Numbers of rows and columns.
    pub(super) fn shape(&self) -> [usize; 2] {
        [self.count, self.cols]
    }
}

/// Rows that are read, and what is added to them.
pub(super) struct Replaced<'a> {
    rows: &'a Rows,
    file: &'a Values,
    /// Where rows of single tokens are in their tensor.
    own: HashMap<u32, usize>,
    folded: Option<Folded>,
}

impl<'a> Replaced<'a> {
    pub(super) fn new(rows: &'a Rows, file: &'a Values, folded: Option<Folded>) -> Replaced<'a> {
        let own = rows.tokens.iter().flat_map(|(_, tokens)| tokens.iter().copied().zip(0..)).collect();
        Replaced { rows, file, own, folded }
    }

    /// The number of the row at an index.
    fn id(&self, index: usize) -> u32 {
        self.rows.ids.as_ref().map_or(index as u32, |ids| ids[index])
    }

    /// Reads some of the rows, by their indices. Returns whether all elements are zero.
    pub(super) fn fill(
        &self,
        indices: Range<usize>,
        dtype: DType,
        mut to: &mut [u8],
    ) -> Result<bool, AdapterError> {
        let Rows { cols, ref tokens, ref table, .. } = *self.rows;
        let (mut next, mut is_zero) = (indices.start, true);
        while next < indices.end {
            let first = self.id(next);
            // Consecutive rows of the table are read at once.
            let run = (next..indices.end).zip(first..).take(ROWS);
            let run = run.take_while(|(i, id)| self.id(*i) == *id && !self.own.contains_key(id)).count();
            let (name, rows) = match (self.own.get(&first), tokens, table) {
                (Some(&at), Some((name, _)), _) => (name, at..at + 1),
                (_, _, Some(name)) => (name, first as usize..first as usize + run),
                (_, _, None) => return Err(AdapterError::NoTensor),
            };
            next += rows.len();
            let filled;
            (filled, to) = to.split_at_mut(rows.len() * cols * dtype.size());
            is_zero &= match &self.folded {
                None => self.file.fill((name, rows, 0..cols), dtype, filled)?,
                Some(folded) => {
                    let rows = folded.add(first as usize, &self.file.rows(name, rows)?);
                    rows.read(0..rows.rows, dtype, filled)?;
                    check(dtype, filled).is_zero
                }
            };
        }
        Ok(is_zero)
    }
}

/// A delta and a magnitude that are applied to rows.
pub(super) struct Folded {
    scale: f32,
    lora_rank: usize,
    /// One vector of `lora_rank` for each row.
    by_row: Vec<f32>,
    /// `[lora_rank, columns]`.
    across: Vec<f32>,
    magnitude: Option<Vec<f32>>,
}

impl Folded {
    /// Reads the delta of a table.
    pub(super) fn read(
        module: &Module,
        delta: &Delta,
        magnitude: Option<Vec<f32>>,
        file: &Values,
    ) -> Result<Folded, AdapterError> {
        let [a, b] = delta.read(module, file)?;
        let (by_row, across) = match module.is_lookup() {
            true => (transposed(&a), transposed(&b)),
            false => (b, a),
        };
        let (by_row, across) = (by_row.to_f32(), across.to_f32());
        Ok(Folded { scale: delta.scale, lora_rank: delta.lora_rank, by_row, across, magnitude })
    }

    /// Adds the delta to the rows from `first`, and rounds them to the type in which they are stored.
    fn add(&self, first: usize, rows: &HostTensor<'_>) -> HostTensor<'static> {
        let mut values = rows.to_f32();
        for (i, row) in values.chunks_exact_mut(rows.cols).enumerate() {
            let factors = &self.by_row[(first + i) * self.lora_rank..][..self.lora_rank];
            for (factor, across) in factors.iter().zip(self.across.chunks_exact(rows.cols)) {
                row.iter_mut().zip(across).for_each(|(x, y)| *x += self.scale * factor * y);
            }
            if let Some(magnitude) = &self.magnitude {
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.iter_mut().for_each(|x| *x *= magnitude[first + i] / norm);
            }
        }
        let mut data = Vec::with_capacity(rows.data.len());
        encode(&values, rows.dtype, &mut data);
        HostTensor { dtype: rows.dtype, rows: rows.rows, cols: rows.cols, data: data.into() }
    }
}
