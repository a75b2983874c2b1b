//! The metrics of `GET /metrics`. `docs/metrics.md` lists all of them.
//!
//! Handles are made once, so that counting looks nothing up, and the engine records once a step where it can. Everything
//! is recorded once, under the server's own names; other sets of names are made of the same figures when the page is read.

mod adapters;
mod aliases;
mod bounds;
mod engine;
mod http;
mod outcome;
mod page;
mod workers;

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use config::MetricNames;
use metrics::{Gauge, describe_gauge, gauge, with_local_recorder};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::server::App;
pub(crate) use adapters::{AdapterMetrics, CallKind};
use aliases::Labels;
use bounds::{SECONDS, TOKENS};
pub(crate) use engine::{Capacity, EngineMetrics, SequenceTimes, StepTokens};
pub(crate) use http::observe;
use outcome::OutcomeMetrics;
pub(crate) use outcome::{End, Outcome};
pub(crate) use workers::WorkerMetrics;

/// Time between two sortings of recorded durations into their buckets; until then each takes 16 bytes.
const UPKEEP: Duration = Duration::from_secs(1);

/// The content type of Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of one router. A process that runs several, as tests do, has as many.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    page: PrometheusHandle,
    outcomes: Arc<OutcomeMetrics>,
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
        Ok(Metrics { recorder, page, outcomes: Arc::new(outcomes), _build: build })
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

    /// The page of these sets of names.
    fn shown(&self, sets: &[MetricNames], labels: &Labels<'_>) -> String {
        let native = page::read(&self.render());
        let mut shown = aliases::of(&native, sets, labels);
        if sets.contains(&MetricNames::Native) {
            shown.extend(native);
        }
        page::write(shown.values())
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

/// `GET /metrics`
pub(crate) async fn page(State(app): State<Arc<App>>) -> Response {
    app.adapters.publish().await;
    let info = app.engine.info();
    let max_tokens = info.as_ref().map(|info| app.request_limits(info).max_total_tokens);
    let labels = Labels { model: app.base.name(), max_tokens };
    let page = app.metrics.shown(&app.config.router.metrics, &labels);
    ([(CONTENT_TYPE, TEXT_FORMAT)], page).into_response()
}
