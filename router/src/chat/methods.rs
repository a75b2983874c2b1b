//! Methods that Python's values have.

use minijinja::{Error, ErrorKind, State, Value, value::ValueKind};

use super::{
    arguments::{bind, required},
    bounds::BYTES_OF_A_STEP,
    objects::View,
    python::error,
    strings,
};

/// Calls a method that minijinja does not know.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        // The engine counts the bytes that filters read, and not those that methods read.
        state.consume_fuel(text.len() as u64 / BYTES_OF_A_STEP)?;
    }
    let found = match value.kind() {
        ValueKind::String => strings::call(value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Map => of_map(value, method, args)?,
        ValueKind::Seq => of_sequence(value, method, args)?,
        ValueKind::Number | ValueKind::Bool => of_number(value, method, args)?,
        _ => None,
    };
    match found {
        Some(found) => Ok(found),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn of_map(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let view = |name: &'static str, item: &dyn Fn(Value) -> Value| -> Result<Option<Value>, Error> {
        let [] = bind(args, [])?;
        let items = value.try_iter()?.map(item).collect();
        Ok(Some(Value::from_object(View { name, items })))
    };
    let item = |key: &Value| value.get_item(key).unwrap_or_default();
    match method {
        "keys" => view("dict_keys", &|key| key),
        "values" => view("dict_values", &|key| item(&key)),
        "items" => {
            view("dict_items", &|key| Value::from(minijinja::value::Tuple::from([key.clone(), item(&key)])))
        }
        "get" => {
            let [key, default] = bind(args, ["key", "default"])?;
            let found = item(&required(key)?);
            Ok(Some(if found.is_undefined() { default.unwrap_or_else(|| Value::from(())) } else { found }))
        }
        "copy" => {
            let [] = bind(args, [])?;
            Ok(Some(value.clone()))
        }
        _ => Ok(None),
    }
}

fn of_sequence(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "index" => {
            let [wanted] = bind(args, ["value"])?;
            let wanted = required(wanted)?;
            let at = value.try_iter()?.position(|item| item == wanted);
            Ok(Some(at.ok_or_else(|| error(format!("{wanted} is not in the list")))?.into()))
        }
        "copy" => {
            let [] = bind(args, [])?;
            Ok(Some(value.clone()))
        }
        _ => Ok(None),
    }
}

fn of_number(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let [] = bind(args, [])?;
    let whole = || i128::try_from(value.clone()).map_err(|_| Error::from(ErrorKind::UnknownMethod));
    match method {
        "is_integer" => {
            Ok(Some(f64::try_from(value.clone()).is_ok_and(|number| number.fract() == 0.0).into()))
        }
        "bit_length" if value.is_integer() => {
            Ok(Some((128 - whole()?.unsigned_abs().leading_zeros()).into()))
        }
        _ => Ok(None),
    }
}
