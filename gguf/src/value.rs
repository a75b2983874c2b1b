//! Metadata values and their typed views.

use std::fmt;

/// Longest text that a message quotes, in bytes.
const LONGEST_QUOTE: usize = 64;

/// A metadata value. Integers and floats keep their values, not their widths.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any integer.
    Int(i128),
    /// Any float.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A text.
    Str(String),
    /// An array of integers.
    Ints(Vec<i64>),
    /// An array of floats; doubles are rounded.
    Floats(Vec<f32>),
    /// An array of booleans.
    Bools(Vec<bool>),
    /// An array of texts.
    Strs(Vec<String>),
}

impl Value {
    /// The value's kind and, where it is short, the value, for messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Value::Int(_) => format!("the integer {self}"),
            Value::Float(_) => format!("the float {self}"),
            Value::Bool(_) => format!("the boolean {self}"),
            Value::Str(v) if v.len() <= LONGEST_QUOTE => format!("the text {v:?}"),
            _ => self.to_string(),
        }
    }
}

impl fmt::Display for Value {
    /// The value alone if it is short, otherwise its kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Int(v) => write!(f, "{v}"),
            // Most floats of a file have 32 bits, which take fewer digits.
            Value::Float(v) if f64::from(*v as f32) == *v => write!(f, "{}", *v as f32),
            Value::Float(v) => write!(f, "{v}"),
            Value::Bool(v) => write!(f, "{v}"),
            Value::Str(v) if v.len() <= LONGEST_QUOTE => f.write_str(v),
            Value::Str(_) => f.write_str("a text"),
            Value::Ints(v) => write!(f, "an array of {} integers", v.len()),
            Value::Floats(v) => write!(f, "an array of {} floats", v.len()),
            Value::Bools(v) => write!(f, "an array of {} booleans", v.len()),
            Value::Strs(v) => write!(f, "an array of {} texts", v.len()),
        }
    }
}

/// What a metadata value can be read as. A value that does not fit is not converted.
pub trait FromValue<'a>: Sized {
    /// What is expected, for messages.
    const EXPECTED: &'static str;

    /// The value as this type, or none.
    fn from_value(value: &'a Value) -> Option<Self>;
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a text";

    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::Str(v) = value { Some(v) } else { None }
    }
}

impl FromValue<'_> for u32 {
    const EXPECTED: &'static str = "an integer of 32 bits, not negative";

    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Int(v) = value { u32::try_from(*v).ok() } else { None }
    }
}

impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = "a float";

    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Float(v) = value { Some(*v as f32) } else { None }
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "a boolean";

    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Bool(v) = value { Some(*v) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a [String] {
    const EXPECTED: &'static str = "an array of texts";

    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::Strs(v) = value { Some(v) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a [f32] {
    const EXPECTED: &'static str = "an array of floats";

    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::Floats(v) = value { Some(v) } else { None }
    }
}

impl FromValue<'_> for Vec<i32> {
    const EXPECTED: &'static str = "an array of integers of 32 bits";

    fn from_value(value: &Value) -> Option<Self> {
        let Value::Ints(v) = value else { return None };
        v.iter().map(|x| i32::try_from(*x).ok()).collect()
    }
}
