//! Bodies of `/v1/responses`, and the chats that they ask for.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::names::Names;
use crate::{
    api::{
        error::{ApiError, Dialect},
        json::{Rest, refuse},
    },
    server::accept::Body,
};

/// Body of `/v1/responses`. Fields that are not named here are those of chats.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ResponsesRequest {
    input: Option<Input>,
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    text: Option<Map<String, Value>>,
    reasoning: Option<Map<String, Value>>,
    include: Option<Vec<String>>,
    truncation: Option<String>,
    background: Option<bool>,
    /// A bound on calls of tools that the server runs itself, of which there are none.
    max_tool_calls: Option<u32>,
    #[serde(flatten)]
    rest: Rest,
}

/// The chat that a request asks for.
pub(super) struct Asked {
    /// Its body.
    pub(super) chat: Rest,
    /// The fields of the request that the response repeats.
    pub(super) told: Value,
    pub(super) names: Names,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "invalid type: expected a string or a list of items")]
enum Input {
    Text(String),
    Items(Vec<Value>),
}

impl Body for ResponsesRequest {
    const DIALECT: Dialect = Dialect::OpenAi;
}

/// Fields of chats that a response does not have, or that need what is not kept.
const UNKNOWN: [&str; 16] = [
    "messages",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
    "logprobs",
    "reasoning_effort",
    "stop",
    "echo",
    "continue_final_message",
    "add_generation_prompt",
    "functions",
    "function_call",
    "previous_response_id",
    "conversation",
    "prompt",
];

impl ResponsesRequest {
    /// The chat that is asked for.
    pub(super) fn into_chat(mut self) -> Result<Asked, ApiError> {
        let asks = |name: &str| self.rest.get(name).is_some_and(|value| !value.is_null());
        if let Some(name) = UNKNOWN.into_iter().find(|name| asks(name)) {
            return Err(ApiError::Unsupported { field: name.into() });
        }
        if self.background == Some(true) {
            return Err(ApiError::Unsupported { field: "background".into() });
        }
        if self.truncation.as_deref().is_some_and(|value| value != "disabled") {
            return Err(ApiError::Unsupported { field: "truncation".into() });
        }
        let told = self.told();
        let mut chat = std::mem::take(&mut self.rest);
        chat.retain(|name, _| !UNKNOWN.contains(&name.as_str()));
        let (messages, names) = self.messages()?;
        chat.insert("messages".into(), messages.into());
        let mut insert = |name: &str, value: Value| _ = chat.insert(name.into(), value);
        insert("max_completion_tokens", self.max_output_tokens.into());
        let tools = self.tools.take().unwrap_or_default().into_iter().enumerate();
        insert("tools", tools.map(|(at, tool)| nested(at, tool)).collect::<Result<Vec<_>, _>>()?.into());
        if let Some(choice) = self.tool_choice.take() {
            insert("tool_choice", choice);
        }
        if let Some(mut text) = self.text.take() {
            if let Some(format) = text.remove("format").filter(|format| !format.is_null()) {
                insert("response_format", chat_format(format));
            }
            refuse(&text, "text", |name, _| name == "verbosity")?;
        }
        if let Some(mut reasoning) = self.reasoning.take() {
            insert("reasoning_effort", reasoning.remove("effort").unwrap_or_default());
            // There are no summaries: thoughts are told as they are.
            refuse(&reasoning, "reasoning", |name, _| name == "summary" || name == "generate_summary")?;
        }
        let mut logprobs = chat.get("top_logprobs").is_some_and(|value| !value.is_null() && *value != 0);
        for include in self.include.iter().flatten() {
            match include.as_str() {
                "message.output_text.logprobs" => logprobs = true,
                // Thoughts are not secret, so that there is nothing to encrypt.
                "reasoning.encrypted_content" => {}
                other => {
                    return Err(ApiError::invalid(
                        "include",
                        format!("has {other:?}, which is not supported"),
                    ));
                }
            }
        }
        chat.insert("logprobs".into(), logprobs.into());
        Ok(Asked { chat, told, names })
    }

    /// The fields that the response repeats.
    fn told(&self) -> Value {
        let rest = |name: &str, default: Value| {
            self.rest.get(name).filter(|value| !value.is_null()).cloned().unwrap_or(default)
        };
        let with_defaults = |defaults: Value, given: &Option<Map<String, Value>>| {
            let Value::Object(mut fields) = defaults else { return Value::Null };
            fields
                .extend(given.clone().unwrap_or_default().into_iter().filter(|(_, value)| !value.is_null()));
            Value::Object(fields)
        };
        json!({
            "background": false,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": rest("metadata", json!({})),
            "parallel_tool_calls": rest("parallel_tool_calls", true.into()),
            "previous_response_id": null,
            "prompt_cache_key": rest("prompt_cache_key", Value::Null),
            "reasoning": with_defaults(json!({"effort": null, "summary": null}), &self.reasoning),
            "safety_identifier": rest("safety_identifier", Value::Null),
            "service_tier": "default",
            "store": false,
            "temperature": rest("temperature", 1.0.into()),
            "text": with_defaults(json!({"format": {"type": "text"}}), &self.text),
            "tool_choice": self.tool_choice.clone().unwrap_or_else(|| "auto".into()),
            "tools": self.tools.clone().unwrap_or_default(),
            "top_logprobs": rest("top_logprobs", 0.into()),
            "top_p": rest("top_p", 1.0.into()),
            "truncation": "disabled",
            "user": rest("user", Value::Null),
        })
    }

    /// The messages of the chat, and where each of them comes from.
    fn messages(&mut self) -> Result<(Vec<Value>, Names), ApiError> {
        let mut messages: Vec<Value> = Vec::new();
        let mut names = Names::default();
        if let Some(instructions) = &self.instructions {
            messages.push(json!({"role": "system", "content": instructions}));
            names.push("instructions".into());
        }
        let mut thoughts = None;
        match self.input.take() {
            None => return Err(ApiError::Missing { field: "input".into() }),
            Some(Input::Text(text)) => {
                messages.push(json!({"role": "user", "content": text}));
                names.push("input".into());
            }
            Some(Input::Items(items)) if items.is_empty() => {
                return Err(ApiError::invalid("input", "cannot be empty"));
            }
            Some(Input::Items(items)) => {
                for (at, item) in items.into_iter().enumerate() {
                    let before = messages.len();
                    add(&format!("input[{at}]"), &item, &mut messages, &mut thoughts)?;
                    (before..messages.len()).for_each(|_| names.push(format!("input[{at}]")));
                }
            }
        }
        Ok((messages, names))
    }
}

/// Refuses fields of an item that nothing is done for.
fn check(field: &str, item: &Value, known: &[&str]) -> Result<(), ApiError> {
    let Value::Object(fields) = item else {
        return Err(ApiError::Type { field: field.into(), problem: "must be an object".into() });
    };
    refuse(fields, field, |name, _| ["type", "id", "status"].contains(&name) || known.contains(&name))
}

/// Adds an item to the messages. What the assistant has thought belongs to the message that follows.
fn add(
    field: &str,
    item: &Value,
    messages: &mut Vec<Value>,
    thoughts: &mut Option<String>,
) -> Result<(), ApiError> {
    let text = |name: &str| match &item[name] {
        Value::String(text) => Ok(text.as_str()),
        Value::Null => Err(ApiError::Missing { field: format!("{field}.{name}") }),
        _ => Err(ApiError::invalid(format!("{field}.{name}"), "must be a string")),
    };
    match item["type"].as_str() {
        None | Some("message") => {
            check(field, item, &["role", "content", "phase"])?;
            let mut message =
                json!({"role": text("role")?, "content": content(field, "content", &item["content"])?});
            if message["role"] == "assistant"
                && let Some(thoughts) = thoughts.take()
            {
                message["reasoning_content"] = thoughts.into();
            }
            messages.push(message);
        }
        Some("function_call") => {
            check(field, item, &["call_id", "name", "arguments", "parsed_arguments"])?;
            let call = json!({"id": text("call_id")?, "type": "function",
                "function": {"name": text("name")?, "arguments": text("arguments")?}});
            if messages.last().is_none_or(|last| last["role"] != "assistant") || thoughts.is_some() {
                let mut message = json!({"role": "assistant", "content": ""});
                if let Some(thoughts) = thoughts.take() {
                    message["reasoning_content"] = thoughts.into();
                }
                messages.push(message);
            }
            if let Some(last) = messages.last_mut() {
                match last["tool_calls"].as_array_mut() {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                }
            }
        }
        Some("function_call_output") => {
            check(field, item, &["call_id", "name", "output"])?;
            let output = content(field, "output", &item["output"])?;
            messages.push(json!({"role": "tool", "tool_call_id": text("call_id")?, "content": output}));
        }
        Some("reasoning") => {
            check(field, item, &["summary", "content", "encrypted_content"])?;
            let parts = item["content"].as_array().into_iter().flatten();
            let text: String = parts.filter_map(|part| part["text"].as_str()).collect();
            *thoughts = Some(text).filter(|text| !text.is_empty());
        }
        Some(other) => {
            let problem = format!("is {other:?}: items of this type are not supported");
            return Err(ApiError::invalid(format!("{field}.type"), problem));
        }
    }
    Ok(())
}

/// The text of a content.
fn content(field: &str, name: &str, content: &Value) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let text = |(at, part): (usize, &Value)| {
                let within = format!("{field}.{name}[{at}]");
                match part["type"].as_str() {
                    Some("input_text" | "output_text" | "text") => match part["text"].as_str() {
                        Some(text) => Ok(text.to_owned()),
                        None => Err(ApiError::Missing { field: format!("{within}.text") }),
                    },
                    Some("refusal") => Ok(part["refusal"].as_str().unwrap_or_default().to_owned()),
                    Some(other) => {
                        let problem = format!("is {other:?}: content of this type is not supported");
                        Err(ApiError::invalid(format!("{within}.type"), problem))
                    }
                    None => Err(ApiError::Missing { field: format!("{within}.type") }),
                }
            };
            parts.iter().enumerate().map(text).collect()
        }
        Value::Null => Err(ApiError::Missing { field: format!("{field}.{name}") }),
        _ => Err(ApiError::invalid(format!("{field}.{name}"), "must be a string or a list of parts")),
    }
}

/// The definition of a tool as chats have it.
fn nested(at: usize, tool: Value) -> Result<Value, ApiError> {
    let Value::Object(mut tool) = tool else {
        return Err(ApiError::invalid(format!("tools[{at}]"), "must be an object"));
    };
    let kind = tool.remove("type").unwrap_or_default();
    if kind == "function" && !tool.contains_key("function") {
        return Ok(json!({"type": kind, "function": tool}));
    }
    tool.insert("type".into(), kind);
    Ok(Value::Object(tool))
}

/// A format as chats have it.
fn chat_format(format: Value) -> Value {
    match format {
        Value::Object(mut format) if format.get("type").is_some_and(|kind| kind == "json_schema") => {
            format.remove("type");
            json!({"type": "json_schema", "json_schema": format})
        }
        other => other,
    }
}
