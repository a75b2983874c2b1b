//! Reads bodies, and says what is wrong with them in words that name the field.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, error::Category};
use serde_path_to_error::Segment;

use super::error::ApiError;

/// Fields of an object that no other field of its type took.
pub(crate) type Rest = Map<String, Value>;

/// Reads a body, which is an object. A list is refused here, because some types would take its elements for their fields,
/// one after the other.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    if body.trim_ascii_start().starts_with(b"[") {
        let problem = "invalid type: list, expected an object".into();
        return Err(ApiError::Type { field: String::new(), problem });
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed: T = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let field = field_name(error.path());
        explain(field, error.inner())
    })?;
    json.end().map_err(|error| ApiError::Malformed(error.to_string()))?;
    Ok(parsed)
}

/// Refuses fields that nothing is done for, by name. A null and an empty list ask for nothing. `within` is the object
/// that has them; empty for the body.
pub(crate) fn refuse(
    rest: &Rest,
    within: &str,
    harmless: impl Fn(&str, &Value) -> bool,
) -> Result<(), ApiError> {
    let nothing = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    match rest.iter().find(|(name, value)| !nothing(value) && !harmless(name, value)) {
        Some((name, _)) => Err(ApiError::Unsupported { field: join(within, name) }),
        None => Ok(()),
    }
}

fn join(object: &str, field: &str) -> String {
    if object.is_empty() { field.to_owned() } else { format!("{object}.{field}") }
}

/// The name of a field as documents write it: `messages[3].content`.
fn field_name(path: &serde_path_to_error::Path) -> String {
    let mut name = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => name += &format!("[{index}]"),
            Segment::Map { key } => name = join(&name, key),
            Segment::Enum { variant } => name = join(&name, variant),
            Segment::Unknown => {}
        }
    }
    own_name(&name).to_owned()
}

/// LoRAX's `parameters` are known by their own names.
fn own_name(name: &str) -> &str {
    name.strip_prefix("parameters.").unwrap_or(name)
}

/// The words of serde for types, and ours.
const TYPES: [(&str, &str); 8] = [
    ("f32", "a number"),
    ("f64", "a number"),
    ("u32", "an integer from 0 to 4294967295"),
    ("u64", "an integer from 0 to 18446744073709551615"),
    ("usize", "a non-negative integer"),
    ("i64", "an integer"),
    ("a sequence", "a list"),
    ("a map", "an object"),
];

fn explain(field: String, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    if error.classify() != Category::Data {
        return ApiError::Malformed(message);
    }
    // The field's name tells the place better.
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = message.strip_suffix(&place).unwrap_or(&message);
    let missing = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
    if let Some(missing) = missing {
        return ApiError::Missing { field: join(&field, missing) };
    }
    let twice = message.strip_prefix("duplicate field `").and_then(|rest| rest.strip_suffix('`'));
    if let Some(twice) = twice {
        return ApiError::invalid(own_name(&join(&field, twice)).to_owned(), "is given twice");
    }
    let problem = match message.rsplit_once(", expected ") {
        Some((found, expected)) => format!("{}, expected {}", found_words(found), expected_words(expected)),
        None => message.to_owned(),
    };
    ApiError::Type { field, problem }
}

fn found_words(found: &str) -> &str {
    match found {
        "invalid type: map" => "invalid type: object",
        "invalid type: sequence" => "invalid type: list",
        other => other,
    }
}

fn expected_words(expected: &str) -> &str {
    let known = TYPES.iter().find(|(serde, _)| *serde == expected);
    known.map_or(if expected.starts_with("struct ") { "an object" } else { expected }, |(_, words)| words)
}
