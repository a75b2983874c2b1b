//! minijinja, set up as transformers sets up jinja2.

use jiff::fmt::{
    StdFmtWrite,
    strtime::{BrokenDownTime, Config},
};
use minijinja::{
    AutoEscape, Environment, Error, State, Value, functions,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args},
};

use super::{
    arguments::Args,
    bounds, comparisons, filters, methods,
    objects::{Cycler, Range},
    operators,
    python::{error, str_of},
};

/// Bytes of a word of `lipsum` with the space behind it, or a little more.
const LONGEST_WORD: usize = 16;

/// An environment with all that chat templates may use.
pub(super) fn new() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, state, value| {
        let escapes = matches!(state.auto_escape(), AutoEscape::Html) && !value.is_safe();
        let text = str_of(value)?;
        out.write_str(&if escapes { filters::escaped(&text) } else { text }).map_err(Error::from)
    });
    bounds::add(&mut environment);
    filters::add(&mut environment);
    operators::add(&mut environment);
    comparisons::add(&mut environment);
    add_tests(&mut environment);
    add_globals(&mut environment);
    Ok(environment)
}

fn add_tests(environment: &mut Environment) {
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && !is_namespace(value) && value.try_iter().is_ok()
    });
    // What has a length and elements by key, as text and maps have.
    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Iterable => false,
        ValueKind::Map => !is_namespace(value),
        kind => matches!(kind, ValueKind::Seq | ValueKind::String | ValueKind::Undefined),
    });
    environment.add_test("mapping", |value: &Value| value.kind() == ValueKind::Map && !is_namespace(value));
    // To call what is undefined fails, but it can be tried.
    environment.add_test("callable", |value: &Value| {
        matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined)
    });
}

fn add_globals(environment: &mut Environment) {
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(error(str_of(message)?))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("range", |args: Args| Range::value(&args.into_values()));
    environment.add_function("dict", |args: Args| dict(&args.into_values()));
    environment.add_function("namespace", |args: Args| namespace(&args.into_values()));
    environment.add_function("cycler", |items: Rest<Value>| Cycler::value(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("lipsum", lipsum);
    environment.add_filter("random", minijinja_contrib::filters::random);
    // What jinja2 does not have, templates may not find.
    environment.remove_global("debug");
    for name in ["split", "lines", "bool", "chain", "zip"] {
        environment.remove_filter(name);
    }
}

/// The local time as `strftime` formats it: without a zone, as Python's `datetime.now()` has none.
fn strftime_now(format: &str) -> Result<String, Error> {
    let without_zone = format.split("%%").map(|part| part.replace("%z", "").replace("%Z", ""));
    let format = without_zone.collect::<Vec<_>>().join("%%");
    let now = BrokenDownTime::from(jiff::Zoned::now().datetime());
    let mut out = String::new();
    // What is no directive stays as it is.
    let lenient = Config::new().lenient(true);
    now.format_with_config(&lenient, &format, &mut StdFmtWrite(&mut out))
        .map_err(|cause| error(cause.to_string()))?;
    Ok(out)
}

/// Paragraphs without meaning, of a length that is checked before they are made.
fn lipsum(state: &mut State, count: Option<usize>, kwargs: Kwargs) -> Result<Value, Error> {
    let most = kwargs.get::<Option<usize>>("max")?.unwrap_or(100);
    let most = most.max(kwargs.get::<Option<usize>>("min")?.unwrap_or(0));
    let by_name = kwargs.get::<Option<usize>>("n")?;
    bounds::room_for(count.or(by_name).unwrap_or(5).saturating_mul(most).saturating_mul(LONGEST_WORD))?;
    minijinja_contrib::globals::lipsum(state, count, kwargs)
}

/// The pairs of a map or of a list of pairs, then those that were given by name.
fn pairs(args: &[Value]) -> Result<Vec<(Value, Value)>, Error> {
    let mut found = Vec::new();
    for arg in args {
        if arg.is_none() || arg.is_undefined() || is_namespace(arg) {
            return Err(error(format!("{} is neither a map nor pairs", arg.kind())));
        }
        for item in arg.try_iter()? {
            if arg.kind() == ValueKind::Map {
                let value = arg.get_item(&item)?;
                found.push((item, value));
            } else {
                let both: Vec<Value> = item.try_iter()?.collect();
                let [key, value] = &both[..] else { return Err(error("dict: an element is not a pair")) };
                found.push((key.clone(), value.clone()));
            }
        }
    }
    let by_name = args.iter().filter(|arg| arg.is_kwargs()).count();
    if args.len() - by_name > 1 {
        return Err(error("at most one argument can be given by position"));
    }
    Ok(found)
}

fn dict(args: &[Value]) -> Result<Value, Error> {
    Ok(Value::from_pairs(pairs(args)?))
}

fn namespace(args: &[Value]) -> Result<Value, Error> {
    let pairs = pairs(args)?;
    if let Some((name, _)) =
        pairs.iter().find(|(name, _)| name.as_str().is_some_and(|name| name.starts_with('_')))
    {
        return Err(error(format!("a namespace cannot have the attribute {name}")));
    }
    new_namespace(Value::from_pairs(pairs))
}

fn new_namespace(values: Value) -> Result<Value, Error> {
    let (values,): (Option<ValueOrKwargs>,) = from_args(&[values])?;
    functions::namespace(values)
}

/// Returns whether this is what `namespace` makes, which is no map for Python. minijinja does not export the type.
pub(super) fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}
