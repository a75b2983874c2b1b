//! How the process is, and what it serves.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::App;
use crate::api::error::{ApiError, Dialect};

/// `GET /health`, `GET /`
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let Err(reason) = app.engine.health() else { return StatusCode::OK.into_response() };
    let body = json!({"error": format!("unhealthy: {reason}"), "error_type": "healthcheck"});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// `GET /info`
pub(super) async fn info(State(app): State<Arc<App>>) -> Response {
    let Some(info) = app.engine.info() else {
        return ApiError::Unavailable("the model is not available, try again".into())
            .respond(Dialect::Native);
    };
    let (rules, router, model) = (app.rules(&info), &app.config.router, &app.config.model);
    let body: Value = json!({
        "model_id": model.id,
        "model_sha": model.sha,
        "model_dtype": info.dtype,
        "model_device_type": info.device,
        "max_concurrent_requests": router.max_concurrent_requests,
        "max_best_of": 1,
        "max_stop_sequences": router.max_stop_sequences,
        "max_input_length": rules.max_input_length,
        "max_total_tokens": rules.max_total_tokens,
        "max_batch_total_tokens": u64::from(info.num_blocks) * u64::from(info.block_size),
        "max_active_adapters": info.num_slots,
        "validation_workers": router.validation_workers,
        "version": env!("CARGO_PKG_VERSION"),
    });
    Json(body).into_response()
}

/// `GET /v1/models`
pub(super) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let model = json!({"id": app.config.model.id, "object": "model", "created": 0, "owned_by": "lorax"});
    Json(json!({"object": "list", "data": [model]}))
}
