//! Choices of `/v1/chat/completions`.

use std::mem;

use serde::Serialize;

use super::{
    Choice,
    logprobs::{ChatLogprobs, finish_reason},
};
use crate::{
    api::fold::Fold,
    chat_events::{AnswerSpec, ChatEvent, ChatEvents},
    text::{EndReason, TextEvent, TokenText},
};

/// A choice of a whole response.
#[derive(Debug, Default, Serialize)]
pub(super) struct ChatChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

impl Choice for ChatChoice {
    fn at(self, index: usize) -> Self {
        Self { index, ..self }
    }
}

/// The assistant's answer.
#[derive(Debug, Default, Serialize)]
struct Message {
    role: &'static str,
    /// Null if there is nothing but calls.
    content: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    reasoning_content: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A call of a tool.
#[derive(Debug, Serialize)]
struct ToolCall {
    id: String,
    r#type: &'static str,
    function: Function,
}

#[derive(Debug, Default, Serialize)]
struct Function {
    name: String,
    arguments: String,
}

/// What a delta adds to a call.
#[derive(Debug, Serialize)]
struct ToolCallDelta {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta,
}

#[derive(Debug, Default, Serialize)]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

/// The delta of a choice.
#[derive(Debug, Default, Serialize)]
pub(super) struct ChatDelta {
    index: usize,
    delta: MessageDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

/// The part of a delta that belongs to the message.
#[derive(Debug, Default, Serialize)]
struct MessageDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallDelta>,
    /// The last call turned out to be none, which a whole answer does not show.
    #[serde(skip)]
    broken: bool,
}

/// Tells a sequence as a choice of a chat.
pub(super) struct ChatFold {
    index: usize,
    logprobs: bool,
    events: ChatEvents,
    /// Tokens of the content that have not been told.
    untold: Vec<TokenText>,
    /// Text in front of the answer.
    echo: String,
    /// Calls that are none of those that are content.
    calls: usize,
}

impl ChatFold {
    pub(super) fn new(index: usize, logprobs: bool, echo: String, answer: AnswerSpec) -> ChatFold {
        ChatFold { index, logprobs, events: ChatEvents::new(answer), untold: Vec::new(), echo, calls: 0 }
    }

    fn delta(&mut self, delta: MessageDelta, finish_reason: Option<&'static str>) -> ChatDelta {
        let untold = mem::take(&mut self.untold);
        let tells = self.logprobs && !untold.is_empty();
        let logprobs = tells.then(|| ChatLogprobs::new(untold));
        ChatDelta { index: self.index, delta, logprobs, finish_reason }
    }

    fn tell(&mut self, event: ChatEvent) -> Option<ChatDelta> {
        let message = match event {
            ChatEvent::Text { text, tokens } => {
                self.untold.extend(tokens);
                // Tokens without text wait for the next text.
                let content = Some(text).filter(|text| !text.is_empty())?;
                MessageDelta { content: Some(content), ..MessageDelta::default() }
            }
            ChatEvent::Reasoning(text) => {
                MessageDelta { reasoning_content: Some(text), ..MessageDelta::default() }
            }
            ChatEvent::Call { index, id, name } => {
                self.calls += 1;
                let function = FunctionDelta { name: Some(name), ..FunctionDelta::default() };
                let call = ToolCallDelta { index, id: Some(id), r#type: Some("function"), function };
                MessageDelta { tool_calls: vec![call], ..MessageDelta::default() }
            }
            ChatEvent::Arguments { index, text } => {
                let function = FunctionDelta { name: None, arguments: text };
                let call = ToolCallDelta { index, id: None, r#type: None, function };
                MessageDelta { tool_calls: vec![call], ..MessageDelta::default() }
            }
            ChatEvent::CallEnd { .. } => return None,
            ChatEvent::CallBroken { text, .. } => {
                self.calls -= 1;
                MessageDelta { content: Some(text), broken: true, ..MessageDelta::default() }
            }
            ChatEvent::End(end) => {
                let reason = match end {
                    EndReason::EndToken if self.calls > 0 => "tool_calls",
                    end => finish_reason(&end),
                };
                return Some(self.delta(MessageDelta::default(), Some(reason)));
            }
        };
        Some(self.delta(message, None))
    }
}

impl Fold for ChatFold {
    type Delta = ChatDelta;
    type Whole = ChatChoice;

    fn open(&mut self) -> Vec<ChatDelta> {
        let delta =
            MessageDelta { role: Some("assistant"), content: Some(String::new()), ..MessageDelta::default() };
        let echo = Some(mem::take(&mut self.echo)).filter(|echo| !echo.is_empty());
        let echo = echo.map(|echo| MessageDelta { content: Some(echo), ..MessageDelta::default() });
        [Some(delta), echo].into_iter().flatten().map(|delta| self.delta(delta, None)).collect()
    }

    fn push(&mut self, event: TextEvent) -> Vec<ChatDelta> {
        self.events.push(event).into_iter().filter_map(|event| self.tell(event)).collect()
    }

    fn is_done(&self) -> bool {
        self.events.is_done()
    }

    fn empty(&self) -> ChatChoice {
        let logprobs = self.logprobs.then(ChatLogprobs::default);
        ChatChoice { index: self.index, logprobs, ..ChatChoice::default() }
    }

    fn add(whole: &mut ChatChoice, delta: ChatDelta) {
        whole.message.add(delta.delta);
        if let (Some(whole), Some(delta)) = (&mut whole.logprobs, delta.logprobs) {
            whole.extend(delta);
        }
        whole.finish_reason = delta.finish_reason.or(whole.finish_reason);
    }
}

impl Message {
    fn add(&mut self, delta: MessageDelta) {
        self.role = delta.role.unwrap_or(self.role);
        self.reasoning_content += &delta.reasoning_content.unwrap_or_default();
        if delta.broken {
            self.tool_calls.pop();
        }
        for call in delta.tool_calls {
            match (call.id, self.tool_calls.last_mut()) {
                (Some(id), _) => {
                    let name = call.function.name.unwrap_or_default();
                    let function = Function { name, arguments: call.function.arguments };
                    self.tool_calls.push(ToolCall { id, r#type: "function", function });
                }
                (None, Some(last)) => last.function.arguments += &call.function.arguments,
                (None, None) => {}
            }
        }
        let content = self.content.take().unwrap_or_default() + &delta.content.unwrap_or_default();
        self.content = Some(content).filter(|content| !content.is_empty() || self.tool_calls.is_empty());
    }
}
