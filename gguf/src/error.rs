//! Why a file could not be read.

use std::{fmt, io, ops::Range, path::PathBuf};

/// Result of reading a file.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a GGUF file, or something in it, could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The file does not begin with "GGUF".
    #[error("not a GGUF file: it begins with {found:02x?}")]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// A version of the format that is not read here, or a big-endian file.
    #[error("GGUF version {version} is not supported, only 2 and 3")]
    Version {
        /// The version.
        version: u32,
    },
    /// The header ends before something in it does, or a length in it is corrupt.
    #[error("truncated or corrupt: {what} at byte {offset} takes {needed} bytes, {available} are left")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it begins.
        offset: u64,
        /// Bytes that it takes at least.
        needed: u64,
        /// Bytes that the header can still have.
        available: u64,
    },
    /// A text is not UTF-8.
    #[error("the text at byte {offset} is not UTF-8")]
    Utf8 {
        /// Where the text begins.
        offset: u64,
    },
    /// A metadata value has a type that the format does not define, or an array of arrays.
    #[error("metadata \"{key}\": value type {code} is not supported here")]
    ValueType {
        /// The key.
        key: String,
        /// Code of the type.
        code: u32,
    },
    /// A boolean is neither 0 nor 1.
    #[error("metadata \"{key}\": {value} is not a boolean")]
    Bool {
        /// The key.
        key: String,
        /// The byte.
        value: u8,
    },
    /// A metadata key appears twice.
    #[error("metadata \"{key}\" appears twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A metadata key that is needed is absent.
    #[error("metadata \"{key}\" is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A metadata value is not what its reader needs.
    #[error("metadata \"{key}\" is {found}, expected {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What is in the file.
        found: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// `general.alignment` is not a power of two.
    #[error("alignment {alignment} is not a power of two")]
    Alignment {
        /// The alignment.
        alignment: u64,
    },
    /// The file is a part of a model, and not the first one.
    #[error("this is part {part} of {count}: the first part must be named, which has the metadata")]
    NotTheFirst {
        /// Its number, from 1.
        part: u32,
        /// The number of parts.
        count: u32,
    },
    /// The file is the first part of a model, and its name does not tell those of the others.
    #[error("the other parts cannot be found: the name {name:?} does not end in -00001-of-{count:05}.gguf")]
    PartName {
        /// The file's name.
        name: String,
        /// The number of parts.
        count: u32,
    },
    /// Another part of a model cannot be read.
    #[error("part {}: {source}", path.display())]
    Part {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<Error>,
    },
    /// A file is another part than its name says.
    #[error("it says that it is part {part} of {count}")]
    OtherPart {
        /// Its number, from 1.
        part: u32,
        /// The number of parts.
        count: u32,
    },
    /// The parts have another number of tensors than the first one says.
    #[error("the parts have {found} tensors together, expected {expected}")]
    PartTensors {
        /// The number that they have.
        found: usize,
        /// The number that the first part tells.
        expected: usize,
    },
    /// A tensor name appears twice.
    #[error("tensor \"{tensor}\" appears twice")]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },
    /// A tensor that is needed is absent.
    #[error("tensor \"{tensor}\" is missing")]
    MissingTensor {
        /// The name.
        tensor: String,
    },
    /// A tensor is stored in a type that is not read here.
    #[error("tensor \"{tensor}\": type {code} is not supported")]
    TensorType {
        /// The name.
        tensor: String,
        /// Code of the type.
        code: u32,
    },
    /// A tensor has no or too many axes, an empty one, rows that are no whole blocks, or more elements than count.
    #[error("tensor \"{tensor}\": shape {dims:?} is not valid for {ty:?}")]
    TensorShape {
        /// The name.
        tensor: String,
        /// Axes, fastest first.
        dims: Vec<u64>,
        /// Type of its elements.
        ty: crate::TensorType,
    },
    /// A tensor has more axes than the format allows, or none.
    #[error("tensor \"{tensor}\" has {axes} axes, expected 1 to 4")]
    TensorAxes {
        /// The name.
        tensor: String,
        /// Number of axes.
        axes: u32,
    },
    /// A tensor does not have the rows or the columns that were asked for.
    #[error("tensor \"{tensor}\" has no {part}")]
    NoSuchPart {
        /// The name.
        tensor: String,
        /// What was asked for.
        part: PartOfTensor,
    },
    /// The columns that were asked for begin or end within a block.
    #[error("tensor \"{tensor}\": {part} are not whole blocks of {} columns of {ty:?}", ty.block_elements())]
    CutBlocks {
        /// The name.
        tensor: String,
        /// What was asked for.
        part: PartOfTensor,
        /// Type of its elements.
        ty: crate::TensorType,
    },
    /// A tensor does not lie within the file, or not at a multiple of the alignment.
    #[error(
        "tensor \"{tensor}\": {bytes} bytes at offset {offset} of {available} bytes of data, aligned to {alignment}"
    )]
    TensorBounds {
        /// The name.
        tensor: String,
        /// Where it begins in the data.
        offset: u64,
        /// Its size.
        bytes: u64,
        /// Size of the data.
        available: u64,
        /// What its offset must be a multiple of.
        alignment: u64,
    },
}

/// Rows and columns of a tensor that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartOfTensor {
    /// The rows.
    pub rows: Range<usize>,
    /// The columns.
    pub cols: Range<usize>,
    /// Number of rows and of columns of the whole tensor.
    pub shape: [usize; 2],
}

impl fmt::Display for PartOfTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PartOfTensor { rows, cols, shape } = self;
        write!(f, "rows {rows:?} and columns {cols:?} of {shape:?}")
    }
}
