//! Messages of a chat, and how chat templates see them.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::unions::Content;
use crate::{
    api::{
        error::ApiError,
        json::{Rest, refuse},
    },
    chat::answer::CallFormat,
};

#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Message {
    pub(super) role: String,
    content: Option<Content>,
    name: Option<String>,
    tool_calls: Option<Vec<ToolCall>>,
    tool_call_id: Option<String>,
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
    #[serde(flatten)]
    rest: Rest,
}

/// A call that the assistant has made.
#[derive(Debug, Deserialize, JsonSchema)]
struct ToolCall {
    id: Option<String>,
    r#type: Option<String>,
    function: Function,
    #[serde(flatten)]
    _rest: Rest,
}

#[derive(Debug, Deserialize, JsonSchema)]
struct Function {
    name: String,
    /// JSON in a string, as OpenAI has it, or an object.
    arguments: Option<Value>,
    #[serde(flatten)]
    _rest: Rest,
}

/// A part of a message's content.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Part {
    r#type: String,
    text: Option<String>,
    #[serde(flatten)]
    _rest: Rest,
}

/// How templates are told of calls.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) format: CallFormat,
    /// Whether arguments are objects, as transformers documents them, or the JSON of these: some templates know nothing
    /// else.
    pub(super) objects: bool,
}

impl Message {
    /// Its text; none if it has something else.
    pub(super) fn text(&self) -> String {
        match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => parts.iter().filter_map(|part| part.text.as_deref()).collect(),
        }
    }

    /// Returns whether it has calls.
    pub(super) fn has_calls(&self) -> bool {
        self.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty())
    }

    /// The message at an index of `messages`.
    pub(super) fn for_template(&self, index: usize, shape: Shape) -> Result<Value, ApiError> {
        let field = |name: &str| format!("messages[{index}].{name}");
        refuse(&self.rest, &format!("messages[{index}]"), |name, value| {
            // What assistants of others have said beside their text, and costs nothing to say again.
            self.role == "assistant" && (name == "annotations" || (name == "refusal" && value == ""))
        })?;
        let role = match self.role.as_str() {
            // OpenAI's newer name.
            "developer" => "system",
            "function" => {
                let problem = "is \"function\": messages of this role are not supported; `tool` is";
                return Err(ApiError::invalid(field("role"), problem));
            }
            role => role,
        };
        let mut message = Map::new();
        message.insert("role".into(), role.into());
        message.insert("content".into(), self.content(role, &field)?.into());
        if let Some(name) = &self.name {
            message.insert("name".into(), name.as_str().into());
        }
        if let Some(reasoning) = self.reasoning_content.as_ref().filter(|_| role == "assistant") {
            message.insert("reasoning_content".into(), reasoning.as_str().into());
        }
        match (&self.tool_call_id, role) {
            (Some(id), "tool") => {
                _ = message.insert("tool_call_id".into(), known_id(id, shape.format).into())
            }
            (None, "tool") => return Err(ApiError::Missing { field: field("tool_call_id") }),
            (Some(_), _) => return Err(ApiError::invalid(field("tool_call_id"), "is for the role `tool`")),
            (None, _) => {}
        }
        if self.has_calls() {
            if role != "assistant" {
                return Err(ApiError::invalid(field("tool_calls"), "are for the role `assistant`"));
            }
            let calls = self.tool_calls.iter().flatten().enumerate();
            let calls =
                calls.map(|(at, call)| call.for_template(&field(&format!("tool_calls[{at}]")), shape));
            message.insert("tool_calls".into(), calls.collect::<Result<Vec<_>, _>>()?.into());
        }
        Ok(message.into())
    }

    fn content(&self, role: &str, field: &dyn Fn(&str) -> String) -> Result<String, ApiError> {
        match &self.content {
            // An assistant may have said nothing.
            None if role == "assistant" => Ok(String::new()),
            None => Err(ApiError::Missing { field: field("content") }),
            Some(Content::Text(text)) => Ok(text.clone()),
            Some(Content::Parts(parts)) => {
                let text = |(at, part): (usize, &Part)| match (part.r#type.as_str(), &part.text) {
                    ("text", Some(text)) => Ok(text.clone()),
                    ("text", None) => Err(ApiError::Missing { field: field(&format!("content[{at}].text")) }),
                    (other, _) => {
                        let problem = format!("is {other:?}: content of type {other:?} is not supported");
                        Err(ApiError::invalid(field(&format!("content[{at}].type")), problem))
                    }
                };
                parts.iter().enumerate().map(text).collect()
            }
        }
    }
}

impl ToolCall {
    fn for_template(&self, field: &str, shape: Shape) -> Result<Value, ApiError> {
        if let Some(kind) = self.r#type.as_deref().filter(|kind| *kind != "function") {
            let problem = format!("is {kind:?}: only calls of type \"function\" are supported");
            return Err(ApiError::invalid(format!("{field}.type"), problem));
        }
        let arguments = match &self.function.arguments {
            None | Some(Value::Null) => json!({}),
            Some(Value::String(text)) if text.trim().is_empty() => json!({}),
            // What a model has written may be no JSON.
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(Value::Object(object)) => Value::Object(object),
                _ => Value::from(text.as_str()),
            },
            Some(Value::Object(object)) => Value::Object(object.clone()),
            Some(_) => {
                let problem = "must be a string of JSON or an object";
                return Err(ApiError::invalid(format!("{field}.function.arguments"), problem));
            }
        };
        let arguments = match (shape.objects, &self.function.arguments) {
            (true, _) => arguments,
            (false, Some(Value::String(text))) if !text.trim().is_empty() => Value::from(text.as_str()),
            (false, _) => Value::from(arguments.to_string()),
        };
        let mut call = json!({"type": "function",
            "function": {"name": self.function.name, "arguments": arguments}});
        if let Some(id) = &self.id {
            call["id"] = known_id(id, shape.format).into();
        }
        Ok(call)
    }
}

/// Mistral's templates refuse ids that do not have nine letters and digits: others get such a one, always the same.
fn known_id(id: &str, format: CallFormat) -> String {
    let known = id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if known || format != CallFormat::Mistral {
        return id.to_owned();
    }
    let digest = Sha256::digest(id);
    digest.iter().take(9).map(|byte| char::from_digit(u32::from(byte % 36), 36).unwrap_or('0')).collect()
}
