//! Responses by route and status.

use std::sync::Arc;

use axum::{
    extract::{MatchedPath, Request, State},
    http::{Method, StatusCode},
    middleware::Next,
    response::Response,
};
use metrics::{counter, with_local_recorder};

use super::{End, Metrics, Outcome};
use crate::server::App;

/// Routes that generate, which is what a request is to the metrics of requests.
const GENERATING: [&str; 6] =
    ["/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions", "/v1/responses"];

/// Counts a response, and the end of a request to generate.
pub(crate) async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let matched = request.extensions().get::<MatchedPath>().cloned();
    let route = matched.as_ref().map_or("none", MatchedPath::as_str);
    let Some(outcome) = request.extensions_mut().remove::<Outcome>() else {
        let response = next.run(request).await;
        app.metrics.response(route, response.status());
        return response;
    };
    let response = outcome.clone().scope(next.run(request)).await;
    app.metrics.response(route, response.status());
    match response.extensions().get::<End>() {
        Some(end) => outcome.end(*end),
        // The answer needed no sequence.
        None if outcome.is_last() => outcome.end(End::Length),
        // Its sequences know how they end.
        None => {}
    }
    response
}

impl Metrics {
    /// Begins to count a request if it is one to generate. To be called when its head has come.
    pub(crate) fn received(&self, request: &mut Request) {
        if request.method() == Method::POST && GENERATING.contains(&request.uri().path()) {
            request.extensions_mut().insert(self.outcome());
        }
    }

    /// Counts a response. Routes and statuses are few, and this happens once a request, so the handle is looked up.
    fn response(&self, route: &str, status: StatusCode) {
        let (route, status) = (route.to_owned(), status.as_u16().to_string());
        with_local_recorder(&self.recorder, || {
            counter!("lorax_http_responses_total", "route" => route, "status" => status).increment(1);
        });
    }
}
