//! Methods of strings that look for another string. Positions are counted in characters.

use minijinja::{Error, Value};

use super::{
    super::{
        arguments::{bind, integer, required, string},
        python::error,
    },
    triple,
};

/// Calls a method; `None` if it is not one of these.
pub(super) fn call(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "find" | "rfind" | "index" | "rindex" => {
            let at = position(text, method.starts_with('r'), args)?;
            match at {
                Some(at) => at.into(),
                None if method.ends_with("find") => (-1).into(),
                None => return Err(error("substring not found")),
            }
        }
        "count" => {
            let [wanted, start, end] = bind(args, ["sub", "start", "end"])?;
            let (within, _) = part(text, &start, &end)?;
            within.matches(&*required(string(&wanted)?)?).count().into()
        }
        "startswith" | "endswith" => {
            let [affixes, start, end] = bind(args, ["affix", "start", "end"])?;
            let (within, _) = part(text, &start, &end)?;
            let at_start = method == "startswith";
            let has =
                |affix: &str| if at_start { within.starts_with(affix) } else { within.ends_with(affix) };
            affixes_of(required(affixes)?)?.iter().any(|affix| has(affix)).into()
        }
        "partition" | "rpartition" => {
            let [separator] = bind(args, ["sep"])?;
            let separator = required(string(&separator)?)?;
            if separator.is_empty() {
                return Err(error("the separator is empty"));
            }
            let from_end = method == "rpartition";
            let found = if from_end { text.rsplit_once(&*separator) } else { text.split_once(&*separator) };
            match found {
                Some((before, after)) => triple([before, &separator, after]),
                None if from_end => triple(["", "", text]),
                None => triple([text, "", ""]),
            }
        }
        _ => return Ok(None),
    }))
}

fn position(text: &str, from_end: bool, args: &[Value]) -> Result<Option<usize>, Error> {
    let [wanted, start, end] = bind(args, ["sub", "start", "end"])?;
    let wanted = required(string(&wanted)?)?;
    let (within, first) = part(text, &start, &end)?;
    let at = if from_end { within.rfind(&*wanted) } else { within.find(&*wanted) };
    Ok(at.map(|at| first + within[..at].chars().count()))
}

/// `text[start:end]`, and the index of its first character.
fn part<'a>(text: &'a str, start: &Option<Value>, end: &Option<Value>) -> Result<(&'a str, usize), Error> {
    let length = text.chars().count() as i64;
    let bound = |index: Option<i64>, default: i64| {
        let index = index.unwrap_or(default);
        (if index < 0 { index + length } else { index }).clamp(0, length) as usize
    };
    let (start, end) = (bound(integer(start)?, 0), bound(integer(end)?, length));
    let byte = |index: usize| text.char_indices().nth(index).map_or(text.len(), |(at, _)| at);
    Ok((text.get(byte(start)..byte(end)).unwrap_or_default(), start))
}

/// One string, or those of a tuple.
fn affixes_of(affixes: Value) -> Result<Vec<String>, Error> {
    if let Some(affix) = affixes.as_str() {
        return Ok(vec![affix.to_owned()]);
    }
    if !affixes.is_tuple() {
        return Err(error("startswith and endswith take a string or a tuple of strings"));
    }
    let affixes = affixes.try_iter()?.map(|affix| string(&Some(affix)).and_then(required));
    affixes.collect()
}
