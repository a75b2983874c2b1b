//! Slices, which are of the type that they are cut from.

use minijinja::{
    Error, State, Value,
    value::{Tuple, ValueKind},
};

use super::{
    arguments::integer,
    bounds::{BYTES_OF_A_STEP, room_for_items_of},
    python::error,
};

/// `value[start:stop:step]`.
pub(super) fn slice(
    state: &State,
    value: &Value,
    start: Value,
    stop: Value,
    step: Option<Value>,
) -> Result<Value, Error> {
    let bounds = |length: usize| indices(length, [&Some(start), &Some(stop), &step]);
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            state.consume_fuel(text.len() as u64 / BYTES_OF_A_STEP)?;
            Ok(letters(text, &bounds(text.chars().count())?).into())
        }
        ValueKind::Seq => {
            let indices = bounds(value.len().unwrap_or(0))?;
            room_for_items_of(indices.count)?;
            let items = indices.map(|index| value.get_item(&index.into()));
            let items = items.collect::<Result<Vec<_>, _>>()?;
            Ok(if value.is_tuple() { Tuple::from(items).into() } else { items.into() })
        }
        kind => Err(error(format!("{kind} has no slices"))),
    }
}

/// The characters at these indices.
fn letters(text: &str, indices: &Indices) -> String {
    match indices.step {
        1 => text.chars().skip(indices.next as usize).take(indices.count).collect(),
        _ => {
            let letters: Vec<char> = text.chars().collect();
            indices.clone().map(|index| letters[index as usize]).collect()
        }
    }
}

/// Indices within what is sliced.
#[derive(Clone)]
struct Indices {
    next: i64,
    step: i64,
    count: usize,
}

impl Iterator for Indices {
    type Item = i64;

    fn next(&mut self) -> Option<i64> {
        self.count = self.count.checked_sub(1)?;
        let index = self.next;
        self.next = index.saturating_add(self.step);
        Some(index)
    }
}

/// The indices of `[start:stop:step]`; those that lie outside are moved to the next end.
fn indices(length: usize, [start, stop, step]: [&Option<Value>; 3]) -> Result<Indices, Error> {
    let length = length as i64;
    let step = integer(step)?.unwrap_or(1);
    let (first, last) = match step {
        0 => return Err(error("the step of a slice cannot be zero")),
        1.. => (0, length),
        _ => (-1, length - 1),
    };
    let bound = |bound: &Option<Value>, default: i64| -> Result<i64, Error> {
        let bound = integer(bound)?.map(|index| if index < 0 { index.saturating_add(length) } else { index });
        Ok(bound.map_or(default, |index| index.clamp(first, last)))
    };
    let (start, stop) = if step > 0 {
        (bound(start, first)?, bound(stop, last)?)
    } else {
        (bound(start, last)?, bound(stop, first)?)
    };
    let span = if step > 0 { stop - start } else { start - stop };
    let count = if span > 0 { (span as u64 - 1) / step.unsigned_abs() + 1 } else { 0 };
    Ok(Indices { next: start, step, count: count as usize })
}
