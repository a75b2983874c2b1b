//! Values as Python prints them, and Python's idea of white space.

use std::fmt::Write;

use minijinja::{Error, ErrorKind, Value, value::ValueKind};

use super::bounds::room_for;

/// An error that a template's author would see.
pub(super) fn error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// `str(value)`: what `{{ value }}` prints.
pub(super) fn str_of(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        ValueKind::Undefined => Ok(String::new()),
        _ => repr_of(value),
    }
}

/// `repr(value)`: what a list prints of its elements.
pub(super) fn repr_of(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(&mut out, value)?;
    Ok(out)
}

fn write_repr(out: &mut String, value: &Value) -> Result<(), Error> {
    room_for(out.len())?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => {
            out.push_str(&float(f64::try_from(value.clone()).unwrap_or(f64::NAN)));
        }
        ValueKind::Seq if !is_printed_otherwise(value) => {
            let (open, close) = if value.is_tuple() { ("(", ")") } else { ("[", "]") };
            out.push_str(open);
            let items = value.try_iter().into_iter().flatten();
            let mut length = 0;
            for item in items {
                out.push_str(if length > 0 { ", " } else { "" });
                write_repr(out, &item)?;
                length += 1;
            }
            out.push_str(if value.is_tuple() && length == 1 { ",)" } else { close });
        }
        ValueKind::Map if !is_printed_otherwise(value) => {
            let is_namespace = super::environment::is_namespace(value);
            out.push_str(if is_namespace { "<Namespace {" } else { "{" });
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(out, &key)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key).unwrap_or_default())?;
            }
            out.push_str(if is_namespace { "}>" } else { "}" });
        }
        // Writing to a string does not fail.
        _ => _ = write!(out, "{value}"),
    }
    Ok(())
}

/// Returns whether an object of ours has its own way to print itself.
fn is_printed_otherwise(value: &Value) -> bool {
    value.downcast_object_ref::<super::objects::Range>().is_some()
}

/// A string in quotes: single ones unless it has those and no double ones.
fn write_quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for letter in text.chars() {
        match letter {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if letter == quote => out.extend(['\\', quote]),
            _ if is_printable(letter) => out.push(letter),
            // Writing to a string does not fail.
            _ if (letter as u32) < 0x100 => _ = write!(out, "\\x{:02x}", letter as u32),
            _ if (letter as u32) < 0x1_0000 => _ = write!(out, "\\u{:04x}", letter as u32),
            _ => _ = write!(out, "\\U{:08x}", letter as u32),
        }
    }
    out.push(quote);
}

/// `str.isprintable` of one character. Rust's `Debug` escapes the same categories of Unicode; behind another
/// character it leaves those alone that only combine with it.
pub(super) fn is_printable(letter: char) -> bool {
    matches!(letter, '\'' | '"' | '\\') || {
        let pair: String = ['a', letter].into_iter().collect();
        pair.escape_debug().skip(1).eq([letter])
    }
}

/// The shortest digits that read back as the same number, with an exponent where Python has one.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => format!("{digits}e{exponent:+03}"),
        _ => {
            let plain = value.to_string();
            if plain.contains('.') { plain } else { format!("{plain}.0") }
        }
    }
}

/// `str.isspace` of one character.
pub(super) fn is_space(letter: char) -> bool {
    letter.is_whitespace() || matches!(letter, '\u{1c}'..='\u{1f}')
}

/// `str.strip()`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}
