//! Answers in which marks part reasoning and calls from the rest.

use super::{
    Events, Tools,
    format::{AnswerFormat, CallFormat},
    overlap,
    section::{Opener, Outcome, Section},
};

/// Reads an answer.
#[derive(Debug)]
pub(super) struct Marked {
    tools: Tools,
    thinking: Option<(&'static str, &'static str)>,
    /// Marks that begin calls wherever they are.
    openers: Vec<Opener>,
    /// Marks that begin calls at the beginning of the content; the empty one stands before an object.
    first: Vec<Opener>,
    state: State,
    /// Text that is not decided.
    pending: String,
    /// Position of its first byte.
    at: usize,
}

#[derive(Debug)]
enum State {
    /// Before any text, or behind a mark or a call.
    Start {
        may_think: bool,
        behind_mark: bool,
        behind_call: bool,
    },
    Text,
    /// Whether something has been thought.
    Thinking(bool),
    Calls(Box<Section>),
}

impl Marked {
    pub(super) fn new(format: &AnswerFormat, tools: Tools, prompt: &str) -> Marked {
        let calls = format.calls;
        let opener = |mark, end| Opener { mark, end, format: calls };
        let (openers, first) = match calls {
            _ if tools.is_empty() => (vec![], vec![]),
            CallFormat::Llama => (vec![opener("<|python_tag|>", "")], vec![opener("", "")]),
            CallFormat::Mistral => (vec![opener("[TOOL_CALLS]", "")], vec![]),
            CallFormat::Tagged => (vec![opener("<tool_call>", "</tool_call>")], vec![]),
            CallFormat::Json | CallFormat::Harmony => {
                (vec![], vec![opener("", ""), opener("```json", "```"), opener("```", "```")])
            }
        };
        let prompt = prompt.trim_end();
        let begun = format.thinking.is_some_and(|(begin, _)| prompt.ends_with(begin));
        let state = match begun {
            true => State::Thinking(false),
            false => State::Start { may_think: true, behind_mark: false, behind_call: false },
        };
        let thinking = format.thinking;
        Marked { tools, thinking, openers, first, state, pending: String::new(), at: 0 }
    }

    pub(super) fn decided(&self) -> usize {
        match &self.state {
            State::Calls(section) => section.at(),
            _ => self.at,
        }
    }

    pub(super) fn push(&mut self, text: &str, events: &mut Events) {
        self.pending.push_str(text);
        while self.step(false, events) {}
    }

    pub(super) fn finish(&mut self, cut_off: bool, events: &mut Events) {
        while self.step(true, events) {}
        let state = std::mem::replace(&mut self.state, State::Text);
        if let State::Calls(section) = state {
            section.finish(cut_off, events);
        }
    }

    /// Decides what it can, and returns whether there may be more to decide.
    fn step(&mut self, last: bool, events: &mut Events) -> bool {
        match self.state {
            State::Start { may_think, behind_mark, behind_call } => {
                self.start(last, may_think, behind_mark, behind_call, events)
            }
            State::Text => self.text(last, events),
            State::Thinking(_) => self.think(last, events),
            State::Calls(_) => self.calls(events),
        }
    }

    /// Drops the first `len` bytes of what is pending.
    fn drop_first(&mut self, len: usize) {
        self.pending.drain(..len);
        self.at += len;
    }

    fn tell(&mut self, len: usize, events: &mut Events) {
        events.content(self.at, &self.pending[..len]);
        self.drop_first(len);
    }

    fn start(
        &mut self,
        last: bool,
        may_think: bool,
        behind_mark: bool,
        behind_call: bool,
        events: &mut Events,
    ) -> bool {
        let text = self.pending.trim_start();
        let blank = self.pending.len() - text.len();
        let begins = |mark: &str| !last && mark.starts_with(text);
        if text.is_empty() {
            if last && !behind_mark {
                self.tell(blank, events);
            }
            return false;
        }
        if let Some((mark, _)) = self.thinking.filter(|_| may_think) {
            if text.starts_with(mark) {
                self.drop_first(blank + mark.len());
                self.state = State::Thinking(false);
                return true;
            }
            if begins(mark) {
                return false;
            }
        }
        // Several objects may have a separator between them.
        let separated = text.strip_prefix([';', ',']).filter(|_| behind_call);
        let object = separated.map_or(text, str::trim_start);
        if separated.is_some() && object.is_empty() && !last {
            return false;
        }
        for opener in self.first.iter().filter(|opener| opener.mark.is_empty() || !behind_call) {
            let lists = opener.format == CallFormat::Json && !behind_call;
            let found = match opener.mark {
                "" => object.starts_with('{') || (lists && object.starts_with('[')),
                mark => text.starts_with(mark),
            };
            if found {
                let len = self.pending.len() - object.len() + opener.mark.len();
                let section = Section::new(*opener, &self.pending[..len], self.at);
                self.state = State::Calls(Box::new(section));
                self.drop_first(len);
                return true;
            }
            if !opener.mark.is_empty() && begins(opener.mark) {
                return false;
            }
        }
        if self.openers.iter().any(|opener| begins(opener.mark) && text != opener.mark) {
            return false;
        }
        if behind_mark {
            self.drop_first(blank);
        }
        self.state = State::Text;
        true
    }

    fn text(&mut self, last: bool, events: &mut Events) -> bool {
        let found = self
            .openers
            .iter()
            .filter_map(|opener| Some((self.pending.find(opener.mark)?, *opener)))
            .min_by_key(|(at, _)| *at);
        if let Some((at, opener)) = found {
            let told = self.pending[..at].trim_end().len();
            self.tell(told, events);
            let len = at - told + opener.mark.len();
            let section = Section::new(opener, &self.pending[..len], self.at);
            self.state = State::Calls(Box::new(section));
            self.drop_first(len);
            return true;
        }
        let certain = match (last, self.openers.is_empty()) {
            (true, _) | (_, true) => self.pending.len(),
            _ => {
                let held = self.openers.iter().map(|opener| overlap(&self.pending, opener.mark)).max();
                self.pending[..self.pending.len() - held.unwrap_or(0)].trim_end().len()
            }
        };
        self.tell(certain, events);
        false
    }

    fn think(&mut self, last: bool, events: &mut Events) -> bool {
        let (State::Thinking(begun), Some((_, mark))) = (&mut self.state, self.thinking) else {
            return false;
        };
        if !*begun {
            let blank = self.pending.len() - self.pending.trim_start().len();
            self.pending.drain(..blank);
            self.at += blank;
        }
        let found = self.pending.find(mark);
        let held = if last { 0 } else { overlap(&self.pending, mark) };
        let end = found.unwrap_or(self.pending.len() - held);
        let told = self.pending[..end].trim_end().len();
        *begun |= told > 0;
        events.reasoning(&self.pending[..told]);
        match found {
            Some(at) => {
                self.drop_first(at + mark.len());
                self.state = State::Start { may_think: false, behind_mark: true, behind_call: false };
            }
            None => self.drop_first(if last { end } else { told }),
        }
        found.is_some()
    }

    fn calls(&mut self, events: &mut Events) -> bool {
        let State::Calls(section) = &mut self.state else { return false };
        let mut taken = 0;
        for c in self.pending.chars() {
            let outcome = section.push(c, &self.tools, events);
            if outcome == Outcome::More {
                taken += c.len_utf8();
                continue;
            }
            taken += if outcome == Outcome::Behind { 0 } else { c.len_utf8() };
            self.drop_first(taken);
            let start = State::Start { may_think: false, behind_mark: true, behind_call: true };
            let next = if outcome == Outcome::Broken { State::Text } else { start };
            if let (State::Calls(section), Outcome::Broken) =
                (std::mem::replace(&mut self.state, next), outcome)
            {
                section.give_back(events);
            }
            return true;
        }
        self.drop_first(taken);
        false
    }
}
