//! What a file of torch can be refused for.

use std::io;

/// Why a file of torch cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TorchError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The archive is damaged.
    #[error("corrupt archive: {0}")]
    Zip(#[from] zip::result::ZipError),
    /// It is something else.
    #[error("neither an archive nor a pickle of torch.save")]
    OtherFormat,
    /// Something that must be in an archive.
    #[error("{0} is missing in the archive")]
    MissingEntry(String),
    /// An entry is compressed or encrypted, which torch does not do.
    #[error("{0} is compressed or encrypted in the archive")]
    PackedEntry(String),
    /// Numbers are stored in the other byte order.
    #[error("numbers are stored big-endian")]
    BigEndian,
    /// A pickle that is longer than any that only lists tensors.
    #[error("a pickle of {len} bytes is longer than {limit}")]
    TooLong {
        /// Its length.
        len: u64,
        /// Longest that is read.
        limit: u64,
    },
    /// A pickle with more instructions than any that only lists tensors.
    #[error("a pickle takes more than {limit} steps")]
    TooManySteps {
        /// Most that are taken.
        limit: usize,
    },
    /// A pickle ends before it is complete.
    #[error("a pickle is cut short at byte {at}")]
    Truncated {
        /// Where.
        at: usize,
    },
    /// A pickle asks for a class or a function that is not needed for tensors.
    #[error("a pickle names {0}, which is not allowed: only tensors, dictionaries and lists are read")]
    Global(String),
    /// An instruction that torch does not write.
    #[error("a pickle has the instruction {opcode:#04x} at byte {at}, which is not allowed")]
    Opcode {
        /// The instruction.
        opcode: u8,
        /// Where it is.
        at: usize,
    },
    /// An instruction with operands of the wrong kind.
    #[error("corrupt pickle: {fault} at byte {at}")]
    Pickle {
        /// What is wrong.
        fault: &'static str,
        /// Where.
        at: usize,
    },
    /// The file holds something other than tensors by their names.
    #[error("not a dictionary of tensors")]
    NotADictionary,
    /// A tensor that is not where it should be.
    #[error("tensor {name}: {fault}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        fault: &'static str,
    },
}
