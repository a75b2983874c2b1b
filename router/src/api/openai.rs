//! OpenAI's interface: `/v1/completions`, `/v1/chat/completions`, `/v1/responses` and `/v1/embeddings`.

mod chat;
mod completion;
mod conversation;
mod embeddings;
mod head;
mod logprobs;
mod messages;
mod request;
mod responses;
mod tools;
mod unions;

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{
    Stream, StreamExt,
    future::{self, FutureExt, ready, try_join_all},
    stream::{self, select_all},
};
use serde::Serialize;

use super::{
    error::{ApiError, Dialect},
    fold::{self, Fold},
    group::{Generation, GroupRequest, TokenCounts},
};
use crate::{
    base_model::is_placeholder,
    server::{
        App,
        accept::{Accepted, Caller},
    },
};
pub(crate) use embeddings::{EmbeddingsRequest, embeddings};

use chat::ChatFold;
use completion::CompletionFold;
use head::{Head, Usage};
use request::Options;
pub(crate) use request::{ChatRequest, CompletionRequest};
pub(crate) use responses::{ResponsesRequest, responses};

/// Removes a name that a client sends where its user has named no model, unless an adapter is registered under it.
pub(crate) fn drop_placeholder(app: &App, model: &mut Option<String>) {
    model.take_if(|model| is_placeholder(model) && app.registry.find(model).is_none());
}

/// `POST /v1/completions`
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<CompletionRequest>,
) -> Response {
    let answer = async {
        let (request, options) = body.into_group(&app, &caller)?;
        let fold = |index, _: &mut Generation| Ok(CompletionFold::new(index, options.logprobs));
        respond(&app, &caller, request, &options, fold).await
    };
    answer.await.unwrap_or_else(|error: ApiError| error.respond(Dialect::OpenAi))
}

/// `POST /v1/chat/completions`
pub(crate) async fn chat_completions(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<ChatRequest>,
) -> Response {
    let answer = async {
        app.expect_generation()?;
        let (request, options) = body.into_group(&app, &caller)?;
        let fold = |index, generation: &mut Generation| {
            let answer = generation.take_answer()?;
            Ok(ChatFold::new(index, options.logprobs, options.echo.clone(), answer))
        };
        respond(&app, &caller, request, &options, fold).await
    };
    answer.await.unwrap_or_else(|error: ApiError| error.respond(Dialect::OpenAi))
}

/// Runs a group, and tells each of its sequences as a choice by the fold of its index.
async fn respond<F>(
    app: &App,
    caller: &Caller,
    request: GroupRequest,
    options: &Options,
    fold: impl Fn(usize, &mut Generation) -> Result<F, ApiError>,
) -> Result<Response, ApiError>
where
    F: Fold<Delta: Serialize, Whole: Choice>,
{
    let mut generations = app.start_group(caller, request).await?;
    if options.stream {
        // The head is sent with the first token of any choice.
        let begun = generations.iter_mut().map(|generation| generation.begin().boxed());
        future::select_all(begun).await.0?;
    }
    let choices = generations.into_iter().enumerate().map(|(index, mut generation)| {
        let fold = fold(index, &mut generation)?;
        Ok((generation, fold))
    });
    let choices = choices.collect::<Result<Vec<(Generation, F)>, ApiError>>()?;
    let head = Head::new(options);
    if options.stream {
        return Ok(Sse::new(events(head, choices)).keep_alive(KeepAlive::default()).into_response());
    }
    let counts = counts(&choices);
    let collected = choices.into_iter().map(|(generation, fold)| collect(generation, fold));
    let mut answers = try_join_all(collected).await?.into_iter();
    let mut choices = Vec::new();
    while answers.len() > 0 {
        choices.extend(best(answers.by_ref().take(options.answers).collect(), options.choices));
    }
    let choices = choices.into_iter().enumerate().map(|(index, choice)| choice.at(index)).collect();
    Ok(Json(head.whole(choices, usage(&counts))).into_response())
}

/// A choice of a whole response.
trait Choice: Serialize {
    /// The choice with another place in the response.
    fn at(self, index: usize) -> Self;
}

/// The answer of a sequence, with the mean log-probability of its tokens.
async fn collect<F: Fold>(mut generation: Generation, fold: F) -> Result<(f64, F::Whole), ApiError> {
    let whole = fold::collect(&mut generation, fold).await?;
    Ok((generation.mean_logprob(), whole))
}

/// The most probable answers to a prompt by the mean of their tokens, the best one first; all of them as they are if as
/// many are wanted.
fn best<W>(mut answers: Vec<(f64, W)>, wanted: usize) -> impl Iterator<Item = W> {
    if wanted < answers.len() {
        answers.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    }
    answers.into_iter().take(wanted).map(|(_, answer)| answer)
}

/// The tokens of each choice.
type Counts = Vec<Arc<TokenCounts>>;

fn counts<F>(choices: &[(Generation, F)]) -> Counts {
    choices.iter().map(|(generation, _)| generation.tokens.clone()).collect()
}

fn usage(counts: &Counts) -> Usage {
    let mut usage = Usage::default();
    counts.iter().for_each(|tokens| usage.add(tokens));
    usage
}

/// Events of all choices as they come, then the usage if it is wanted, then the mark of the end. An error is the last
/// event of its choice; the others go on.
fn events<F: Fold<Delta: Serialize>>(
    head: Head,
    choices: Vec<(Generation, F)>,
) -> impl Stream<Item = Result<Event, axum::Error>> + Send {
    let head = Arc::new(head);
    let counts = counts(&choices);
    let choices = choices.into_iter().map(|(generation, fold)| {
        let head = head.clone();
        let event = move |delta| match delta {
            Ok(delta) => Event::default().json_data(head.chunk(delta)),
            Err(error) => Event::default().json_data(ApiError::body(&error, Dialect::OpenAi)),
        };
        fold::deltas(generation, fold).map(event).boxed()
    });
    let choices = select_all(choices.collect::<Vec<_>>());
    let last = stream::once(async move {
        let chunk = head.usage_chunk(usage(&counts));
        chunk.map(|chunk| Event::default().json_data(chunk))
    });
    let done = stream::once(ready(Ok(Event::default().data("[DONE]"))));
    choices.chain(last.filter_map(ready)).chain(done)
}
