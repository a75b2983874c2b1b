//! Responses, and the events that they come in.

use std::{
    sync::atomic::Ordering,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use crate::{
    api::{
        group::TokenCounts,
        openai::{logprobs::ChatLogprobs, request::Options},
    },
    chat_events::ChatEvent,
    text::{EndReason, TokenText},
};

/// A response that is being written.
pub(super) struct Output {
    /// All fields but the output.
    response: Value,
    /// Items that are complete.
    items: Vec<Value>,
    open: Option<Open>,
    /// Items that have begun so far.
    begun: usize,
    sequence: u64,
    logprobs: bool,
    /// Whether items are told of as they begin, so that they cannot be taken back.
    streams: bool,
    /// Tokens whose text has not been told.
    untold: Vec<TokenText>,
}

/// The item that is being written.
struct Open {
    id: String,
    kind: Kind,
    text: String,
    logprobs: Vec<Value>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Message,
    Reasoning,
    Call { call_id: String, name: String },
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

fn new_id(prefix: &str) -> String {
    format!("{prefix}_{:032x}", rand::random::<u128>())
}

impl Open {
    fn item(&self, status: &str) -> Value {
        let part = |kind: &str| json!({"type": kind, "text": self.text});
        let complete = status != "in_progress";
        match &self.kind {
            Kind::Message => {
                let content = if complete { json!([self.part()]) } else { json!([]) };
                json!({"type": "message", "id": self.id, "role": "assistant", "status": status, "content": content})
            }
            Kind::Reasoning => {
                let content = if complete { json!([part("reasoning_text")]) } else { json!([]) };
                json!({"type": "reasoning", "id": self.id, "summary": [], "content": content, "status": status})
            }
            Kind::Call { call_id, name } => {
                json!({"type": "function_call", "id": self.id, "call_id": call_id,
                "name": name, "arguments": self.text, "status": status})
            }
        }
    }

    /// The only part of its content.
    fn part(&self) -> Value {
        match self.kind {
            Kind::Reasoning => json!({"type": "reasoning_text", "text": self.text}),
            _ => {
                json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs})
            }
        }
    }
}

impl Output {
    /// A response that repeats some fields of its request.
    pub(super) fn new(options: &Options, told: Value) -> Output {
        let mut response = json!({"id": new_id("resp"), "object": "response", "created_at": now(),
            "model": options.model, "status": "in_progress", "error": null, "incomplete_details": null,
            "completed_at": null, "usage": null});
        if let (Some(all), Value::Object(told)) = (response.as_object_mut(), told) {
            all.extend(told);
        }
        let (items, untold) = (Vec::new(), Vec::new());
        let (logprobs, streams) = (options.logprobs, options.stream);
        Output { response, items, open: None, begun: 0, sequence: 0, logprobs, streams, untold }
    }

    /// The events before the first of the answer.
    pub(super) fn open(&mut self) -> Vec<Value> {
        ["response.created", "response.in_progress"]
            .map(|name| {
                let response = self.response();
                self.number(json!({"type": name, "response": response}))
            })
            .into()
    }

    /// The events that end a response which cannot be completed, with OpenAI's description of the error.
    pub(super) fn fail(&mut self, error: &Value) -> Vec<Value> {
        let (code, message) = (&error["code"], &error["message"]);
        let mut events = Vec::new();
        self.close("incomplete", &mut events);
        events.push(json!({"type": "error", "code": code, "message": message, "param": error["param"]}));
        self.response["status"] = "failed".into();
        self.response["error"] = json!({"code": "server_error", "message": message});
        events.push(json!({"type": "response.failed", "response": self.response()}));
        events.into_iter().map(|event| self.number(event)).collect()
    }

    /// Numbers an event.
    fn number(&mut self, mut event: Value) -> Value {
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        event
    }

    fn response(&self) -> Value {
        let mut response = self.response.clone();
        response["output"] = self.items.clone().into();
        response
    }

    /// The whole response.
    pub(super) fn into_response(self) -> Value {
        self.response()
    }

    /// Takes an event of the answer, and returns those of the response.
    pub(super) fn push(&mut self, event: ChatEvent, tokens: &TokenCounts) -> Vec<Value> {
        let mut events = Vec::new();
        match event {
            ChatEvent::Text { text, tokens } => {
                self.untold.extend(tokens);
                if !text.is_empty() {
                    self.text(text, &mut events);
                }
            }
            ChatEvent::Reasoning(text) => {
                self.begin(Kind::Reasoning, &mut events);
                self.add(
                    &text,
                    json!({"type": "response.reasoning_text.delta", "content_index": 0}),
                    &mut events,
                );
            }
            ChatEvent::Call { id, name, .. } => self.begin(Kind::Call { call_id: id, name }, &mut events),
            ChatEvent::Arguments { text, .. } => {
                self.add(&text, json!({"type": "response.function_call_arguments.delta"}), &mut events);
            }
            ChatEvent::CallEnd { .. } => self.close("completed", &mut events),
            ChatEvent::CallBroken { text, .. } => {
                self.close("incomplete", &mut events);
                // In a stream it has its index, and those of the items behind it count on.
                if !self.streams {
                    self.items.pop();
                    self.begun -= 1;
                }
                self.text(text, &mut events);
            }
            ChatEvent::End(end) => self.end(&end, tokens, &mut events),
        }
        events.into_iter().map(|event| self.number(event)).collect()
    }

    fn text(&mut self, text: String, events: &mut Vec<Value>) {
        self.begin(Kind::Message, events);
        let untold = std::mem::take(&mut self.untold);
        let logprobs = if self.logprobs { ChatLogprobs::new(untold).into_values() } else { Vec::new() };
        if let Some(open) = &mut self.open {
            open.logprobs.extend(logprobs.iter().cloned());
        }
        let event = json!({"type": "response.output_text.delta", "content_index": 0, "logprobs": logprobs});
        self.add(&text, event, events);
    }

    /// Begins an item, unless one of its kind is open.
    fn begin(&mut self, kind: Kind, events: &mut Vec<Value>) {
        if self.open.as_ref().is_some_and(|open| open.kind == kind) {
            return;
        }
        self.close("completed", events);
        let prefix = match kind {
            Kind::Message => "msg",
            Kind::Reasoning => "rs",
            Kind::Call { .. } => "fc",
        };
        let open = Open { id: new_id(prefix), kind, text: String::new(), logprobs: Vec::new() };
        let at = self.begun;
        self.begun += 1;
        events.push(json!({"type": "response.output_item.added", "output_index": at, "item": open.item("in_progress")}));
        if !matches!(open.kind, Kind::Call { .. }) {
            events
                .push(json!({"type": "response.content_part.added", "output_index": at, "item_id": open.id,
                "content_index": 0, "part": open.part()}));
        }
        self.open = Some(open);
    }

    fn add(&mut self, text: &str, mut event: Value, events: &mut Vec<Value>) {
        let Some(open) = &mut self.open else { return };
        open.text += text;
        event["item_id"] = open.id.as_str().into();
        event["output_index"] = self.begun.saturating_sub(1).into();
        event["delta"] = text.into();
        events.push(event);
    }

    /// Ends the item that is open.
    fn close(&mut self, status: &str, events: &mut Vec<Value>) {
        let Some(open) = self.open.take() else { return };
        let at = self.begun.saturating_sub(1);
        let mut done = json!({"item_id": open.id, "output_index": at});
        match &open.kind {
            Kind::Call { name, .. } => {
                done["type"] = "response.function_call_arguments.done".into();
                done["name"] = name.as_str().into();
                done["arguments"] = open.text.as_str().into();
                events.push(done);
            }
            kind => {
                let is_message = *kind == Kind::Message;
                let name =
                    if is_message { "response.output_text.done" } else { "response.reasoning_text.done" };
                done["type"] = name.into();
                done["content_index"] = 0.into();
                let mut part = done.clone();
                done["text"] = open.text.as_str().into();
                if is_message {
                    done["logprobs"] = open.logprobs.clone().into();
                }
                part["type"] = "response.content_part.done".into();
                part["part"] = open.part();
                events.extend([done, part]);
            }
        }
        let item = open.item(status);
        events.push(json!({"type": "response.output_item.done", "output_index": at, "item": item}));
        self.items.push(item);
    }

    fn end(&mut self, end: &EndReason, tokens: &TokenCounts, events: &mut Vec<Value>) {
        let cut_off = *end == EndReason::Length;
        let status = if cut_off { "incomplete" } else { "completed" };
        self.close(status, events);
        let generated = tokens.generated.load(Ordering::Relaxed);
        self.response["status"] = status.into();
        if cut_off {
            self.response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        } else {
            self.response["completed_at"] = now().into();
        }
        self.response["usage"] = json!({
            "input_tokens": tokens.prompt,
            "input_tokens_details": {"cached_tokens": tokens.cached.load(Ordering::Relaxed), "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens.prompt + generated,
        });
        events.push(json!({"type": format!("response.{status}"), "response": self.response()}));
    }
}
