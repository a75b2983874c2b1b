//! `/v1/embeddings`: the vectors of texts.

use std::sync::Arc;

use axum::{Json, extract::State, response::IntoResponse, response::Response};
use base64::{Engine, prelude::BASE64_STANDARD};
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use super::{drop_placeholder, unions::Prompts};
use crate::{
    adapter::AdapterRef,
    api::{
        ensemble::{Ensemble, Several},
        error::{ApiError, Dialect},
        json::{Rest, refuse},
        merged::MergedAdapters,
        pooled::{Output, PooledRequest, Wants},
        request::Prompt,
    },
    generation::Pooling,
    server::{
        App,
        accept::{Accepted, Body, Caller},
    },
};

/// The most inputs of one request, as at OpenAI.
const MAX_INPUTS: usize = 2048;

/// Body of a request.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct EmbeddingsRequest {
    input: Prompts,
    model: Option<String>,
    encoding_format: Option<String>,
    dimensions: Option<u64>,
    // Beyond OpenAI's:
    truncate: Option<bool>,
    adapter_id: Option<String>,
    adapter_source: Option<String>,
    merged_adapters: Option<MergedAdapters>,
    ensemble: Option<Ensemble>,
    #[schemars(with = "Option<String>")]
    api_token: Option<SecretString>,
    #[serde(flatten)]
    rest: Rest,
}

impl Body for EmbeddingsRequest {
    const DIALECT: Dialect = Dialect::OpenAi;
}

#[derive(Debug, Serialize)]
struct EmbeddingsResponse {
    object: &'static str,
    data: Vec<Item>,
    model: String,
    usage: Usage,
}

#[derive(Debug, Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

/// A vector as numbers, or as the base64 of their bytes: f32, little-endian.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// `POST /v1/embeddings`
pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<EmbeddingsRequest>,
) -> Response {
    respond(&app, &caller, body).await.unwrap_or_else(|error| error.respond(Dialect::OpenAi))
}

async fn respond(app: &App, caller: &Caller, mut body: EmbeddingsRequest) -> Result<Response, ApiError> {
    refuse(&body.rest, "", |name, _| name == "user")?;
    let as_base64 = match body.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::invalid("encoding_format", "must be \"float\" or \"base64\"")),
    };
    let dimensions = expect_dimensions(app, body.dimensions)?;
    drop_placeholder(app, &mut body.model);
    let model = body.model.clone().filter(|model| !model.is_empty());
    let request = PooledRequest {
        adapter: body.adapter(app, caller)?,
        field: "input",
        truncate: body.truncate,
        inputs: inputs(body.input)?,
        wants: Wants::Vectors,
    };
    let pooled = app.pool(caller, request).await?;
    let (tokens, headers) = (pooled.tokens(), pooled.headers(app));
    let normalizes = matches!(app.embedding.pooling, Pooling::Vector { normalize: true, .. });
    let item = |(index, Output { values, .. }): (usize, Output)| {
        let values = shortened(values, dimensions, normalizes);
        let embedding = match as_base64 {
            false => Vector::Numbers(values),
            true => {
                let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
                Vector::Base64(BASE64_STANDARD.encode(bytes))
            }
        };
        Item { object: "embedding", index, embedding }
    };
    let response = EmbeddingsResponse {
        object: "list",
        data: pooled.outputs.into_iter().enumerate().map(item).collect(),
        model: model.unwrap_or_else(|| app.base.name().to_owned()),
        usage: Usage { prompt_tokens: tokens, total_tokens: tokens },
    };
    Ok((headers, Json(response)).into_response())
}

/// The number of elements that are asked for, if it is one that the model can give.
fn expect_dimensions(app: &App, dimensions: Option<u64>) -> Result<Option<usize>, ApiError> {
    let (Some(asked), Some(info)) = (dimensions, app.engine.info()) else { return Ok(None) };
    let most = info.hidden_size;
    if (1..=u64::from(most)).contains(&asked) {
        return Ok(Some(asked as usize));
    }
    let problem =
        format!("must be from 1 to {most}, the elements that the model's vectors have. Given: {asked}");
    Err(ApiError::invalid("dimensions", problem))
}

/// The first elements of a vector, brought back to the length 1 if it had it.
fn shortened(mut vector: Vec<f32>, dimensions: Option<usize>, normalizes: bool) -> Vec<f32> {
    let Some(dimensions) = dimensions.filter(|dimensions| *dimensions < vector.len()) else { return vector };
    vector.truncate(dimensions);
    let length = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if normalizes && length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    vector
}

/// Checks the inputs.
fn inputs(input: Prompts) -> Result<Vec<Prompt>, ApiError> {
    let inputs: Vec<Prompt> = match input {
        Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
        Prompts::Tokens(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
    };
    if inputs.is_empty() || inputs.len() > MAX_INPUTS {
        let problem = format!("must have 1 to {MAX_INPUTS} elements. Given: {}", inputs.len());
        return Err(ApiError::invalid("input", problem));
    }
    let is_empty = |input: &Prompt| match input {
        Prompt::Text(text) | Prompt::Rendered(text) => text.is_empty(),
        Prompt::Tokens(ids) => ids.is_empty(),
        Prompt::Chat(_) => false,
    };
    match inputs.iter().position(is_empty) {
        Some(index) if inputs.len() > 1 => {
            Err(ApiError::invalid(format!("input[{index}]"), "cannot be empty"))
        }
        Some(_) => Err(ApiError::invalid("input", "cannot be empty")),
        None => Ok(inputs),
    }
}

impl EmbeddingsRequest {
    /// The adapter, or those that are merged.
    fn adapter(&mut self, app: &App, caller: &Caller) -> Result<Option<AdapterRef>, ApiError> {
        let named = app.base.adapter_in(self.model.as_deref(), self.adapter_id.take());
        let credential = caller.credential.or_in_body(self.api_token.take());
        let source = self.adapter_source.as_deref();
        let several = Several { merged: self.merged_adapters.take(), ensemble: self.ensemble.take() };
        app.adapter(named, several, source, credential)
    }
}
