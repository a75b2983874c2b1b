//! Rewrites what jinja2 reads differently from minijinja, before minijinja reads it.

mod expression;
mod macros;

use macros::Open;

/// The end of a statement.
const END: &str = "%}";

/// Macros within each other that are rewritten.
const MAX_NESTED: usize = 150;

/// A template as minijinja has to read it. Text outside of tags stays as it is.
pub(super) fn translate(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut open_macros = Vec::new();
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let tag = match rest.get(..2) {
            Some("{#") => rest.find("#}").map_or(rest.len(), |end| end + 2),
            Some("{{") => end_of_code(rest, "}}"),
            Some("{%") => end_of_code(rest, "%}"),
            _ => 1,
        };
        let (text, behind) = rest.split_at(tag);
        rest = behind;
        match Tag::parse(text) {
            Some(tag) if tag.word == "raw" => {
                out.push_str(text);
                // minijinja drops a line break behind this tag and jinja2 does not.
                out.push_str(if rest.starts_with('\n') && !text.ends_with("-%}") { "\n" } else { "" });
                let (raw, behind) = rest.split_at(end_of_raw(rest));
                out.push_str(raw);
                rest = behind;
            }
            Some(tag) if tag.word == "macro" => {
                // Each looks for its end in all that is behind it. minijinja reads no statements that are nested so deeply.
                let open = if open_macros.len() < MAX_NESTED { Open::read(&tag, rest) } else { None };
                tag.write_macro(&mut out, open.as_ref());
                open_macros.push(open);
            }
            Some(tag) if tag.word == "endmacro" => {
                let more = open_macros.pop().flatten().and_then(|open| open.tail());
                tag.write_with(&mut out, more.as_deref());
            }
            Some(tag) => tag.write(&mut out),
            None => out.push_str(text),
        }
    }
    out.push_str(rest);
    out
}

/// A tag in its parts, which make up its text.
struct Tag<'a> {
    /// The delimiter with its white space control, and space.
    open: &'a str,
    /// A statement's name; empty for an expression.
    word: &'a str,
    code: &'a str,
    close: &'a str,
}

impl<'a> Tag<'a> {
    fn parse(text: &'a str) -> Option<Tag<'a>> {
        let end = if text.starts_with("{%") { "%}" } else { "}}" };
        let inner = text.strip_suffix(end).filter(|_| text.starts_with("{%") || text.starts_with("{{"))?;
        let inner = inner.get(2..)?;
        let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner);
        let close = &text[2 + inner.len()..];
        let code = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
        let open = &text[..text.len() - close.len() - code.len()];
        let is_statement = end == "%}";
        let letters = |letter: char| letter.is_alphanumeric() || letter == '_';
        let word = if is_statement { code.find(|letter| !letters(letter)).unwrap_or(code.len()) } else { 0 };
        let (word, code) = code.split_at(word);
        Some(Tag { open, word, code, close })
    }

    fn write(&self, out: &mut String) {
        // `generation` marks the assistant's answers for training. Like `with`, it has a scope of its own.
        let word = match self.word {
            "generation" => "with",
            "endgeneration" => "endwith",
            word => word,
        };
        out.extend([self.open, word]);
        expression::write(out, self.code, word);
        out.push_str(self.close);
    }

    /// Writes the head of a macro.
    fn write_macro(&self, out: &mut String, open: Option<&Open>) {
        let Some((head, defaults)) = open.and_then(Open::head) else { return self.write(out) };
        out.extend([self.open, self.word]);
        expression::write(out, &head, self.word);
        // White space behind the head is that behind the last of these. What they take from the head is no template.
        for default in &defaults {
            out.extend([END, "{% set"]);
            expression::write(out, default, "set");
        }
        out.push_str(self.close);
    }

    /// Writes a statement, and another one right behind it.
    fn write_with(&self, out: &mut String, other: Option<&str>) {
        let Some(other) = other else { return self.write(out) };
        out.extend([self.open, self.word, " ", END, "{% ", other, " ", self.close]);
    }
}

/// Length of a tag that ends with `end` outside of string literals and brackets; the whole text if it does not end.
fn end_of_code(text: &str, end: &str) -> usize {
    let (mut quote, mut braces) = (None, 0usize);
    let mut letters = text.char_indices().skip(2);
    while let Some((at, letter)) = letters.next() {
        match quote {
            Some(_) if letter == '\\' => _ = letters.next(),
            Some(open) if letter == open => quote = None,
            Some(_) => {}
            None if matches!(letter, '"' | '\'') => quote = Some(letter),
            None if braces == 0 && text[at..].starts_with(end) => return at + end.len(),
            None if letter == '{' => braces += 1,
            None if letter == '}' => braces = braces.saturating_sub(1),
            None => {}
        }
    }
    text.len()
}

/// Length of a raw block's content: up to its end tag.
fn end_of_raw(text: &str) -> usize {
    let mut tags = text.match_indices("{%").map(|(at, _)| at);
    let is_end = |at: &usize| {
        let code = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        code.starts_with("endraw")
    };
    tags.find(is_end).unwrap_or(text.len())
}
