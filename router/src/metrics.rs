//! The metrics of `GET /metrics`. `docs/metrics.md` lists all of them.
//!
//! Handles are made once, so that counting looks nothing up, and the engine records once a step where it can. Labels
//! have few values: none is an adapter, and none comes from a client.

mod adapters;
mod engine;
mod http;
mod outcome;
mod workers;

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use metrics::{Gauge, describe_gauge, gauge, with_local_recorder};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::server::App;
pub(crate) use adapters::{AdapterMetrics, CallKind};
pub(crate) use engine::{Capacity, EngineMetrics, StepTokens};
pub(crate) use http::observe;
use outcome::OutcomeMetrics;
pub(crate) use outcome::{End, Outcome};
pub(crate) use workers::WorkerMetrics;

/// Time between two sortings of recorded durations into their buckets; until then each takes 16 bytes.
const UPKEEP: Duration = Duration::from_secs(1);

/// The content type of Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of durations in seconds: from a step of a small model to a long answer.
const SECONDS: [f64; 22] = [
    0.000_5, 0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0,
    15.0, 30.0, 60.0, 120.0, 300.0,
];

/// Upper bounds of numbers of tokens and of rows.
const TOKENS: [f64; 18] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
    32768.0, 65536.0, 131072.0,
];

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

    /// All of them in Prometheus' text format.
    pub(crate) fn render(&self) -> String {
        self.page.render()
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
    ([(CONTENT_TYPE, TEXT_FORMAT)], app.metrics.render()).into_response()
}
