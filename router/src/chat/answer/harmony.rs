//! Answers in OpenAI's harmony format: messages, each with a channel and possibly a recipient.
//! <https://developers.openai.com/cookbook/articles/openai-harmony>

use super::{
    Events, Tools, overlap,
    section::give_back,
    value::{Step, ValueScanner},
};

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
/// Marks that end a message.
const ENDS: [&str; 4] = ["<|end|>", "<|call|>", "<|return|>", START];
/// Texts that a head begins with.
const HEADS: [&str; 3] = [START, CHANNEL, "to="];
/// The recipients that are tools of the request.
const FUNCTIONS: &str = "functions.";

/// Reads an answer.
#[derive(Debug)]
pub(super) struct Harmony {
    tools: Tools,
    state: State,
    pending: String,
    at: usize,
}

#[derive(Debug)]
enum State {
    Head,
    Content,
    Reasoning,
    Call(Call),
}

/// A call that is being read.
#[derive(Debug)]
struct Call {
    name: String,
    arguments: ValueScanner,
    begun: bool,
    complete: bool,
    /// Its text with its head.
    raw: String,
    at: usize,
}

impl Harmony {
    pub(super) fn new(tools: Tools, prompt: &str) -> Harmony {
        // A prompt that ends within a message is continued by the answer.
        let state = match prompt.rsplit_once(MESSAGE) {
            Some((_, text)) if ENDS.iter().any(|end| text.contains(end)) => State::Head,
            Some((head, _)) if head.ends_with("<|channel|>analysis") => State::Reasoning,
            Some(_) => State::Content,
            None => State::Head,
        };
        Harmony { tools, state, pending: String::new(), at: 0 }
    }

    pub(super) fn decided(&self) -> usize {
        match &self.state {
            State::Call(call) => call.at,
            _ => self.at,
        }
    }

    pub(super) fn push(&mut self, text: &str, events: &mut Events) {
        self.pending.push_str(text);
        while self.step(false, events) {}
    }

    pub(super) fn finish(&mut self, cut_off: bool, events: &mut Events) {
        while self.step(true, events) {}
        match std::mem::replace(&mut self.state, State::Content) {
            // A head without a message says nothing.
            State::Head if !cut_off && !self.pending.trim().is_empty() => {
                events.content(self.at, &self.pending);
            }
            State::Call(call) => call.end(cut_off, events),
            _ => {}
        }
        self.drop_first(self.pending.len());
    }

    fn drop_first(&mut self, len: usize) {
        self.pending.drain(..len);
        self.at += len;
    }

    fn step(&mut self, last: bool, events: &mut Events) -> bool {
        if matches!(self.state, State::Head) {
            return self.head(last);
        }
        let found =
            ENDS.iter().filter_map(|end| Some((self.pending.find(end)?, *end))).min_by_key(|(at, _)| *at);
        let held = ENDS.iter().map(|end| overlap(&self.pending, end)).max().filter(|_| !last).unwrap_or(0);
        let len = found.map_or(self.pending.len() - held, |(at, _)| at);
        let text = &self.pending[..len];
        let mut broken = false;
        match &mut self.state {
            State::Reasoning => events.reasoning(text),
            State::Call(call) => broken = !call.push(text, events),
            _ => events.content(self.at, text),
        }
        self.drop_first(len);
        if broken && let State::Call(call) = std::mem::replace(&mut self.state, State::Content) {
            give_back(events, call.begun, call.at, call.raw);
        }
        let Some((_, end)) = found else { return false };
        // The mark that begins the next message belongs to its head.
        self.drop_first(if end == START { 0 } else { end.len() });
        if let State::Call(call) = std::mem::replace(&mut self.state, State::Head) {
            call.end(false, events);
        }
        true
    }

    /// Reads a head, up to where its message begins.
    fn head(&mut self, last: bool) -> bool {
        let text = self.pending.trim_start();
        let may_begin = |mark: &str| text.starts_with(mark) || (!last && mark.starts_with(text));
        if text.is_empty() {
            return false;
        }
        if !HEADS.iter().any(|mark| may_begin(mark)) {
            // The model does without.
            self.state = State::Content;
            return true;
        }
        let Some((head, _)) = self.pending.split_once(MESSAGE) else { return false };
        let len = head.len() + MESSAGE.len();
        let (channel, recipient) = (channel(head), recipient(head));
        let name = recipient.and_then(|recipient| recipient.strip_prefix(FUNCTIONS));
        self.state = match name.filter(|name| self.tools.has(name)) {
            Some(name) => State::Call(Call {
                name: name.to_owned(),
                arguments: ValueScanner::default(),
                begun: false,
                complete: false,
                raw: self.pending[..len].to_owned(),
                at: self.at,
            }),
            None if channel == "analysis" => State::Reasoning,
            None => State::Content,
        };
        self.drop_first(len);
        true
    }
}

/// The channel that a head names.
fn channel(head: &str) -> &str {
    let behind = head.split_once(CHANNEL).map_or("", |(_, behind)| behind).trim_start();
    let end = behind.find(|c: char| c.is_whitespace() || c == '<');
    &behind[..end.unwrap_or(behind.len())]
}

/// The recipient that a head names.
fn recipient(head: &str) -> Option<&str> {
    let behind = head.split_once("to=")?.1;
    let end = behind.find(|c: char| c.is_whitespace() || c == '<');
    Some(&behind[..end.unwrap_or(behind.len())])
}

impl Call {
    /// Takes text of the arguments, and returns whether it can be that.
    fn push(&mut self, text: &str, events: &mut Events) -> bool {
        self.raw.push_str(text);
        for c in text.chars() {
            let blank = c.is_ascii_whitespace();
            if blank && (!self.begun || self.complete) {
                continue;
            }
            if self.complete || (!self.begun && c != '{') {
                return false;
            }
            if !self.begun {
                events.begin(&self.name);
                self.begun = true;
            }
            match self.arguments.push(c) {
                Step::More => {}
                Step::Last => self.complete = true,
                Step::Behind | Step::Invalid => return false,
            }
            events.arguments(c.encode_utf8(&mut [0; 4]));
        }
        true
    }

    fn end(self, cut_off: bool, events: &mut Events) {
        if self.complete {
            events.end();
        } else if !(self.begun && cut_off) {
            give_back(events, self.begun, self.at, self.raw);
        }
    }
}
