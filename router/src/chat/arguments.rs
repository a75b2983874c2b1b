//! Arguments of filters, functions and methods, which Python takes by position or by name.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind, ValueOrKwargs},
};

use super::python::error;

/// All arguments of a call, the named ones as the last value.
pub(super) type Args = Rest<ValueOrKwargs>;

/// Gives each parameter its argument.
pub(super) fn bind<const N: usize>(args: &[Value], names: [&str; N]) -> Result<[Option<Value>; N], Error> {
    let (by_position, by_name) = match args.split_last() {
        Some((last, before)) if last.is_kwargs() => (before, Some(Kwargs::try_from(last.clone())?)),
        _ => (args, None),
    };
    if by_position.len() > N {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let mut bound = [const { None }; N];
    for (slot, value) in bound.iter_mut().zip(by_position) {
        *slot = Some(value.clone());
    }
    let Some(by_name) = by_name else { return Ok(bound) };
    for name in by_name.args() {
        let slot = names.iter().position(|known| *known == name).map(|at| &mut bound[at]);
        match slot {
            Some(slot @ None) => *slot = Some(by_name.peek(name)?),
            Some(_) => return Err(error(format!("two values for the argument {name:?}"))),
            None => return Err(error(format!("unexpected argument {name:?}"))),
        }
    }
    Ok(bound)
}

/// Returns the truth value that an argument has in Python.
pub(super) fn truth(argument: &Option<Value>, default: bool) -> bool {
    argument.as_ref().map_or(default, Value::is_true)
}

/// A whole number; None counts as not given.
pub(super) fn integer(argument: &Option<Value>) -> Result<Option<i64>, Error> {
    let given = argument.as_ref().filter(|value| !value.is_none());
    let integer = |value: &Value| match value.kind() {
        ValueKind::Bool => Ok(value.is_true().into()),
        _ => value.as_i64().ok_or_else(|| error(format!("{} is not an integer", value.kind()))),
    };
    given.map(integer).transpose()
}

/// A string; None counts as not given.
pub(super) fn string(argument: &Option<Value>) -> Result<Option<String>, Error> {
    let given = argument.as_ref().filter(|value| !value.is_none());
    let string = |value: &Value| {
        value.as_str().map(str::to_owned).ok_or_else(|| error(format!("{} is not a string", value.kind())))
    };
    given.map(string).transpose()
}

/// An argument that must be there.
pub(super) fn required<T>(argument: Option<T>) -> Result<T, Error> {
    argument.ok_or_else(|| Error::from(ErrorKind::MissingArgument))
}
