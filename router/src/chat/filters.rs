//! Filters where jinja2's differ from minijinja's.

mod text;
mod urlize;

pub(super) use text::escaped;

use std::borrow::Cow;

use minijinja::{
    Environment, Error, State, Value, filters,
    value::{Tuple, ValueKind},
};

use super::{
    arguments::{Args, bind, integer, required, string, truth},
    attributes::own_attribute,
    bounds::{room_for, room_for_items},
    format::printf,
    json,
    objects::Generator,
    python::{error, repr_of, str_of, strip},
};

/// Adds all.
pub(super) fn add(environment: &mut Environment) {
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("string", |value: &Value| {
        Ok::<_, Error>(if value.kind() == ValueKind::String { value.clone() } else { str_of(value)?.into() })
    });
    environment.add_filter("join", join);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("attr", attribute);
    environment.add_filter("last", last);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("dictsort", |value: &Value, args: Args| {
        let [case_sensitive, by, reverse] = bind(&args.into_values(), ["case_sensitive", "by", "reverse"])?;
        let options = [("case_sensitive", case_sensitive), ("by", by), ("reverse", reverse)];
        filters::dictsort(
            value,
            options.into_iter().filter_map(|(name, value)| Some((name, value?))).collect(),
        )
    });
    add_of_sequences(environment);
    environment.add_filter("unique", |state: &State, value: Value, args: Args| {
        let [case_sensitive, attribute] = bind(&args.into_values(), ["case_sensitive", "attribute"])?;
        let options = [("case_sensitive", case_sensitive), ("attribute", attribute)];
        let options = options.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        Ok::<_, Error>(Generator::value(filters::unique(state, value, options)?.try_iter()?.collect()))
    });
    environment.add_filter("format", |value: &Value, args: Args| {
        let mut args = args.into_values();
        let by_name = args.pop_if(|last| last.is_kwargs());
        printf(&str_of(value)?, &by_name.unwrap_or_else(|| Tuple::from(args).into()))
    });
    environment.add_filter("pprint", |value: &Value| {
        // What is too long is found out before it is sorted.
        repr_of(value)?;
        repr_of(&sorted(value))
    });
    add_generators(environment);
    environment.add_filter("urlize", urlize::urlize);
    text::add(environment);
}

/// Filters that jinja2 writes as generators.
fn add_generators(environment: &mut Environment) {
    fn generator(result: Result<Vec<Value>, Error>) -> Result<Value, Error> {
        result.map(Generator::value)
    }
    type Test<'a> = Option<Cow<'a, str>>;
    environment.add_filter("select", |state: &mut State, value: Value, test: Test, args: Args| {
        generator(filters::select(state, value, test, args))
    });
    environment.add_filter("reject", |state: &mut State, value: Value, test: Test, args: Args| {
        generator(filters::reject(state, value, test, args))
    });
    environment.add_filter(
        "selectattr",
        |state: &mut State, value: Value, name: Cow<'_, str>, test: Test, args: Args| {
            generator(filters::selectattr(state, value, name, test, args))
        },
    );
    environment.add_filter(
        "rejectattr",
        |state: &mut State, value: Value, name: Cow<'_, str>, test: Test, args: Args| {
            generator(filters::rejectattr(state, value, name, test, args))
        },
    );
    environment.add_filter("map", |state: &mut State, value: Value, args: Args| {
        generator(filters::map(state, value, args))
    });
    environment.add_filter("batch", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        Ok::<_, Error>(Generator::value(filters::batch(state, value, count, fill)?.try_iter()?.collect()))
    });
    environment.add_filter("slice", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        Ok::<_, Error>(Generator::value(filters::slice(state, value, count, fill)?.try_iter()?.collect()))
    });
    environment.add_filter("items", |value: &Value| {
        Ok::<_, Error>(Generator::value(filters::items(value)?.try_iter()?.collect()))
    });
}

/// Filters that minijinja lets take None for an empty list.
fn add_of_sequences(environment: &mut Environment) {
    environment.add_filter("list", |value: &Value| elements(value).map(Value::from));
    environment.add_filter("sort", |state: &mut State, value: &Value, args: Args| {
        let [reverse, case_sensitive, attribute] =
            bind(&args.into_values(), ["reverse", "case_sensitive", "attribute"])?;
        let items = elements(value)?;
        if attribute.is_none() {
            comparable(&items)?;
        }
        let options = [("reverse", reverse), ("case_sensitive", case_sensitive), ("attribute", attribute)];
        let options = options.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        filters::sort(state, items.into(), options)
    });
}

/// Python compares numbers with numbers, text with text and lists with lists, and nothing else.
fn comparable(items: &[Value]) -> Result<(), Error> {
    let kind = |value: &Value| match value.kind() {
        ValueKind::Bool => ValueKind::Number,
        kind => kind,
    };
    let odd = items.windows(2).find(|pair| {
        let (first, second) = (kind(&pair[0]), kind(&pair[1]));
        first != second || !matches!(first, ValueKind::Number | ValueKind::String | ValueKind::Seq)
    });
    match odd {
        Some(pair) => Err(error(format!("cannot compare {} with {}", pair[0].kind(), pair[1].kind()))),
        None => Ok(()),
    }
}

/// Elements of anything that Python can iterate over.
fn elements(value: &Value) -> Result<Vec<Value>, Error> {
    if value.is_none() {
        return Err(error("None is not iterable"));
    }
    room_for_items(value)?;
    Ok(value.try_iter()?.collect())
}

fn join(value: &Value, args: Args) -> Result<String, Error> {
    let [separator, attribute] = bind(&args.into_values(), ["d", "attribute"])?;
    let mut items = elements(value)?;
    if let Some(attribute) = attribute.filter(|attribute| !attribute.is_none()) {
        for item in &mut items {
            *item = path(item, &attribute)?;
        }
    }
    let separator = separator.as_ref().map(str_of).transpose()?.unwrap_or_default();
    let mut out = String::new();
    for (index, item) in items.iter().enumerate() {
        out.push_str(if index > 0 { &separator } else { "" });
        out.push_str(&str_of(item)?);
        room_for(out.len())?;
    }
    Ok(out)
}

/// The value that a path of names, such as `address.city`, leads to.
fn path(item: &Value, attribute: &Value) -> Result<Value, Error> {
    let Some(names) = attribute.as_str() else { return item.get_item(attribute) };
    names.split('.').try_fold(item.clone(), |at, name| match name.parse::<i64>() {
        Ok(index) => at.get_item(&index.into()),
        Err(_) => at.get_item(&name.into()),
    })
}

fn default(value: &Value, args: Args) -> Result<Value, Error> {
    let [other, boolean] = bind(&args.into_values(), ["default_value", "boolean"])?;
    let missing = value.is_undefined() || (truth(&boolean, false) && !value.is_true());
    Ok(if missing { other.unwrap_or_else(|| "".into()) } else { value.clone() })
}

/// `int(value)`, for text also by way of a float, or the default.
fn int(value: &Value, args: Args) -> Result<Value, Error> {
    let [default, base] = bind(&args.into_values(), ["default", "base"])?;
    let base = integer(&base)?.unwrap_or(10);
    let parsed = match value.kind() {
        ValueKind::Undefined => return Err(error("undefined is not a number")),
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => {
            f64::try_from(value.clone()).ok().filter(|number| number.is_finite()).map(truncated)
        }
        ValueKind::String => {
            let text = strip(value.as_str().unwrap_or_default()).to_ascii_lowercase();
            whole(&text, base)
                .map(Value::from)
                .or_else(|| text.parse().ok().filter(|number: &f64| number.is_finite()).map(truncated))
        }
        _ => None,
    };
    Ok(parsed.unwrap_or_else(|| default.unwrap_or_else(|| 0.into())))
}

fn truncated(number: f64) -> Value {
    Value::from(number.trunc() as i128)
}

/// A whole number of a base, with the prefix that it may have; base 0 goes by the prefix.
fn whole(text: &str, base: i64) -> Option<i128> {
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)];
    let found = prefixed.iter().find(|(prefix, of)| digits.starts_with(prefix) && [0, *of].contains(&base));
    let (digits, base) = match found {
        Some((prefix, base)) => (&digits[prefix.len()..], *base),
        None => (digits, if base == 0 { 10 } else { base }),
    };
    let grouped = !digits.starts_with('_') && !digits.ends_with('_') && !digits.contains("__");
    let base = u32::try_from(base).ok().filter(|base| (2..=36).contains(base) && grouped)?;
    let unsigned = !digits.starts_with(['-', '+']);
    i128::from_str_radix(&digits.replace('_', ""), base).ok().filter(|_| unsigned).map(|value| sign * value)
}

fn float(value: &Value, args: Args) -> Result<Value, Error> {
    let [default] = bind(&args.into_values(), ["default"])?;
    let parsed = match value.kind() {
        ValueKind::Undefined => return Err(error("undefined is not a number")),
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => strip(value.as_str().unwrap_or_default()).parse().ok(),
        _ => None,
    };
    Ok(parsed.map(Value::from).unwrap_or_else(|| default.unwrap_or_else(|| 0.0.into())))
}

/// Attributes are not items: a plain map has none but its methods.
fn attribute(value: &Value, name: &Value) -> Value {
    let own = name.as_str().and_then(|name| own_attribute(value, name));
    own.unwrap_or_else(|| match value.kind() {
        ValueKind::Map if !super::environment::is_namespace(value) => Value::UNDEFINED,
        ValueKind::Seq | ValueKind::String => Value::UNDEFINED,
        _ => value.get_item(name).unwrap_or_default(),
    })
}

fn last(value: &Value) -> Result<Value, Error> {
    match value.downcast_object_ref::<Generator>() {
        Some(_) => Err(error("a generator has no last element")),
        None => filters::last(value.clone()),
    }
}

fn length(value: &Value) -> Result<usize, Error> {
    match value.downcast_object_ref::<Generator>() {
        Some(_) => Err(error("a generator has no length")),
        None => filters::length(value),
    }
}

/// Maps with sorted keys, as Python's pretty printer writes them.
fn sorted(value: &Value) -> Value {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Map => {
            let mut keys: Vec<Value> = items().collect();
            keys.sort();
            Value::from_pairs(keys.into_iter().map(|key| {
                let item = value.get_item(&key).unwrap_or_default();
                (key, sorted(&item))
            }))
        }
        ValueKind::Seq if !value.is_tuple() => items().map(|item| sorted(&item)).collect(),
        _ => value.clone(),
    }
}

/// A parameter that is a string.
fn text_argument(argument: Option<Value>) -> Result<String, Error> {
    required(string(&argument)?)
}
