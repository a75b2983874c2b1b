//! Macros that take more than their parameters, or whose defaults use other parameters.
//!
//! A macro of jinja2 finds further arguments in `varargs` and `kwargs` if its body names these, and its defaults may use
//! other parameters. It takes a default where nothing is given, which is not where something undefined is given.
//! minijinja's macros do neither, so such a macro declares all that it needs, its name stands for a function that fills
//! it in, and its body begins with assignments of the defaults.

use super::{
    super::{objects::GIVEN, operators::MACRO},
    Tag,
};

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
        let parameters: Vec<Parameter> = parameters.collect();
        let takes = |word| has_word(body, word) && parameters.iter().all(|parameter| parameter.name != word);
        Some(Open { name: name.trim(), varargs: takes("varargs"), kwargs: takes("kwargs"), parameters })
    }

    /// Returns whether minijinja can read the macro as it is written.
    fn is_plain(&self) -> bool {
        !self.varargs && !self.kwargs && self.parameters.iter().all(|parameter| parameter.default.is_none())
    }

    /// The head of the macro as minijinja has to read it, and the assignments with which its body begins, without their
    /// delimiters; `None` if that is how it is written.
    pub(super) fn head(&self) -> Option<(String, Vec<String>)> {
        if self.is_plain() {
            return None;
        }
        let mut all: Vec<&str> = self.parameters.iter().map(|parameter| parameter.name).collect();
        let more = [(self.varargs, "varargs"), (self.kwargs, "kwargs"), (true, GIVEN)];
        all.extend(more.iter().filter_map(|(takes, name)| takes.then_some(*name)));
        let default = |Parameter { name, default }: &Parameter| {
            default.map(|default| format!(" {name} = {name} if \"{name}\" in {GIVEN} else ({default}) "))
        };
        let defaults = self.parameters.iter().filter_map(default);
        Some((format!(" {}({}) ", self.name, all.join(", ")), defaults.collect()))
    }

    /// The statement behind the macro that puts the function in its place, without its delimiters.
    pub(super) fn tail(&self) -> Option<String> {
        let name = self.name;
        let names: Vec<_> =
            self.parameters.iter().map(|parameter| format!("\"{}\"", parameter.name)).collect();
        let (names, varargs, kwargs) = (names.join(", "), self.varargs, self.kwargs);
        (!self.is_plain()).then(|| format!("set {name} = {MACRO}({name}, [{names}], {varargs}, {kwargs})"))
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
