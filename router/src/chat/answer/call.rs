//! A call that is written as a JSON object: `{"name": "f", "arguments": {…}}`.

use super::{
    Events, Tools,
    value::{Step, ValueScanner},
};

/// The text is not a call, or the call is malformed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotACall;

/// Reads one call, and gives its arguments out as they come.
#[derive(Debug)]
pub(super) struct CallReader {
    phase: Phase,
    /// The key or value that is being read.
    value: ValueScanner,
    literal: String,
    name: Option<String>,
    /// Arguments that came before the name, or that are written as a string.
    held: Option<String>,
    /// Whether the call must have arguments: text without any mark may as well be some other object.
    needs_arguments: bool,
    begun: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Brace,
    FirstKey,
    Key,
    Colon,
    Value(Role),
    Comma,
}

/// The meaning of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Name,
    Arguments,
    /// Arguments that are given out as they come.
    Streamed,
    Other,
}

impl CallReader {
    pub(super) fn new(needs_arguments: bool) -> CallReader {
        CallReader {
            phase: Phase::Brace,
            value: ValueScanner::default(),
            literal: String::new(),
            name: None,
            held: None,
            needs_arguments,
            begun: false,
        }
    }

    /// Takes a character, and returns whether it is the last one of the call.
    pub(super) fn push(&mut self, c: char, tools: &Tools, events: &mut Events) -> Result<bool, NotACall> {
        let blank = c.is_ascii_whitespace();
        match self.phase {
            Phase::Key => self.key(c)?,
            Phase::Value(role) if role == Role::Streamed || !(blank && self.literal.is_empty()) => {
                return self.member(role, c, tools, events);
            }
            _ if blank => {}
            Phase::Brace if c == '{' => self.phase = Phase::FirstKey,
            Phase::FirstKey if c == '"' => {
                self.phase = Phase::Key;
                self.key(c)?;
            }
            Phase::Colon if c == ':' => self.phase = Phase::Value(self.role()?),
            Phase::Comma if c == ',' => self.phase = Phase::FirstKey,
            Phase::Comma if c == '}' => return self.end(tools, events),
            _ => return Err(NotACall),
        }
        Ok(false)
    }

    fn key(&mut self, c: char) -> Result<(), NotACall> {
        self.literal.push(c);
        match self.value.push(c) {
            Step::More => Ok(()),
            Step::Last => {
                self.value = ValueScanner::default();
                self.phase = Phase::Colon;
                Ok(())
            }
            Step::Behind | Step::Invalid => Err(NotACall),
        }
    }

    /// The meaning of the member whose key was read.
    fn role(&mut self) -> Result<Role, NotACall> {
        let key: String = serde_json::from_str(&std::mem::take(&mut self.literal)).map_err(|_| NotACall)?;
        match key.as_str() {
            "name" if self.name.is_none() => Ok(Role::Name),
            "arguments" | "parameters" if self.held.is_none() && !self.begun => Ok(Role::Arguments),
            "id" | "type" => Ok(Role::Other),
            _ => Err(NotACall),
        }
    }

    fn member(&mut self, role: Role, c: char, tools: &Tools, events: &mut Events) -> Result<bool, NotACall> {
        let role = match role {
            Role::Arguments if self.literal.is_empty() => self.first_of_arguments(c, tools, events)?,
            role => role,
        };
        self.phase = Phase::Value(role);
        let step = self.value.push(c);
        if matches!(step, Step::More | Step::Last) {
            match role {
                Role::Streamed => events.arguments(c.encode_utf8(&mut [0; 4])),
                _ => self.literal.push(c),
            }
        }
        match step {
            Step::More => Ok(false),
            Step::Last => self.ended(role, tools).map(|()| false),
            Step::Behind => {
                self.ended(role, tools)?;
                self.push(c, tools, events)
            }
            Step::Invalid => Err(NotACall),
        }
    }

    /// Arguments are an object. Null and a string with an object in it are found, too.
    fn first_of_arguments(&mut self, c: char, tools: &Tools, events: &mut Events) -> Result<Role, NotACall> {
        match (c, &self.name) {
            ('{', Some(name)) => {
                if !tools.has(name) {
                    return Err(NotACall);
                }
                events.begin(name);
                self.begun = true;
                Ok(Role::Streamed)
            }
            ('{' | '"' | 'n', _) => Ok(Role::Arguments),
            _ => Err(NotACall),
        }
    }

    fn ended(&mut self, role: Role, tools: &Tools) -> Result<(), NotACall> {
        let literal = std::mem::take(&mut self.literal);
        self.value = ValueScanner::default();
        self.phase = Phase::Comma;
        match role {
            Role::Name => {
                let name: String = serde_json::from_str(&literal).map_err(|_| NotACall)?;
                self.name = Some(name).filter(|name| tools.has(name));
                self.name.as_ref().map(|_| ()).ok_or(NotACall)
            }
            Role::Arguments => {
                self.held = Some(object(literal)?);
                Ok(())
            }
            Role::Streamed | Role::Other => Ok(()),
        }
    }

    fn end(&mut self, tools: &Tools, events: &mut Events) -> Result<bool, NotACall> {
        let name = self.name.as_deref().filter(|name| tools.has(name)).ok_or(NotACall)?;
        if !self.begun {
            let held = self.held.take();
            if held.is_none() && self.needs_arguments {
                return Err(NotACall);
            }
            events.begin(name);
            events.arguments(held.as_deref().unwrap_or("{}"));
        }
        events.end();
        Ok(true)
    }
}

/// The text of arguments that were held back, as an object.
fn object(literal: String) -> Result<String, NotACall> {
    if literal.starts_with('{') {
        return Ok(literal);
    }
    let text: Option<String> = serde_json::from_str(&literal).map_err(|_| NotACall)?;
    let text = text.unwrap_or_else(|| "{}".into());
    let is_object = serde_json::from_str::<serde_json::Map<_, serde_json::Value>>(&text).is_ok();
    if is_object { Ok(text) } else { Err(NotACall) }
}
