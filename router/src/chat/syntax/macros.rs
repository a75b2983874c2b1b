//! Macros that take more than their parameters, or whose defaults use other parameters.
//!
//! A macro of jinja2 finds further arguments in `varargs` and `kwargs` if its body names these. minijinja's macros take
//! what they declare, so such a macro declares both, and its name stands for a function that fills them in. A default
//! of minijinja's cannot use the parameters before it, so the body begins with an assignment.

use super::{super::operators::MACRO, Tag};

/// A macro whose end has not been reached.
pub(super) struct Open<'a> {
    name: &'a str,
    parameters: Vec<Parameter<'a>>,
    varargs: bool,
    kwargs: bool,
}

struct Parameter<'a> {
    name: &'a str,
    default: Option<&'a str>,
}

impl<'a> Open<'a> {
    /// Reads the head of a macro; `behind` is the template behind it.
    pub(super) fn read(tag: &Tag<'a>, behind: &str) -> Option<Open<'a>> {
        let (name, parameters) = tag.code.trim().strip_suffix(')')?.split_once('(')?;
        let parameter = |text: &'a str| match text.split_once('=') {
            Some((name, default)) => Parameter { name: name.trim(), default: Some(default.trim()) },
            None => Parameter { name: text.trim(), default: None },
        };
        let parameters = split(parameters).into_iter().filter(|text| !text.trim().is_empty()).map(parameter);
        let body = &behind[..end_of_body(behind)];
        Some(Open {
            name: name.trim(),
            parameters: parameters.collect(),
            varargs: has_word(body, "varargs"),
            kwargs: has_word(body, "kwargs"),
        })
    }

    fn takes_more(&self) -> bool {
        self.varargs || self.kwargs
    }

    /// Returns whether a default uses one of the parameters.
    fn has_late_defaults(&self) -> bool {
        let defaults = || self.parameters.iter().filter_map(|parameter| parameter.default);
        self.parameters.iter().any(|parameter| defaults().any(|default| has_word(default, parameter.name)))
    }

    /// The head of the macro as minijinja has to read it; `None` if that is how it is written.
    pub(super) fn head(&self) -> Option<(String, String)> {
        if !self.takes_more() && !self.has_late_defaults() {
            return None;
        }
        let late = self.has_late_defaults();
        let mut all: Vec<String> = Vec::new();
        let mut body = String::new();
        for Parameter { name, default } in &self.parameters {
            match default {
                None => all.push((*name).to_owned()),
                Some(default) if !late => all.push(format!("{name}={default}")),
                Some(default) => {
                    // Undefined, as no template sets it.
                    all.push(format!("{name}=__not_given"));
                    body += &format!("{{% set {name} = {name} if {name} is defined else ({default}) %}}");
                }
            }
        }
        if self.takes_more() {
            all.extend(["varargs=none".to_owned(), "kwargs=none".to_owned()]);
        }
        Some((format!(" {}({}) ", self.name, all.join(", ")), body))
    }

    /// The statement behind the macro that lets it take more, without its delimiters.
    pub(super) fn tail(&self) -> Option<String> {
        let name = self.name;
        let names: Vec<_> =
            self.parameters.iter().map(|parameter| format!("\"{}\"", parameter.name)).collect();
        let (names, varargs, kwargs) = (names.join(", "), self.varargs, self.kwargs);
        self.takes_more().then(|| format!("set {name} = {MACRO}({name}, [{names}], {varargs}, {kwargs})"))
    }
}

/// Where the body of a macro ends.
fn end_of_body(text: &str) -> usize {
    let mut depth = 0;
    for (at, _) in text.match_indices("{%") {
        let code = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        match code.split(|letter: char| !letter.is_alphanumeric()).next() {
            Some("macro") => depth += 1,
            Some("endmacro") if depth == 0 => return at,
            Some("endmacro") => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').any(|found| found == word)
}

/// The parts between commas outside of brackets and strings.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut from, mut depth, mut quote) = (Vec::new(), 0, 0, None);
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match (quote, letter) {
            (Some(_), '\\') => _ = letters.next(),
            (Some(open), _) if letter == open => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(letter),
            (None, '(' | '[' | '{') => depth += 1,
            (None, ')' | ']' | '}') => depth -= 1,
            (None, ',') if depth == 0 => {
                parts.push(&text[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[from..]);
    parts
}
