//! Filters of lists and of what else can be iterated over. minijinja lets many take None for an empty list.

use std::borrow::Cow;

use minijinja::{
    Environment, Error, State, Value, filters,
    value::{Kwargs, ValueKind},
};

use super::super::{
    arguments::{Args, bind, integer, required},
    bounds::{room_for, room_for_items},
    comparisons::check_hashable,
    environment::is_namespace,
    objects::Generator,
    python::{error, str_of},
};

/// Adds all.
pub(super) fn add(environment: &mut Environment) {
    environment.add_filter("list", |value: &Value| elements(value).map(Value::from));
    environment.add_filter("first", |value: &Value| iterable(value).and_then(filters::first));
    environment.add_filter("last", last);
    environment.add_filter("join", join);
    environment.add_filter("reverse", |value: &Value| iterable(value).and_then(filters::reverse));
    environment.add_filter("dictsort", |value: &Value, args: Args| {
        filters::dictsort(iterable(value)?, named(args, ["case_sensitive", "by", "reverse"])?)
    });
    environment.add_filter("sort", |state: &State, value: &Value, args: Args| {
        let options = named(args, ["reverse", "case_sensitive", "attribute"])?;
        filters::sort(state, ordered(value, &options)?, options)
    });
    environment.add_filter("min", |state: &State, value: &Value, args: Args| {
        let options = named(args, ["case_sensitive", "attribute"])?;
        filters::min(state, ordered(value, &options)?, options)
    });
    environment.add_filter("max", |state: &State, value: &Value, args: Args| {
        let options = named(args, ["case_sensitive", "attribute"])?;
        filters::max(state, ordered(value, &options)?, options)
    });
    environment.add_filter("sum", sum);
    environment.add_filter("groupby", |value: &Value, args: Args| {
        filters::groupby(
            iterable(value)?.clone(),
            None,
            named(args, ["attribute", "default", "case_sensitive"])?,
        )
    });
    add_generators(environment);
}

/// Filters that jinja2 writes as generators.
fn add_generators(environment: &mut Environment) {
    type Test<'a> = Option<Cow<'a, str>>;
    environment.add_filter("select", |state: &mut State, value: Value, test: Test, args: Args| {
        of_true(value, |value| filters::select(state, value, test, args))
    });
    environment.add_filter("reject", |state: &mut State, value: Value, test: Test, args: Args| {
        of_true(value, |value| filters::reject(state, value, test, args))
    });
    environment.add_filter(
        "selectattr",
        |state: &mut State, value: Value, name: Cow<'_, str>, test: Test, args: Args| {
            of_true(value, |value| filters::selectattr(state, value, name, test, args))
        },
    );
    environment.add_filter(
        "rejectattr",
        |state: &mut State, value: Value, name: Cow<'_, str>, test: Test, args: Args| {
            of_true(value, |value| filters::rejectattr(state, value, name, test, args))
        },
    );
    environment.add_filter("map", |state: &mut State, value: Value, args: Args| {
        of_true(value, |value| filters::map(state, value, args))
    });
    environment.add_filter("unique", |state: &State, value: Value, args: Args| {
        let options = named(args, ["case_sensitive", "attribute"])?;
        let items = elements(&value)?;
        if !options.has("attribute") {
            items.iter().try_for_each(check_hashable)?;
        }
        generator(filters::unique(state, items.into(), options))
    });
    environment.add_filter("batch", |state: &State, value: &Value, args: Args| {
        let [count, fill] = bind(&args.into_values(), ["linecount", "fill_with"])?;
        generator(filters::batch(state, iterable(value)?.clone(), length(&count)?, fill))
    });
    environment.add_filter("slice", |state: &State, value: &Value, args: Args| {
        let [count, fill] = bind(&args.into_values(), ["slices", "fill_with"])?;
        generator(filters::slice(state, iterable(value)?.clone(), length(&count)?, fill))
    });
    environment.add_filter("items", |value: &Value| generator(filters::items(iterable(value)?)));
}

fn generator(items: Result<Value, Error>) -> Result<Value, Error> {
    Ok(Generator::value(items?.try_iter()?.collect()))
}

/// A generator over what a filter makes. Of what is not true it makes nothing, whether that can be iterated over or not.
fn of_true(value: Value, filter: impl FnOnce(Value) -> Result<Vec<Value>, Error>) -> Result<Value, Error> {
    let items = if value.is_true() { filter(iterable(&value)?.clone())? } else { Vec::new() };
    Ok(Generator::value(items))
}

/// Arguments by their names.
fn named<const N: usize>(args: Args, names: [&str; N]) -> Result<Kwargs, Error> {
    let values = bind(&args.into_values(), names)?;
    Ok(names.into_iter().zip(values).filter_map(|(name, value)| Some((name, value?))).collect())
}

/// A number of lists or of their items.
fn length(argument: &Option<Value>) -> Result<usize, Error> {
    let count = required(integer(argument)?)?;
    usize::try_from(count).map_err(|_| error(format!("{count} is not a number of items")))
}

/// Refuses what Python does not iterate over, though minijinja does.
fn iterable(value: &Value) -> Result<&Value, Error> {
    match value.kind() {
        ValueKind::None => Err(error("None is not iterable")),
        _ if is_namespace(value) => Err(error("a namespace is not iterable")),
        _ => Ok(value),
    }
}

/// Elements of anything that Python can iterate over.
pub(in super::super) fn elements(value: &Value) -> Result<Vec<Value>, Error> {
    room_for_items(value)?;
    Ok(iterable(value)?.try_iter()?.collect())
}

/// Elements that have an order, if they are compared themselves. Python compares numbers with numbers, text with text
/// and lists with lists, and nothing else.
fn ordered(value: &Value, options: &Kwargs) -> Result<Value, Error> {
    let kind = |value: &Value| match value.kind() {
        ValueKind::Bool => ValueKind::Number,
        kind => kind,
    };
    let items = elements(value)?;
    let by_itself = options.peek::<Option<Value>>("attribute")?.is_none_or(|attribute| attribute.is_none());
    let odd = items.windows(2).find(|pair| {
        let (first, second) = (kind(&pair[0]), kind(&pair[1]));
        first != second || !matches!(first, ValueKind::Number | ValueKind::String | ValueKind::Seq)
    });
    match odd.filter(|_| by_itself) {
        Some(pair) => Err(error(format!("cannot compare {} with {}", pair[0].kind(), pair[1].kind()))),
        None => Ok(items.into()),
    }
}

fn last(value: &Value) -> Result<Value, Error> {
    match value.downcast_object_ref::<Generator>() {
        Some(_) => Err(error("a generator has no last element")),
        None => filters::last(iterable(value)?.clone()),
    }
}

fn sum(state: &State, value: &Value, args: Args) -> Result<Value, Error> {
    let [attribute, start] = bind(&args.into_values(), ["attribute", "start"])?;
    let items = of_attribute(value, attribute)?;
    if items.iter().any(Value::is_undefined) {
        return Err(error("sum: an element is undefined"));
    }
    filters::sum(state, items.into(), None, start, Kwargs::from_iter::<[(&str, Value); 0]>([]))
}

fn join(value: &Value, args: Args) -> Result<String, Error> {
    let [separator, attribute] = bind(&args.into_values(), ["d", "attribute"])?;
    let separator = separator.as_ref().map(str_of).transpose()?.unwrap_or_default();
    let mut out = String::new();
    for (index, item) in of_attribute(value, attribute)?.iter().enumerate() {
        out.push_str(if index > 0 { &separator } else { "" });
        out.push_str(&str_of(item)?);
        room_for(out.len())?;
    }
    Ok(out)
}

/// The elements, or what they have under a path of names, such as `address.city`.
fn of_attribute(value: &Value, attribute: Option<Value>) -> Result<Vec<Value>, Error> {
    let items = elements(value)?;
    match attribute.filter(|attribute| !attribute.is_none()) {
        None => Ok(items),
        Some(attribute) => items.iter().map(|item| path(item, &attribute)).collect(),
    }
}

fn path(item: &Value, attribute: &Value) -> Result<Value, Error> {
    let Some(names) = attribute.as_str() else { return item.get_item(attribute) };
    names.split('.').try_fold(item.clone(), |at, name| match name.parse::<i64>() {
        Ok(index) => at.get_item(&index.into()),
        Err(_) => at.get_item(&name.into()),
    })
}
