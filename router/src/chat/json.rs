//! The filter `tojson` as transformers defines it: Python's `json.dumps`.

use std::fmt::Write;

use minijinja::{Error, Value, value::ValueKind};

use super::{
    arguments::{Args, bind, truth},
    bounds::room_for,
    environment::is_namespace,
    objects::{Range, View},
    python::{error, float},
};

/// Options for writing JSON.
struct Style {
    ensure_ascii: bool,
    /// The indentation of each level; without it, everything is in one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The filter.
pub(super) fn to_json(value: &Value, args: Args) -> Result<String, Error> {
    let [ensure_ascii, indent, separators, sort_keys] =
        bind(&args.into_values(), ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(width) => {
            let width = i64::try_from(width).map_err(|_| error("tojson: the indent is not an integer"))?;
            let width = usize::try_from(width).unwrap_or(0);
            room_for(width)?;
            Some(" ".repeat(width))
        }
    };
    let (item_separator, key_separator) = match separators.filter(|separators| !separators.is_none()) {
        Some(separators) => {
            let both: Vec<Value> = separators.try_iter()?.collect();
            let [item, key] = &both[..] else { return Err(error("tojson: separators must be two")) };
            (item.to_string(), key.to_string())
        }
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ensure_ascii: truth(&ensure_ascii, false),
        indent,
        item_separator,
        key_separator,
        sort_keys: truth(&sort_keys, false),
    };
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(out)
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::String => self.write_string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable if is_list(value) => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_all(out, ['[', ']'], items, depth, |out, item| self.write(out, &item, depth + 1))?;
            }
            ValueKind::Map if !is_namespace(value) => {
                let pair = |key: Value| -> Result<_, Error> { Ok((scalar(&key)?, value.get_item(&key)?)) };
                let mut pairs = value.try_iter()?.map(pair).collect::<Result<Vec<_>, _>>()?;
                if self.sort_keys {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.write_all(out, ['{', '}'], pairs, depth, |out, (key, value)| {
                    self.write_string(out, &key);
                    out.push_str(&self.key_separator);
                    self.write(out, &value, depth + 1)
                })?;
            }
            _ => out.push_str(&scalar(value)?),
        }
        Ok(())
    }

    /// A list or map: each element on a line of its own if JSON is indented.
    fn write_all<T>(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: Vec<T>,
        depth: usize,
        mut write: impl FnMut(&mut String, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        let empty = items.is_empty();
        out.push(open);
        for (index, item) in items.into_iter().enumerate() {
            out.push_str(if index > 0 { &self.item_separator } else { "" });
            let indent = self.indent.as_ref().map_or(0, |indent| indent.len() * (depth + 1));
            room_for(out.len() + indent)?;
            new_line(out, depth + 1);
            write(out, item)?;
        }
        if !empty {
            new_line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn write_string(&self, out: &mut String, text: &str) {
        out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                _ if letter < ' ' || (self.ensure_ascii && !(' '..='~').contains(&letter)) => {
                    for unit in letter.encode_utf16(&mut [0; 2]) {
                        // Writing to a string does not fail.
                        _ = write!(out, "\\u{unit:04x}");
                    }
                }
                _ => out.push(letter),
            }
        }
        out.push('"');
    }
}

/// Returns whether Python has a list or tuple for this value.
fn is_list(value: &Value) -> bool {
    // Groups are pairs that the engine iterates over; what has no length is a generator.
    let is_view =
        value.downcast_object_ref::<View>().is_some() || value.downcast_object_ref::<Range>().is_some();
    !is_view && value.len().is_some()
}

/// A value that is not a list or map; also what a key of a map becomes.
fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok(if value.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number if value.is_integer() => Ok(value.to_string()),
        ValueKind::Number => Ok(match float(f64::try_from(value.clone())?).as_str() {
            "nan" => "NaN".into(),
            "inf" => "Infinity".into(),
            "-inf" => "-Infinity".into(),
            finite => finite.to_owned(),
        }),
        kind => Err(error(format!("tojson: a value of type {kind} cannot be written as JSON"))),
    }
}
