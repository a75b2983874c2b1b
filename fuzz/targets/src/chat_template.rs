//! Chat templates, rendered over conversations that have all that a template may ask for.

use std::{
    path::Path,
    sync::{Mutex, OnceLock, PoisonError},
};

use lorax_router::{
    chat::{ChatTemplates, TemplateInput},
    tokenizer::ModelTokenizer,
};
use minijinja::{Value, value::Serde};
use serde_json::json;

use crate::{Outcome, must};

/// Renders a template, which is refused if it is no text, does not compile, or refuses all conversations.
pub fn run(bytes: &[u8]) -> Outcome {
    let Ok(source) = std::str::from_utf8(bytes) else { return Outcome::Refused("it is no text".into()) };
    let templates = {
        let mut model = model().lock().unwrap_or_else(PoisonError::into_inner);
        model.chat_templates = [("default".to_owned(), source.to_owned())].into();
        ChatTemplates::new(&model)
    };
    for with_tools in [false, true] {
        templates.answer_format(with_tools);
    }
    let rendered: Vec<_> = conversations().iter().map(|input| templates.render(input)).collect();
    let first_error = rendered.iter().find_map(|one| one.as_ref().err()).cloned();
    match rendered.into_iter().find(Result::is_ok) {
        Some(_) => Outcome::Read,
        None => Outcome::of(first_error.map_or(Ok(()), Err)),
    }
}

/// The tiny model, of which the special tokens are used.
fn model() -> &'static Mutex<ModelTokenizer> {
    static MODEL: OnceLock<Mutex<ModelTokenizer>> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../integration-tests/fixtures/tiny/model");
        Mutex::new(must(ModelTokenizer::load(Path::new(folder), None)))
    })
}

/// A plain chat; one with tools, their calls and documents; and one whose answer is to be continued.
fn conversations() -> &'static [TemplateInput; 3] {
    static INPUTS: OnceLock<[TemplateInput; 3]> = OnceLock::new();
    INPUTS.get_or_init(|| {
        let messages = |list: serde_json::Value| -> Vec<Value> {
            list.as_array().into_iter().flatten().map(|message| Serde(message).into()).collect()
        };
        let plain = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&\n\u{e9}"}]);
        let answered = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I "}]);
        let call = json!({"id": "abcdefghi", "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Paris", "days": 3, "exact": true, "none": null}}});
        let tools = json!([{"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
            {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "{\"rain\": 0.5}"}]);
        let tool = json!([{"type": "function", "function": {"name": "weather", "description": "Tells it",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]);
        let document = json!([{"title": "A", "text": "B"}]);
        [
            TemplateInput {
                messages: messages(plain),
                add_generation_prompt: true,
                ..TemplateInput::default()
            },
            TemplateInput {
                messages: messages(tools),
                tools: Some(Serde(tool).into()),
                documents: Some(Serde(document).into()),
                kwargs: [("enable_thinking".to_owned(), Value::from(true))].into(),
                ..TemplateInput::default()
            },
            TemplateInput {
                messages: messages(answered),
                continue_final_message: true,
                ..TemplateInput::default()
            },
        ]
    })
}
