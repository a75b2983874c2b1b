//! `/embed`: the vector of a text.

use std::sync::Arc;

use axum::{Json, extract::State, response::IntoResponse, response::Response};
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::{
    adapter::AdapterRef,
    api::{
        ensemble::{Ensemble, Several},
        error::{ApiError, Dialect},
        json::{Rest, refuse},
        merged::MergedAdapters,
        pooled::{PooledRequest, Wants},
        request::Prompt,
    },
    server::{
        App,
        accept::{Accepted, Body, Caller},
    },
};

/// Body of a request.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct EmbedRequest {
    inputs: String,
    truncate: Option<bool>,
    parameters: Option<Parameters>,
    #[serde(flatten)]
    rest: Rest,
}

impl Body for EmbedRequest {
    const DIALECT: Dialect = Dialect::Native;
}

/// The adapter of a request.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(rename = "AdapterParameters")]
pub(in crate::api) struct Parameters {
    adapter_id: Option<String>,
    adapter_source: Option<String>,
    merged_adapters: Option<MergedAdapters>,
    ensemble: Option<Ensemble>,
    #[schemars(with = "Option<String>")]
    api_token: Option<SecretString>,
    #[serde(flatten)]
    rest: Rest,
}

impl Parameters {
    pub(in crate::api) fn into_adapter(
        self,
        app: &App,
        caller: &Caller,
    ) -> Result<Option<AdapterRef>, ApiError> {
        refuse(&self.rest, "", |_, _| false)?;
        let credential = caller.credential.or_in_body(self.api_token);
        let source = self.adapter_source.as_deref();
        let several = Several { merged: self.merged_adapters, ensemble: self.ensemble };
        app.adapter(("adapter_id", self.adapter_id), several, source, credential)
    }
}

/// Refuses fields that nothing is done for. LoRAX's client sends `stream` with every request.
pub(super) fn refuse_others(rest: &Rest) -> Result<(), ApiError> {
    refuse(rest, "", |name, value| name == "stream" && value == false)
}

#[derive(Debug, Serialize)]
struct EmbedResponse {
    embeddings: Vec<f32>,
}

/// `POST /embed`
pub(crate) async fn embed(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<EmbedRequest>,
) -> Response {
    let answer = async {
        refuse_others(&body.rest)?;
        if body.inputs.is_empty() {
            return Err(ApiError::invalid("inputs", "cannot be empty"));
        }
        let request = PooledRequest {
            adapter: body.parameters.unwrap_or_default().into_adapter(&app, &caller)?,
            field: "inputs",
            inputs: vec![Prompt::Text(body.inputs)],
            wants: Wants::Vectors,
            truncate: body.truncate,
        };
        let mut pooled = app.pool(&caller, request).await?;
        let headers = pooled.headers(&app);
        let embeddings = pooled.outputs.pop().map(|output| output.values).unwrap_or_default();
        Ok((headers, Json(EmbedResponse { embeddings })).into_response())
    };
    answer.await.unwrap_or_else(|error: ApiError| error.respond(Dialect::Native))
}
