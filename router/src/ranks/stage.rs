//! Stages and unstages of all ranks, which succeed or fail as one.

#[cfg(test)]
mod tests;

use futures::future::try_join_all;
use scheduler::AdapterKey;
use tonic::{Code, Status};

use super::{RankError, Ranks, failed};
use crate::wire::{
    WireError,
    stage::{self, StageAnswer, StageOrder, Staged},
};

/// The reason that an adapter could not be staged. No rank has it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StageError {
    /// The model cannot serve it; the message names the cause.
    #[error("{0}")]
    Invalid(String),
    /// A rank has no memory for it, or could not read it, or cannot be reached.
    #[error("the adapter is not available: {0}")]
    Unavailable(String),
    /// A rank could not read it in time.
    #[error("{0}")]
    Slow(String),
    /// The session has ended.
    #[error("{0}")]
    SessionEnded(String),
    /// An answer contradicts the protocol.
    #[error("rank {rank} sent {source}")]
    Wire {
        /// The rank.
        rank: usize,
        /// The contradiction.
        source: WireError,
    },
    /// Two ranks have read different adapters.
    #[error("`{field}` of an adapter is {first} on rank 0 and {other} on rank {rank}")]
    Differs {
        /// The property.
        field: &'static str,
        /// Its value on rank 0.
        first: String,
        /// The rank with another value.
        rank: usize,
        /// Its value there.
        other: String,
    },
}

impl From<Status> for StageError {
    fn from(status: Status) -> StageError {
        let message = status.message().to_owned();
        match status.code() {
            Code::InvalidArgument => StageError::Invalid(message),
            Code::DeadlineExceeded => StageError::Slow(message),
            Code::FailedPrecondition => StageError::SessionEnded(message),
            _ => StageError::Unavailable(message),
        }
    }
}

impl Ranks {
    /// Copies an adapter into the host memory of every rank. The answer has the largest sizes of all ranks. Unless it is
    /// `Staged`, no rank has the adapter by then. Whoever drops this call must unstage the content.
    pub(crate) async fn stage(&self, session: u64, order: &StageOrder) -> Result<StageAnswer, StageError> {
        let request = stage::request(session, order);
        let answers = self.clients().enumerate().map(async |(rank, mut client)| {
            let response = client.stage(request.clone()).await?.into_inner();
            stage::answer(response).map_err(|source| StageError::Wire { rank, source })
        });
        // The first failure ends the calls to the other ranks.
        let answer = try_join_all(answers).await.and_then(merge);
        if !matches!(answer, Ok(StageAnswer::Staged(_)))
            && let Err(error) = self.unstage(session, order.content).await
        {
            tracing::warn!(adapter = order.name, "after a stage that failed: {error}");
        }
        answer
    }

    /// Takes an adapter out of the host memory of every rank. Ends when nothing of it is left, not even a stage that was
    /// under way.
    pub(crate) async fn unstage(&self, session: u64, content: AdapterKey) -> Result<(), RankError> {
        let request = stage::unstage(session, content);
        let calls = self.clients().enumerate().map(async |(rank, mut client)| {
            client.unstage(request.clone()).await.map_err(|status| failed(rank, &status))
        });
        try_join_all(calls).await.map(|_| ())
    }
}

/// The answer of all ranks together. `Gone` goes before `NeedsRoom`, because the adapter will not be read again.
fn merge(answers: Vec<StageAnswer>) -> Result<StageAnswer, StageError> {
    if answers.contains(&StageAnswer::Gone) {
        return Ok(StageAnswer::Gone);
    }
    let bytes = |answer: &StageAnswer| match answer {
        StageAnswer::NeedsRoom { bytes } => Some(*bytes),
        _ => None,
    };
    if let Some(bytes) = answers.iter().filter_map(bytes).max() {
        return Ok(StageAnswer::NeedsRoom { bytes });
    }
    let staged = answers.into_iter().filter_map(|answer| match answer {
        StageAnswer::Staged(staged) => Some(staged),
        _ => None,
    });
    let mut ranks = staged.enumerate();
    let (_, first) = ranks.next().ok_or_else(|| StageError::Unavailable("there are no ranks".into()))?;
    ranks.try_fold(first, |all, (rank, staged)| larger(all, rank, &staged)).map(StageAnswer::Staged)
}

/// The properties of an adapter on the ranks so far, and on one more.
pub(super) fn larger(all: Staged, rank: usize, staged: &Staged) -> Result<Staged, StageError> {
    let differs = |field, first: String, other: String| StageError::Differs { field, first, rank, other };
    if all.max_lora_rank != staged.max_lora_rank {
        let (first, other) = (all.max_lora_rank.to_string(), staged.max_lora_rank.to_string());
        return Err(differs("max_lora_rank", first, other));
    }
    if all.sites != staged.sites {
        return Err(differs("sites", format!("{:?}", all.sites), format!("{:?}", staged.sites)));
    }
    if all.invocation != staged.invocation {
        let (first, other) = (format!("{:?}", all.invocation), format!("{:?}", staged.invocation));
        return Err(differs("invocation", first, other));
    }
    Ok(Staged {
        host_bytes: all.host_bytes.max(staged.host_bytes),
        slot_bytes: all.slot_bytes.max(staged.slot_bytes),
        ..all
    })
}
