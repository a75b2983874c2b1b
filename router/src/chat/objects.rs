//! Python's objects that minijinja has no values for.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    vec,
};

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Enumerator, Kwargs, Object, ObjectRepr, Tuple},
};

use super::{
    arguments::{bind, integer, required},
    python::{error, repr_of},
};

/// Most elements of a range, as in jinja2's sandbox.
const MAX_RANGE: i64 = 100_000;

/// `range(start, stop, step)`.
#[derive(Debug)]
pub(super) struct Range {
    start: i64,
    stop: i64,
    step: i64,
}

impl Range {
    pub(super) fn value(args: &[Value]) -> Result<Value, Error> {
        let [first, second, step] = bind(args, ["start", "stop", "step"])?;
        let first = required(integer(&first)?)?;
        let (start, stop) = integer(&second)?.map_or((0, first), |stop| (first, stop));
        let step = integer(&step)?.unwrap_or(1);
        if step == 0 {
            return Err(error("the step of a range cannot be zero"));
        }
        let range = Range { start, stop, step };
        if range.length() > MAX_RANGE {
            return Err(error(format!("a range has at most {MAX_RANGE} elements")));
        }
        Ok(Value::from_object(range))
    }

    fn length(&self) -> i64 {
        let (span, step) = if self.step > 0 {
            (self.stop.saturating_sub(self.start), self.step)
        } else {
            (self.start.saturating_sub(self.stop), self.step.saturating_neg())
        };
        if span <= 0 { 0 } else { (span - 1) / step + 1 }
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let index = key.as_i64().filter(|index| (0..self.length()).contains(index))?;
        Some(Value::from(self.start + index * self.step))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.length() as usize)
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            1 => write!(out, "range({}, {})", self.start, self.stop),
            step => write!(out, "range({}, {}, {step})", self.start, self.stop),
        }
    }
}

/// `dict.keys()`, `dict.values()` or `dict.items()`.
#[derive(Debug)]
pub(super) struct View {
    /// Its name in Python.
    pub(super) name: &'static str,
    pub(super) items: Vec<Value>,
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let view = self.clone();
        Enumerator::RevIter(Box::new((0..self.items.len()).map(move |at| view.items[at].clone())))
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let items = repr_of(&Value::from(self.items.clone())).map_err(|_| fmt::Error)?;
        write!(out, "{}({items})", self.name)
    }
}

/// What jinja2's filters that work one element at a time return: it is true even if it has no elements, has no
/// length, and can be gone through once.
#[derive(Debug)]
pub(super) struct Generator(Mutex<vec::IntoIter<Value>>);

impl Generator {
    pub(super) fn value(items: Vec<Value>) -> Value {
        Value::from_object(Generator(Mutex::new(items.into_iter())))
    }

    fn next(&self) -> Option<Value> {
        // Nothing panics while it is locked.
        self.0.lock().ok()?.next()
    }
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let generator = self.clone();
        // The length of this iterator is not known in advance.
        Enumerator::Iter(Box::new(std::iter::from_fn(move || generator.next())))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("<generator object>")
    }
}

/// The parameter of a [`Macro`] that tells which of the others have been given.
pub(super) const GIVEN: &str = "__given";

/// A macro with defaults, or one that takes more arguments than it has parameters: those whose body names `varargs` or
/// `kwargs`.
#[derive(Debug)]
pub(super) struct Macro {
    /// The macro, whose last parameters are those of the next two that it takes, and [`GIVEN`].
    pub(super) inner: Value,
    /// Names of the other parameters.
    pub(super) names: Vec<String>,
    pub(super) varargs: bool,
    pub(super) kwargs: bool,
}

impl Macro {
    /// The arguments of the macro itself.
    fn arguments(&self, args: &[Value]) -> Result<Vec<Value>, Error> {
        let (by_position, by_name) = match args.split_last() {
            Some((last, before)) if last.is_kwargs() => (before, Some(Kwargs::try_from(last.clone())?)),
            _ => (args, None),
        };
        let (own, more) = by_position.split_at(by_position.len().min(self.names.len()));
        if !more.is_empty() && !self.varargs {
            return Err(Error::from(ErrorKind::TooManyArguments));
        }
        let (mut named, mut others) = (Vec::new(), Vec::new());
        let mut given = self.names[..own.len()].to_vec();
        for name in by_name.iter().flat_map(Kwargs::args) {
            let value = by_name.as_ref().map_or(Ok(Value::UNDEFINED), |by_name| by_name.peek(name))?;
            let is_own = name == "caller" || self.names.iter().any(|own| own == name);
            if !is_own && !self.kwargs {
                return Err(error(format!("unexpected argument {name:?}")));
            }
            given.push(name.to_owned());
            if is_own { &mut named } else { &mut others }.push((name.to_owned(), value));
        }
        if self.varargs {
            named.push(("varargs".into(), Tuple::from(more.to_vec()).into()));
        }
        if self.kwargs {
            named.push(("kwargs".into(), Value::from_pairs(others)));
        }
        named.push((GIVEN.into(), given.into()));
        Ok([own, &[Value::from(Kwargs::from_iter(named))]].concat())
    }
}

impl Object for Macro {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        Some(match key.as_str()? {
            "arguments" => Tuple::new(self.names.iter().map(Value::from).collect()).into(),
            "catch_varargs" => self.varargs.into(),
            "catch_kwargs" => self.kwargs.into(),
            _ => return self.inner.get_item(key).ok(),
        })
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::NonEnumerable
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        self.inner.call(state, &self.arguments(args)?)
    }
}

/// `cycler(…)`: gives its items one after the other, over and over.
#[derive(Debug)]
pub(super) struct Cycler {
    items: Vec<Value>,
    at: AtomicUsize,
}

impl Cycler {
    pub(super) fn value(items: Vec<Value>) -> Result<Value, Error> {
        if items.is_empty() {
            return Err(error("a cycler needs items"));
        }
        Ok(Value::from_object(Cycler { items, at: AtomicUsize::new(0) }))
    }
}

impl Object for Cycler {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.items[self.at.load(Relaxed)].clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::NonEnumerable
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        let [] = bind(args, [])?;
        match method {
            "next" => {
                let at = self.at.load(Relaxed);
                self.at.store((at + 1) % self.items.len(), Relaxed);
                Ok(self.items[at].clone())
            }
            "reset" => {
                self.at.store(0, Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}
