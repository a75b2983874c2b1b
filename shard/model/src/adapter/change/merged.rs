//! A change as numbers that are added to the model's own.

use std::ops::Range;

use kernels::DType;

use super::{Change, Kind, initial};
use crate::{
    adapter::{AdapterError, base::BaseWeights, rows::Replaced, values::Values},
    load::transposed,
};

/// What is added to a weight `[rows, columns]`, in the order of the model's file.
#[derive(Default)]
pub(in crate::adapter) struct Merged {
    scale: f32,
    lora_rank: usize,
    /// `[rows, lora_rank]`.
    down: Vec<f32>,
    /// `[lora_rank, columns]`.
    across: Vec<f32>,
    /// The number of columns of the whole weight.
    columns: usize,
    /// Magnitudes of DoRA; of each output, whose norm is divided out once it is known.
    gains: Option<Gains>,
}

struct Gains {
    values: Vec<f32>,
    /// The sum of squares of each output.
    squares: Vec<f64>,
    /// Whether outputs are rows.
    by_row: bool,
}

impl Merged {
    pub(in crate::adapter) fn has_magnitude(&self) -> bool {
        self.gains.is_some()
    }

    /// Adds the delta to some rows and columns.
    pub(in crate::adapter) fn add_delta(&self, values: &mut [f32], rows: Range<usize>, cols: Range<usize>) {
        if self.lora_rank == 0 {
            return;
        }
        for (row, values) in rows.zip(values.chunks_exact_mut(cols.len())) {
            let factors = &self.down[row * self.lora_rank..][..self.lora_rank];
            for (factor, across) in factors.iter().zip(self.across.chunks_exact(self.columns)) {
                let factor = self.scale * factor;
                values.iter_mut().zip(&across[cols.clone()]).for_each(|(x, y)| *x += factor * y);
            }
        }
    }

    /// Counts some whole rows, to which the delta has been added, towards the norms of outputs.
    pub(in crate::adapter) fn count_norms(&mut self, values: &[f32], rows: Range<usize>) {
        let Some(Gains { squares, by_row, .. }) = &mut self.gains else { return };
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        for (row, values) in rows.zip(values.chunks_exact(self.columns)) {
            match by_row {
                true => squares[row] = values.iter().map(square).sum(),
                false => squares.iter_mut().zip(values).for_each(|(sum, x)| *sum += square(x)),
            }
        }
    }

    /// Divides magnitudes by the norms that have been counted.
    pub(in crate::adapter) fn divide_by_norms(&mut self) {
        if let Some(Gains { values, squares, .. }) = &mut self.gains {
            values.iter_mut().zip(squares).for_each(|(gain, sum)| *gain /= sum.sqrt() as f32);
        }
    }

    /// Multiplies some rows and columns by their gains.
    pub(in crate::adapter) fn multiply(&self, values: &mut [f32], rows: Range<usize>, cols: Range<usize>) {
        let Some(Gains { values: gains, by_row, .. }) = &self.gains else { return };
        for (row, values) in rows.zip(values.chunks_exact_mut(cols.len())) {
            match by_row {
                true => values.iter_mut().for_each(|x| *x *= gains[row]),
                false => values.iter_mut().zip(&gains[cols.clone()]).for_each(|(x, gain)| *x *= gain),
            }
        }
    }
}

impl Change {
    /// Whether the model's weight changes. Errors: there are other tokens than the model's.
    pub(in crate::adapter) fn changes_weight(&self, file: &Values) -> Result<bool, AdapterError> {
        let table = self.rows.as_ref().and_then(|rows| rows.table.as_ref());
        let table = table.map(|name| file.file.matrix_shape(name)).transpose()?.map(|[rows, _]| rows);
        let own = [
            table,
            self.delta.as_ref().map(|delta| delta.outputs),
            self.rows.as_ref().map(|rows| rows.end()),
        ];
        let [table, delta, end] = own;
        let is_other = |count: usize| count != self.module.outputs;
        if table.is_some_and(is_other)
            || delta.is_some_and(is_other)
            || end.is_some_and(|end| end > self.module.outputs)
        {
            return Err(AdapterError::OtherTokens(self.module.path.clone()));
        }
        if let Some(weight) = &self.weight {
            file.expect_shape(weight, &[self.module.outputs, self.module.inputs])?;
        }
        Ok(self.rows.is_some() || self.delta.is_some() || self.weight.is_some())
    }

    /// The bias that the model has afterwards, in the order of the file; `None` if it stays as it is.
    pub(in crate::adapter) fn merged_bias(
        &self,
        file: &Values,
        base: &BaseWeights<'_>,
    ) -> Result<Option<Vec<f32>>, AdapterError> {
        let Some(change) = self.read_bias(file, base)? else { return Ok(None) };
        if !self.module.bias {
            return Err(AdapterError::NoBias(self.module.path.clone()));
        }
        let own = base.bias(&self.module)?;
        Ok(Some(own.iter().zip(change).map(|(own, change)| own + change).collect()))
    }

    /// The row that replaces one of the model's.
    pub(in crate::adapter) fn replaced_row(
        &self,
        row: usize,
        file: &Values,
    ) -> Result<Option<Vec<f32>>, AdapterError> {
        if let Some(weight) = &self.weight {
            return Ok(Some(file.rows(weight, row..row + 1)?.to_f32()));
        }
        let Some(rows) = &self.rows else { return Ok(None) };
        let index = rows.ids().map_or(Some(row), |ids| ids.binary_search(&(row as u32)).ok());
        let Some(index) = index else { return Ok(None) };
        let mut data = vec![0; rows.shape()[1] * DType::F32.size()];
        Replaced::new(rows, file, None).fill(index..index + 1, DType::F32, &mut data)?;
        Ok(Some(data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    }

    /// Reads what is added to the weight.
    pub(in crate::adapter) fn merged(
        &self,
        file: &Values,
        base: &BaseWeights<'_>,
    ) -> Result<Merged, AdapterError> {
        let module = &self.module;
        let Some(delta) = &self.delta else { return Ok(Merged::default()) };
        let [mut a, mut b] = delta.read(module, file)?;
        if let Some(initial) = delta.initial {
            (a, b) = initial::extended(initial, module, [a, b], base)?;
        }
        let is_lookup = module.kind == Kind::Lookup;
        let is_transposed = is_lookup || module.transposed;
        let (down, across) = if is_transposed { (transposed(&a), transposed(&b)) } else { (b, a) };
        let magnitudes = if is_lookup { module.inputs } else { module.outputs };
        let gains = self.magnitude.as_ref().map(|name| {
            let (values, squares) = (file.vector(name, magnitudes)?, vec![0.0; magnitudes]);
            Ok::<_, AdapterError>(Gains { values, squares, by_row: !is_transposed })
        });
        let (lora_rank, columns, gains) = (down.cols, across.cols, gains.transpose()?);
        Ok(Merged {
            scale: delta.scale,
            lora_rank,
            columns,
            down: down.to_f32(),
            across: across.to_f32(),
            gains,
        })
    }
}
