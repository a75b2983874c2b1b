//! Bounds of what a template may do: templates come with models and adapters, whose authors are not trusted.
//!
//! The engine counts the steps of a template and the bytes that it makes, as fuel. It counts what a function returns
//! when it is there, so functions that make much of little ask for room first. Values that lie deep in each other are
//! refused, because they are printed, compared and dropped by recursion.

use minijinja::{Environment, Error, State, Value, value::ValueKind};

use super::python::error;

/// Steps of one rendering, whatever is rendered.
const STEPS: u64 = 2_000_000;
/// Steps for each byte of what is rendered: templates that go through texts letter by letter take 9.
const STEPS_OF_A_BYTE: u64 = 16;
/// Steps for each two messages: templates that look through the others for each message take 11.
const STEPS_OF_A_PAIR: u64 = 24;
/// Most steps of one rendering.
const MAX_STEPS: u64 = 200_000_000;
/// Bytes that count as one step, as the engine counts them.
pub(super) const BYTES_OF_A_STEP: u64 = 64;
/// Calls of macros and loops within each other.
const MAX_CALLS: usize = 100;
/// The longest text that a function makes, in bytes.
const MAX_TEXT: usize = 16 << 20;
/// The longest list that is assigned or that a function makes.
const MAX_ITEMS: usize = 1 << 17;
/// Lists and maps within each other.
const MAX_DEPTH: usize = 64;
/// Values within a value that are looked at for one step.
const VALUES_OF_A_STEP: u64 = 16;

/// Passes on a value that is assigned, unless it is nested too deeply.
pub(super) const BOUNDED: &str = "__bounded";

/// Bounds what the templates of an environment do.
pub(super) fn add(environment: &mut Environment) {
    environment.set_recursion_limit(MAX_CALLS);
    environment.add_function(BOUNDED, |state: &State, value: Value| {
        check(state, &value, MAX_DEPTH)?;
        Ok::<_, Error>(value)
    });
}

/// Steps for a rendering with these variables.
pub(super) fn steps_for<'a>(messages: usize, variables: impl IntoIterator<Item = &'a Value>) -> u64 {
    let bytes: u64 = variables.into_iter().map(size).sum();
    let pairs = (messages as u64).saturating_pow(2);
    let steps = bytes.saturating_mul(STEPS_OF_A_BYTE).saturating_add(pairs.saturating_mul(STEPS_OF_A_PAIR));
    steps.saturating_add(STEPS).min(MAX_STEPS)
}

/// The bytes of all text in a value, and one for each value.
fn size(value: &Value) -> u64 {
    if let Some(text) = value.as_str() {
        return 1 + text.len() as u64;
    }
    let items = value.try_iter().into_iter().flatten();
    let of_item = |item: Value| match value.kind() {
        ValueKind::Map => size(&item) + value.get_item(&item).map_or(0, |value| size(&value)),
        _ => size(&item),
    };
    1 + items.map(of_item).sum::<u64>()
}

/// Refuses a text of so many bytes before it is made.
pub(super) fn room_for(bytes: usize) -> Result<(), Error> {
    if bytes <= MAX_TEXT { Ok(()) } else { Err(error(format!("a text has at most {MAX_TEXT} bytes"))) }
}

/// Refuses to make a list of what has too many items: sums and products of lists have them without any memory.
pub(super) fn room_for_items(value: &Value) -> Result<(), Error> {
    room_for_items_of(value.len().unwrap_or(0))
}

/// Refuses to make a list of too many items.
pub(super) fn room_for_items_of(count: usize) -> Result<(), Error> {
    if count <= MAX_ITEMS { Ok(()) } else { Err(error(format!("a list has at most {MAX_ITEMS} items"))) }
}

/// Refuses a width or precision, of those in the options of a format, that makes the text too long.
pub(super) fn check_format(options: &str) -> Result<(), Error> {
    let numbers = options.split(|letter: char| !letter.is_ascii_digit()).filter(|number| !number.is_empty());
    for number in numbers {
        room_for(number.parse().unwrap_or(usize::MAX))?;
    }
    Ok(())
}

/// Refuses values that are nested more than `depth` levels deep, and takes the steps to look at all of them.
fn check(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    let has_items = match value.kind() {
        ValueKind::Seq | ValueKind::Map => true,
        // Without a length, it may be a generator, which can be gone through once.
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    };
    if !has_items {
        return Ok(());
    }
    if depth == 0 {
        return Err(error(format!("lists and maps are nested more than {MAX_DEPTH} levels deep")));
    }
    room_for_items(value)?;
    state.consume_fuel(1 + value.len().unwrap_or(0) as u64 / VALUES_OF_A_STEP)?;
    // What prints as a map may have no items, such as a cycler.
    for item in value.try_iter().into_iter().flatten() {
        let item = if value.kind() == ValueKind::Map { value.get_item(&item)? } else { item };
        check(state, &item, depth - 1)?;
    }
    Ok(())
}
