//! Routes about the process and the model: liveness, start-up, readiness, `/info`, `/v1/models` and below.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};

use super::App;
use crate::api::{
    error::{ApiError, Dialect},
    info::{InfoResponse, ModelList, Unhealthy},
};

/// `GET /livez`: whether the process does its work. One that does not answer should be started anew.
pub(super) async fn live() -> StatusCode {
    // The parts that the process cannot live without are supervised: when one fails, the process ends.
    StatusCode::OK
}

/// `GET /startupz`, `GET /startup`: whether the model could answer yet, be it once.
pub(super) async fn started(State(app): State<Arc<App>>) -> Response {
    // The answer never turns from 200 back to 503: `started` may be set a moment after `health`.
    if app.started.load(Relaxed) || app.engine.health().is_ok() {
        StatusCode::OK.into_response()
    } else {
        unhealthy("the model is loading")
    }
}

/// `GET /readyz`, `GET /health`, `GET /ping`, `GET /`: whether the model can answer now and the server takes requests.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    if app.stopping.load(Relaxed) {
        return unhealthy("the server is about to stop");
    }
    match app.engine.health() {
        Ok(()) => StatusCode::OK.into_response(),
        Err(reason) => unhealthy(&reason),
    }
}

fn unhealthy(reason: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(Unhealthy::new(&reason))).into_response()
}

/// `GET /info`
pub(super) async fn info(State(app): State<Arc<App>>) -> Response {
    let Some(info) = app.engine.info() else {
        return ApiError::Unavailable("the model is not available, try again".into())
            .respond(Dialect::Native);
    };
    Json(InfoResponse::new(&app, &info)).into_response()
}

/// `GET /v1/models`
pub(super) async fn models(State(app): State<Arc<App>>) -> Response {
    Json(ModelList::new(&app)).into_response()
}

/// `GET /v1/models/{id}`
pub(super) async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    let models = ModelList::new(&app);
    match models.find(&id) {
        Some(model) => Json(model).into_response(),
        None => {
            let message = format!("The model `{id}` does not exist");
            ApiError::AdapterNotFound { field: "model", message }.respond(Dialect::OpenAi)
        }
    }
}
