//! OpenAI's interface: `/v1/completions` and `/v1/chat/completions`.

mod body;
mod logprobs;
mod request;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{KeepAlive, Sse},
    },
};
use futures::{
    StreamExt,
    future::{FutureExt, select_all as select_all_futures, try_join_all},
    stream::{self, select_all},
};

use super::{
    ask::Ask,
    error::{ApiError, Dialect},
    generate::{done, sse},
    run::Generation,
};
use crate::server::{
    App,
    accept::{Accepted, Caller},
};
use body::{Choice, Head, Usage};
use request::{ChatRequest, CompletionRequest, Options};

/// `POST /v1/completions`
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<CompletionRequest>,
) -> Response {
    let answer = async {
        let (asks, options) = body.into_asks(&app, &caller)?;
        run(&app, &caller, asks, options).await
    };
    answer.await.unwrap_or_else(|error: ApiError| error.respond(Dialect::OpenAi))
}

/// `POST /v1/chat/completions`
pub(crate) async fn chat_completions(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<ChatRequest>,
) -> Response {
    let answer = async {
        let (ask, options) = body.into_ask(&app, &caller)?;
        run(&app, &caller, vec![ask], options).await
    };
    answer.await.unwrap_or_else(|error: ApiError| error.respond(Dialect::OpenAi))
}

async fn run(app: &App, caller: &Caller, asks: Vec<Ask>, options: Options) -> Result<Response, ApiError> {
    // Each prompt is as much work as a request of its own.
    let adapter = asks.first().and_then(|ask| ask.adapter.as_ref());
    let permits = app.admit(caller, adapter, asks.len())?;
    let started = asks.into_iter().zip(permits).map(|(ask, permit)| app.generate(caller, ask, permit));
    let mut generations = try_join_all(started).await?;
    let head = Head::new(&options, new_id(options.chat));
    if options.stream {
        // The head is sent with the first token of any choice.
        let begin = generations.iter_mut().map(|generation| generation.begin().boxed());
        select_all_futures(begin).await.0?;
        return Ok(stream_events(head, generations, options).into_response());
    }
    let answers = try_join_all(generations.iter_mut().map(Generation::answer)).await?;
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (index, (generation, answer)) in generations.iter().zip(&answers).enumerate() {
        usage.add(generation.prompt.len(), answer.pieces.len());
        choices.push(body::whole(index, generation, answer, &options));
    }
    Ok(Json(head.whole(choices, usage)).into_response())
}

/// Events of all choices as they come, then the usage if it is wanted, then the mark of the end.
fn stream_events(head: Head, generations: Vec<Generation>, options: Options) -> impl IntoResponse {
    let head = Arc::new(head);
    let with_usage = options.include_usage;
    let usage = Arc::new(std::sync::Mutex::new(Usage::default()));
    let choices = generations.into_iter().enumerate().map(|(index, generation)| {
        if let Ok(mut usage) = usage.lock() {
            usage.add(generation.prompt.len(), 0);
        }
        let mut choice = Choice::new(index, &generation, options.clone());
        let (head, usage) = (head.clone(), usage.clone());
        let opening = stream::iter(choice.opening().map(|delta| sse(&head.chunk(delta))));
        let pieces = generation.pieces().flat_map(move |(piece, prompt)| {
            let events = match piece {
                Err(error) => vec![sse(&error.body(Dialect::OpenAi))],
                Ok(piece) => {
                    if let Ok(mut usage) = usage.lock() {
                        usage.add(0, 1);
                    }
                    choice.push(piece, &prompt).map(|delta| sse(&head.chunk(delta))).collect()
                }
            };
            stream::iter(events)
        });
        opening.chain(pieces).boxed()
    });
    let choices = select_all(choices.collect::<Vec<_>>());
    let last = {
        let usage = usage.clone();
        stream::once(async move {
            let total = usage.lock().map(|usage| *usage).unwrap_or_default();
            sse(&head.usage_chunk(total))
        })
    };
    let last = stream::iter(with_usage.then_some(last)).flatten();
    Sse::new(choices.chain(last).chain(done())).keep_alive(KeepAlive::default())
}

/// Names a response; unique in this process, and hardly ever the same in another.
fn new_id(chat: bool) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
    let prefix = if chat { "chatcmpl" } else { "cmpl" };
    format!("{prefix}-{now:016x}{:08x}", NEXT.fetch_add(1, Ordering::Relaxed) as u32)
}
