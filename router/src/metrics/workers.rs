//! Metrics of the threads that work for requests.

use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

/// The metrics of jobs that take too long.
pub(crate) struct WorkerMetrics {
    pub(crate) overdue: Counter,
    pub(crate) hanging: Gauge,
}

impl WorkerMetrics {
    /// Makes the handles with the current recorder.
    pub(super) fn new() -> WorkerMetrics {
        describe_counter!("lorax_workers_overdue_total", "Jobs of validation workers that took too long.");
        describe_gauge!("lorax_workers_hanging", "Those of them that have not ended.");
        WorkerMetrics {
            overdue: counter!("lorax_workers_overdue_total"),
            hanging: gauge!("lorax_workers_hanging"),
        }
    }
}
