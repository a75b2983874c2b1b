//! Bodies that describe the server.

use std::{fmt::Display, time::UNIX_EPOCH};

use schemars::JsonSchema;
use serde::Serialize;

use crate::{server::App, wire::Info};

/// LoRAX's `/info`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct InfoResponse<'a> {
    model_id: &'a str,
    model_sha: Option<&'a str>,
    model_dtype: String,
    model_device_type: String,
    /// Always null: only hubs know pipelines.
    model_pipeline_tag: Option<&'a str>,
    max_concurrent_requests: usize,
    max_best_of: usize,
    max_stop_sequences: usize,
    max_input_length: usize,
    max_total_tokens: usize,
    /// 0, as prompts never wait for other prompts: prompt chunks and decode rows share every step.
    waiting_served_ratio: f32,
    max_batch_total_tokens: u64,
    /// 0 for the same reason: no token has to be generated before a prompt may begin.
    max_waiting_tokens: usize,
    max_active_adapters: u32,
    validation_workers: usize,
    eager_prefill: bool,
    version: &'static str,
    /// The commit that this program was built from, if the build was told.
    sha: Option<&'static str>,
    docker_label: Option<&'static str>,
    /// Always null: requests are not sent to a logger.
    request_logger_url: Option<&'a str>,
}

impl<'a> InfoResponse<'a> {
    pub(crate) fn new(app: &'a App, info: &Info) -> InfoResponse<'a> {
        let (limits, router, model) = (app.request_limits(info), &app.config.router, &app.config.model);
        InfoResponse {
            model_id: &model.id,
            model_sha: model.sha.as_deref(),
            model_dtype: format!("torch.{}", info.dtype),
            model_device_type: info.device.clone(),
            model_pipeline_tag: None,
            max_concurrent_requests: router.max_concurrent_requests,
            max_best_of: router.max_best_of,
            max_stop_sequences: router.max_stop_sequences,
            max_input_length: limits.max_input_length,
            max_total_tokens: limits.max_total_tokens,
            waiting_served_ratio: 0.0,
            max_batch_total_tokens: u64::from(info.num_blocks) * u64::from(info.block_size),
            max_waiting_tokens: 0,
            max_active_adapters: info.num_slots,
            validation_workers: router.validation_workers,
            eager_prefill: true,
            version: env!("CARGO_PKG_VERSION"),
            sha: option_env!("VERGEN_GIT_SHA"),
            docker_label: option_env!("DOCKER_LABEL"),
            request_logger_url: None,
        }
    }
}

/// OpenAI's `/v1/models`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

/// A model that requests can name: the base model, or a registered adapter of it.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// What it was made from: the model itself, or the adapter's reference.
    root: String,
    parent: Option<String>,
}

impl ModelList {
    pub(crate) fn new(app: &App) -> ModelList {
        let base = &app.base;
        let model = |id: String, created, root, parent| Model {
            id,
            object: "model",
            created,
            owned_by: "lorax",
            root,
            parent,
        };
        let served = base.served().iter();
        let served = served.map(|name| model(name.clone(), base.created(), base.root().to_owned(), None));
        let adapters = app.registry.all().into_iter().map(|(name, adapter)| {
            let created = adapter.created.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            model(name, created, adapter.reference.to_string(), Some(base.name().to_owned()))
        });
        ModelList { object: "list", data: served.chain(adapters).collect() }
    }

    /// The model of this name.
    pub(crate) fn find(&self, id: &str) -> Option<&Model> {
        self.data.iter().find(|model| model.id == id)
    }
}

/// LoRAX's answer to a question for its health, if it is bad.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Unhealthy {
    error: String,
    error_type: &'static str,
}

impl Unhealthy {
    pub(crate) fn new(reason: &impl Display) -> Unhealthy {
        Unhealthy { error: format!("unhealthy: {reason}"), error_type: "healthcheck" }
    }
}
