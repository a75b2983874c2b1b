//! Bodies of requests, and what they ask for.

use std::collections::HashMap;

use minijinja::value::Serde;
use sampling::SamplingParams;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    adapter::AdapterRef,
    api::{
        ask::{Ask, Prompt, Rest, refuse},
        error::{ApiError, Dialect},
        generate::random_seed,
    },
    chat::TemplateInput,
    server::{
        App,
        accept::{Body, Caller},
    },
};

/// Fields that both endpoints have.
#[derive(Debug, Deserialize)]
struct Common {
    model: Option<String>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    stop: Option<OneOrMany>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<HashMap<String, f32>>,
    seed: Option<i64>,
    // Beyond OpenAI's:
    adapter_id: Option<String>,
    adapter_source: Option<String>,
    api_token: Option<SecretString>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    repetition_penalty: Option<f32>,
    #[serde(alias = "ignore_eos_token")]
    ignore_eos: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    #[serde(flatten)]
    rest: Rest,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Body of `/v1/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct CompletionRequest {
    #[serde(flatten)]
    common: Common,
    prompt: Prompts,
    max_tokens: Option<u32>,
    logprobs: Option<u32>,
    echo: Option<bool>,
    #[serde(flatten)]
    rest: Rest,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// Body of `/v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatRequest {
    #[serde(flatten)]
    common: Common,
    messages: Vec<Message>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    #[serde(flatten)]
    rest: Rest,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    #[serde(flatten)]
    rest: Rest,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

/// A message as chat templates see it.
#[derive(Debug, Serialize)]
struct Plain {
    role: String,
    content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

/// What the response looks like.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) chat: bool,
    pub(super) model: String,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) logprobs: bool,
    /// Put the prompt in front of the text: its own text where it came as text.
    pub(super) echo: bool,
}

/// Whether a field that we make nothing of has a value that changes nothing here.
fn harmless(name: &str, value: &Value) -> bool {
    match name {
        "user"
        | "metadata"
        | "store"
        | "service_tier"
        | "safety_identifier"
        | "prompt_cache_key"
        | "parallel_tool_calls" => true,
        "n" | "best_of" => value == 1,
        "suffix" => value == "",
        "response_format" => value["type"] == "text",
        // Of no tools.
        "tool_choice" | "function_call" => value == "none" || value == "auto",
        _ => false,
    }
}

impl Common {
    fn check(&self, rest: &Rest) -> Result<(), ApiError> {
        refuse(rest, harmless)?;
        self.stream_options
            .as_ref()
            .map_or(Ok(()), |options| refuse(&options.rest, |name, _| name == "include_obfuscation"))
    }

    /// The adapter: by its own field, else the model's name unless that is the base model's.
    fn adapter(&self, app: &App, caller: &Caller) -> Option<AdapterRef> {
        let named = self.model.clone().filter(|model| *model != app.config.model.id);
        let id = self.adapter_id.clone().or(named);
        app.adapter(id, self.adapter_source.clone(), caller.credential.or_in_body(self.api_token.clone()))
    }

    fn sampling(&self, num_top: u32) -> Result<SamplingParams, ApiError> {
        let bias = self.logit_bias.iter().flatten().map(|(token, bias)| {
            let id = token
                .parse()
                .map_err(|_| ApiError::invalid(format!("`logit_bias`: {token:?} is no token id")))?;
            Ok((id, *bias))
        });
        Ok(SamplingParams {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            typical_p: self.typical_p.unwrap_or(1.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            seed: self.seed.map_or_else(random_seed, i64::cast_unsigned),
            num_top,
            logit_bias: bias.collect::<Result<_, ApiError>>()?,
        })
    }

    fn ask(
        &self,
        app: &App,
        prompt: Prompt,
        caller: &Caller,
        (max_new_tokens, num_top): (Option<u32>, u32),
    ) -> Result<Ask, ApiError> {
        Ok(Ask {
            prompt,
            max_new_tokens,
            stop: match &self.stop {
                None => Vec::new(),
                Some(OneOrMany::One(stop)) => vec![stop.clone()],
                Some(OneOrMany::Many(stops)) => stops.clone(),
            },
            ignore_eos: self.ignore_eos == Some(true),
            adapter: self.adapter(app, caller),
            sampling: self.sampling(num_top)?,
            prompt_logprobs: false,
            truncate: None,
        })
    }

    fn options(&self, app: &App, chat: bool) -> Options {
        let model = self.model.as_ref().filter(|model| !model.is_empty()).unwrap_or(&app.config.model.id);
        Options {
            chat,
            model: model.clone(),
            stream: self.stream == Some(true),
            include_usage: self
                .stream_options
                .as_ref()
                .and_then(|options| options.include_usage)
                .unwrap_or(false),
            logprobs: false,
            echo: false,
        }
    }
}

/// Prompts of one request.
const MAX_PROMPTS: usize = 128;
/// OpenAI's default of `max_tokens`.
const MAX_TOKENS: u32 = 16;

impl Body for CompletionRequest {
    const DIALECT: Dialect = Dialect::OpenAi;
}

impl Body for ChatRequest {
    const DIALECT: Dialect = Dialect::OpenAi;
}

impl CompletionRequest {
    pub(super) fn into_asks(self, app: &App, caller: &Caller) -> Result<(Vec<Ask>, Options), ApiError> {
        let common = &self.common;
        common.check(&self.rest)?;
        let prompts: Vec<Prompt> = match self.prompt {
            Prompts::Text(text) => vec![Prompt::Text(text)],
            Prompts::Tokens(tokens) => vec![Prompt::Tokens(tokens)],
            Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Prompts::TokenLists(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
        };
        if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
            return Err(ApiError::invalid(format!("`prompt` must have 1 to {MAX_PROMPTS} elements")));
        }
        let echo = self.echo == Some(true);
        let lengths = (Some(self.max_tokens.unwrap_or(MAX_TOKENS)), self.logprobs.unwrap_or(0));
        let asks = prompts.into_iter().map(|prompt| {
            let mut ask = common.ask(app, prompt, caller, lengths)?;
            ask.prompt_logprobs = echo && self.logprobs.is_some();
            Ok(ask)
        });
        let asks = asks.collect::<Result<_, ApiError>>()?;
        Ok((asks, Options { logprobs: self.logprobs.is_some(), echo, ..common.options(app, false) }))
    }
}

impl ChatRequest {
    pub(super) fn into_ask(self, app: &App, caller: &Caller) -> Result<(Ask, Options), ApiError> {
        let common = &self.common;
        common.check(&self.rest)?;
        if self.top_logprobs.is_some() && self.logprobs != Some(true) {
            return Err(ApiError::invalid("`top_logprobs` needs `logprobs`"));
        }
        if self.messages.is_empty() {
            return Err(ApiError::invalid("`messages` cannot be empty"));
        }
        let messages = self.messages.into_iter().map(Message::plain).collect::<Result<Vec<_>, _>>()?;
        let messages = messages.iter().map(|message| Serde(message).into()).collect();
        let chat = TemplateInput { messages, add_generation_prompt: true, ..TemplateInput::default() };
        let prompt = app.chat.render(&chat).map_err(|error| ApiError::Template(error.to_string()))?;
        let lengths = (self.max_completion_tokens.or(self.max_tokens), self.top_logprobs.unwrap_or(0));
        let ask = common.ask(app, Prompt::Rendered(prompt), caller, lengths)?;
        Ok((ask, Options { logprobs: self.logprobs == Some(true), ..common.options(app, true) }))
    }
}

impl Message {
    fn plain(self) -> Result<Plain, ApiError> {
        refuse(&self.rest, |_, _| false)?;
        if matches!(self.role.as_str(), "tool" | "function") {
            return Err(ApiError::invalid(format!("messages of role {:?} are not supported", self.role)));
        }
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let text = |part: Part| match (part.r#type.as_str(), part.text) {
                    ("text", Some(text)) => Ok(text),
                    (other, _) => {
                        Err(ApiError::invalid(format!("content of type {other:?} is not supported")))
                    }
                };
                parts.into_iter().map(text).collect::<Result<_, _>>()?
            }
        };
        Ok(Plain { role: self.role, content, name: self.name })
    }
}
