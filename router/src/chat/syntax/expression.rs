//! Operators that work otherwise in Python, written as calls of functions that do as Python does.
//!
//! minijinja has no `%` for text, prints what `~` joins in its own way, orders values of unlike types, finds anything in
//! text and in None, cuts slices that are no lists, takes None for an empty list in loops, and knows no unary plus. The expression is split into the levels that its brackets make;
//! within a level, the operators that bind more weakly end the operands.

use super::super::{
    attributes::is_special,
    bounds::BOUNDED,
    operators::{ATTRIBUTE, COMPARE, ITEM, ITERATE, LIST, PRINT, REMAINDER, SLICE},
};

/// A piece of an expression. `space` is what stands before it.
#[derive(Debug, Clone)]
struct Piece {
    space: String,
    text: String,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A name, number, string, dot, bar or bracketed group.
    Operand,
    /// `*`, `/`, `//` or `%` between operands.
    Product,
    Tilde,
    /// `+` or `-` between operands.
    Sum,
    /// `==`, `!=`, `<`, `<=`, `>`, `>=`, `in` or `not in`.
    Comparison,
    /// What stands between the brackets of a slice, as arguments.
    Slice,
    /// Anything else that ends the operands of the others.
    Boundary,
}

/// Words that end an operand.
const WORDS: [&str; 6] = ["and", "or", "not", "if", "else", "recursive"];

/// Writes the code of an expression's tag, which has no `word`, or of a statement's.
pub(super) fn write(out: &mut String, code: &str, word: &str) {
    // Not an expression: minijinja will say why.
    let Some(pieces) = Lexer(code).pieces() else { return out.push_str(code) };
    match word {
        "for" => write_loop(out, &pieces),
        "set" => write_assignment(out, &pieces),
        "with" => write_scope(out, &pieces),
        "" | "if" | "elif" => write_tuple(out, &pieces),
        _ => write_level(out, &pieces),
    }
}

/// An expression, which is a tuple if there are commas.
fn write_tuple(out: &mut String, pieces: &[Piece]) {
    let is_tuple = pieces.iter().any(is_comma);
    out.push_str(if is_tuple { " (" } else { "" });
    write_level(out, pieces);
    out.push_str(if is_tuple { ")" } else { "" });
}

fn is_comma(piece: &Piece) -> bool {
    piece.kind == Kind::Boundary && piece.text == ","
}

fn is_assignment(piece: &Piece) -> bool {
    piece.kind == Kind::Boundary && piece.text == "="
}

/// `target = expression`, or a target alone. Several names take the items of anything that can be iterated over.
fn write_assignment(out: &mut String, pieces: &[Piece]) {
    let Some(at) = pieces.iter().position(is_assignment) else { return write_level(out, pieces) };
    let (target, expression) = pieces.split_at(at + 1);
    write_level(out, target);
    let is_one = !target.iter().any(|piece| is_comma(piece) || piece.text.starts_with('('));
    // An assignment of nothing stays one, so that minijinja refuses it.
    if expression.is_empty() {
        return;
    }
    if is_one {
        out.push_str(&format!(" {BOUNDED}(("));
        write_level(out, expression);
        return out.push_str("))");
    }
    out.push_str(&format!(" {ITERATE}({BOUNDED}(("));
    write_level(out, expression);
    out.push_str(")))");
}

/// Assignments for a scope. They are made at the same time: none sees the names of another.
fn write_scope(out: &mut String, pieces: &[Piece]) {
    let parts: Option<Vec<_>> = pieces
        .split(is_comma)
        .map(|assignment| Some(assignment.split_at(assignment.iter().position(is_assignment)?)))
        .collect();
    let Some(parts) = parts.filter(|parts| parts.len() > 1) else { return write_level(out, pieces) };
    let (mut names, mut values) = (String::new(), String::new());
    for (name, value) in parts {
        write_level(&mut names, name);
        write_level(&mut values, &value[1..]);
        names.push(',');
        values.push(',');
    }
    out.push_str(&format!(" ({names}) = ({values}) "));
}

/// `target in iterable`, and what may follow: a filter or `recursive`.
fn write_loop(out: &mut String, pieces: &[Piece]) {
    let word = |piece: &Piece, text: &str| piece.kind == Kind::Boundary && piece.text == text;
    let is_in = |piece: &Piece| piece.kind == Kind::Comparison && piece.text == "in";
    let Some(start) = pieces.iter().position(is_in) else { return write_level(out, pieces) };
    let (target, rest) = pieces.split_at(start + 1);
    let end =
        rest.iter().position(|piece| word(piece, "if") || word(piece, "recursive")).unwrap_or(rest.len());
    let (iterable, behind) = rest.split_at(end);
    write_level(out, target);
    out.push_str(&format!(" {ITERATE}(("));
    write_level(out, iterable);
    out.push_str("))");
    write_level(out, behind);
}

/// The clauses between boundaries, one after the other.
fn write_level(out: &mut String, pieces: &[Piece]) {
    for part in pieces.split_inclusive(|piece| piece.kind == Kind::Boundary) {
        match part.split_last() {
            Some((boundary, clause)) if boundary.kind == Kind::Boundary => {
                write_clause(out, clause);
                out.extend([&*boundary.space, &*boundary.text]);
            }
            _ => write_clause(out, part),
        }
    }
}

/// Operands between comparisons. A chain of them is a single call, as each but the last also begins the next.
fn write_clause(out: &mut String, pieces: &[Piece]) {
    let is_comparison = |piece: &Piece| piece.kind == Kind::Comparison;
    let mut operands = pieces.split(is_comparison);
    let operators: Vec<&Piece> = pieces.iter().filter(|piece| is_comparison(piece)).collect();
    let is_missing = |operand: &[Piece]| operand.iter().all(|piece| piece.text.is_empty());
    // What is equal to minijinja is so to Python. Without one of its sides, minijinja will complain.
    let stays = matches!(&operators[..], [one] if matches!(&*one.text, "==" | "!="))
        || operands.clone().any(is_missing);
    let first = sum(operands.next().unwrap_or_default());
    if stays || operators.is_empty() {
        out.push_str(&first);
        for (operator, operand) in operators.into_iter().zip(operands) {
            out.extend([&*operator.space, &*operator.text, &sum(operand)]);
        }
        return;
    }
    out.push_str(&format!(" {COMPARE}({first}"));
    for (operator, operand) in operators.into_iter().zip(operands) {
        out.push_str(&format!(", \"{}\", {}", operator.text, sum(operand)));
    }
    out.push(')');
}

/// Operands between `+` and `-`.
fn sum(pieces: &[Piece]) -> String {
    let mut out = String::new();
    for part in pieces.split_inclusive(|piece| piece.kind == Kind::Sum) {
        let (part, operator) = match part.split_last() {
            Some((last, before)) if last.kind == Kind::Sum => (before, Some(last)),
            _ => (part, None),
        };
        let operands: Vec<&[Piece]> = part.split(|piece| piece.kind == Kind::Tilde).collect();
        match &operands[..] {
            [operand] => out.push_str(&product(operand)),
            operands => {
                let printed = operands.iter().map(|operand| format!(" {PRINT}({})", product(operand)));
                out.push_str(&printed.collect::<Vec<_>>().join(" ~"));
            }
        }
        out.extend(operator.into_iter().flat_map(|operator| [&*operator.space, &*operator.text]));
    }
    let adds = pieces.iter().any(|piece| piece.kind == Kind::Sum && piece.text == "+");
    if adds { format!(" {LIST}({out})") } else { out }
}

/// Operands between `*`, `/`, `//` and `%`, which are worked off from the left.
fn product(pieces: &[Piece]) -> String {
    let mut so_far = String::new();
    let mut operator: Option<&Piece> = None;
    for part in pieces.split_inclusive(|piece| piece.kind == Kind::Product) {
        let (operand, next) = match part.split_last() {
            Some((last, before)) if last.kind == Kind::Product => (before, Some(last)),
            _ => (part, None),
        };
        let operand: String = operand.iter().flat_map(|piece| [&*piece.space, &*piece.text]).collect();
        so_far = match operator {
            Some(percent) if percent.text == "%" => format!(" {REMAINDER}({so_far}, {operand})"),
            Some(times) if times.text == "*" => format!(" {LIST}({so_far} * {operand})"),
            Some(other) => format!("{so_far}{}{}{operand}", other.space, other.text),
            None => operand,
        };
        operator = next;
    }
    // An operator without a right side: minijinja will complain.
    so_far + operator.map_or("", |piece| &piece.text)
}

/// Writes an attribute or item at the end, such as `value.items`, as the call that finds it as Python does.
fn name_attribute(pieces: &mut Vec<Piece>) {
    let (function, name, length) = match &pieces[..] {
        [.., dot, name] if dot.text == "." && name.kind == Kind::Operand => (ATTRIBUTE, &*name.text, 2),
        [.., item] => match quoted(&item.text) {
            Some(name) => (ITEM, name, 1),
            None => return,
        },
        [] => return,
    };
    let start = start_of_value(&pieces[..pieces.len() - length]).filter(|_| is_special(name));
    let is_filter = |start: usize| start > 0 && pieces[start - 1].text == "|";
    let Some(start) = start.filter(|start| !is_filter(*start) && pieces[*start].text != "loop") else {
        return;
    };
    let name = name.to_owned();
    let mut value = pieces.split_off(start);
    value.truncate(value.len() - length);
    let space = value[0].space.clone();
    let value: String = value.into_iter().flat_map(|piece| [piece.space, piece.text]).collect();
    let text = format!("{function}({value}, \"{name}\")");
    pieces.push(Piece { space, text, kind: Kind::Operand });
}

/// Cuts a slice out of the value at the end; `None` if there is no value.
fn cut(pieces: &mut Vec<Piece>, bounds: &str) -> Option<()> {
    let value = pieces.split_off(start_of_value(pieces)?);
    let space = value[0].space.clone();
    let value: String = value.into_iter().flat_map(|piece| [piece.space, piece.text]).collect();
    let text = format!("{SLICE}({value}, {bounds})");
    pieces.push(Piece { space, text, kind: Kind::Operand });
    Some(())
}

/// What stands between the brackets of a slice, as arguments.
fn bounds(pieces: &[Piece]) -> String {
    let bound = |pieces: &[Piece]| {
        let mut out = String::new();
        write_level(&mut out, pieces);
        if out.trim().is_empty() { "none".to_owned() } else { out }
    };
    pieces.split(is_colon).map(bound).collect::<Vec<_>>().join(", ")
}

fn is_colon(piece: &Piece) -> bool {
    piece.kind == Kind::Boundary && piece.text == ":"
}

/// The name in `["name"]`.
fn quoted(group: &str) -> Option<&str> {
    let literal = group.strip_prefix('[')?.strip_suffix(']')?.trim();
    let quote = literal.chars().next().filter(|letter| matches!(letter, '"' | '\''))?;
    literal.strip_prefix(quote)?.strip_suffix(quote)
}

/// Where the value begins that ends a list of pieces: a name, literal or group with calls, items and attributes.
fn start_of_value(pieces: &[Piece]) -> Option<usize> {
    let is_value = |piece: &Piece| {
        piece.kind == Kind::Operand
            && !piece.text.is_empty()
            && !matches!(&*piece.text, "." | "|" | "**" | "-" | "*")
    };
    let mut at = pieces.len().checked_sub(1)?;
    loop {
        let before = at.checked_sub(1).map(|before| &pieces[before]);
        let follows = pieces[at].text.starts_with(['(', '[']) && before.is_some_and(is_value);
        match before {
            Some(_) if follows => at -= 1,
            Some(dot) if dot.text == "." && at > 1 => at -= 2,
            _ => return is_value(&pieces[at]).then_some(at),
        }
    }
}

/// The code that has not been read.
struct Lexer<'a>(&'a str);

impl Lexer<'_> {
    /// All pieces, those in brackets rewritten already; `None` if the brackets do not match or a string does not end.
    fn pieces(&mut self) -> Option<Vec<Piece>> {
        let pieces = self.level()?;
        self.0.is_empty().then_some(pieces)
    }

    /// Pieces up to the end or to a closing bracket, and trailing space as a piece of its own.
    fn level(&mut self) -> Option<Vec<Piece>> {
        let mut pieces: Vec<Piece> = Vec::new();
        loop {
            let code = self.0.trim_start();
            let space = self.take(self.0.len() - code.len()).to_owned();
            let Some(first) = code.chars().next().filter(|letter| !matches!(letter, ')' | ']' | '}')) else {
                name_attribute(&mut pieces);
                if !space.is_empty() {
                    pieces.push(Piece { space, text: String::new(), kind: Kind::Operand });
                }
                return Some(pieces);
            };
            // A method that is called needs nothing; and the target of an assignment is no value.
            if !matches!(first, '(' | '=') || code.starts_with("==") {
                name_attribute(&mut pieces);
            }
            let (text, kind) = match first {
                '(' | '[' | '{' => self.group()?,
                '"' | '\'' => (self.string(first)?, Kind::Operand),
                _ if first.is_alphanumeric() || first == '_' => self.word(pieces.last()),
                _ => self.symbol(first, pieces.last()),
            };
            match pieces.last_mut() {
                _ if kind == Kind::Slice => cut(&mut pieces, &text)?,
                Some(not) if kind == Kind::Comparison && text == "in" && not.text == "not" => {
                    (not.text, not.kind) = ("not in".into(), kind);
                }
                _ => pieces.push(Piece { space, text, kind }),
            }
        }
    }

    fn take(&mut self, length: usize) -> &str {
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        text
    }

    fn group(&mut self) -> Option<(String, Kind)> {
        let mut out = self.take(1).to_owned();
        let pieces = self.level()?;
        let close = match &*out {
            "(" => ")",
            "[" => "]",
            _ => "}",
        };
        self.0 = self.0.strip_prefix(close)?;
        if out == "[" && pieces.iter().any(is_colon) {
            return Some((bounds(&pieces), Kind::Slice));
        }
        write_level(&mut out, &pieces);
        Some((out + close, Kind::Operand))
    }

    /// A string literal. Its escapes are those that minijinja knows.
    fn string(&mut self, quote: char) -> Option<String> {
        let mut letters = self.0.char_indices().skip(1);
        let end = loop {
            match letters.next()? {
                (_, '\\') => _ = letters.next()?,
                (at, letter) if letter == quote => break at,
                _ => {}
            }
        };
        Some(with_plain_escapes(self.take(end + 1)))
    }

    /// A name, keyword or number.
    fn word(&mut self, before: Option<&Piece>) -> (String, Kind) {
        let is_number = self.0.starts_with(|letter: char| letter.is_ascii_digit());
        let mut previous = ' ';
        let part = |letter: char| {
            // The sign of an exponent, and the point of a fraction, belong to a number.
            let exponent = matches!(previous, 'e' | 'E') && matches!(letter, '+' | '-');
            let fraction = letter == '.' && previous.is_ascii_digit();
            previous = letter;
            letter.is_alphanumeric() || letter == '_' || (is_number && (exponent || fraction))
        };
        let mut part = part;
        let mut end = self.0.find(|letter| !part(letter)).unwrap_or(self.0.len());
        if is_number && self.0[..end].starts_with("0x") {
            end = self
                .0
                .find(|letter: char| !letter.is_alphanumeric() && letter != '_')
                .unwrap_or(self.0.len());
        }
        let text = self.take(end).to_owned();
        // Behind a dot, a bar, `is` or `is not`, these are names.
        let is_name = before.is_some_and(|piece| match &*piece.text {
            "." | "|" | "is" => true,
            "not" => piece.kind == Kind::Operand,
            _ => false,
        });
        let kind = match &*text {
            _ if is_name => Kind::Operand,
            "in" => Kind::Comparison,
            word if WORDS.contains(&word) => Kind::Boundary,
            _ => Kind::Operand,
        };
        (text, kind)
    }

    fn symbol(&mut self, first: char, before: Option<&Piece>) -> (String, Kind) {
        let two = self.0.get(..2).unwrap_or_default();
        let length =
            if matches!(two, "**" | "//" | "==" | "!=" | "<=" | ">=") { 2 } else { first.len_utf8() };
        let text = self.take(length).to_owned();
        let is_prefix = before.is_none_or(|piece| piece.kind != Kind::Operand || piece.text == "**");
        match &*text {
            "." | "|" | "**" => (text, Kind::Operand),
            "~" => (text, Kind::Tilde),
            "*" | "/" | "//" | "%" if !is_prefix => (text, Kind::Product),
            // minijinja has no such operator, and it does nothing.
            "+" if is_prefix => (String::new(), Kind::Operand),
            "-" | "*" if is_prefix => (text, Kind::Operand),
            "+" | "-" => (text, Kind::Sum),
            "==" | "!=" | "<" | "<=" | ">" | ">=" => (text, Kind::Comparison),
            _ => (text, Kind::Boundary),
        }
    }
}

/// A literal whose escapes mean the same to minijinja, which has none of eight digits or above 255, and reads `\/` as
/// JSON does.
fn with_plain_escapes(literal: &str) -> String {
    let mut out = String::with_capacity(literal.len());
    let mut rest = literal;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let first = escape[1..].chars().next();
        let octal = escape[1..].bytes().take(3).take_while(|digit| matches!(digit, b'0'..=b'7')).count();
        let long = match first {
            Some('U') => number(escape.get(2..10), 16).map(|letter| (letter, 10)),
            Some('0'..='7') => number(escape.get(1..=octal), 8).map(|letter| (letter, 1 + octal)),
            Some('/') => Some(("\\\\/".to_owned(), 2)),
            _ => None,
        };
        let (text, length) = long.unwrap_or_else(|| {
            let length = 1 + first.map_or(0, char::len_utf8);
            (escape[..length].to_owned(), length)
        });
        out.push_str(&text);
        rest = &escape[length..];
    }
    out + rest
}

/// The character with this number, as text within a literal.
fn number(digits: Option<&str>, base: u32) -> Option<String> {
    let letter = char::from_u32(u32::from_str_radix(digits?, base).ok()?)?;
    // Quotes and backslashes would be read again.
    Some(if letter.is_ascii() { format!("\\x{:02x}", letter as u32) } else { letter.into() })
}
