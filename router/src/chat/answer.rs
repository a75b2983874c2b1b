//! Takes an assistant's text apart as it comes: what it says, what it thinks, and the tools that it calls.
//!
//! Models write calls in forms of their own, which their chat templates show ([`AnswerFormat`]). Text that looks like a
//! call and turns out not to be one is content. White space around marks is not part of anything.

mod call;
mod format;
mod harmony;
mod marked;
mod section;
mod value;
mod xml;

use std::sync::Arc;

use serde_json::Value;

pub use format::{AnswerFormat, CallFormat};
use harmony::Harmony;
use marked::Marked;

/// A part of an answer. Everything about calls concerns the one that has begun last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerEvent {
    /// Text that is meant for the reader, and the position of its first byte in the answer.
    Content {
        /// Position in the answer, in bytes.
        at: usize,
        /// The text.
        text: String,
    },
    /// Text that the model thinks.
    Reasoning(String),
    /// A call of a tool begins.
    Begin {
        /// Name of the tool.
        name: String,
    },
    /// Text that follows the arguments so far; all of it is a JSON object.
    Arguments(String),
    /// The call is complete.
    End,
    /// The call that has begun is malformed, and hence content.
    Broken {
        /// Position in the answer, in bytes.
        at: usize,
        /// All of its text.
        text: String,
    },
}

/// The tools that a request has. Nothing else is a call.
#[derive(Debug, Clone, Default)]
pub struct Tools(Arc<[Tool]>);

/// A tool.
#[derive(Debug, Clone)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments.
    pub parameters: Value,
}

impl Tools {
    /// Tools with their schemas.
    pub fn new(tools: Vec<Tool>) -> Tools {
        Tools(tools.into())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    fn find(&self, name: &str) -> Option<&Tool> {
        self.0.iter().find(|tool| tool.name == name)
    }

    /// The schema of a tool's parameter.
    fn parameter(&self, name: &str, parameter: &str) -> Option<&Value> {
        self.find(name)?.parameters.get("properties")?.get(parameter)
    }
}

/// Events that are being collected.
#[derive(Debug, Default)]
struct Events(Vec<AnswerEvent>);

impl Events {
    fn content(&mut self, at: usize, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(AnswerEvent::Content { at: begin, text: before }) if *begin + before.len() == at => {
                before.push_str(text);
            }
            _ => self.0.push(AnswerEvent::Content { at, text: text.to_owned() }),
        }
    }

    fn reasoning(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(AnswerEvent::Reasoning(before)) => before.push_str(text),
            _ => self.0.push(AnswerEvent::Reasoning(text.to_owned())),
        }
    }

    fn begin(&mut self, name: &str) {
        self.0.push(AnswerEvent::Begin { name: name.to_owned() });
    }

    fn arguments(&mut self, text: &str) {
        match self.0.last_mut() {
            Some(AnswerEvent::Arguments(before)) => before.push_str(text),
            _ => self.0.push(AnswerEvent::Arguments(text.to_owned())),
        }
    }

    fn end(&mut self) {
        self.0.push(AnswerEvent::End);
    }
}

/// Reads one answer.
#[derive(Debug)]
pub struct AnswerParser(Form);

#[derive(Debug)]
enum Form {
    Marked(Box<Marked>),
    Harmony(Box<Harmony>),
}

impl AnswerParser {
    /// An answer to a prompt. Calls are looked for if there are tools.
    pub fn new(format: &AnswerFormat, tools: Tools, prompt: &str) -> AnswerParser {
        AnswerParser(match format.is_harmony() {
            true => Form::Harmony(Box::new(Harmony::new(tools, prompt))),
            false => Form::Marked(Box::new(Marked::new(format, tools, prompt))),
        })
    }

    /// Takes text that follows, and returns the events that are certain with it.
    pub fn push(&mut self, text: &str) -> Vec<AnswerEvent> {
        let mut events = Events::default();
        match &mut self.0 {
            Form::Marked(parser) => parser.push(text, &mut events),
            Form::Harmony(parser) => parser.push(text, &mut events),
        }
        events.0
    }

    /// Ends the answer. One that is cut off may end within the arguments of a call.
    pub fn finish(&mut self, cut_off: bool) -> Vec<AnswerEvent> {
        let mut events = Events::default();
        match &mut self.0 {
            Form::Marked(parser) => parser.finish(cut_off, &mut events),
            Form::Harmony(parser) => parser.finish(cut_off, &mut events),
        }
        events.0
    }

    /// The position before which all text has become an event, or is none.
    pub fn decided(&self) -> usize {
        match &self.0 {
            Form::Marked(parser) => parser.decided(),
            Form::Harmony(parser) => parser.decided(),
        }
    }
}

/// The length of the longest end of a text that may be the beginning of a mark.
fn overlap(text: &str, mark: &str) -> usize {
    let longest = text.len().min(mark.len().saturating_sub(1));
    let begins =
        |len: &usize| text.is_char_boundary(text.len() - len) && mark.starts_with(&text[text.len() - len..]);
    (1..=longest).rev().find(begins).unwrap_or(0)
}
