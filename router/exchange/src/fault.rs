//! Why an ask fails.

use std::{error::Error, fmt, sync::Arc};

use crate::Tier;

/// Why an ask failed, or a call did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The source has no such adapter, or does not say whether it has.
    NotFound(Arc<str>),
    /// The source does not let this credential read it.
    Denied(Arc<str>),
    /// The source could not be reached, or failed in the middle.
    Unavailable(Arc<str>),
    /// The ranks could not take it into host memory: one has no memory, or could not be reached.
    Ranks(Arc<str>),
    /// The bytes are not an adapter that the model can serve.
    Invalid(Arc<str>),
    /// It is larger than what there is room for.
    TooLarge {
        /// Its bytes, or what has come of it so far.
        bytes: u64,
        /// The bound that they exceed.
        limit: u64,
    },
    /// A lookup, a fetch or a stage was not answered in time, or the ask's deadline passed while it waited for one.
    Slow,
    /// The version is not there any more, because the source has another one by now. The reference is looked up again;
    /// an ask fails with this if that happens repeatedly. So does one whose lease on the disk is void, because the files
    /// are gone.
    Changed,
    /// Pins have as much of a tier as they may have.
    PinsFull(Tier),
    /// The session ended in which the lease was held.
    SessionLost,
    /// Another ask of the same name has not ended.
    Duplicate,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(message)
            | Self::Denied(message)
            | Self::Unavailable(message)
            | Self::Ranks(message)
            | Self::Invalid(message) => write!(f, "{message}"),
            Self::TooLarge { bytes, limit } => {
                write!(f, "the adapter takes {bytes} bytes, and there is room for {limit}")
            }
            Self::Slow => write!(f, "the adapter was not ready in time"),
            Self::Changed => write!(f, "the adapter has changed while it was read"),
            Self::PinsFull(tier) => write!(f, "pinned adapters take all they may have of the tier {tier:?}"),
            Self::SessionLost => write!(f, "the session with the model has ended"),
            Self::Duplicate => write!(f, "an ask of this name has not ended"),
        }
    }
}

impl Error for Fault {}

impl From<Fault> for StageFault {
    fn from(fault: Fault) -> Self {
        Self::Failed(fault)
    }
}

/// Why a content could not be staged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StageFault {
    /// It takes more bytes in host memory than were reserved. Nothing was read but its header.
    NeedsRoom {
        /// The bytes that it takes, on the rank where it takes the most.
        bytes: u64,
    },
    /// Its files are gone, or are another content's by now.
    Gone,
    /// The stage failed.
    Failed(Fault),
}
