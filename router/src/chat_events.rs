//! Turns text into chat events: the layer that knows the form in which a model writes its answer.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use rand::Rng;

use crate::{
    chat::answer::{AnswerEvent, AnswerFormat, AnswerParser, CallFormat, Tools},
    text::{EndReason, Piece, TextEvent, TokenText},
};

/// A part of an assistant's answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ChatEvent {
    /// Text of the content, and the tokens whose text is part of it to the last byte by now. Either may be empty.
    Text { text: String, tokens: Vec<TokenText> },
    /// Text that the model thinks.
    Reasoning(String),
    /// A call of a tool; calls are numbered from 0.
    Call { index: usize, id: String, name: String },
    /// Text that follows the arguments of a call.
    Arguments { index: usize, text: String },
    /// The arguments are complete.
    CallEnd { index: usize },
    /// The call is none: its text is content, and comes with this event.
    CallBroken { index: usize, text: String },
    /// The answer is complete; the last event.
    End(EndReason),
}

/// What is known of an answer before it comes.
#[derive(Debug, Clone)]
pub(crate) struct AnswerSpec {
    pub(crate) format: AnswerFormat,
    /// The tools that may be called.
    pub(crate) tools: Tools,
    /// The prompt that is answered.
    pub(crate) prompt: Arc<str>,
    /// Whether there may be several calls.
    pub(crate) parallel: bool,
    /// Whether thoughts are told.
    pub(crate) include_reasoning: bool,
}

/// Characters of ids.
const ALPHANUMERIC: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

/// Reads an answer as it comes.
#[derive(Debug)]
pub(crate) struct ChatEvents {
    parser: AnswerParser,
    spec: AnswerSpec,
    calls: usize,
    /// Whether nothing more is told, because there was the only call.
    full: bool,
    content: ContentTokens,
}

impl ChatEvents {
    pub(crate) fn new(spec: AnswerSpec) -> ChatEvents {
        let parser = AnswerParser::new(&spec.format, spec.tools.clone(), &spec.prompt);
        ChatEvents { parser, spec, calls: 0, full: false, content: ContentTokens::default() }
    }

    /// The chat events of a text event. The prompt has none, because it is not part of the answer.
    pub(crate) fn push(&mut self, event: TextEvent) -> Vec<ChatEvent> {
        let TextEvent::Piece(Piece { text, settled, end, .. }) = event else { return Vec::new() };
        self.content.settled.extend(settled.into_iter().filter(|token| token.visible));
        if self.full {
            return Vec::new();
        }
        let mut parsed = self.parser.push(&text);
        if let Some(end) = &end {
            parsed.extend(self.parser.finish(*end == EndReason::Length));
        }
        let mut events: Vec<ChatEvent> = parsed.into_iter().filter_map(|event| self.event(event)).collect();
        let decided = if end.is_some() { usize::MAX } else { self.parser.decided() };
        let tokens = self.content.take(decided);
        if !tokens.is_empty() {
            events.insert(0, ChatEvent::Text { text: String::new(), tokens });
        }
        let end = if self.full { Some(EndReason::EndToken) } else { end };
        events.extend(end.map(ChatEvent::End));
        events
    }

    /// Returns whether nothing more comes, although the model may go on.
    pub(crate) fn is_done(&self) -> bool {
        self.full
    }

    fn event(&mut self, event: AnswerEvent) -> Option<ChatEvent> {
        if self.full {
            return None;
        }
        let index = self.calls.saturating_sub(1);
        Some(match event {
            AnswerEvent::Content { at, text } => {
                self.content.ranges.push_back(at..at + text.len());
                ChatEvent::Text { text, tokens: Vec::new() }
            }
            AnswerEvent::Reasoning(_) if !self.spec.include_reasoning => return None,
            AnswerEvent::Reasoning(text) => ChatEvent::Reasoning(text),
            AnswerEvent::Begin { name } => {
                self.calls += 1;
                ChatEvent::Call { index: self.calls - 1, id: call_id(self.spec.format.calls), name }
            }
            AnswerEvent::Arguments(text) => ChatEvent::Arguments { index, text },
            AnswerEvent::End => {
                self.full = !self.spec.parallel;
                ChatEvent::CallEnd { index }
            }
            AnswerEvent::Broken { at, text } => {
                self.content.ranges.push_back(at..at + text.len());
                ChatEvent::CallBroken { index, text }
            }
        })
    }
}

/// Finds the tokens of the content among those of the answer.
#[derive(Debug, Default)]
struct ContentTokens {
    /// The parts of the answer that are content, in bytes.
    ranges: VecDeque<Range<usize>>,
    /// Tokens in order.
    settled: VecDeque<TokenText>,
    /// Position at which the first of them begins.
    position: usize,
}

impl ContentTokens {
    /// Takes the tokens that end before a position. Of one that is not all content the part remains that is.
    fn take(&mut self, decided: usize) -> Vec<TokenText> {
        let mut taken = Vec::new();
        while let Some(token) = self.settled.front() {
            let (start, end) = (self.position, self.position + token.text.len());
            // A part of a character has no text, and goes with the character that begins where it is.
            let is_decided = if token.text.is_empty() { start < decided } else { end <= decided };
            if !is_decided {
                break;
            }
            self.position = end;
            while self.ranges.front().is_some_and(|range| range.end <= start && !token.text.is_empty()) {
                self.ranges.pop_front();
            }
            let Some(token) = self.settled.pop_front() else { break };
            taken.extend(cut(token, start, &self.ranges));
        }
        taken
    }
}

/// What of a token at a position lies in some of the ranges, which ascend.
fn cut(mut token: TokenText, start: usize, ranges: &VecDeque<Range<usize>>) -> Option<TokenText> {
    if token.text.is_empty() {
        return ranges.iter().any(|range| range.contains(&start)).then_some(token);
    }
    let end = start + token.text.len();
    let parts = ranges.iter().filter_map(|range| {
        let (from, to) = (range.start.max(start), range.end.min(end));
        token.text.get(from.checked_sub(start)?..to.checked_sub(start)?)
    });
    let text: String = parts.collect();
    if text.len() < token.text.len() {
        token.bytes = text.as_bytes().to_vec();
    }
    token.text = text;
    Some(token).filter(|token| !token.text.is_empty())
}

/// A new id of a call; Mistral's templates know no others than those of nine characters.
fn call_id(format: CallFormat) -> String {
    let mut random = rand::rng();
    let mut text = |len: usize| -> String {
        (0..len).map(|_| char::from(ALPHANUMERIC[random.random_range(0..ALPHANUMERIC.len())])).collect()
    };
    match format {
        CallFormat::Mistral => text(9),
        _ => format!("call_{}", text(24)),
    }
}
