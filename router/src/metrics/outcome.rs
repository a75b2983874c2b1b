//! The ends of requests, each of which is counted once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use metrics::{Counter, Histogram, counter, describe_counter, describe_histogram, histogram};

/// The end of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum End {
    /// The answer has as many tokens as were asked for.
    Length,
    /// The model ended the answer.
    EosToken,
    /// The answer met a stop string.
    StopSequence,
    /// The client left.
    Cancelled,
    /// There was no permit for it, or a limit of its tenant was reached.
    Overloaded,
    /// The caller has no valid key.
    Unauthorized,
    /// Its body, or what it asks for, was refused.
    Validation,
    /// Its adapter does not exist, may not be read, cannot be served, or was not ready in time.
    Adapter,
    /// It failed while it ran.
    Generation,
    /// The model was not available.
    Unavailable,
}

impl End {
    /// All, in the order of their numbers.
    const ALL: [End; 10] = [
        End::Length,
        End::EosToken,
        End::StopSequence,
        End::Cancelled,
        End::Overloaded,
        End::Unauthorized,
        End::Validation,
        End::Adapter,
        End::Generation,
        End::Unavailable,
    ];

    /// Returns whether the request was answered.
    fn is_good(self) -> bool {
        matches!(self, End::Length | End::EosToken | End::StopSequence)
    }

    /// Its label.
    fn name(self) -> &'static str {
        match self {
            End::Length => "length",
            End::EosToken => "eos_token",
            End::StopSequence => "stop_sequence",
            End::Cancelled => "cancelled",
            End::Overloaded => "overloaded",
            End::Unauthorized => "unauthorized",
            End::Validation => "validation",
            End::Adapter => "adapter",
            End::Generation => "generation",
            End::Unavailable => "unavailable",
        }
    }
}

/// No end is known yet.
const OPEN: u8 = u8::MAX;

/// The end of one request, which is counted when all clones are gone: the handler has one, and so has every sequence of
/// the request in the engine and with the client. Without any other end the client has left.
#[derive(Clone)]
pub(crate) struct Outcome(Arc<Counted>);

struct Counted {
    metrics: Arc<OutcomeMetrics>,
    received: Instant,
    end: AtomicU8,
}

tokio::task_local! {
    /// The outcome of the request that this task handles.
    static CURRENT: Outcome;
}

impl Outcome {
    pub(super) fn new(metrics: Arc<OutcomeMetrics>) -> Outcome {
        Outcome(Arc::new(Counted { metrics, received: Instant::now(), end: AtomicU8::new(OPEN) }))
    }

    /// The outcome of the request that this task handles, if it handles one.
    pub(crate) fn current() -> Option<Outcome> {
        CURRENT.try_with(Outcome::clone).ok()
    }

    /// Runs `handler` with this outcome as the current one.
    pub(super) async fn scope<T>(self, handler: impl Future<Output = T>) -> T {
        CURRENT.scope(self, handler).await
    }

    /// Notes an end. Of several failures the first counts, and a failure counts more than the good end of another
    /// sequence of the request.
    pub(crate) fn end(&self, end: End) {
        let replace = |now: u8| {
            let known = End::ALL.get(usize::from(now));
            known.is_none_or(|known| known.is_good() && !end.is_good()).then_some(end as u8)
        };
        // Failing means that there is an end already.
        let _ = self.0.end.fetch_update(Relaxed, Relaxed, replace);
    }

    /// Returns whether all sequences of the request have ended.
    pub(super) fn is_last(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// Time since the request came.
    pub(crate) fn age(&self, now: Instant) -> Duration {
        now.duration_since(self.0.received)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let end = End::ALL.get(usize::from(*self.end.get_mut())).copied().unwrap_or(End::Cancelled);
        self.metrics.requests[end as usize].increment(1);
        if end.is_good() {
            self.metrics.duration.record(self.received.elapsed());
        }
    }
}

/// The metrics of whole requests.
pub(super) struct OutcomeMetrics {
    /// Counters of ended requests, by the number of the end.
    requests: Vec<Counter>,
    duration: Histogram,
    pub(super) validation: Histogram,
}

impl OutcomeMetrics {
    /// Makes the handles with the current recorder.
    pub(super) fn new() -> OutcomeMetrics {
        describe_counter!("lorax_http_responses_total", "Responses of all routes, by status.");
        describe_counter!("lorax_requests_total", "Requests that have ended, by how.");
        describe_histogram!(
            "lorax_request_duration",
            "Seconds from the head of a request to the end of its answer."
        );
        describe_histogram!(
            "lorax_request_validation_duration",
            "Seconds until a request was checked and tokenized, and had its adapter."
        );
        let requests = End::ALL.map(|end| counter!("lorax_requests_total", "end" => end.name()));
        OutcomeMetrics {
            requests: requests.into(),
            duration: histogram!("lorax_request_duration"),
            validation: histogram!("lorax_request_validation_duration"),
        }
    }
}
