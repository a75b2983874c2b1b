//! Text with places for values, in Python's two ways: `'%s' % value` and `'{}'.format(value)`.
//!
//! minijinja formats single values as Python does; what it lacks is finding them and converting them first.

use minijinja::{
    Error, Value,
    formatting::{FormatStyle, format},
    value::{Kwargs, ValueKind},
};

use super::{
    attributes::attribute,
    bounds::{check_format, room_for},
    python::{error, repr_of, str_of},
};

/// `text % right`.
pub(super) fn printf(text: &str, right: &Value) -> Result<String, Error> {
    let mut in_order =
        if right.is_tuple() { right.try_iter()?.collect() } else { vec![right.clone()] }.into_iter();
    let (mut out, mut rest, mut by_name) = (String::new(), text, right.kind() == ValueKind::Map);
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let mut field = &rest[at + 1..];
        let mut named = None;
        if let Some((name, behind)) = field.strip_prefix('(').and_then(|field| field.split_once(')')) {
            (named, field) = (Some(name), behind);
        }
        let end = field.find(|letter: char| !"#0- +.123456789".contains(letter));
        let letter = end.and_then(|end| field[end..].chars().next());
        let (Some(end), Some(letter)) = (end, letter) else { return Err(error("incomplete format")) };
        let options = &field[..end];
        rest = &field[end + letter.len_utf8()..];
        if letter == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(name) => right.get_item(&name.into()).ok().filter(|value| !value.is_undefined()),
            None => in_order.next(),
        };
        by_name |= named.is_some();
        let value = value.ok_or_else(|| error("not enough values for the format"))?;
        out.push_str(&one_printf(options, letter, value)?);
        room_for(out.len())?;
    }
    if in_order.next().is_some() && !by_name {
        return Err(error("more values than the format has places for"));
    }
    Ok(out + rest)
}

fn one_printf(options: &str, letter: char, value: Value) -> Result<String, Error> {
    check_format(options)?;
    let (letter, value) = match letter {
        'r' | 'a' => ('s', repr_of(&value)?.into()),
        's' => ('s', str_of(&value)?.into()),
        'd' | 'i' | 'u' => ('d', truncated(value)?),
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => (letter, f64::try_from(value)?.into()),
        _ => (letter, value),
    };
    format(FormatStyle::Printf, &format!("%{options}{letter}"), &[value])
}

fn truncated(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => Ok(Value::from(f64::try_from(value)?.trunc() as i128)),
        ValueKind::Bool => Ok(Value::from(i64::from(value.is_true()))),
        _ => Ok(value),
    }
}

/// `text.format(…)`.
pub(super) fn str_format(text: &str, args: &[Value]) -> Result<String, Error> {
    let (by_position, by_name) = match args.split_last() {
        Some((last, before)) if last.is_kwargs() => (before, Some(Kwargs::try_from(last.clone())?)),
        _ => (args, None),
    };
    Arguments { by_position, by_name, next: 0 }.fill(text, MAX_NESTED)
}

/// Formats within formats, of which the inner ones have widths and precisions: `{:{width}}`.
const MAX_NESTED: usize = 2;

/// The arguments of a format, and the place of the next one that is asked for by no name.
struct Arguments<'a> {
    by_position: &'a [Value],
    by_name: Option<Kwargs>,
    next: usize,
}

impl Arguments<'_> {
    fn fill(&mut self, text: &str, nested: usize) -> Result<String, Error> {
        let nested = nested.checked_sub(1).ok_or_else(|| error("formats are nested too deeply"))?;
        let (mut out, mut rest) = (String::new(), text);
        while let Some(at) = rest.find(['{', '}']) {
            out.push_str(&rest[..at]);
            let (brace, behind) = rest[at..].split_at(1);
            if behind.starts_with(brace) {
                out.push_str(brace);
                rest = &behind[1..];
                continue;
            }
            let end = end_of_field(behind).filter(|_| brace == "{");
            let end = end.ok_or_else(|| error("a brace has no partner"))?;
            out.push_str(&self.field(&behind[..end], nested)?);
            room_for(out.len())?;
            rest = &behind[end + 1..];
        }
        Ok(out + rest)
    }

    /// What stands between braces: a name and what to make of its value.
    fn field(&mut self, field: &str, nested: usize) -> Result<String, Error> {
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (field, conversion) = field.split_once('!').unwrap_or((field, ""));
        let end = field.find(['.', '[']).unwrap_or(field.len());
        let (name, path) = field.split_at(end);
        let index = if name.is_empty() { Some(self.next) } else { name.parse().ok() };
        self.next += usize::from(name.is_empty());
        let value = match (index, &self.by_name) {
            (Some(index), _) => self.by_position.get(index).cloned(),
            (None, Some(by_name)) => by_name.peek(name).ok(),
            (None, None) => None,
        };
        let value = value.ok_or_else(|| error(format!("no value for {{{field}}}")))?;
        let value = follow(value, path)?;
        let value = match conversion {
            "" => value,
            "s" => str_of(&value)?.into(),
            "r" | "a" => repr_of(&value)?.into(),
            other => return Err(error(format!("unknown conversion {other:?}"))),
        };
        if spec.contains(['{', '}']) {
            return one_str_format(&self.fill(spec, nested)?, value);
        }
        one_str_format(spec, value)
    }
}

/// Where the brace is that ends a field.
fn end_of_field(text: &str) -> Option<usize> {
    let mut open = 0;
    text.bytes().position(|letter| {
        match letter {
            b'{' => open += 1,
            b'}' if open == 0 => return true,
            b'}' => open -= 1,
            _ => {}
        }
        false
    })
}

/// The value that `.name` or `[key]` leads to.
fn follow(mut value: Value, mut path: &str) -> Result<Value, Error> {
    while !path.is_empty() {
        value = match path.strip_prefix('[') {
            Some(group) => {
                let (key, rest) = group.split_once(']').ok_or_else(|| error("a bracket has no partner"))?;
                path = rest;
                value.get_item(&key.parse::<i64>().map_or_else(|_| key.into(), Value::from))?
            }
            None => {
                let name = path.trim_start_matches('.');
                let (name, rest) = name.split_at(name.find(['.', '[']).unwrap_or(name.len()));
                path = rest;
                attribute(&value, name)?
            }
        };
    }
    Ok(value)
}

fn one_str_format(spec: &str, value: Value) -> Result<String, Error> {
    check_format(spec)?;
    if spec.is_empty() {
        return str_of(&value);
    }
    if !matches!(value.kind(), ValueKind::String | ValueKind::Number | ValueKind::Bool) {
        return Err(error(format!("{} takes no format", value.kind())));
    }
    if let Some(options) = spec.strip_suffix('%') {
        // The sign counts as a part of the width, which is the last thing that is filled up.
        let percent = f64::try_from(value)? * 100.0;
        return Ok(format(FormatStyle::StrFormat, &format!("{{:{options}f}}"), &[percent.into()])? + "%");
    }
    format(FormatStyle::StrFormat, &format!("{{:{spec}}}"), &[value])
}
