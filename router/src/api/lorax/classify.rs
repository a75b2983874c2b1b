//! `/classify` and `/classify_batch`: the entities in texts, or the classes of texts.

use std::sync::Arc;

use axum::{Json, extract::State, response::IntoResponse, response::Response};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{
    embed::{Parameters, refuse_others},
    entities::{Entity, classes_of_text, entities},
};
use crate::{
    api::{
        error::{ApiError, Dialect},
        json::Rest,
        pooled::{Pooled, PooledRequest, Wants},
        request::Prompt,
    },
    server::{
        App,
        accept::{Accepted, Body, Caller},
    },
    wire::Task,
};

/// The most texts of one request.
const MAX_TEXTS: usize = 2048;

/// Body of a request, with one text or a list of them.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ClassifyRequest<T> {
    inputs: T,
    truncate: Option<bool>,
    parameters: Option<Parameters>,
    #[serde(flatten)]
    rest: Rest,
}

impl Body for ClassifyRequest<String> {
    const DIALECT: Dialect = Dialect::Native;
}

impl Body for ClassifyRequest<Vec<String>> {
    const DIALECT: Dialect = Dialect::Native;
}

/// `POST /classify`
pub(crate) async fn classify(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<ClassifyRequest<String>>,
) -> Response {
    let ClassifyRequest { inputs, truncate, parameters, rest } = body;
    let body = ClassifyRequest { inputs: vec![inputs], truncate, parameters, rest };
    let answer = async {
        let (pooled, mut found) = run(&app, &caller, body).await?;
        let headers = pooled.headers(&app);
        Ok((headers, Json(found.pop().unwrap_or_default())).into_response())
    };
    answer.await.unwrap_or_else(|error: ApiError| error.respond(Dialect::Native))
}

/// `POST /classify_batch`
pub(crate) async fn classify_batch(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<ClassifyRequest<Vec<String>>>,
) -> Response {
    let answer = async {
        let (pooled, found) = run(&app, &caller, body).await?;
        Ok((pooled.headers(&app), Json(found)).into_response())
    };
    answer.await.unwrap_or_else(|error: ApiError| error.respond(Dialect::Native))
}

/// The entities of each text.
async fn run(
    app: &App,
    caller: &Caller,
    body: ClassifyRequest<Vec<String>>,
) -> Result<(Pooled, Vec<Vec<Entity>>), ApiError> {
    refuse_others(&body.rest)?;
    let texts = body.inputs;
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        return Err(ApiError::invalid("inputs", "cannot be empty"));
    }
    if texts.len() > MAX_TEXTS {
        let problem = format!("must have at most {MAX_TEXTS} elements. Given: {}", texts.len());
        return Err(ApiError::invalid("inputs", problem));
    }
    let request = PooledRequest {
        adapter: body.parameters.unwrap_or_default().into_adapter(app, caller)?,
        field: "inputs",
        inputs: texts.iter().cloned().map(Prompt::Text).collect(),
        wants: Wants::Classes,
        truncate: body.truncate,
    };
    let pooled = app.pool(caller, request).await?;
    let task = app.engine.info().map(|info| info.task.clone());
    let found = texts.iter().zip(&pooled.outputs).map(|(text, output)| match &task {
        Some(Task::ClassifyTokens(labels)) => entities(&pooled.tokenizer, text, output, labels),
        Some(Task::ClassifyTexts(labels)) => classes_of_text(text, &output.values, labels),
        _ => Vec::new(),
    });
    let found = found.collect();
    Ok((pooled, found))
}
