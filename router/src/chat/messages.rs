//! Changes that transformers makes to messages before a template renders them, and to the text after that.

use minijinja::{Value, value::ValueKind};

use super::ChatError;

/// Names under which a message may have its reasoning, the preferred one first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Appended to the text of a message that is to be continued.
const MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

type Message = Vec<(Value, Value)>;

/// Leaves out the fields of messages that are null, and gives reasoning all of its names that templates know.
pub(super) fn prepare(messages: &[Value]) -> Result<Value, ChatError> {
    if messages.is_empty() {
        return Err(ChatError::Render("there are no messages".into()));
    }
    messages
        .iter()
        .map(|message| Ok(to_value(with_reasoning(fields(message)?))))
        .collect::<Result<Vec<_>, _>>()
        .map(Value::from)
}

/// The fields of a message that are not null.
fn fields(message: &Value) -> Result<Message, ChatError> {
    if message.kind() != ValueKind::Map {
        return Err(ChatError::Render("messages must be objects".into()));
    }
    let keys = message.try_iter().map_err(|error| ChatError::Render(error.to_string()))?;
    let fields = keys.map(|key| {
        let value = message.get_item(&key).unwrap_or_default();
        (key, value)
    });
    Ok(fields.filter(|(_, value)| !value.is_none()).collect())
}

fn with_reasoning(mut message: Message) -> Message {
    let find = |message: &Message, name: &str| message.iter().position(|(key, _)| key.as_str() == Some(name));
    let Some(at) = REASONING.iter().find_map(|name| find(&message, name)) else { return message };
    let reasoning = message[at].1.clone();
    let thinking = match find(&message, "thinking") {
        Some(at) => message.remove(at),
        None => ("thinking".into(), reasoning.clone()),
    };
    message.insert(0, thinking);
    match find(&message, "reasoning_content") {
        Some(at) => message[at].1 = reasoning,
        None => message.push(("reasoning_content".into(), reasoning)),
    }
    message
}

fn to_value(message: Message) -> Value {
    minijinja::value::Value::from_pairs(message)
}

/// Puts the mark behind the last message's text; returns that text, too.
pub(super) fn mark_final(messages: Value, source: &str) -> Result<(Value, String), ChatError> {
    let mut messages: Vec<Value> = messages.try_iter().into_iter().flatten().collect();
    let Some(last) = messages.pop() else { return Err(ChatError::Continue("there are no messages")) };
    let mut last = fields(&last)?;
    let content = last.iter_mut().find(|(key, _)| key.as_str() == Some("content"));
    let Some((_, content)) = content else {
        return Err(ChatError::Continue("the final message has no content"));
    };
    if !source.contains("content") {
        return Err(ChatError::Continue("the chat template does not use a message's content"));
    }
    let (marked, text) = mark(content)?;
    *content = marked;
    messages.push(to_value(last));
    Ok((Value::from(messages), text))
}

/// A text, or the last text of a list of parts, with the mark.
fn mark(content: &Value) -> Result<(Value, String), ChatError> {
    const NO_TEXT: ChatError = ChatError::Continue("the final message has no text");
    if let Some(text) = content.as_str() {
        return Ok((format!("{text}{MARK}").into(), text.to_owned()));
    }
    let mut parts: Vec<Value> = content.try_iter().map_err(|_| NO_TEXT)?.collect();
    for part in parts.iter_mut().rev() {
        let Ok(mut fields) = fields(part) else { continue };
        let Some((_, text)) = fields.iter_mut().find(|(key, _)| key.as_str() == Some("text")) else {
            continue;
        };
        let plain = text.as_str().ok_or(NO_TEXT)?.to_owned();
        *text = format!("{plain}{MARK}").into();
        *part = to_value(fields);
        return Ok((Value::from(parts), plain));
    }
    Err(NO_TEXT)
}

/// The text up to the mark. A template that trims the message has trimmed the mark's space, too; then the text ends
/// in no space either.
pub(super) fn cut_at_mark(text: String, unfinished: &str) -> Result<String, ChatError> {
    let at = text.rfind(MARK.trim_end()).filter(|_| text.contains(unfinished.trim()));
    let Some(at) = at else {
        return Err(ChatError::Continue("the chat template changes the final message"));
    };
    let cut = &text[..at];
    Ok(if text[at..].starts_with(MARK) { cut } else { cut.trim_end() }.to_owned())
}
