//! Comparisons, and tests that compare: what Python does not compare is refused.

use minijinja::{
    Environment, Error, State, Value, tests,
    value::{Rest, ValueKind},
};

use super::{
    environment::is_namespace,
    methods,
    objects::Range,
    operators::remainder,
    python::{error, str_of},
};

/// Adds the tests.
pub(super) fn add(environment: &mut Environment) {
    environment
        .add_test("in", |state: &State, item: &Value, container: &Value| contains(state, container, item));
    for (operator, names) in
        [("<", ["lt", "lessthan"]), ("<=", ["le", "<="]), (">", ["gt", "greaterthan"]), (">=", ["ge", ">="])]
    {
        for name in [operator, names[0], names[1]] {
            environment.add_test(name, move |left: &Value, right: &Value| order(left, operator, right));
        }
    }
    environment
        .add_test("odd", |value: &Value| Ok::<_, Error>(remainder(value, &2.into())? == Value::from(1)));
    environment.add_test("even", |value: &Value| is_divisible(value, &2.into()));
    environment.add_test("divisibleby", is_divisible);
    for (name, method) in [("lower", "islower"), ("upper", "isupper")] {
        environment.add_test(name, move |state: &mut State, value: &Value| {
            methods::call(state, &str_of(value)?.into(), method, &[]).map(|is_so| is_so.is_true())
        });
    }
}

/// `a < b < c`, given as its operands with the operators as text between them.
pub(super) fn chain(state: &State, pieces: Rest<Value>) -> Result<bool, Error> {
    for step in pieces.windows(3).step_by(2) {
        let [left, operator, right] = step else { continue };
        let holds = match operator.as_str().unwrap_or_default() {
            "in" => contains(state, right, left)?,
            "not in" => !contains(state, right, left)?,
            "==" => left == right,
            "!=" => left != right,
            operator => order(left, operator, right)?,
        };
        if !holds {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Numbers are ordered among numbers, text among text, lists among lists, and nothing else is.
fn order(left: &Value, operator: &str, right: &Value) -> Result<bool, Error> {
    let kind = |value: &Value| match value.kind() {
        ValueKind::Bool => ValueKind::Number,
        kind => kind,
    };
    let ordered = matches!(kind(left), ValueKind::Number | ValueKind::String | ValueKind::Seq);
    if !ordered || kind(left) != kind(right) || left.is_tuple() != right.is_tuple() {
        return Err(error(format!("{} and {} have no order", left.kind(), right.kind())));
    }
    Ok(match operator {
        "<" => left < right,
        "<=" => left <= right,
        ">" => left > right,
        _ => left >= right,
    })
}

/// `item in container`.
fn contains(state: &State, container: &Value, item: &Value) -> Result<bool, Error> {
    match container.kind() {
        ValueKind::String if item.kind() != ValueKind::String => {
            Err(error(format!("text cannot contain {}", item.kind())))
        }
        ValueKind::Map if !is_namespace(container) => {
            check_hashable(item)?;
            tests::is_in(state, item, container)
        }
        ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Undefined => {
            tests::is_in(state, item, container)
        }
        kind => Err(error(format!("{kind} cannot contain anything"))),
    }
}

/// Refuses what cannot be a key of a map: lists and maps can change.
pub(super) fn check_hashable(value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq if value.is_tuple() => value.try_iter()?.try_for_each(|item| check_hashable(&item)),
        ValueKind::Seq if value.downcast_object_ref::<Range>().is_none() => {
            Err(error("a list cannot be a key"))
        }
        ValueKind::Map if !is_namespace(value) => Err(error("a map cannot be a key")),
        _ => Ok(()),
    }
}

fn is_divisible(value: &Value, by: &Value) -> Result<bool, Error> {
    Ok(remainder(value, by)? == Value::from(0))
}
