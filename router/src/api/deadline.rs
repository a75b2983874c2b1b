//! The time that a request has for its whole answer.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::error::ApiError;
use crate::server::{App, accept::Caller};

/// The time at which a request must have its whole answer, if there is one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Option<(Instant, Duration)>);

impl Deadline {
    /// Does some work until then.
    pub(super) async fn keep<T>(self, work: impl Future<Output = T>) -> Result<T, ApiError> {
        let Some((at, limit)) = self.0 else { return Ok(work.await) };
        timeout_at(at, work).await.map_err(|_| ApiError::RequestTimeout { limit })
    }
}

impl App {
    /// The deadline of a request, which `--request-timeout` counts from its arrival.
    pub(super) fn deadline(&self, caller: &Caller) -> Deadline {
        let limit = self.config.router.request_timeout;
        Deadline(limit.map(|limit| (Instant::from_std(caller.received) + limit, limit)))
    }
}
