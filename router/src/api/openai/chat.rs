//! Choices of `/v1/chat/completions`.

use std::mem;

use serde::Serialize;

use super::{
    Choice,
    logprobs::{ChatLogprobs, finish_reason},
};
use crate::{
    api::fold::Fold,
    chat_events::{ChatEvent, ChatEvents},
    text::{TextEvent, TokenText},
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
    content: String,
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
}

impl ChatFold {
    pub(super) fn new(index: usize, logprobs: bool, echo: String) -> ChatFold {
        ChatFold { index, logprobs, events: ChatEvents::default(), untold: Vec::new(), echo }
    }

    fn delta(&mut self, delta: MessageDelta, finish_reason: Option<&'static str>) -> ChatDelta {
        let untold = mem::take(&mut self.untold);
        let tells = self.logprobs && !untold.is_empty();
        let logprobs = tells.then(|| ChatLogprobs::new(untold));
        ChatDelta { index: self.index, delta, logprobs, finish_reason }
    }

    fn tell(&mut self, event: ChatEvent) -> Option<ChatDelta> {
        match event {
            ChatEvent::Text { text, tokens } => {
                self.untold.extend(tokens);
                // Tokens without text wait for the next text.
                let content = Some(text).filter(|text| !text.is_empty())?;
                Some(self.delta(MessageDelta { role: None, content: Some(content) }, None))
            }
            ChatEvent::End(end) => Some(self.delta(MessageDelta::default(), Some(finish_reason(&end)))),
        }
    }
}

impl Fold for ChatFold {
    type Delta = ChatDelta;
    type Whole = ChatChoice;

    fn open(&mut self) -> Vec<ChatDelta> {
        let delta = MessageDelta { role: Some("assistant"), content: Some(String::new()) };
        let echo = Some(mem::take(&mut self.echo)).filter(|echo| !echo.is_empty());
        let echo = echo.map(|echo| MessageDelta { role: None, content: Some(echo) });
        [Some(delta), echo].into_iter().flatten().map(|delta| self.delta(delta, None)).collect()
    }

    fn push(&mut self, event: TextEvent) -> Vec<ChatDelta> {
        self.events.push(event).into_iter().filter_map(|event| self.tell(event)).collect()
    }

    fn empty(&self) -> ChatChoice {
        let logprobs = self.logprobs.then(ChatLogprobs::default);
        ChatChoice { index: self.index, logprobs, ..ChatChoice::default() }
    }

    fn add(whole: &mut ChatChoice, delta: ChatDelta) {
        let MessageDelta { role, content } = delta.delta;
        whole.message.role = role.unwrap_or(whole.message.role);
        whole.message.content += &content.unwrap_or_default();
        if let (Some(whole), Some(delta)) = (&mut whole.logprobs, delta.logprobs) {
            whole.extend(delta);
        }
        whole.finish_reason = delta.finish_reason.or(whole.finish_reason);
    }
}
