//! Chats, which the template of the model or of an adapter renders.

use std::{collections::BTreeMap, fmt};

use minijinja::value::Serde;
use serde_json::Value;

use super::{
    messages::{Message, Shape},
    tools::ToolUse,
};
use crate::{
    api::{
        error::ApiError,
        request::{Chat, Prompt, RenderedChat},
    },
    chat::{ChatError, ChatTemplates, TemplateInput},
    chat_events::AnswerSpec,
    text_side::TextSide,
};

/// The variable of chat templates that says how long to think, and the field that sets it.
const REASONING_EFFORT: &str = "reasoning_effort";
/// The variable of other templates, which only says whether to think.
const ENABLE_THINKING: &str = "enable_thinking";

/// What a request says of its chat.
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    pub(super) tool_use: ToolUse,
    pub(super) documents: Option<Vec<Value>>,
    pub(super) reasoning_effort: Option<String>,
    /// Further variables of the template.
    pub(super) kwargs: BTreeMap<String, Value>,
    /// Whether the prompt ends with the head of an answer, if the request says so.
    pub(super) add_generation_prompt: Option<bool>,
    /// Whether the answer continues the last message.
    pub(super) continues: bool,
    /// Whether the tokenizer adds its own special tokens to those that the template writes.
    pub(super) add_special_tokens: bool,
    pub(super) include_reasoning: bool,
}

impl fmt::Debug for Conversation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Conversation of {} messages", self.messages.len())
    }
}

impl Conversation {
    /// Refuses what makes no sense to any template.
    pub(super) fn check(&self) -> Result<(), ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::invalid("messages", "cannot be empty"));
        }
        if self.continues && self.add_generation_prompt == Some(true) {
            return Err(ApiError::invalid("continue_final_message", "excludes `add_generation_prompt`"));
        }
        Ok(())
    }

    fn has_tools(&self) -> bool {
        !self.tool_use.definitions.is_empty()
    }

    /// The prompt. A template that cannot make anything of arguments as objects gets them as text.
    fn prompt(&self, chat: &ChatTemplates) -> Result<String, ApiError> {
        let mut input = self.template_input(chat)?;
        let calls = self.messages.iter().any(Message::has_calls);
        let prompt = match self.prompt_with(chat, &mut input, true)? {
            Err(error) if calls => self.prompt_with(chat, &mut input, false)?.map_err(|_| error),
            prompt => prompt,
        };
        prompt.map_err(|error| ApiError::Template(error.to_string()))
    }

    /// The prompt, with arguments of calls as objects or as text.
    fn prompt_with(
        &self,
        chat: &ChatTemplates,
        input: &mut TemplateInput,
        objects: bool,
    ) -> Result<Result<String, ChatError>, ApiError> {
        let format = chat.answer_format(self.has_tools());
        let shape = Shape { format: format.calls, objects };
        let messages = self.messages.iter().enumerate();
        let messages = messages.map(|(i, message)| message.for_template(i, shape));
        let mut messages = messages.collect::<Result<Vec<_>, _>>()?;
        if format.knows_tools {
            let told = Some(&self.tool_use.definitions).filter(|tools| !tools.is_empty());
            input.tools = told.map(|tools| Serde(tools).into());
        } else {
            messages = self.tool_use.tell_in_words(messages);
        }
        input.messages = messages.iter().map(|message| Serde(message).into()).collect();
        Ok(chat.render(input))
    }

    /// The variables that the prompt is rendered with, beside messages and tools.
    fn template_input(&self, chat: &ChatTemplates) -> Result<TemplateInput, ApiError> {
        let mut kwargs = BTreeMap::new();
        if let Some(effort) = &self.reasoning_effort {
            if chat.mentions(REASONING_EFFORT) {
                kwargs.insert(REASONING_EFFORT.to_owned(), effort.as_str().into());
            } else if chat.mentions(ENABLE_THINKING) {
                kwargs.insert(ENABLE_THINKING.to_owned(), (effort != "none").into());
            } else {
                return Err(ApiError::Unsupported { field: REASONING_EFFORT.into() });
            }
        }
        kwargs.extend(self.kwargs.iter().map(|(name, value)| (name.clone(), Serde(value).into())));
        let documents = self.documents.as_ref().filter(|all| !all.is_empty());
        Ok(TemplateInput {
            documents: documents.map(|all| Serde(all).into()),
            kwargs,
            add_generation_prompt: self.add_generation_prompt.unwrap_or(!self.continues),
            continue_final_message: self.continues,
            ..TemplateInput::default()
        })
    }
}

impl Chat for Conversation {
    fn render(&self, side: &TextSide) -> Result<RenderedChat, ApiError> {
        let chat = &side.chat;
        let prompt = self.prompt(chat)?;
        let (format, tools) = (chat.answer_format(self.has_tools()), self.tool_use.callable());
        let grammar = self.tool_use.grammar(&format, chat.source(self.has_tools()), &prompt);
        let marks = side.tokenizer.special_ids(format.marks(!tools.is_empty()));
        let answer = AnswerSpec {
            format,
            tools,
            prompt: prompt.as_str().into(),
            parallel: self.tool_use.parallel,
            include_reasoning: self.include_reasoning,
        };
        // A template writes the special tokens itself.
        let prompt = if self.add_special_tokens { Prompt::Text(prompt) } else { Prompt::Rendered(prompt) };
        Ok(RenderedChat { prompt, grammar, marks, answer: Some(answer) })
    }
}
