//! Filters where jinja2's differ from minijinja's.

mod sequences;
mod text;
mod urlize;

pub(super) use sequences::elements;
pub(super) use text::escaped;

use minijinja::{
    Environment, Error, Value, filters,
    value::{Kwargs, Tuple, ValueKind},
};

use super::{
    arguments::{Args, bind, integer, required, string, truth},
    attributes::own_attribute,
    environment::is_namespace,
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
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("attr", attribute);
    environment.add_filter("abs", |value: Value| filters::abs(as_number(value)));
    environment.add_filter("round", |value: Value, args: Args| {
        let [precision, method] = bind(&args.into_values(), ["precision", "method"])?;
        let (precision, method) = (integer(&precision)?, string(&method)?);
        let precision = precision
            .map(i32::try_from)
            .transpose()
            .map_err(|_| error("round: the precision is too large"))?;
        filters::round(
            as_number(value),
            precision,
            method.as_deref(),
            Kwargs::from_iter::<[(&str, Value); 0]>([]),
        )
    });
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    sequences::add(environment);
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
    environment.add_filter("urlize", urlize::urlize);
    text::add(environment);
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
fn attribute(value: &Value, args: Args) -> Result<Value, Error> {
    let [name] = bind(&args.into_values(), ["name"])?;
    let name = text_argument(name)?;
    Ok(match own_attribute(value, &name) {
        Some(own) => own,
        None => match value.kind() {
            ValueKind::Map if !is_namespace(value) => Value::UNDEFINED,
            ValueKind::Seq | ValueKind::String => Value::UNDEFINED,
            ValueKind::Undefined => return Err(error(format!("undefined has no attribute {name:?}"))),
            _ => value.get_item(&name.into()).unwrap_or_default(),
        },
    })
}

fn length(value: &Value) -> Result<usize, Error> {
    let has_none = value.downcast_object_ref::<Generator>().is_some() || is_namespace(value);
    if has_none { Err(error("it has no length")) } else { filters::length(value) }
}

/// What Python takes for a number: truth values are 0 and 1.
fn as_number(value: Value) -> Value {
    if value.kind() == ValueKind::Bool { i64::from(value.is_true()).into() } else { value }
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
