//! A part of an answer that consists of calls.

use super::{
    AnswerEvent, Events, Tools,
    call::{CallReader, NotACall},
    format::CallFormat,
    value::{Step, ValueScanner},
    xml::XmlReader,
};

/// How a section ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    More,
    /// With the character that was pushed.
    Done,
    /// Before it.
    Behind,
    /// Its text from a position on is content.
    Broken,
}

/// A mark that begins a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Opener {
    /// The mark; empty before an object that has none.
    pub(super) mark: &'static str,
    pub(super) end: &'static str,
    pub(super) format: CallFormat,
}

/// Reads the calls of a section.
#[derive(Debug)]
pub(super) struct Section {
    opener: Opener,
    reader: Reader,
    /// Text since the mark or the last complete call.
    raw: String,
    /// Position of `raw` in the answer.
    at: usize,
    in_list: bool,
    /// What there is of the mark that ends the section.
    end: String,
    begun: bool,
}

#[derive(Debug)]
enum Reader {
    /// A call, a list, or the name of a tool comes.
    Begin,
    Object(CallReader),
    Xml(XmlReader),
    /// `name[CALL_ID]id[ARGS]`.
    Name(String),
    Arguments(ValueScanner),
    /// Behind a call.
    Behind,
}

impl Section {
    /// A section that begins with this text, which ends with the mark.
    pub(super) fn new(opener: Opener, begin: &str, at: usize) -> Section {
        Section {
            opener,
            reader: Reader::Begin,
            raw: begin.to_owned(),
            at,
            in_list: false,
            end: String::new(),
            begun: false,
        }
    }

    /// The position of the text that is not decided.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn push(&mut self, c: char, tools: &Tools, events: &mut Events) -> Outcome {
        let before = events.0.len();
        self.raw.push(c);
        let outcome = match self.read(c, tools, events) {
            Ok(outcome) => outcome,
            Err(NotACall) => {
                self.begun |= has_begun(&events.0[before..]);
                return Outcome::Broken;
            }
        };
        self.begun |= has_begun(&events.0[before.min(events.0.len())..]);
        outcome
    }

    fn read(&mut self, c: char, tools: &Tools, events: &mut Events) -> Result<Outcome, NotACall> {
        let done = match &mut self.reader {
            Reader::Begin => return self.begin(c, tools, events),
            Reader::Behind => return self.behind(c, tools, events),
            Reader::Object(reader) => reader.push(c, tools, events)?,
            Reader::Xml(reader) => reader.push(c, tools, events)?,
            Reader::Name(name) => {
                if c == '{' {
                    let name = call_name(name).ok_or(NotACall)?;
                    if !tools.has(name) {
                        return Err(NotACall);
                    }
                    events.begin(name);
                    let mut scanner = ValueScanner::default();
                    scanner.push(c);
                    self.reader = Reader::Arguments(scanner);
                    events.arguments("{");
                } else {
                    name.push(c);
                    // Nothing that long is a name with an id.
                    if name.len() > 512 {
                        return Err(NotACall);
                    }
                }
                false
            }
            Reader::Arguments(scanner) => match scanner.push(c) {
                Step::Invalid | Step::Behind => return Err(NotACall),
                step => {
                    events.arguments(c.encode_utf8(&mut [0; 4]));
                    if step == Step::Last {
                        events.end();
                    }
                    step == Step::Last
                }
            },
        };
        if done {
            self.ended();
            if !self.in_list && self.opener.end.is_empty() {
                return Ok(Outcome::Done);
            }
        }
        Ok(Outcome::More)
    }

    fn begin(&mut self, c: char, tools: &Tools, events: &mut Events) -> Result<Outcome, NotACall> {
        let format = self.opener.format;
        let unmarked = self.opener.mark.is_empty() || format == CallFormat::Json;
        self.reader = match c {
            c if c.is_ascii_whitespace() => return Ok(Outcome::More),
            '[' if !self.in_list && matches!(format, CallFormat::Mistral | CallFormat::Json) => {
                self.in_list = true;
                return Ok(Outcome::More);
            }
            '{' => Reader::Object(CallReader::new(unmarked)),
            '<' if format == CallFormat::Tagged => Reader::Xml(XmlReader::default()),
            c if format == CallFormat::Mistral && !self.in_list => Reader::Name(c.to_string()),
            _ => return Err(NotACall),
        };
        match &self.reader {
            Reader::Name(_) => Ok(Outcome::More),
            _ => self.read(c, tools, events),
        }
    }

    /// Behind a call there is another one, or the end of the list or section. The mark at the end may be missing.
    fn behind(&mut self, c: char, tools: &Tools, events: &mut Events) -> Result<Outcome, NotACall> {
        if self.end.is_empty() && c.is_ascii_whitespace() {
            return Ok(Outcome::More);
        }
        if self.in_list {
            return match c {
                ',' => {
                    self.reader = Reader::Begin;
                    Ok(Outcome::More)
                }
                ']' => {
                    self.in_list = false;
                    self.ended();
                    Ok(if self.opener.end.is_empty() { Outcome::Done } else { Outcome::More })
                }
                _ => Err(NotACall),
            };
        }
        if self.end.is_empty() && c == '{' {
            return self.begin(c, tools, events);
        }
        self.end.push(c);
        if self.end == self.opener.end {
            return Ok(Outcome::Done);
        }
        if self.opener.end.starts_with(&self.end) {
            return Ok(Outcome::More);
        }
        // Text that is no end mark follows the call.
        self.raw.pop();
        self.end.pop();
        if self.end.is_empty() { Ok(Outcome::Behind) } else { Err(NotACall) }
    }

    /// The call, or the list, is complete: its text is none that could be given back.
    fn ended(&mut self) {
        self.reader = Reader::Behind;
        self.begun = false;
        self.at += self.raw.len();
        self.raw.clear();
    }

    /// Gives the text back that is not part of a complete call.
    pub(super) fn give_back(self, events: &mut Events) {
        give_back(events, self.begun, self.at, self.raw);
    }

    /// Ends the answer here.
    pub(super) fn finish(self, cut_off: bool, events: &mut Events) {
        let complete = matches!(self.reader, Reader::Behind) && !self.in_list;
        let open = self.begun && cut_off;
        if complete || open || (self.in_list && cut_off && self.raw.trim().is_empty()) {
            return;
        }
        self.give_back(events);
    }
}

fn has_begun(events: &[AnswerEvent]) -> bool {
    let last =
        events.iter().rev().find(|event| matches!(event, AnswerEvent::Begin { .. } | AnswerEvent::End));
    matches!(last, Some(AnswerEvent::Begin { .. }))
}

/// Text that was taken for a call is content.
pub(super) fn give_back(events: &mut Events, begun: bool, at: usize, text: String) {
    match begun {
        true => events.0.push(AnswerEvent::Broken { at, text }),
        false => events.content(at, &text),
    }
}

/// The tool's name in the head of a call.
fn call_name(head: &str) -> Option<&str> {
    let head = head.trim_end();
    let head = head.strip_suffix("[ARGS]").unwrap_or(head);
    let name = head.split_once("[CALL_ID]").map_or(head, |(name, _)| name).trim();
    Some(name).filter(|name| !name.is_empty())
}
