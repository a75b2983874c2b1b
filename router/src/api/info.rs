//! Bodies that describe the server.

use std::fmt::Display;

use serde::Serialize;

use crate::{server::App, wire::Info};

/// LoRAX's `/info`.
#[derive(Debug, Serialize)]
pub(crate) struct InfoResponse<'a> {
    model_id: &'a str,
    model_sha: Option<&'a str>,
    model_dtype: String,
    model_device_type: String,
    max_concurrent_requests: usize,
    max_best_of: usize,
    max_stop_sequences: usize,
    max_input_length: usize,
    max_total_tokens: usize,
    max_batch_total_tokens: u64,
    max_active_adapters: u32,
    validation_workers: usize,
    version: &'static str,
}

impl<'a> InfoResponse<'a> {
    pub(crate) fn new(app: &'a App, info: &Info) -> InfoResponse<'a> {
        let (limits, router, model) = (app.request_limits(info), &app.config.router, &app.config.model);
        InfoResponse {
            model_id: &model.id,
            model_sha: model.sha.as_deref(),
            model_dtype: info.dtype.clone(),
            model_device_type: info.device.clone(),
            max_concurrent_requests: router.max_concurrent_requests,
            max_best_of: 1,
            max_stop_sequences: router.max_stop_sequences,
            max_input_length: limits.max_input_length,
            max_total_tokens: limits.max_total_tokens,
            max_batch_total_tokens: u64::from(info.num_blocks) * u64::from(info.block_size),
            max_active_adapters: info.num_slots,
            validation_workers: router.validation_workers,
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// OpenAI's `/v1/models`.
#[derive(Debug, Serialize)]
pub(crate) struct ModelList<'a> {
    object: &'static str,
    data: [Model<'a>; 1],
}

/// A model that requests can name.
#[derive(Debug, Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

impl<'a> ModelList<'a> {
    pub(crate) fn new(app: &'a App) -> ModelList<'a> {
        let base = Model { id: &app.config.model.id, object: "model", created: 0, owned_by: "lorax" };
        ModelList { object: "list", data: [base] }
    }
}

/// LoRAX's answer to a question for its health, if it is bad.
#[derive(Debug, Serialize)]
pub(crate) struct Unhealthy {
    error: String,
    error_type: &'static str,
}

impl Unhealthy {
    pub(crate) fn new(reason: &impl Display) -> Unhealthy {
        Unhealthy { error: format!("unhealthy: {reason}"), error_type: "healthcheck" }
    }
}
