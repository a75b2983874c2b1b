//! Methods of Python's `str`, where minijinja's are missing or other ones.

mod search;

use minijinja::{Error, Value, value::Tuple};

use super::{
    arguments::{bind, integer, required, string, truth},
    bounds::room_for,
    filters::elements,
    format::str_format,
    python::{error, is_printable, is_space},
};

/// Calls a method; `None` if it is not one of these.
pub(super) fn call(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    if let Some(found) = search::call(text, method, args)? {
        return Ok(Some(found));
    }
    if let Some(result) = predicate(text, method) {
        let [] = bind(args, [])?;
        return Ok(Some(result.into()));
    }
    if let Some(result) = changed_case(text, method) {
        let [] = bind(args, [])?;
        return Ok(Some(result.into()));
    }
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => strip(text, method, args)?.into(),
        "split" | "rsplit" => split(text, method == "rsplit", args)?.into(),
        "splitlines" => {
            let [keep] = bind(args, ["keepends"])?;
            split_lines(text, truth(&keep, false)).into_iter().map(Value::from).collect()
        }
        "join" => join(text, args)?.into(),
        "ljust" | "rjust" | "center" => {
            let [width, fill] = bind(args, ["width", "fillchar"])?;
            let width = required(integer(&width)?)?;
            let fill = string(&fill)?.unwrap_or_else(|| " ".into());
            let [fill] = fill.chars().collect::<Vec<_>>()[..] else {
                return Err(error("the fill must be one character"));
            };
            let padding = padding(text, width, fill)?;
            match method {
                "ljust" => format!("{text}{padding}").into(),
                "rjust" => format!("{padding}{text}").into(),
                _ => centered(text, width, fill)?.into(),
            }
        }
        "zfill" => {
            let [width] = bind(args, ["width"])?;
            let padding = padding(text, required(integer(&width)?)?, '0')?;
            let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
            let sign = &text[..text.len() - digits.len()];
            format!("{sign}{padding}{digits}").into()
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = bind(args, ["affix"])?;
            let affix = required(string(&affix)?)?;
            let stripped = if method == "removeprefix" {
                text.strip_prefix(&*affix)
            } else {
                text.strip_suffix(&*affix)
            };
            stripped.unwrap_or(text).into()
        }
        "format" => str_format(text, args)?.into(),
        "expandtabs" => {
            let [size] = bind(args, ["tabsize"])?;
            expand_tabs(text, usize::try_from(integer(&size)?.unwrap_or(8)).unwrap_or(0))?.into()
        }
        _ => return Ok(None),
    }))
}

fn strip<'a>(text: &'a str, method: &str, args: &[Value]) -> Result<&'a str, Error> {
    let [letters] = bind(args, ["chars"])?;
    let letters = string(&letters)?;
    let goes = |letter: char| match &letters {
        Some(letters) => letters.contains(letter),
        None => is_space(letter),
    };
    Ok(match method {
        "lstrip" => text.trim_start_matches(goes),
        "rstrip" => text.trim_end_matches(goes),
        _ => text.trim_matches(goes),
    })
}

fn split(text: &str, from_end: bool, args: &[Value]) -> Result<Vec<Value>, Error> {
    let [separator, most] = bind(args, ["sep", "maxsplit"])?;
    let parts = integer(&most)?
        .and_then(|most| usize::try_from(most).ok())
        .map_or(usize::MAX, |most| most.saturating_add(1));
    let mut found: Vec<&str> = match &string(&separator)? {
        Some(separator) if separator.is_empty() => return Err(error("the separator is empty")),
        Some(separator) if from_end => text.rsplitn(parts, separator.as_str()).collect(),
        Some(separator) => text.splitn(parts, separator.as_str()).collect(),
        None => words(text, parts, from_end),
    };
    if from_end {
        found.reverse();
    }
    Ok(found.into_iter().map(Value::from).collect())
}

/// At most so many parts between runs of spaces, in the order in which they are found. The last part keeps its inner
/// spaces.
fn words(text: &str, parts: usize, from_end: bool) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = if from_end { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        let end = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        match end.filter(|_| found.len() + 1 < parts) {
            Some(at) if from_end => {
                let space = rest[at..].chars().next().map_or(0, char::len_utf8);
                found.push(&rest[at + space..]);
                rest = rest[..at].trim_end_matches(is_space);
            }
            Some(at) => {
                found.push(&rest[..at]);
                rest = rest[at..].trim_start_matches(is_space);
            }
            None => {
                found.push(rest);
                break;
            }
        }
    }
    found
}

/// `str.splitlines`: at all characters that end lines for Python.
pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |letter: char| {
        matches!(
            letter,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find(ends) {
        let letter = rest[at..].chars().next().map_or(0, char::len_utf8);
        let end = at + if rest[at..].starts_with("\r\n") { 2 } else { letter };
        lines.push(if keep_ends { &rest[..end] } else { &rest[..at] });
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn join(separator: &str, args: &[Value]) -> Result<String, Error> {
    let [items] = bind(args, ["iterable"])?;
    let mut parts = Vec::new();
    for item in elements(&required(items)?)? {
        parts
            .push(item.as_str().map(str::to_owned).ok_or_else(|| error("join: an element is not a string"))?);
    }
    let length: usize = parts.iter().map(String::len).sum();
    room_for(length.saturating_add(parts.len().saturating_mul(separator.len())))?;
    Ok(parts.join(separator))
}

fn padding(text: &str, width: i64, fill: char) -> Result<String, Error> {
    let missing = width.saturating_sub(text.chars().count() as i64);
    let missing = usize::try_from(missing).unwrap_or(0);
    room_for(text.len().saturating_add(missing))?;
    Ok(String::from(fill).repeat(missing))
}

/// `str.center`. Of an odd number of fill characters, the left side has one more if the width is odd.
pub(super) fn centered(text: &str, width: i64, fill: char) -> Result<String, Error> {
    let missing = padding(text, width, fill)?.chars().count();
    let left = missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1);
    let fill = |count: usize| String::from(fill).repeat(count);
    Ok(format!("{}{text}{}", fill(left), fill(missing - left)))
}

fn expand_tabs(text: &str, size: usize) -> Result<String, Error> {
    let (mut out, mut column) = (String::new(), 0);
    for letter in text.chars() {
        match letter {
            '\t' => {
                let spaces = if size == 0 { 0 } else { size - column % size };
                room_for(out.len().saturating_add(spaces))?;
                out.push_str(&" ".repeat(spaces));
                column += spaces;
            }
            _ => {
                out.push(letter);
                column = if matches!(letter, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(out)
}

fn changed_case(text: &str, method: &str) -> Option<String> {
    Some(match method {
        "title" => title(text),
        "swapcase" => {
            let swap = |letter: char| -> String {
                if letter.is_uppercase() {
                    letter.to_lowercase().collect()
                } else {
                    letter.to_uppercase().collect()
                }
            };
            text.chars().map(swap).collect()
        }
        // What lower case leaves apart, folding joins: of these, the sharp s alone is common.
        "casefold" => text.to_lowercase().replace('ß', "ss"),
        _ => return None,
    })
}

/// Upper case for each cased character behind one that is not, lower case for all others.
fn title(text: &str) -> String {
    let (mut out, mut within) = (String::with_capacity(text.len()), false);
    for letter in text.chars() {
        if within {
            out.extend(letter.to_lowercase());
        } else {
            let mut upper = letter.to_uppercase();
            out.extend(upper.next());
            out.extend(upper.flat_map(char::to_lowercase));
        }
        within = is_cased(letter);
    }
    out
}

fn is_cased(letter: char) -> bool {
    letter.is_lowercase() || letter.is_uppercase()
}

fn predicate(text: &str, method: &str) -> Option<bool> {
    let all = |holds: fn(char) -> bool| !text.is_empty() && text.chars().all(holds);
    Some(match method {
        "isspace" => all(is_space),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(|letter| is_decimal(letter) || is_other_digit(letter)),
        "isprintable" => text.chars().all(is_printable),
        "isidentifier" => {
            let mut letters = text.chars();
            letters.next().is_some_and(|first| first.is_alphabetic() || first == '_')
                && letters.all(|letter| letter.is_alphanumeric() || letter == '_')
        }
        "istitle" => text.chars().any(is_cased) && title(text) == text,
        _ => return None,
    })
}

/// Digits that numbers are written with: ten in a row in each script.
fn is_decimal(letter: char) -> bool {
    use unicode_categories::UnicodeCategories;
    letter.is_number_decimal_digit()
}

/// Digits in superscript, subscript or circles.
fn is_other_digit(letter: char) -> bool {
    matches!(letter, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨' | '⑴'..='⑼' | '⒈'..='⒐' | '⓪' | '⓵'..='⓽' | '⓿'
        | '❶'..='❾' | '➀'..='➈' | '➊'..='➒' | '፩'..='፱')
}

/// `(before, separator, after)`.
pub(super) fn triple(parts: [&str; 3]) -> Value {
    Value::from(Tuple::from(parts.map(Value::from)))
}
