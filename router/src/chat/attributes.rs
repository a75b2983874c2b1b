//! Attributes of Python's values, where templates name them without a call: methods, and the parts of numbers.

use std::{fmt, sync::Arc};

use minijinja::{
    Error, State, Value,
    value::{Enumerator, Object, ObjectRepr, ValueKind},
};

use super::{environment::is_namespace, methods};

/// Methods of `str`. Each hides nothing: text has no items by name.
const OF_TEXT: &str = "capitalize casefold center count encode endswith expandtabs find format format_map index isalnum \
                       isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle \
                       isupper join ljust lower lstrip maketrans partition removeprefix removesuffix replace rfind \
                       rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title \
                       translate upper zfill";
/// Methods of `dict` that change nothing. They come before items of the same name.
const OF_MAPS: &str = "copy fromkeys get items keys values";
/// Methods of `dict` that change it, which jinja2's sandbox does not give out; nor does it look for items then.
const CHANGE_MAPS: &str = "clear pop popitem setdefault update";
/// Methods of `list` that change nothing.
const OF_LISTS: &str = "copy count index";
/// Methods of `tuple`.
const OF_TUPLES: &str = "count index";
/// Methods of `int` and `float`.
const OF_NUMBERS: &str = "as_integer_ratio conjugate is_integer";
/// The parts of a number.
const PARTS: &str = "denominator imag numerator real";

fn is_among(name: &str, names: &str) -> bool {
    names.split(' ').any(|known| known == name)
}

/// Returns whether an attribute or item of this name needs [`attribute`] or [`item`].
pub(super) fn is_special(name: &str) -> bool {
    [OF_TEXT, OF_MAPS, CHANGE_MAPS, OF_NUMBERS, PARTS].iter().any(|names| is_among(name, names))
}

/// `value.name` without a call.
pub(super) fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    own_attribute(value, name).map_or_else(|| value.get_attr(name), Ok)
}

/// `value["name"]`: attributes are looked for where there is no such item.
pub(super) fn item(value: &Value, name: &str) -> Result<Value, Error> {
    let item = value.get_item(&Value::from(name))?;
    Ok(if item.is_undefined() { own_attribute(value, name).unwrap_or(item) } else { item })
}

/// An attribute that values of this type have in Python; an item is none.
pub(super) fn own_attribute(value: &Value, name: &str) -> Option<Value> {
    let is_method = match value.kind() {
        ValueKind::String => is_among(name, OF_TEXT),
        ValueKind::Map if is_namespace(value) => false,
        ValueKind::Map if is_among(name, CHANGE_MAPS) => return Some(Value::UNDEFINED),
        ValueKind::Map => is_among(name, OF_MAPS),
        ValueKind::Seq if value.is_tuple() => is_among(name, OF_TUPLES),
        ValueKind::Seq => is_among(name, OF_LISTS),
        ValueKind::Number | ValueKind::Bool if is_among(name, PARTS) => return part(value, name),
        ValueKind::Number | ValueKind::Bool => is_among(name, OF_NUMBERS),
        _ => false,
    };
    let method = || Value::from_object(BoundMethod { value: value.clone(), name: name.to_owned() });
    is_method.then(method)
}

fn part(value: &Value, name: &str) -> Option<Value> {
    let whole = value.kind() == ValueKind::Bool || value.is_integer();
    let itself =
        if value.kind() == ValueKind::Bool { Value::from(i64::from(value.is_true())) } else { value.clone() };
    match (name, whole) {
        ("real", _) | ("numerator", true) => Some(itself),
        ("imag", true) => Some(Value::from(0)),
        ("imag", false) => Some(Value::from(0.0)),
        ("denominator", true) => Some(Value::from(1)),
        _ => None,
    }
}

/// A method that has not been called.
#[derive(Debug)]
struct BoundMethod {
    value: Value,
    name: String,
}

impl Object for BoundMethod {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::NonEnumerable
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        methods::call(state, &self.value, &self.name, args)
    }

    /// Python prints the address, too.
    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = match self.value.kind() {
            ValueKind::String => "str",
            ValueKind::Map => "dict",
            ValueKind::Seq if self.value.is_tuple() => "tuple",
            ValueKind::Seq => "list",
            ValueKind::Bool => "bool",
            _ if self.value.is_integer() => "int",
            _ => "float",
        };
        write!(out, "<built-in method {} of {of} object>", self.name)
    }
}
