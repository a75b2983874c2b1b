//! How the process is, and what it serves.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};

use super::App;
use crate::api::{
    error::{ApiError, Dialect},
    info::{InfoResponse, ModelList, Unhealthy},
};

/// `GET /health`, `GET /`
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let Err(reason) = app.engine.health() else { return StatusCode::OK.into_response() };
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
