//! Functions that rewritten templates call in place of operators.

use minijinja::{Environment, Error, Value, value::ValueKind};

use super::{
    attributes::{attribute, item},
    bounds::room_for_items,
    comparisons,
    environment::is_namespace,
    format::printf,
    objects::Macro,
    python::{error, str_of},
    slices,
};

/// Stands for `left % right`.
pub(super) const REMAINDER: &str = "__remainder";
/// Stands for `left < right` and its like, and for chains of them, with the operators as text between the operands.
pub(super) const COMPARE: &str = "__compare";
/// Stands for `value[start:stop:step]`.
pub(super) const SLICE: &str = "__slice";
/// Makes a list of what minijinja makes of sums and products of lists.
pub(super) const LIST: &str = "__list";
/// Makes text of an operand of `~`.
pub(super) const PRINT: &str = "__print";
/// Refuses what Python does not iterate over.
pub(super) const ITERATE: &str = "__iterate";

/// Gives a macro the arguments that are none of its parameters.
pub(super) const MACRO: &str = "__macro";
/// Stands for `value.name`, with the name as text.
pub(super) const ATTRIBUTE: &str = "__attribute";

/// Stands for `value["name"]`.
pub(super) const ITEM: &str = "__item";

/// Adds all.
pub(super) fn add(environment: &mut Environment) {
    environment.add_function(REMAINDER, remainder);
    environment.add_function(COMPARE, comparisons::chain);
    environment.add_function(SLICE, slices::slice);
    environment.add_function(PRINT, |value: &Value| -> Result<Value, Error> {
        // Text keeps its mark of being safe.
        if value.kind() == ValueKind::String { Ok(value.clone()) } else { Ok(str_of(value)?.into()) }
    });
    environment.add_function(ITERATE, iterate);
    environment.add_function(LIST, list);
    environment.add_function(ATTRIBUTE, attribute);
    environment.add_function(ITEM, item);
    environment.add_function(MACRO, |inner: Value, names: Vec<String>, varargs: bool, kwargs: bool| {
        Value::from_object(Macro { inner, names, varargs, kwargs })
    });
}

/// The items of a loop, or of an assignment to several names. The loop's variables need their number, which minijinja
/// does not know for text and generators.
fn iterate(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::None => Err(error("None is not iterable")),
        ValueKind::Map if is_namespace(&value) => Err(error("a namespace is not iterable")),
        ValueKind::String | ValueKind::Iterable => Ok(value.try_iter()?.collect()),
        _ => Ok(value),
    }
}

/// minijinja iterates over the parts of a sum of lists, and has no list of it.
fn list(value: Value) -> Result<Value, Error> {
    if value.kind() != ValueKind::Iterable || value.len().is_none() {
        return Ok(value);
    }
    room_for_items(&value)?;
    Ok(value.try_iter()?.collect::<Vec<_>>().into())
}

/// `left % right`.
pub(super) fn remainder(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        return Ok(printf(text, right)?.into());
    }
    let number = |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(left) || !number(right) {
        return Err(error(format!("cannot divide {} by {}", left.kind(), right.kind())));
    }
    if let (Ok(left), Ok(right)) = (whole(left), whole(right)) {
        let remainder = left.checked_rem(right).ok_or_else(|| error("division by zero"))?;
        let moved = remainder != 0 && (remainder < 0) != (right < 0);
        return Ok(Value::from(if moved { remainder + right } else { remainder }));
    }
    let (left, right) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
    if right == 0.0 {
        return Err(error("division by zero"));
    }
    let remainder = left % right;
    let moved = remainder != 0.0 && (remainder < 0.0) != (right < 0.0);
    Ok(Value::from(if moved { remainder + right } else { remainder.abs().copysign(right) }))
}

fn whole(value: &Value) -> Result<i128, Error> {
    match value.kind() {
        ValueKind::Bool => Ok(value.is_true().into()),
        _ if value.is_integer() => i128::try_from(value.clone()),
        kind => Err(error(format!("{kind} is not an integer"))),
    }
}
