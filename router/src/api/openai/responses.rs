//! `/v1/responses`: a chat by another name, of which nothing is kept.

mod input;
mod names;
mod output;

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{Stream, StreamExt, stream};
use serde_json::Value;

pub(crate) use input::ResponsesRequest;

use super::request::{ChatRequest, Options};
use crate::{
    api::{
        error::{ApiError, Dialect},
        group::{Generation, GroupRequest},
        json,
    },
    chat_events::ChatEvents,
    server::{
        App,
        accept::{Accepted, Caller},
    },
};
use input::Asked;
use output::Output;

/// `POST /v1/responses`
pub(crate) async fn responses(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<ResponsesRequest>,
) -> Response {
    let answer = async {
        let Asked { chat, told, names } = body.into_chat()?;
        let answer = async {
            app.expect_generation()?;
            let chat: ChatRequest = json::parse(Value::Object(chat).to_string().as_bytes())?;
            let (request, options) = chat.into_group(&app, &caller)?;
            respond(&app, &caller, request, options, told).await
        };
        answer.await.map_err(|error| names.own(error))
    };
    answer.await.unwrap_or_else(|error: ApiError| error.respond(Dialect::OpenAi))
}

async fn respond(
    app: &App,
    caller: &Caller,
    request: GroupRequest,
    options: Options,
    told: Value,
) -> Result<Response, ApiError> {
    let mut generations = app.start_group(caller, request).await?;
    let (Some(mut generation), true) = (generations.pop(), generations.is_empty()) else {
        return Err(ApiError::Unsupported { field: "n".into() });
    };
    let mut output = Output::new(&options, told);
    let mut events = ChatEvents::new(generation.take_answer()?);
    if options.stream {
        generation.begin().await?;
        return Ok(Sse::new(stream(generation, events, output))
            .keep_alive(KeepAlive::default())
            .into_response());
    }
    while !events.is_done()
        && let Some(event) = generation.next().await
    {
        for event in events.push(event?) {
            output.push(event, &generation.tokens);
        }
    }
    Ok(Json(output.into_response()).into_response())
}

/// The events of a response as they come.
fn stream(
    generation: Generation,
    events: ChatEvents,
    mut output: Output,
) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let opening = output.open();
    let following = stream::unfold(Some((generation, events, output)), async |state| {
        let (mut generation, mut events, mut output) = state?;
        if events.is_done() {
            return None;
        }
        Some(match generation.next().await? {
            Ok(event) => {
                let told = events.push(event).into_iter();
                let told = told.flat_map(|event| output.push(event, &generation.tokens)).collect::<Vec<_>>();
                (told, Some((generation, events, output)))
            }
            Err(error) => {
                let body = serde_json::to_value(ApiError::body(&error, Dialect::OpenAi)).unwrap_or_default();
                (output.fail(&body["error"]), None)
            }
        })
    });
    let all = stream::iter(opening).chain(following.flat_map(|events: Vec<_>| stream::iter(events)));
    all.map(|event| {
        let name = event["type"].as_str().unwrap_or_default().to_owned();
        Ok(Event::default().event(name).data(event.to_string()))
    })
}
