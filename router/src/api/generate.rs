//! LoRAX's own interface: `/generate`, `/generate_stream`, and `/` for both.

use std::{sync::Arc, time::Instant};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{StreamExt, stream};
use sampling::SamplingParams;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    ask::{Ask, Prompt, Rest, refuse},
    error::{ApiError, Dialect},
    run::{Answer, FinishReason, Generation, Piece},
};
use crate::{
    adapter::{AdapterRef, Credential},
    generation::Scored,
    server::{
        App,
        accept::{Accepted, Body, Caller},
    },
};

/// Body of a request.
#[derive(Debug, Deserialize)]
pub(crate) struct GenerateRequest {
    inputs: String,
    parameters: Option<Parameters>,
    stream: Option<bool>,
    #[serde(flatten)]
    rest: Rest,
}

/// As LoRAX documents them; a null is the same as nothing.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Parameters {
    adapter_id: Option<String>,
    adapter_source: Option<String>,
    api_token: Option<SecretString>,
    temperature: Option<f32>,
    repetition_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    do_sample: Option<bool>,
    max_new_tokens: Option<u32>,
    ignore_eos_token: Option<bool>,
    return_full_text: Option<bool>,
    stop: Option<Vec<String>>,
    truncate: Option<usize>,
    details: Option<bool>,
    decoder_input_details: Option<bool>,
    return_k_alternatives: Option<u32>,
    seed: Option<u64>,
    #[serde(flatten)]
    rest: Rest,
}

/// What the response has in it.
#[derive(Debug, Clone)]
struct Shape {
    details: bool,
    prefill: bool,
    /// Text to put in front of the answer.
    full_text: Option<String>,
    adapter: Option<AdapterRef>,
    characters: usize,
}

impl Body for GenerateRequest {
    const DIALECT: Dialect = Dialect::Native;
}

impl GenerateRequest {
    fn into_ask(self, app: &App, caller: &Caller) -> Result<(Ask, Shape), ApiError> {
        let p = self.parameters.unwrap_or_default();
        refuse(&self.rest, |_, _| false)?;
        refuse(&p.rest, |name, value| match name {
            "best_of" => value == 1,
            "watermark" | "apply_chat_template" => value == false,
            _ => false,
        })?;
        if self.inputs.is_empty() {
            return Err(ApiError::invalid("`inputs` cannot be empty"));
        }
        let samples = p.do_sample == Some(true)
            || p.temperature.is_some()
            || p.top_k.is_some()
            || p.top_p.is_some()
            || p.min_p.is_some()
            || p.typical_p.is_some();
        let adapter = app.adapter(p.adapter_id, p.adapter_source, caller.credential.or_in_body(p.api_token));
        let prefill = p.decoder_input_details == Some(true);
        let shape = Shape {
            details: p.details == Some(true) || prefill,
            prefill,
            full_text: (p.return_full_text == Some(true)).then(|| self.inputs.clone()),
            adapter: adapter.clone(),
            characters: self.inputs.chars().count(),
        };
        let sampling = SamplingParams {
            temperature: if samples { p.temperature.unwrap_or(1.0) } else { 0.0 },
            top_k: p.top_k.unwrap_or(0),
            top_p: p.top_p.unwrap_or(1.0),
            min_p: p.min_p.unwrap_or(0.0),
            typical_p: p.typical_p.unwrap_or(1.0),
            repetition_penalty: p.repetition_penalty.unwrap_or(1.0),
            frequency_penalty: p.frequency_penalty.unwrap_or(0.0),
            presence_penalty: p.presence_penalty.unwrap_or(0.0),
            seed: p.seed.unwrap_or_else(random_seed),
            num_top: p.return_k_alternatives.unwrap_or(0),
            logit_bias: Vec::new(),
        };
        let ask = Ask {
            prompt: Prompt::Text(self.inputs),
            max_new_tokens: p.max_new_tokens,
            stop: p.stop.unwrap_or_default(),
            ignore_eos: p.ignore_eos_token == Some(true),
            adapter,
            sampling,
            prompt_logprobs: prefill,
            truncate: p.truncate,
        };
        Ok((ask, shape))
    }
}

/// A seed for requests that bring none: the hasher's keys are the standard library's source of randomness.
pub(super) fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}

impl App {
    /// The adapter that a request names; none for an empty name.
    pub(super) fn adapter(
        &self,
        id: Option<String>,
        source: Option<String>,
        credential: Credential,
    ) -> Option<AdapterRef> {
        let id = id.filter(|id| !id.is_empty())?;
        let source = source.unwrap_or_else(|| self.config.router.adapter_source.clone());
        Some(AdapterRef { source, id, credential })
    }
}

/// `POST /generate`
pub(crate) async fn whole(State(app): State<Arc<App>>, request: Accepted<GenerateRequest>) -> Response {
    respond(&app, request, |_| false, false).await
}

/// `POST /generate_stream`
pub(crate) async fn stream(State(app): State<Arc<App>>, request: Accepted<GenerateRequest>) -> Response {
    respond(&app, request, |_| true, false).await
}

/// `POST /`: by the field `stream`; a whole answer is the only element of a list.
pub(crate) async fn either(State(app): State<Arc<App>>, request: Accepted<GenerateRequest>) -> Response {
    respond(&app, request, |request| request.stream == Some(true), true).await
}

async fn respond(
    app: &App,
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
    app: &App,
    request: Accepted<GenerateRequest>,
    streams: impl Fn(&GenerateRequest) -> bool,
    as_list: bool,
) -> Result<Response, ApiError> {
    let Accepted { caller, body } = request;
    let streams = streams(&body);
    let (ask, shape) = body.into_ask(app, &caller)?;
    if streams && shape.prefill {
        return Err(ApiError::invalid(
            "`decoder_input_details` == true is not supported when streaming tokens",
        ));
    }
    let permit = app.admit_one(&caller, ask.adapter.as_ref())?;
    let mut generation = app.generate(&caller, ask, permit).await?;
    let mut headers = headers(app, &shape);
    if streams {
        generation.begin().await?;
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        return Ok((headers, events(generation, shape)).into_response());
    }
    let begun = Instant::now();
    let answer = generation.answer().await?;
    timing_headers(&mut headers, &generation, answer.pieces.len(), begun);
    let body = whole_body(&generation, answer, &shape);
    let body = if as_list { Value::Array(vec![body]) } else { body };
    Ok((headers, Json(body)).into_response())
}

/// The field's name of why a text ends.
fn reason(finish: &FinishReason) -> &'static str {
    match finish {
        FinishReason::Length => "length",
        FinishReason::Eos => "eos_token",
        FinishReason::Stop(_) => "stop_sequence",
    }
}

/// The generated text has the stop string in it that ended it.
fn full(text: &str, finish: &FinishReason, shape: &Shape) -> String {
    let stop = if let FinishReason::Stop(stop) = finish { stop.as_str() } else { "" };
    format!("{}{text}{stop}", shape.full_text.as_deref().unwrap_or_default())
}

fn whole_body(generation: &Generation, answer: Answer, shape: &Shape) -> Value {
    let text = full(&answer.text, &answer.finish, shape);
    if !shape.details {
        return json!({ "generated_text": text });
    }
    let scored = |token: &Scored, logprob: Option<f32>| json!({"id": token.id, "text": generation.token_text(token.id), "logprob": logprob});
    let mut prefill = Vec::new();
    if shape.prefill {
        prefill.push(scored(&Scored { id: generation.prompt[0], logprob: 0.0 }, None));
        prefill.extend(generation.prompt_scores.iter().map(|token| scored(token, Some(token.logprob))));
    }
    let tokens: Vec<Value> = answer
        .pieces
        .iter()
        .map(|piece| token_json(piece, piece.top.iter().map(|top| scored(top, Some(top.logprob))).collect()))
        .collect();
    json!({
        "generated_text": text,
        "details": {
            "finish_reason": reason(&answer.finish),
            "prompt_tokens": generation.prompt.len(),
            "generated_tokens": tokens.len(),
            "skipped_tokens": 0,
            "seed": generation.seed,
            "prefill": prefill,
            "tokens": tokens,
        },
    })
}

fn token_json(piece: &Piece, alternatives: Vec<Value>) -> Value {
    let mut token = json!({
        "id": piece.token.id,
        "text": piece.token_text,
        "logprob": piece.token.logprob,
        "special": piece.special,
        "skipped": false,
    });
    if !alternatives.is_empty() {
        token["alternative_tokens"] = alternatives.into();
    }
    token
}

/// One event per token; the last has the whole text.
fn events(generation: Generation, shape: Shape) -> impl IntoResponse {
    let (prompt_tokens, seed) = (generation.prompt.len(), generation.seed);
    let names = generation.names();
    let events = generation.pieces().scan((String::new(), 0), move |(text, tokens), (piece, _)| {
        let data = match piece {
            Err(error) => error.body(Dialect::Native),
            Ok(piece) => {
                *text += &piece.text;
                *tokens += 1;
                let details = piece.finish.as_ref().filter(|_| shape.details).map(|finish| {
                    json!({
                        "finish_reason": reason(finish),
                        "prompt_tokens": prompt_tokens,
                        "generated_tokens": tokens,
                        "seed": seed,
                    })
                });
                let alternatives = piece
                    .top
                    .iter()
                    .map(|top| json!({"id": top.id, "text": names(top.id), "logprob": top.logprob}));
                json!({
                    "token": token_json(&piece, alternatives.collect()),
                    "generated_text": piece.finish.as_ref().map(|finish| full(text, finish, &shape)),
                    "details": details,
                })
            }
        };
        futures::future::ready(Some(sse(&data)))
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

/// An event of JSON.
pub(super) fn sse(data: &impl Serialize) -> Result<Event, axum::Error> {
    Event::default().json_data(data)
}

/// Stream that ends with OpenAI's mark.
pub(super) fn done() -> impl futures::Stream<Item = Result<Event, axum::Error>> {
    stream::once(async { Ok(Event::default().data("[DONE]")) })
}

fn headers(app: &App, shape: &Shape) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let adapter = shape.adapter.as_ref();
    let device = |device: &str| if device == "cpu" { "cpu+optimized" } else { "gpu+optimized" }.to_owned();
    for (name, value) in [
        ("x-compute-type", app.engine.info().map(|info| device(&info.device))),
        ("x-compute-characters", Some(shape.characters.to_string())),
        ("x-model-id", Some(app.config.model.id.clone())),
        ("x-adapter-id", adapter.map(|adapter| adapter.id.clone())),
        ("x-adapter-source", adapter.map(|adapter| adapter.source.clone())),
    ] {
        // A name that no header can hold is left out.
        if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
    headers
}

fn timing_headers(headers: &mut HeaderMap, generation: &Generation, tokens: usize, begun: Instant) {
    let timing = &generation.timing;
    let total = timing.received.elapsed();
    let inference = begun.elapsed().saturating_sub(timing.queued);
    for (name, value) in [
        ("x-compute-time", total.as_millis()),
        ("x-total-time", total.as_millis()),
        ("x-validation-time", timing.validation.as_millis()),
        ("x-queue-time", timing.queued.as_millis()),
        ("x-inference-time", inference.as_millis()),
        ("x-time-per-token", inference.as_millis() / tokens.max(1) as u128),
        ("x-prompt-tokens", generation.prompt.len() as u128),
        ("x-generated-tokens", tokens as u128),
        ("x-total-tokens", (generation.prompt.len() + tokens) as u128),
    ] {
        if let Ok(value) = HeaderValue::try_from(value.to_string()) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}
