//! Headers of responses.

use std::sync::atomic::Ordering;

use axum::http::HeaderMap;

use crate::{
    adapter::AdapterRef,
    api::{
        group::Generation,
        headers::{compute_type, insert},
    },
    server::App,
};

/// Headers of all responses: what was asked, and who answers.
pub(super) fn of_request(app: &App, adapter: Option<&AdapterRef>, characters: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("x-compute-type", compute_type(app).map(str::to_owned)),
        ("x-compute-characters", Some(characters.to_string())),
        ("x-model-id", Some(app.config.model.id.clone())),
        ("x-adapter-id", adapter.map(|adapter| adapter.id.clone())),
        ("x-adapter-source", adapter.and_then(AdapterRef::source).map(|source| source.to_string())),
    ] {
        if let Some(value) = value {
            insert(&mut headers, name, value);
        }
    }
    headers
}

/// Headers of whole responses: where the time went, in milliseconds, and how many tokens there are.
pub(super) fn of_answer(generation: &Generation) -> HeaderMap {
    let timing = &generation.timing;
    let total = timing.received.elapsed();
    let inference = timing.submitted.elapsed().saturating_sub(timing.queued);
    // The first token ends what computes the prompt.
    let first = timing.first_token.map_or(inference, |first| first.saturating_sub(timing.queued));
    let (prompt, tokens) = (generation.tokens.prompt, generation.tokens.generated.load(Ordering::Relaxed));
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("x-compute-time", total.as_millis()),
        ("x-total-time", total.as_millis()),
        ("x-validation-time", timing.validation.as_millis()),
        ("x-queue-time", timing.queued.as_millis()),
        ("x-inference-time", inference.as_millis()),
        ("x-time-per-token", inference.as_millis() / tokens.max(1) as u128),
        ("x-time-to-first-token", first.as_millis()),
        (
            "x-time-per-output-token",
            inference.saturating_sub(first).as_millis() / tokens.saturating_sub(1).max(1) as u128,
        ),
        ("x-prompt-tokens", prompt as u128),
        ("x-generated-tokens", tokens as u128),
        // No token is ever skipped: that is what LoRAX calls those that were guessed.
        ("x-skipped-tokens", 0),
        ("x-total-tokens", (prompt + tokens) as u128),
    ] {
        insert(&mut headers, name, value);
    }
    headers
}
