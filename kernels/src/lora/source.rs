//! Where a backend reads the matrices of an adapter from.

use std::ops::Range;

use crate::{DType, Error, HostTensor, Result, tensor::convert};

/// A row-major matrix that a backend reads straight into the memory where it keeps adapters, some rows at a time.
pub trait MatrixSource: Sync {
    /// Why it cannot be read, or staged.
    type Error: From<Error> + Send;

    /// The numbers of rows and columns.
    fn shape(&self) -> [usize; 2];

    /// Reads rows as little-endian elements of a type. They fill `to`. A backend reads every row once, different ones on
    /// several threads at the same time.
    fn read(&self, rows: Range<usize>, dtype: DType, to: &mut [u8]) -> Result<(), Self::Error>;
}

impl MatrixSource for HostTensor<'_> {
    type Error = Error;

    fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    fn read(&self, rows: Range<usize>, dtype: DType, to: &mut [u8]) -> Result<()> {
        let width = self.cols * self.dtype.size();
        let (got, expected) = (self.data.len(), self.rows * width);
        if got != expected {
            return Err(Error::Shape { op: "stage", what: "bytes of data", got, expected });
        }
        convert(self.dtype, &self.data[rows.start * width..rows.end * width], dtype, to);
        Ok(())
    }
}
