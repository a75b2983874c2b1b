//! The routes of AIBrix's runtime, by which its controller hands an adapter's address and credentials over
//! (<https://github.com/vllm-project/aibrix>, `pkg/controller/modeladapter`).

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::{
    api::error::{ApiError, Dialect},
    server::{
        App,
        accept::{Accepted, Body},
    },
};

/// Names under which credentials have the token of a source.
const TOKENS: [&str; 5] = ["token", "hf_token", "huggingface_token", "hugging_face_hub_token", "api_token"];

/// Body of `/v1/lora_adapter/load`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "AibrixLoadRequest")]
pub(crate) struct LoadRequest {
    lora_name: String,
    artifact_url: String,
    /// A secret of Kubernetes, which only AIBrix's own runtime could read.
    credentials_secret: Option<String>,
    #[serde(default)]
    #[schemars(with = "Option<BTreeMap<String, String>>")]
    credentials: Option<BTreeMap<String, SecretString>>,
    /// Means something to AIBrix alone, such as the key by which it calls this server.
    #[serde(default)]
    #[schemars(with = "Option<BTreeMap<String, String>>")]
    additional_config: Option<BTreeMap<String, SecretString>>,
    /// A folder for downloads. This server has one of its own.
    local_dir: Option<String>,
}

/// Body of `/v1/lora_adapter/unload`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "AibrixUnloadRequest")]
pub(crate) struct UnloadRequest {
    lora_name: String,
    /// Whether files go, too: here they do in any case.
    #[serde(default, rename = "cleanup_local")]
    _cleanup_local: Option<bool>,
}

impl Body for LoadRequest {
    const DIALECT: Dialect = Dialect::Aibrix;
}

impl Body for UnloadRequest {
    const DIALECT: Dialect = Dialect::Aibrix;
}

/// What both routes answer.
#[derive(Debug, Serialize)]
struct Answer {
    status: &'static str,
    message: String,
    local_path: Option<String>,
    engine_response: Option<String>,
}

impl Answer {
    fn success(message: String) -> Response {
        Json(Answer { status: "success", message, local_path: None, engine_response: None }).into_response()
    }
}

/// `POST /v1/lora_adapter/load`
pub(crate) async fn load(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<LoadRequest>,
) -> Response {
    let answer = async {
        let LoadRequest {
            lora_name,
            artifact_url,
            credentials_secret,
            credentials,
            additional_config,
            local_dir,
        } = body;
        drop((additional_config, local_dir));
        if credentials_secret.is_some() {
            let problem = "names a secret of Kubernetes, which this server cannot read: send `credentials`";
            return Err(ApiError::invalid("credentials_secret", problem));
        }
        let credential = token(credentials.unwrap_or_default())?.or(caller.credential.clone().into_given());
        app.load_lora(&caller, &lora_name, &artifact_url, credential, false).await?;
        Ok(Answer::success(format!("LoRA adapter '{lora_name}' loaded successfully")))
    };
    answer.await.unwrap_or_else(|error| error.respond(Dialect::Aibrix))
}

/// `POST /v1/lora_adapter/unload`
pub(crate) async fn unload(
    State(app): State<Arc<App>>,
    Accepted { body: UnloadRequest { lora_name, .. }, .. }: Accepted<UnloadRequest>,
) -> Response {
    match app.unload_lora(&lora_name).await {
        Ok(()) => Answer::success(format!("LoRA adapter '{lora_name}' unloaded successfully")),
        Err(error) => error.respond(Dialect::Aibrix),
    }
}

/// The token among credentials.
fn token(credentials: BTreeMap<String, SecretString>) -> Result<Option<SecretString>, ApiError> {
    if credentials.is_empty() {
        return Ok(None);
    }
    let is_token = |name: &str| TOKENS.contains(&&*name.to_ascii_lowercase());
    let found = credentials.into_iter().find_map(|(name, value)| is_token(&name).then_some(value));
    let missing = || ApiError::invalid("credentials", format!("has none of {}", TOKENS.join(", ")));
    found.map(Some).ok_or_else(missing)
}
