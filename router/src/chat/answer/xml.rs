//! A call as Qwen3-Coder writes it: `<function=f>`, a `<parameter=p>` for each argument, `</function>`.

use serde_json::Value;

use super::{Events, Tools, call::NotACall};

const FUNCTION: &str = "<function=";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";
const FUNCTION_END: &str = "</function>";

/// Reads one call. Arguments are given out one by one, because the type of each shows at its end.
#[derive(Debug, Default)]
pub(super) struct XmlReader {
    /// Text of the part that is being read.
    text: String,
    function: Option<String>,
    parameter: Option<String>,
    any: bool,
}

impl XmlReader {
    /// Takes a character, and returns whether it is the last one of the call.
    pub(super) fn push(&mut self, c: char, tools: &Tools, events: &mut Events) -> Result<bool, NotACall> {
        self.text.push(c);
        if self.parameter.is_some() {
            self.value(tools, events);
            return Ok(false);
        }
        let text = self.text.trim_start();
        let tag = if self.function.is_none() { FUNCTION } else { PARAMETER };
        if let Some(name) = text.strip_prefix(tag) {
            let Some(name) = name.strip_suffix('>') else { return Ok(false) };
            let name = name.trim().to_owned();
            self.text.clear();
            return self.named(name, tools, events);
        }
        if self.function.is_some() && text == FUNCTION_END {
            events.arguments(if self.any { "}" } else { "{}" });
            events.end();
            return Ok(true);
        }
        let ends = self.function.is_some() && FUNCTION_END.starts_with(text);
        if ends || tag.starts_with(text) { Ok(false) } else { Err(NotACall) }
    }

    fn named(&mut self, name: String, tools: &Tools, events: &mut Events) -> Result<bool, NotACall> {
        if self.function.is_some() {
            self.parameter = Some(name);
        } else if tools.has(&name) {
            events.begin(&name);
            self.function = Some(name);
        } else {
            return Err(NotACall);
        }
        Ok(false)
    }

    /// Gives out an argument whose value is complete.
    fn value(&mut self, tools: &Tools, events: &mut Events) {
        let Some(text) = self.text.strip_suffix(PARAMETER_END) else { return };
        let text = text.strip_prefix('\n').unwrap_or(text);
        let text = text.strip_suffix('\n').unwrap_or(text);
        let (Some(function), Some(parameter)) = (&self.function, self.parameter.take()) else { return };
        let schema = tools.parameter(function, &parameter);
        let value = match serde_json::from_str::<Value>(text) {
            Ok(value) if !is_text(schema, &value) => value,
            _ => Value::from(text),
        };
        let separator = if self.any { ", " } else { "{" };
        self.any = true;
        events.arguments(&format!("{separator}{}: {value}", Value::from(parameter)));
        self.text.clear();
    }
}

/// Returns whether a parameter's text is meant, and not the value that it spells.
fn is_text(schema: Option<&Value>, value: &Value) -> bool {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let allows = |name: &str| allows(schema, name);
    allows("string") && !(allows(kind) || (kind == "integer" && allows("number"))) || kind == "string"
}

/// Returns whether a schema names a type, in itself or in one of its alternatives.
fn allows(schema: Option<&Value>, name: &str) -> bool {
    let Some(schema) = schema else { return name == "string" };
    let named = match &schema["type"] {
        Value::String(one) => one == name,
        Value::Array(several) => several.iter().any(|one| one == name),
        _ => false,
    };
    let lists = ["anyOf", "oneOf"].into_iter().filter_map(|list| schema[list].as_array());
    let listed = schema["enum"].as_array().into_iter().flatten();
    let of_kind = |value: &Value| match name {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        _ => false,
    };
    named || lists.flatten().any(|one| allows(Some(one), name)) || listed.clone().any(of_kind)
}
