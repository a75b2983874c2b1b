//! A file of named tensors in safetensors' or torch's format. Opening it reads the header, and parts of tensors are
//! read when they are asked for.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use kernels::{DType, Format, WeightPart};

use super::{safetensors, torch};
use crate::{LoadError, Result, files};

/// The type of a tensor's elements in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ElementType {
    Known(DType),
    /// 64 bits, which are rounded to 32 bits.
    F64,
    /// Any other type, by its name. Reading the tensor is refused.
    Other(String),
}

impl ElementType {
    fn size(&self) -> usize {
        match self {
            ElementType::Known(dtype) => dtype.size(),
            ElementType::F64 => 8,
            ElementType::Other(_) => 0,
        }
    }
}

/// The place of a tensor. It has been checked that it is within the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) ty: ElementType,
    pub(super) shape: Vec<usize>,
    /// The stride of each axis, in elements.
    pub(super) strides: Vec<usize>,
    /// The offset of the first element in the file.
    pub(super) offset: u64,
    /// Bytes of all elements.
    pub(super) bytes: u64,
}

impl Place {
    /// The strides of rows and columns; a vector is one row.
    fn matrix_strides(&self) -> [usize; 2] {
        match *self.strides {
            [row, col] => [row, col],
            [col] => [0, col],
            _ => [0, 0],
        }
    }
}

/// An open file.
pub(crate) struct TensorFile {
    path: PathBuf,
    file: File,
    places: BTreeMap<String, Place>,
}

impl TensorFile {
    /// Opens a file and reads its header.
    pub(crate) fn open(path: &Path) -> Result<TensorFile> {
        TensorFile::of(path, files::open(path)?)
    }

    /// Reads the header of a file that was opened by this path. The name of the file decides on the format, as in
    /// transformers.
    pub(crate) fn of(path: &Path, file: File) -> Result<TensorFile> {
        let is_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
        let places = if is_safetensors { safetensors::places } else { torch::places }(path, &file)?;
        Ok(TensorFile { path: path.into(), file, places })
    }

    /// Names of all tensors, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Bytes of a tensor; 0 if it is missing.
    pub(crate) fn bytes(&self, name: &str) -> u64 {
        self.places.get(name).map_or(0, |place| place.bytes)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).ok_or_else(|| LoadError::MissingTensor(name.into()))
    }

    /// Shape of a tensor, from the header.
    pub(crate) fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.place(name)?.shape)
    }

    /// Number of rows and of columns of a tensor; a vector is one row.
    pub(crate) fn matrix_shape(&self, name: &str) -> Result<[usize; 2]> {
        match *self.shape(name)? {
            [cols] => Ok([1, cols]),
            [rows, cols] => Ok([rows, cols]),
            ref other => Err(LoadError::NotAMatrix { name: name.into(), got: other.into() }),
        }
    }

    /// Reads some rows and columns of a tensor. If the elements of a row are contiguous, nothing else is read.
    pub(crate) fn part(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<WeightPart<'static>> {
        let shape = self.matrix_shape(name)?;
        check_part(name, shape, &rows, &cols)?;
        let place = self.place(name)?;
        let dtype = match &place.ty {
            ElementType::Known(dtype) => *dtype,
            ElementType::F64 => DType::F32,
            ElementType::Other(other) => {
                return Err(LoadError::TensorType { name: name.into(), dtype: other.clone() });
            }
        };
        let mut data = vec![0; rows.len() * cols.len() * place.ty.size()];
        self.elements(place, rows.clone(), cols.clone(), &mut data)?;
        if place.ty == ElementType::F64 {
            let values = data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32);
            data = values.flat_map(f32::to_le_bytes).collect();
        }
        Ok(WeightPart { format: Format::Dense(dtype), rows: rows.len(), cols: cols.len(), data: data.into() })
    }

    /// The type of the elements of a matrix that are stored one after the other along each row; `None` if they lie apart, or
    /// are of a type that is converted.
    pub(crate) fn type_of_rows(&self, name: &str) -> Option<DType> {
        let place = self.places.get(name)?;
        match place.ty {
            ElementType::Known(dtype) if place.matrix_strides()[1] == 1 => Some(dtype),
            _ => None,
        }
    }

    /// As [`Self::part`], into memory that has the size of the stored elements.
    pub(crate) fn read_part(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
        to: &mut [u8],
    ) -> Result<()> {
        check_part(name, self.matrix_shape(name)?, &rows, &cols)?;
        self.elements(self.place(name)?, rows, cols, to)
    }

    /// Reads the bytes of some rows and columns, row after row.
    fn elements(&self, place: &Place, rows: Range<usize>, cols: Range<usize>, data: &mut [u8]) -> Result<()> {
        let size = place.ty.size();
        let [row_stride, col_stride] = place.matrix_strides();
        let index = |row: usize, col: usize| row * row_stride + col * col_stride;
        if data.is_empty() {
            return Ok(());
        }
        let is_packed = cols.len() == 1 || col_stride == 1;
        if is_packed && (rows.len() == 1 || row_stride == cols.len()) {
            self.read(place, index(rows.start, cols.start), data)?;
        } else if is_packed {
            for (to, row) in data.chunks_exact_mut(cols.len() * size).zip(rows) {
                self.read(place, index(row, cols.start), to)?;
            }
        } else {
            self.scattered(place, (rows, cols), data)?;
        }
        Ok(())
    }

    /// Reads rows and columns whose elements are not side by side, for example of a transposed matrix. Either everything
    /// between the first and the last element is read, or one line after another along the axis on which elements are
    /// closer together: a few rows of a transposed table are then not most of it.
    fn scattered(
        &self,
        place: &Place,
        (rows, cols): (Range<usize>, Range<usize>),
        data: &mut [u8],
    ) -> Result<()> {
        let size = place.ty.size();
        let [row_stride, col_stride] = place.matrix_strides();
        let width = cols.len();
        let first = rows.start * row_stride + cols.start * col_stride;
        let span = |rows: usize, cols: usize| ((rows - 1) * row_stride + (cols - 1) * col_stride + 1) * size;
        let (lines, line) = match (span(rows.len(), width), row_stride < col_stride) {
            (whole, _) if whole <= 2 * data.len() => ((1, 0), (rows.len(), width)),
            (_, true) => ((width, col_stride), (rows.len(), 1)),
            (_, false) => ((rows.len(), row_stride), (1, width)),
        };
        let mut read = vec![0; span(line.0, line.1)];
        for i in 0..lines.0 {
            self.read(place, first + i * lines.1, &mut read)?;
            // The first row and column of the line, within the part.
            let (row, col) = if line.1 == 1 { (0, i) } else { (i, 0) };
            for (j, k) in (0..line.0).flat_map(|j| (0..line.1).map(move |k| (j, k))) {
                let at = (j * row_stride + k * col_stride) * size;
                let to = ((row + j) * width + col + k) * size;
                data[to..to + size].copy_from_slice(&read[at..at + size]);
            }
        }
        Ok(())
    }

    /// Reads elements from an offset.
    fn read(&self, place: &Place, element: usize, to: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(to, place.offset + (element * place.ty.size()) as u64);
        read.map_err(|source| LoadError::Io { path: self.path.clone(), source })
    }
}

/// Refuses rows and columns that a matrix does not have.
pub(super) fn check_part(
    name: &str,
    shape: [usize; 2],
    rows: &Range<usize>,
    cols: &Range<usize>,
) -> Result<()> {
    let lies_within = |range: &Range<usize>, len: usize| range.start <= range.end && range.end <= len;
    if lies_within(rows, shape[0]) && lies_within(cols, shape[1]) {
        return Ok(());
    }
    Err(LoadError::NoSuchPart { name: name.into(), rows: rows.clone(), cols: cols.clone(), shape })
}
