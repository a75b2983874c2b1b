//! The tools of a request, which of them may or must be called, and the grammar that follows from it.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::{
    api::error::ApiError,
    chat::answer::{AnswerFormat, CallFormat, Tool, Tools},
    grammar::{Grammar, GrammarSource, Tag, Tagged},
};

/// Tools of one request.
const MAX_TOOLS: usize = 128;
/// Characters of a tool's name.
const MAX_NAME: usize = 256;

/// The fields that say which tools there are.
#[derive(Debug, Default)]
pub(super) struct ToolFields {
    pub(super) tools: Option<Vec<Value>>,
    pub(super) tool_choice: Option<Value>,
    pub(super) parallel_tool_calls: Option<bool>,
}

/// The tools of a request.
#[derive(Debug, Default)]
pub(super) struct ToolUse {
    /// The definitions as templates are told of them; none if nothing may be called.
    pub(super) definitions: Vec<Value>,
    /// Those that may be called.
    callable: Vec<Callable>,
    /// Whether one must be called.
    required: bool,
    pub(super) parallel: bool,
}

#[derive(Debug, Clone)]
struct Callable {
    name: String,
    parameters: Arc<Value>,
    strict: bool,
}

/// The tools that the model may choose.
enum Choice {
    None,
    Any { required: bool },
    These { names: Vec<String>, required: bool },
}

impl ToolFields {
    pub(super) fn read(self) -> Result<ToolUse, ApiError> {
        let definitions = self.tools.unwrap_or_default();
        if definitions.len() > MAX_TOOLS {
            return Err(ApiError::invalid("tools", format!("must have at most {MAX_TOOLS} elements")));
        }
        let tools = definitions.iter().enumerate().map(|(at, tool)| callable(&format!("tools[{at}]"), tool));
        let mut tools = tools.collect::<Result<Vec<_>, _>>()?;
        for (at, tool) in tools.iter().enumerate() {
            if tools[..at].iter().any(|other| other.name == tool.name) {
                let problem = format!("is {:?}, which another tool is called, too", tool.name);
                return Err(ApiError::invalid(format!("tools[{at}].function.name"), problem));
            }
        }
        let parallel = self.parallel_tool_calls != Some(false);
        let required = match choice(self.tool_choice)? {
            Choice::None => return Ok(ToolUse { parallel, ..ToolUse::default() }),
            Choice::Any { required } => required,
            Choice::These { names, required } => {
                if let Some(unknown) = names.iter().find(|name| tools.iter().all(|tool| tool.name != **name))
                {
                    let problem = format!("names {unknown:?}, which is not in `tools`");
                    return Err(ApiError::invalid("tool_choice", problem));
                }
                tools.retain(|tool| names.contains(&tool.name));
                required
            }
        };
        if required && tools.is_empty() {
            return Err(ApiError::invalid("tool_choice", "needs `tools`"));
        }
        Ok(ToolUse { definitions, callable: tools, required, parallel })
    }
}

/// Checks the definition of a tool.
fn callable(field: &str, tool: &Value) -> Result<Callable, ApiError> {
    match &tool["type"] {
        Value::String(kind) if kind == "function" => {}
        Value::Null => return Err(ApiError::Missing { field: format!("{field}.type") }),
        other => {
            let problem = format!("is {other}: only tools of type \"function\" are supported");
            return Err(ApiError::invalid(format!("{field}.type"), problem));
        }
    }
    let Value::Object(function) = &tool["function"] else {
        return Err(ApiError::Missing { field: format!("{field}.function") });
    };
    let within = |name: &str| format!("{field}.function.{name}");
    let get = |name: &str| function.get(name).unwrap_or(&Value::Null);
    let name = match get("name") {
        Value::String(name) => name,
        Value::Null => return Err(ApiError::Missing { field: within("name") }),
        _ => return Err(ApiError::invalid(within("name"), "must be a string")),
    };
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:/".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(valid) {
        let problem = format!("must have 1 to {MAX_NAME} letters, digits and characters of `_-.:/`");
        return Err(ApiError::invalid(within("name"), problem));
    }
    let parameters = match get("parameters") {
        Value::Null => json!({"type": "object", "properties": {}}),
        Value::Object(schema) => Value::Object(schema.clone()),
        _ => {
            return Err(ApiError::invalid(within("parameters"), "must be a JSON schema, which is an object"));
        }
    };
    let strict = match get("strict") {
        Value::Null => false,
        Value::Bool(strict) => *strict,
        _ => return Err(ApiError::invalid(within("strict"), "must be true or false")),
    };
    Ok(Callable { name: name.clone(), parameters: Arc::new(parameters), strict })
}

fn choice(given: Option<Value>) -> Result<Choice, ApiError> {
    const FIELD: &str = "tool_choice";
    let unknown = || {
        let problem = "must be \"none\", \"auto\", \"required\", or an object that names a function";
        ApiError::invalid(FIELD, problem)
    };
    let name = |tool: &Value| {
        let name = tool["function"]["name"].as_str().or_else(|| tool["name"].as_str());
        let function = tool["type"] == "function";
        name.filter(|_| function).map(str::to_owned).ok_or_else(unknown)
    };
    let mode = |mode: &str| match mode {
        "auto" => Ok(false),
        "required" | "any" => Ok(true),
        _ => Err(unknown()),
    };
    match given {
        None | Some(Value::Null) => Ok(Choice::Any { required: false }),
        Some(Value::String(text)) if text == "none" => Ok(Choice::None),
        Some(Value::String(text)) => Ok(Choice::Any { required: mode(&text)? }),
        Some(object) if object["type"] == "allowed_tools" => {
            let allowed =
                if object["allowed_tools"].is_object() { &object["allowed_tools"] } else { &object };
            let names = allowed["tools"].as_array().ok_or_else(unknown)?.iter().map(name);
            let required = mode(allowed["mode"].as_str().ok_or_else(unknown)?)?;
            Ok(Choice::These { names: names.collect::<Result<_, _>>()?, required })
        }
        Some(object) => Ok(Choice::These { names: vec![name(&object)?], required: true }),
    }
}

impl ToolUse {
    /// The tools that calls are looked for.
    pub(super) fn callable(&self) -> Tools {
        let tool = |tool: &Callable| Tool { name: tool.name.clone(), parameters: (*tool.parameters).clone() };
        Tools::new(self.callable.iter().map(tool).collect())
    }

    /// The grammar of an answer in which a tool must be called, or in which calls of strict tools are marked.
    pub(super) fn grammar(&self, format: &AnswerFormat, template: &str, prompt: &str) -> Option<Grammar> {
        let strict = self.callable.iter().any(|tool| tool.strict);
        if !self.required && !strict {
            return None;
        }
        let thinks = format.thinking.filter(|(begin, _)| prompt.trim_end().ends_with(begin));
        let tag = |tool: &Callable| {
            let name = &tool.name;
            let (trigger, begin, end) = match format.calls {
                CallFormat::Mistral if template.contains("[ARGS]") => {
                    ("[TOOL_CALLS]", format!("[TOOL_CALLS]{name}[ARGS]"), "")
                }
                CallFormat::Mistral => {
                    ("[TOOL_CALLS]", format!("[TOOL_CALLS][{{\"name\": \"{name}\", \"arguments\": "), "}]")
                }
                CallFormat::Tagged => (
                    "<tool_call>",
                    format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": "),
                    "}\n</tool_call>",
                ),
                CallFormat::Harmony => (
                    "<|channel|>",
                    format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"),
                    "",
                ),
                CallFormat::Llama => ("{", format!("{{\"name\": \"{name}\", \"parameters\": "), "}"),
                CallFormat::Json => ("{", format!("{{\"name\": \"{name}\", \"arguments\": "), "}"),
            };
            let schema = match self.required || tool.strict {
                true => tool.parameters.clone(),
                false => Arc::new(json!({"type": "object"})),
            };
            match thinks.filter(|_| self.required) {
                Some((_, close)) => Tag {
                    trigger: close.into(),
                    begin: format!("{close}\n\n{begin}"),
                    schema,
                    end: end.into(),
                },
                None => Tag { trigger: trigger.into(), begin, schema, end: end.into() },
            }
        };
        let single = !self.parallel || format.calls == CallFormat::Harmony || thinks.is_some();
        let tagged = Tagged {
            tags: self.callable.iter().map(tag).collect(),
            free_text: !self.required || thinks.is_some(),
            at_least: u32::from(self.required),
            at_most: (self.required && single).then_some(1),
            separator: match format.calls {
                CallFormat::Llama => "; ".into(),
                CallFormat::Tagged | CallFormat::Json => "\n".into(),
                CallFormat::Mistral | CallFormat::Harmony => String::new(),
            },
        };
        // Without a mark nothing tells that a call begins.
        let marked = matches!(format.calls, CallFormat::Mistral | CallFormat::Tagged);
        let field = if self.required { "tool_choice" } else { "tools" };
        (self.required || marked).then(|| Grammar::new(field, GrammarSource::Tagged(tagged)))
    }

    /// Tells a model of tools whose template knows of none: in words, in front of the first message. Calls and results
    /// become messages that every template knows.
    pub(super) fn tell_in_words(&self, messages: Vec<Value>) -> Vec<Value> {
        let mut messages: Vec<Value> = messages.into_iter().map(in_words).collect();
        if self.definitions.is_empty() {
            return messages;
        }
        let functions = self.definitions.iter().map(|tool| format!("{}\n", tool["function"]));
        let words = format!(
            "You can call these functions. Each is described by a line of JSON, with a schema of its parameters:\n{}\
             To call a function, answer with nothing but a JSON object of this form:\n\
             {{\"name\": \"the function's name\", \"arguments\": {{…}}}}\n\
             For several calls, answer with a list of such objects. If no function is needed, answer as usual.",
            functions.collect::<String>()
        );
        if let Some(first) = messages.first_mut() {
            let before = first["content"].as_str().unwrap_or_default();
            let (content, role) = match first["role"] == "system" {
                true => (format!("{before}\n\n{words}"), "system"),
                false => (format!("{words}\n\n{before}"), "user"),
            };
            if first["role"] == role {
                first["content"] = content.into();
            } else {
                messages.insert(0, json!({"role": "user", "content": words}));
            }
        }
        messages
    }
}

/// A message without calls and results.
fn in_words(message: Value) -> Value {
    let Value::Object(mut message) = message else { return message };
    if let Some(Value::Array(calls)) = message.remove("tool_calls") {
        let call = |call: &Value| {
            let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
            json!({"name": name, "arguments": arguments}).to_string()
        };
        let calls = calls.iter().map(call).collect::<Vec<_>>().join("\n");
        let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
        let content = if content.is_empty() { calls } else { format!("{content}\n{calls}") };
        message.insert("content".into(), content.into());
    }
    if message.get("role").is_some_and(|role| role == "tool") {
        let content = message.get("content").and_then(Value::as_str).unwrap_or_default();
        let name = message.get("name").and_then(Value::as_str);
        let of = name.map(|name| format!(" of {name}")).unwrap_or_default();
        return json!({"role": "user", "content": format!("Result{of}:\n{content}")});
    }
    Value::Object(Map::from_iter(message))
}
