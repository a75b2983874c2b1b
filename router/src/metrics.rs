//! The metrics of `GET /metrics`. `docs/metrics.md` lists all of them.
//!
//! Handles are made once, so that counting looks nothing up, and the engine records once a step where it can. Everything
//! is recorded once, under the server's own names; other sets of names are made of the same figures when the page is read.

mod adapters;
mod aliases;
mod bounds;
mod engine;
mod http;
mod named;
mod outcome;
mod page;
mod scrape;
mod usage;
mod workers;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use metrics::{Gauge, describe_gauge, gauge, with_local_recorder};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

pub(crate) use adapters::{AdapterMetrics, CallKind};
use bounds::{SECONDS, TOKENS};
pub(crate) use engine::{Capacity, EngineMetrics, SequenceTimes, StepTokens};
pub(crate) use http::observe;
pub(crate) use named::Held;
use outcome::OutcomeMetrics;
pub(crate) use outcome::{End, Outcome};
pub(crate) use scrape::page;
pub(crate) use usage::Usage;
use usage::{Tenants, Top};
pub(crate) use workers::WorkerMetrics;

/// Time between two sortings of recorded durations into their buckets; until then each takes 16 bytes.
const UPKEEP: Duration = Duration::from_secs(1);

/// All metrics of one router. A process that runs several, as tests do, has as many.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    page: PrometheusHandle,
    outcomes: Arc<OutcomeMetrics>,
    tenants: Tenants,
    top_adapters: Mutex<Top>,
    top_tenants: Mutex<Top>,
    _build: Gauge,
}

impl Metrics {
    pub(crate) fn new() -> Result<Metrics, BuildError> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?
            .set_buckets_for_metric(Matcher::Suffix("_duration".into()), &SECONDS)?
            .set_buckets_for_metric(Matcher::Suffix("_tokens".into()), &TOKENS)?
            .set_buckets_for_metric(Matcher::Suffix("_length".into()), &TOKENS)?
            .set_buckets_for_metric(Matcher::Suffix("_rows".into()), &TOKENS)?
            .build_recorder();
        let build = with_local_recorder(&recorder, || {
            describe_gauge!("lorax_build_info", "1, with the version of the router as a label.");
            let build = gauge!("lorax_build_info", "version" => env!("CARGO_PKG_VERSION"));
            build.set(1.0);
            build
        });
        let outcomes = with_local_recorder(&recorder, OutcomeMetrics::new);
        let page = recorder.handle();
        Ok(Metrics {
            recorder,
            page,
            outcomes: Arc::new(outcomes),
            tenants: Tenants::default(),
            top_adapters: Mutex::default(),
            top_tenants: Mutex::default(),
            _build: build,
        })
    }

    /// Begins to count a request.
    pub(crate) fn outcome(&self) -> Outcome {
        Outcome::new(self.outcomes.clone())
    }

    /// A request has been checked and tokenized, and has its adapter.
    pub(crate) fn validated(&self, took: Duration) {
        self.outcomes.validation.record(took);
    }

    /// The metrics of the engine.
    pub(crate) fn engine(&self) -> EngineMetrics {
        with_local_recorder(&self.recorder, EngineMetrics::new)
    }

    /// The metrics of adapters on their way to the ranks.
    pub(crate) fn adapters(&self) -> AdapterMetrics {
        with_local_recorder(&self.recorder, AdapterMetrics::new)
    }

    /// The metrics of work for requests.
    pub(crate) fn workers(&self) -> WorkerMetrics {
        with_local_recorder(&self.recorder, WorkerMetrics::new)
    }

    /// All of the server's own in Prometheus' text format.
    pub(crate) fn render(&self) -> String {
        self.page.render()
    }

    /// How tenants have used the server.
    pub(crate) fn tenants(&self) -> &Tenants {
        &self.tenants
    }

    fn top_adapters(&self) -> MutexGuard<'_, Top> {
        self.top_adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn top_tenants(&self) -> MutexGuard<'_, Top> {
        self.top_tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts recorded durations into their buckets from time to time, for ever.
    pub(crate) async fn upkeep(self: Arc<Metrics>) {
        let mut ticks = tokio::time::interval(UPKEEP);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.page.run_upkeep();
        }
    }
}
