//! Checks JSON as it comes, a character at a time.

use serde_json::Value;

/// Nesting that readers of JSON commonly accept.
const MAX_DEPTH: usize = 128;

/// What a character means for a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// It is part of the value, or of the white space before it.
    More,
    /// It is the value's last one.
    Last,
    /// The value has ended before it, as numbers do.
    Behind,
    /// The text is not JSON.
    Invalid,
}

/// Reads one JSON value.
#[derive(Debug, Default)]
pub(super) struct ValueScanner {
    state: State,
    /// The containers that are open; true for an object.
    open: Vec<bool>,
    /// The number or word that is being read.
    word: String,
}

#[derive(Debug, Default, Clone, Copy)]
enum State {
    /// A value begins here; with `true`, the list may end here, too.
    #[default]
    Value,
    FirstElement,
    /// A key begins here.
    Key,
    FirstKey,
    Colon,
    /// Within a string; `true` in a key.
    Text(bool),
    Escape(bool),
    /// Hexadecimal digits that are missing.
    Hex(bool, u8),
    Word,
    /// Behind a value within a container.
    Comma,
}

impl ValueScanner {
    /// Takes the next character. Nothing may be pushed after anything but `More`.
    pub(super) fn push(&mut self, c: char) -> Step {
        let blank = matches!(c, ' ' | '\n' | '\r' | '\t');
        match self.state {
            State::Value
            | State::FirstElement
            | State::Key
            | State::FirstKey
            | State::Colon
            | State::Comma
                if blank =>
            {
                Step::More
            }
            State::FirstElement if c == ']' => self.close(false),
            State::Value | State::FirstElement => self.begin(c),
            State::FirstKey if c == '}' => self.close(true),
            State::Key | State::FirstKey => self.turn(c == '"', State::Text(true)),
            State::Colon => self.turn(c == ':', State::Value),
            State::Text(key) => self.text(key, c),
            State::Escape(key) => match c {
                'u' => self.turn(true, State::Hex(key, 4)),
                _ => self.turn("\"\\/bfnrt".contains(c), State::Text(key)),
            },
            State::Hex(key, 1) => self.turn(c.is_ascii_hexdigit(), State::Text(key)),
            State::Hex(key, left) => self.turn(c.is_ascii_hexdigit(), State::Hex(key, left - 1)),
            State::Word if c.is_ascii_alphanumeric() || "+-.".contains(c) => {
                self.word.push(c);
                Step::More
            }
            State::Word => self.behind_word(c, blank),
            State::Comma => match (c, self.open.last()) {
                (',', Some(true)) => self.turn(true, State::Key),
                (',', Some(false)) => self.turn(true, State::Value),
                ('}', _) => self.close(true),
                (']', _) => self.close(false),
                _ => Step::Invalid,
            },
        }
    }

    fn turn(&mut self, valid: bool, state: State) -> Step {
        self.state = state;
        if valid { Step::More } else { Step::Invalid }
    }

    fn begin(&mut self, c: char) -> Step {
        match c {
            '{' | '[' if self.open.len() < MAX_DEPTH => {
                self.open.push(c == '{');
                self.turn(true, if c == '{' { State::FirstKey } else { State::FirstElement })
            }
            '"' => self.turn(true, State::Text(false)),
            c if c == '-' || c.is_ascii_alphanumeric() => {
                self.word.push(c);
                self.turn(true, State::Word)
            }
            _ => Step::Invalid,
        }
    }

    fn text(&mut self, key: bool, c: char) -> Step {
        match c {
            '\\' => self.turn(true, State::Escape(key)),
            '"' if key => self.turn(true, State::Colon),
            '"' => self.ended(),
            c => self.turn(c >= ' ', State::Text(key)),
        }
    }

    fn behind_word(&mut self, c: char, blank: bool) -> Step {
        let word = std::mem::take(&mut self.word);
        if serde_json::from_str::<Value>(&word).is_err() {
            return Step::Invalid;
        }
        if self.open.is_empty() {
            return Step::Behind;
        }
        self.state = State::Comma;
        if blank { Step::More } else { self.push(c) }
    }

    fn close(&mut self, object: bool) -> Step {
        if self.open.pop() == Some(object) { self.ended() } else { Step::Invalid }
    }

    fn ended(&mut self) -> Step {
        if self.open.is_empty() {
            return Step::Last;
        }
        self.turn(true, State::Comma)
    }
}
