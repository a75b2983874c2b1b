//! Chats to prompts, as transformers' `apply_chat_template` renders them.
//!
//! Chat templates are written for jinja2 in Python and use what Python gives them: its way to print values, its methods
//! of strings and its rules of truth. minijinja has the language; the modules below add what it does otherwise.

pub mod answer;
mod arguments;
mod attributes;
mod bounds;
mod comparisons;
mod environment;
mod filters;
mod format;
mod json;
mod messages;
mod methods;
mod objects;
mod operators;
mod python;
mod slices;
mod strings;
mod syntax;

use std::{
    collections::BTreeMap,
    panic::{self, AssertUnwindSafe},
};

use minijinja::{Environment, Value, value::ValueKind};

use self::answer::AnswerFormat;
use crate::tokenizer::ModelTokenizer;

/// The name of the environment's only template.
const NAME: &str = "chat_template";
/// The template that is used unless another one is better.
const DEFAULT: &str = "default";
/// The template for requests with tools.
const TOOL_USE: &str = "tool_use";

/// The reason that a chat was not rendered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChatError {
    /// The model has none.
    #[error("the model has no chat template")]
    Missing,
    /// The model has templates, but none for this request.
    #[error("the model has no default chat template; its templates are {0}")]
    NoDefault(String),
    /// The template is not valid.
    #[error("the model's chat template does not compile: {0}")]
    Compile(String),
    /// The template failed or refused the messages.
    #[error("{0}")]
    Render(String),
    /// The final message cannot be continued.
    #[error("continue_final_message: {0}")]
    Continue(&'static str),
}

/// The variables that a chat is rendered with.
#[derive(Debug, Clone, Default)]
pub struct TemplateInput {
    /// The messages, each a map as the client sent it.
    pub messages: Vec<Value>,
    /// Definitions of tools, if the request has any.
    pub tools: Option<Value>,
    /// Documents for answers that are grounded in them.
    pub documents: Option<Value>,
    /// Further variables; they go before special tokens of the same name.
    pub kwargs: BTreeMap<String, Value>,
    /// Let the prompt end with the head of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Let the prompt end within the last message, so that the answer continues it.
    pub continue_final_message: bool,
}

/// A model's chat templates.
pub struct ChatTemplates {
    named: BTreeMap<String, Result<Template, ChatError>>,
    special_tokens: BTreeMap<String, Value>,
}

/// One compiled template.
struct Template {
    source: String,
    environment: Environment<'static>,
}

impl ChatTemplates {
    /// Compiles a model's templates. One that is not valid fails the requests that need it, and no others.
    pub fn new(model: &ModelTokenizer) -> ChatTemplates {
        let compile = |(name, source): (&String, &String)| (name.clone(), Template::new(source));
        let special = |(name, text): (&String, &String)| (name.clone(), Value::from(text.as_str()));
        ChatTemplates {
            named: model.chat_templates.iter().map(compile).collect(),
            special_tokens: model.special_tokens.iter().map(special).collect(),
        }
    }

    /// Names of templates that are not valid, with the cause.
    pub fn broken(&self) -> impl Iterator<Item = (&str, &ChatError)> {
        self.named.iter().filter_map(|(name, template)| Some((name.as_str(), template.as_ref().err()?)))
    }

    /// Returns whether the default template mentions a variable.
    pub fn mentions(&self, variable: &str) -> bool {
        let template = self.named.get(DEFAULT).and_then(|template| template.as_ref().ok());
        template.is_some_and(|template| template.source.contains(variable))
    }

    /// The form of the answers to requests with or without tools.
    pub fn answer_format(&self, with_tools: bool) -> AnswerFormat {
        AnswerFormat::of(self.source(with_tools))
    }

    /// The source of the template for requests with or without tools; empty if there is none.
    pub fn source(&self, with_tools: bool) -> &str {
        let for_tools = self.named.get(TOOL_USE).filter(|_| with_tools);
        let template =
            for_tools.or_else(|| self.named.get(DEFAULT)).and_then(|template| template.as_ref().ok());
        template.map_or("", |template| &template.source)
    }

    /// The prompt of a chat.
    pub fn render(&self, input: &TemplateInput) -> Result<String, ChatError> {
        let template = self.choose(input)?;
        let messages = messages::prepare(&input.messages)?;
        if !input.continue_final_message {
            return self.render_messages(template, input, messages);
        }
        if input.add_generation_prompt {
            return Err(ChatError::Continue("it cannot be combined with add_generation_prompt"));
        }
        let (messages, unfinished) = messages::mark_final(messages, &template.source)?;
        let text = self.render_messages(template, input, messages)?;
        messages::cut_at_mark(text, &unfinished)
    }

    /// The template for requests with tools if there is one and the request has some, else the default.
    fn choose(&self, input: &TemplateInput) -> Result<&Template, ChatError> {
        let for_tools = input.tools.as_ref().and_then(|_| self.named.get(TOOL_USE));
        match for_tools.or_else(|| self.named.get(DEFAULT)) {
            Some(template) => template.as_ref().map_err(Clone::clone),
            None if self.named.is_empty() => Err(ChatError::Missing),
            None => {
                let names: Vec<_> = self.named.keys().map(String::as_str).collect();
                Err(ChatError::NoDefault(names.join(", ")))
            }
        }
    }

    fn render_messages(
        &self,
        template: &Template,
        input: &TemplateInput,
        messages: Value,
    ) -> Result<String, ChatError> {
        let failed = |error: minijinja::Error| ChatError::Render(error.to_string());
        let mut variables = self.special_tokens.clone();
        variables.extend(input.kwargs.clone());
        let own = [
            ("messages", messages),
            ("tools", given(&input.tools)),
            ("documents", given(&input.documents)),
            ("add_generation_prompt", input.add_generation_prompt.into()),
        ];
        variables.extend(own.map(|(name, value)| (name.to_owned(), value)));
        let mut environment = template.environment.clone();
        environment.set_fuel(Some(bounds::steps_for(input.messages.len(), variables.values())));
        let found = environment.get_template(NAME).map_err(failed)?;
        // minijinja panics on a few valid templates, such as one that leaves a loop from within `with`.
        let rendered = panic::catch_unwind(AssertUnwindSafe(|| found.render(Value::from(variables))));
        rendered.map_err(|_| ChatError::Render("the template engine failed".into()))?.map_err(failed)
    }
}

impl Template {
    fn new(source: &str) -> Result<Template, ChatError> {
        let failed = |error: minijinja::Error| ChatError::Compile(error.to_string());
        if source.contains(bounds::BOUNDED) {
            return Err(ChatError::Compile(format!("the name {} is reserved", bounds::BOUNDED)));
        }
        let mut environment = environment::new().map_err(failed)?;
        // To jinja2 all line breaks are alike.
        let lines = source.replace("\r\n", "\n").replace('\r', "\n");
        environment.add_template_owned(NAME, syntax::translate(&lines)).map_err(failed)?;
        Ok(Template { source: source.to_owned(), environment })
    }
}

/// A variable that was not given is `None` for a template.
fn given(value: &Option<Value>) -> Value {
    value.clone().filter(|value| value.kind() != ValueKind::Undefined).unwrap_or_else(|| Value::from(()))
}
