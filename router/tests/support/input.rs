//! What goldens of chats give to a template.

use std::collections::BTreeMap;

use lorax_router::chat::TemplateInput;
use minijinja::Value;
use serde::Deserialize;

/// The input of a template, as the goldens have it.
#[derive(Clone, Deserialize)]
pub(crate) struct Input {
    messages: Vec<Value>,
    tools: Option<Value>,
    documents: Option<Value>,
    #[serde(default)]
    kwargs: BTreeMap<String, Value>,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
}

impl From<Input> for TemplateInput {
    fn from(input: Input) -> TemplateInput {
        let Input { messages, tools, documents, kwargs, add_generation_prompt, continue_final_message } =
            input;
        TemplateInput { messages, tools, documents, kwargs, add_generation_prompt, continue_final_message }
    }
}
