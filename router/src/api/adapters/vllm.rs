//! vLLM's routes for adapters, which controllers of several projects call
//! (<https://docs.vllm.ai/en/latest/features/lora.html>).

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use exchange::Fault;
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::Deserialize;

use crate::{
    api::error::{ApiError, Dialect},
    registry::{New, RegistryError, places},
    server::{
        App,
        accept::{Accepted, Body, Caller},
    },
};

/// Time for which the copies of an adapter that was unloaded wait for its requests.
const DRAIN: Duration = Duration::from_secs(600);

/// Body of `/v1/load_lora_adapter`. Fields that are not known are ignored, as vLLM does.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct LoadRequest {
    lora_name: String,
    lora_path: String,
    #[serde(default)]
    load_inplace: bool,
}

/// Body of `/v1/unload_lora_adapter`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct UnloadRequest {
    lora_name: String,
}

impl Body for LoadRequest {
    const DIALECT: Dialect = Dialect::Vllm;
}

impl Body for UnloadRequest {
    const DIALECT: Dialect = Dialect::Vllm;
}

/// `POST /v1/load_lora_adapter`
pub(crate) async fn load(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<LoadRequest>,
) -> Response {
    let LoadRequest { lora_name, lora_path, load_inplace } = body;
    let credential = caller.credential.clone().into_given();
    let loaded = app.load_lora(&caller, &lora_name, &lora_path, credential, load_inplace).await;
    match loaded {
        Ok(()) => format!("Success: LoRA adapter '{lora_name}' added successfully.").into_response(),
        Err(error) => error.respond(Dialect::Vllm),
    }
}

/// `POST /v1/unload_lora_adapter`
pub(crate) async fn unload(
    State(app): State<Arc<App>>,
    Accepted { body: UnloadRequest { lora_name }, .. }: Accepted<UnloadRequest>,
) -> Response {
    match app.unload_lora(&lora_name).await {
        Ok(()) => format!("Success: LoRA adapter '{lora_name}' removed successfully.").into_response(),
        Err(error) => error.respond(Dialect::Vllm),
    }
}

impl App {
    /// Registers the adapter at a path, in vLLM's sense: a folder, or else a repository of the hub.
    pub(super) async fn load_lora(
        &self,
        caller: &Caller,
        name: &str,
        path: &str,
        credential: Option<SecretString>,
        replace: bool,
    ) -> Result<(), ApiError> {
        if name.is_empty() || path.is_empty() {
            return Err(ApiError::LoraInput("Both 'lora_name' and 'lora_path' must be provided.".into()));
        }
        let words = |error: RegistryError| in_words(error.into(), name);
        let mut refused = None;
        for place in places(self.config.default_adapter_source(), path) {
            let reference = place.map_err(|error| {
                let message = error.to_string();
                ApiError::AdapterInvalid { field: "lora_path", message }
            })?;
            let credential = credential.clone();
            let new = New { id: name.into(), reference, credential, pinned: false };
            match self.register(caller, new, replace).await {
                Ok(()) => return Ok(()),
                // Where nobody knows it, the first place that was asked says so.
                Err(error @ RegistryError::Adapter { fault: Fault::NotFound(_), .. }) => {
                    refused.get_or_insert(error);
                }
                Err(error) => return Err(words(error)),
            }
        }
        refused.map_or(Ok(()), |error| Err(words(error)))
    }

    /// Ends a registration. The copies go when the requests that run have ended, which nobody waits for.
    pub(super) async fn unload_lora(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        if name.is_empty() {
            let message = "'lora_name' needs to be provided to unload a LoRA adapter.";
            return Err(ApiError::LoraInput(message.into()));
        }
        let registered =
            self.registry.unregister(name).await.map_err(|error| in_words(error.into(), name))?;
        let (app, reference) = (self.clone(), registered.reference.clone());
        drop(registered);
        tokio::spawn(async move { app.registry.unload(&reference, DRAIN).await });
        Ok(())
    }
}

/// The same error in the words by which controllers recognise it.
fn in_words(error: ApiError, name: &str) -> ApiError {
    match error {
        ApiError::AdapterExists { .. } => ApiError::LoraInput(format!(
            "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set \
             'load_inplace' to True."
        )),
        ApiError::AdapterUnknown { .. } => ApiError::AdapterUnknown { id: name.into() },
        other => other,
    }
}
