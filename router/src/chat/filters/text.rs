//! Filters of text.

use minijinja::{Environment, Error, State, Value, filters, value::ValueKind};

use super::{
    super::{
        arguments::{Args, bind, integer, required, string, truth},
        bounds::room_for,
        environment::is_namespace,
        methods,
        python::{error, is_space, str_of},
        strings::{centered, split_lines},
    },
    sequences::elements,
    text_argument,
};

/// Adds all.
pub(super) fn add(environment: &mut Environment) {
    for name in ["upper", "lower", "capitalize"] {
        environment.add_filter(name, move |state: &mut State, value: &Value| method(state, value, name, &[]));
    }
    environment.add_filter("title", |value: &Value| Ok::<_, Error>(filters::title(str_of(value)?.into())));
    environment.add_filter("trim", |state: &mut State, value: &Value, args: Args| {
        let [chars] = bind(&args.into_values(), ["chars"])?;
        method(state, value, "strip", &[chars.unwrap_or_else(|| Value::from(()))])
    });
    environment.add_filter("replace", |state: &mut State, value: &Value, args: Args| {
        let [old, new, count] = bind(&args.into_values(), ["old", "new", "count"])?;
        let (old, new) = (str_of(&required(old)?)?, str_of(&required(new)?)?);
        let count = integer(&count)?.unwrap_or(-1);
        method(state, value, "replace", &[old.into(), new.into(), count.into()])
    });
    environment.add_filter("e", escape);
    environment.add_filter("escape", escape);
    environment.add_filter("forceescape", |value: &Value| {
        Ok::<_, Error>(Value::from_safe_string(escaped(&str_of(value)?)))
    });
    environment.add_filter("safe", |value: &Value| Ok::<_, Error>(Value::from_safe_string(str_of(value)?)));
    environment.add_filter("striptags", |value: &Value| {
        Ok::<_, Error>(minijinja_contrib::filters::striptags(str_of(value)?))
    });
    environment.add_filter("wordcount", word_count);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordwrap", word_wrap);
    environment.add_filter("indent", indent);
    environment.add_filter("center", |value: &Value, args: Args| {
        let [width] = bind(&args.into_values(), ["width"])?;
        centered(&str_of(value)?, integer(&width)?.unwrap_or(80), ' ')
    });
    environment.add_filter("filesizeformat", file_size);
    environment.add_filter("urlencode", url_encode);
    environment.add_filter("xmlattr", xml_attributes);
}

/// What a method of text makes of a value's text.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let text = if value.kind() == ValueKind::String { value.clone() } else { str_of(value)?.into() };
    methods::call(state, &text, name, args)
}

/// Text, where jinja2 takes nothing else.
fn text_of(value: &Value) -> Result<&str, Error> {
    value.as_str().ok_or_else(|| error(format!("{} is no text", value.kind())))
}

fn escape(value: &Value) -> Result<Value, Error> {
    Ok(if value.is_safe() { value.clone() } else { Value::from_safe_string(escaped(&str_of(value)?)) })
}

/// Text for HTML, as markupsafe escapes it.
pub(in super::super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(letter),
        }
    }
    out
}

fn word_count(value: &Value) -> Result<usize, Error> {
    let text = str_of(value)?;
    let words = text.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
    Ok(words.filter(|word| !word.is_empty()).count())
}

fn truncate(value: &Value, args: Args) -> Result<Value, Error> {
    let [length, kill_words, end, leeway] =
        bind(&args.into_values(), ["length", "killwords", "end", "leeway"])?;
    let end = string(&end)?.unwrap_or_else(|| "...".into());
    let (length, leeway) = (integer(&length)?.unwrap_or(255), integer(&leeway)?.unwrap_or(5));
    let has = filters::length(value)? as i64;
    if has <= length.saturating_add(leeway) {
        return Ok(value.clone());
    }
    let text = text_of(value)?;
    let room = length.saturating_sub(end.chars().count() as i64);
    let room = usize::try_from(room).map_err(|_| error("truncate: the length is shorter than the end"))?;
    let cut: String = text.chars().take(room).collect();
    let whole_words = if truth(&kill_words, false) { None } else { cut.rsplit_once(' ') };
    Ok(format!("{}{end}", whole_words.map_or(cut.as_str(), |(words, _)| words)).into())
}

fn word_wrap(value: &Value, args: Args) -> Result<String, Error> {
    let [width, break_long, separator, _] =
        bind(&args.into_values(), ["width", "break_long_words", "wrapstring", "break_on_hyphens"])?;
    let width = usize::try_from(integer(&width)?.unwrap_or(79)).unwrap_or(0).max(1);
    let separator = string(&separator)?.unwrap_or_else(|| "\n".into());
    let break_long = truth(&break_long, true);
    let text = text_of(value)?;
    let lines = split_lines(text, false);
    let wrapped: Vec<Vec<String>> = lines.into_iter().map(|line| wrap(line, width, break_long)).collect();
    let separators = wrapped.iter().map(|lines| lines.len().max(1)).sum::<usize>();
    room_for(text.len().saturating_add(separators.saturating_mul(separator.len())))?;
    let wrapped = wrapped.iter().map(|lines| lines.join(&separator));
    Ok(wrapped.collect::<Vec<_>>().join(&separator))
}

/// Lines of at most `width` characters, broken at spaces, which go away at the ends of lines.
fn wrap(line: &str, width: usize, break_long: bool) -> Vec<String> {
    let (mut lines, mut current): (Vec<String>, Vec<&str>) = (Vec::new(), Vec::new());
    // The characters of the current line.
    let mut used = 0;
    let mut chunks = chunks(line);
    chunks.reverse();
    while let Some((chunk, length)) = chunks.pop() {
        if is_blank(chunk) && current.is_empty() && !lines.is_empty() {
            continue;
        }
        if used + length <= width {
            current.push(chunk);
            used += length;
            continue;
        }
        if length > width && (break_long || current.is_empty()) {
            let room = if break_long { width - used } else { length };
            let end = chunk.char_indices().nth(room).map_or(chunk.len(), |(at, _)| at);
            current.push(&chunk[..end]);
            if end < chunk.len() {
                chunks.push((&chunk[end..], length - room));
            }
        } else {
            chunks.push((chunk, length));
        }
        end_line(&mut current, &mut lines);
        used = 0;
    }
    end_line(&mut current, &mut lines);
    lines
}

fn is_blank(chunk: &str) -> bool {
    chunk.chars().all(is_space)
}

fn end_line(current: &mut Vec<&str>, lines: &mut Vec<String>) {
    current.pop_if(|last| is_blank(last));
    if !current.is_empty() {
        lines.push(current.concat());
    }
    current.clear();
}

/// Words and the spaces between them, each with the number of its characters.
fn chunks(line: &str) -> Vec<(&str, usize)> {
    let (mut chunks, mut rest) = (Vec::new(), line);
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|letter| is_space(letter) != is_space(first)).unwrap_or(rest.len());
        let (chunk, behind) = rest.split_at(end);
        chunks.push((chunk, chunk.chars().count()));
        rest = behind;
    }
    chunks
}

fn indent(value: &Value, args: Args) -> Result<String, Error> {
    let [width, first, blank] = bind(&args.into_values(), ["width", "first", "blank"])?;
    let indentation = match width {
        Some(text) if text.kind() == ValueKind::String => str_of(&text)?,
        width => {
            let width = usize::try_from(integer(&width)?.unwrap_or(4)).unwrap_or(0);
            room_for(width)?;
            " ".repeat(width)
        }
    };
    let text = text_of(value)?.to_owned() + "\n";
    let mut out = String::new();
    for (index, line) in split_lines(&text, false).into_iter().enumerate() {
        let indented =
            if index == 0 { truth(&first, false) } else { truth(&blank, false) || !line.is_empty() };
        out.push_str(if index > 0 { "\n" } else { "" });
        room_for(out.len() + indentation.len())?;
        out.push_str(if indented { &indentation } else { "" });
        out.push_str(line);
    }
    Ok(out)
}

fn file_size(value: &Value, args: Args) -> Result<String, Error> {
    let [binary] = bind(&args.into_values(), ["binary"])?;
    let binary = truth(&binary, false);
    let bytes = f64::try_from(value.clone())?;
    let (base, units) = if binary {
        (1024.0, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"])
    } else {
        (1000.0, ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"])
    };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes.trunc()));
    }
    let mut size = bytes / base;
    let mut units = units.iter().peekable();
    while let Some(unit) = units.next() {
        if size < base || units.peek().is_none() {
            return Ok(format!("{size:.1} {unit}"));
        }
        size /= base;
    }
    Ok(String::new())
}

fn url_encode(value: &Value) -> Result<String, Error> {
    let quoted = |value: &Value| Ok::<_, Error>(quote(&str_of(value)?, "").replace("%20", "+"));
    let pairs: Vec<[Value; 2]> = match value.kind() {
        ValueKind::Map => elements(value)?
            .into_iter()
            .map(|key| Ok([key.clone(), value.get_item(&key)?]))
            .collect::<Result<_, Error>>()?,
        ValueKind::Seq | ValueKind::Iterable => {
            let pair = |pair: Value| {
                elements(&pair)?.try_into().map_err(|_| error("urlencode: the elements must be pairs"))
            };
            elements(value)?.into_iter().map(pair).collect::<Result<_, Error>>()?
        }
        _ => return Ok(quote(&str_of(value)?, "/")),
    };
    let pair = |[key, value]: &[Value; 2]| Ok(format!("{}={}", quoted(key)?, quoted(value)?));
    Ok(pairs.iter().map(pair).collect::<Result<Vec<String>, Error>>()?.join("&"))
}

/// Percent-encodes all but letters, digits, and `safe` characters.
fn quote(text: &str, safe: &str) -> String {
    let plain =
        |byte: u8| byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || safe.as_bytes().contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn xml_attributes(value: &Value, args: Args) -> Result<String, Error> {
    let [space] = bind(&args.into_values(), ["autospace"])?;
    if value.kind() != ValueKind::Map || is_namespace(value) {
        return Err(error(format!("xmlattr: {} is no map", value.kind())));
    }
    let mut attributes = Vec::new();
    for key in elements(value)? {
        let item = value.get_item(&key)?;
        if !item.is_none() && !item.is_undefined() {
            let name = text_argument(Some(key))?;
            attributes.push(format!("{}=\"{}\"", escaped(&name), escaped(&str_of(&item)?)));
        }
    }
    let lead = if truth(&space, true) && !attributes.is_empty() { " " } else { "" };
    Ok(format!("{lead}{}", attributes.join(" ")))
}
