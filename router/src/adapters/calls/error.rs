//! Why calls fail.

use std::{fmt::Display, io};

use exchange::{Fault, StageFault};
use sources::SourceError;
use store::StoreError;

/// Why a call has failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// As the exchange knows it.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The source says no.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The cache on the disk says no.
    #[error("the adapter cache: {0}")]
    Store(#[from] StoreError),
    /// Files that are read in place cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// There is no folder to copy it to.
    #[error("the server has no folder for it: set --adapter-cache")]
    NoCache,
    /// It panicked.
    #[error("reading it was interrupted")]
    Interrupted,
}

impl CallError {
    /// The fault of an ask for this adapter.
    pub(super) fn fault(self, adapter: &dyn Display) -> Fault {
        match self {
            CallError::Fault(fault) => fault,
            CallError::Source(error) => of_source(error),
            // There is room for it as far as this server knows: others that share the folder have taken it.
            CallError::Store(StoreError::TooLarge { bytes, reserved }) => {
                Fault::TooLarge { bytes, limit: reserved }
            }
            error => Fault::Unavailable(format!("adapter \"{adapter}\": {error}").into()),
        }
    }

    /// The same of one that is staged.
    pub(super) fn stage_fault(self, adapter: &dyn Display) -> StageFault {
        self.fault(adapter).into()
    }
}

fn of_source(error: SourceError) -> Fault {
    let message = error.to_string().into();
    match error {
        SourceError::NotFound { .. } => Fault::NotFound(message),
        SourceError::Denied { .. } => Fault::Denied(message),
        SourceError::Unavailable { .. } | SourceError::Offline { .. } | SourceError::Io { .. } => {
            Fault::Unavailable(message)
        }
        SourceError::Invalid { .. } | SourceError::NotConfigured { .. } => Fault::Invalid(message),
        SourceError::TooLarge { bytes, limit, .. } => Fault::TooLarge { bytes, limit },
        SourceError::Changed { .. } => Fault::Changed,
    }
}
