//! What an operation can fail with.

/// Result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument does not have the shape that the operation needs.
    #[error("{op}: {what} is {got}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument and its axis.
        what: &'static str,
        /// The size that was given.
        got: usize,
        /// The size that the other arguments imply.
        expected: usize,
    },
    /// An index points outside of what it indexes.
    #[error("{op}: {what} {index} is out of range, limit {limit}")]
    Index {
        /// The operation.
        op: &'static str,
        /// What is indexed.
        what: &'static str,
        /// The index.
        index: usize,
        /// The first invalid index.
        limit: usize,
    },
    /// A row uses a slot that holds no adapter.
    #[error("{op}: slot {slot} is empty")]
    EmptySlot {
        /// The operation.
        op: &'static str,
        /// The slot.
        slot: usize,
    },
    /// Rows have an adapter with a weight or beside others, and it is not a sum: it has magnitudes or replaced rows.
    #[error("{op}: the adapter in slot {slot} cannot be a member of an ensemble")]
    NoMember {
        /// The operation.
        op: &'static str,
        /// The slot.
        slot: usize,
    },
    /// The backend's threads could not be started.
    #[error("cannot start a thread: {0}")]
    Threads(#[from] std::io::Error),
    /// The backend cannot compute in this type or with this head size on this device.
    #[error("{backend}: {what} is not supported")]
    Unsupported {
        /// The backend.
        backend: &'static str,
        /// What was asked for.
        what: String,
    },
    /// The device or one of its libraries reported a failure. The device is not usable afterwards.
    #[error("{op}: {library} error {code}")]
    Device {
        /// The operation.
        op: &'static str,
        /// Who reported it: the driver, the runtime, a library.
        library: &'static str,
        /// Its error code.
        code: i32,
    },
    /// No device that this backend can use.
    #[error("{backend}: {missing}")]
    Unavailable {
        /// The backend.
        backend: &'static str,
        /// What the machine lacks.
        missing: String,
    },
    /// The device has no memory left.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What they were for.
        what: &'static str,
    },
    /// The ranks of a model could not form a group.
    #[error("rank {rank}: {what}: {source}")]
    Group {
        /// The rank that reports it.
        rank: usize,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Another rank of the model is not there, so that nothing can be computed any more.
    #[error("{op}: rank {rank} {fault}")]
    Peer {
        /// The operation that needed it.
        op: &'static str,
        /// The other rank.
        rank: usize,
        /// What is wrong with it.
        fault: PeerFault,
    },
    /// Two sequences of a step store into the same block of KV memory, or one of them returns to it.
    #[error("block {0} is stored into twice in one step")]
    SharedBlock(u32),
}

/// What is wrong with another rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// Its process has ended, or has left the group.
    #[error("has ended")]
    Ended,
    /// It has not come within the time that ranks wait for each other.
    #[error("has not come within {0:?}")]
    Late(std::time::Duration),
    /// It runs another operation, or the same one with other sizes.
    #[error("runs another operation")]
    Differs,
}

impl Error {
    /// Whether the arguments are at fault, and other ones could succeed. Otherwise the device or the machine failed.
    pub fn is_argument(&self) -> bool {
        match self {
            Error::Shape { .. }
            | Error::Index { .. }
            | Error::EmptySlot { .. }
            | Error::NoMember { .. }
            | Error::Unsupported { .. }
            | Error::SharedBlock(_) => true,
            Error::Threads(_)
            | Error::Device { .. }
            | Error::Unavailable { .. }
            | Error::Group { .. }
            | Error::Peer { .. }
            | Error::OutOfMemory { .. } => false,
        }
    }

    /// Returns whether the fault is another rank's: its process has ended, or it has not come in time.
    pub fn is_loss_of_a_peer(&self) -> bool {
        matches!(self, Error::Peer { fault: PeerFault::Ended | PeerFault::Late(_), .. })
    }
}
