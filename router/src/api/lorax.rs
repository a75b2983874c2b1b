//! LoRAX's own interface: `/generate`, `/generate_stream`, and `/` for both; `/embed`; `/classify` and
//! `/classify_batch`; `/tokenize` and `/detokenize`.

mod classify;
mod embed;
mod entities;
mod headers;
mod request;
mod response;
pub(crate) mod tokenize;

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::HeaderValue,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{
    StreamExt,
    future::{ready, try_join_all},
};

use super::{
    error::{ApiError, Dialect},
    fold,
    group::Generation,
};
use crate::server::{App, accept::Accepted};
pub(crate) use classify::{ClassifyRequest, classify, classify_batch};
pub(crate) use embed::{EmbedRequest, embed};
pub(crate) use request::GenerateRequest as Generate;
use request::{GenerateRequest, Shape};
use response::{Delta, GenerateFold, Generated};
pub(crate) use response::{GenerateResponse, StreamEvent};

/// `POST /generate`
pub(crate) async fn whole(State(app): State<Arc<App>>, request: Accepted<GenerateRequest>) -> Response {
    respond(&app, request, |_| false, false).await
}

/// `POST /generate_stream`
pub(crate) async fn stream(State(app): State<Arc<App>>, request: Accepted<GenerateRequest>) -> Response {
    respond(&app, request, |_| true, false).await
}

/// `POST /` and `POST /invocations`: by the field `stream`; a whole answer is the only element of a list.
pub(crate) async fn either(State(app): State<Arc<App>>, request: Accepted<GenerateRequest>) -> Response {
    respond(&app, request, |request| request.stream == Some(true), true).await
}

async fn respond(
    app: &Arc<App>,
    request: Accepted<GenerateRequest>,
    streams: impl Fn(&GenerateRequest) -> bool,
    as_list: bool,
) -> Response {
    match generate(app, request, streams, as_list).await {
        Ok(response) => response,
        Err(error) => error.respond(Dialect::Native),
    }
}

async fn generate(
    app: &Arc<App>,
    request: Accepted<GenerateRequest>,
    streams: impl Fn(&GenerateRequest) -> bool,
    as_list: bool,
) -> Result<Response, ApiError> {
    let Accepted { caller, body } = request;
    let streams = streams(&body);
    let (request, shape) = body.into_group(app, &caller, streams)?;
    let mut headers = headers::of_request(app, request.adapter.as_ref(), shape.characters);
    let mut generations = app.start_group(&caller, request).await?;
    if streams {
        let Some(mut generation) = generations.pop() else {
            return Err(ApiError::Generation("nothing was started".into()));
        };
        generation.begin().await?;
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        return Ok((headers, events(generation, shape)).into_response());
    }
    let collected = generations.into_iter().map(|generation| collect(generation, shape.clone()));
    let mut answers = try_join_all(collected).await?;
    answers.sort_by(|(a, _), (b, _)| b.mean_logprob().total_cmp(&a.mean_logprob()));
    let mut answers = answers.into_iter();
    let Some((generation, best)) = answers.next() else {
        return Err(ApiError::Generation("nothing was started".into()));
    };
    headers.extend(headers::of_answer(&generation));
    let body = best.into_response(answers.map(|(_, other)| other));
    Ok(if as_list { (headers, Json([body])).into_response() } else { (headers, Json(body)).into_response() })
}

/// The whole of an answer.
async fn collect(mut generation: Generation, shape: Shape) -> Result<(Generation, Generated), ApiError> {
    let fold = GenerateFold::new(&generation, shape);
    let generated = fold::collect(&mut generation, fold).await?;
    Ok((generation, generated))
}

/// One event for every token; the last has the whole text.
fn events(generation: Generation, shape: Shape) -> impl IntoResponse {
    let fold = GenerateFold::new(&generation, shape);
    let events = fold::deltas(generation, fold).filter_map(|delta| {
        ready(match delta {
            Ok(Delta::Token(event)) => Some(Event::default().json_data(event)),
            // Only whole answers have this field.
            Ok(Delta::Prefill(_)) => None,
            Err(error) => Some(Event::default().json_data(error.body(Dialect::Native))),
        })
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}
