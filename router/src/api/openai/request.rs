//! Bodies of requests, and what they ask for.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Arc,
};

use sampling::{Named, SamplingParams};
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    conversation::Conversation,
    drop_placeholder,
    messages::Message,
    tools::ToolFields,
    unions::{Prompts, Stop},
};
use crate::{
    adapter::AdapterRef,
    api::{
        ensemble::{Ensemble, Several},
        error::{ApiError, Dialect},
        group::{Answers, GroupRequest},
        json::{Rest, refuse},
        merged::MergedAdapters,
        request::{FieldNames, Prompt, Report, SequenceRequest},
        structured,
    },
    server::{
        App,
        accept::{Body, Caller},
    },
    text::Ending,
};

/// Answers to one prompt.
const MAX_ANSWERS: usize = 128;
/// OpenAI's default of `max_tokens` for completions.
const MAX_TOKENS: u32 = 16;

/// Declares a body with the fields that both routes have, those of sampling among them.
macro_rules! body {
    (
        { $(#[$meta:meta])* struct $body:ident { $($field:ident: $field_type:ty,)* } }
        $($(#[$doc:meta])* $name:ident: $type:ty { $($row:tt)* })*
    ) => {
        $(#[$meta])*
        #[derive(Debug, Deserialize, JsonSchema)]
        pub(crate) struct $body {
            $($field: $field_type,)*
            model: Option<String>,
            stream: Option<bool>,
            stream_options: Option<StreamOptions>,
            stop: Option<Stop>,
            logit_bias: Option<HashMap<String, f32>>,
            seed: Option<i64>,
            n: Option<usize>,
            // Beyond OpenAI's:
            adapter_id: Option<String>,
            adapter_source: Option<String>,
            merged_adapters: Option<MergedAdapters>,
            ensemble: Option<Ensemble>,
            #[schemars(with = "Option<String>")]
            api_token: Option<SecretString>,
            #[schemars(with = "Option<String>")]
            cache_salt: Option<SecretString>,
            #[serde(alias = "ignore_eos_token")]
            ignore_eos: Option<bool>,
            min_tokens: Option<u32>,
            stop_token_ids: Option<Vec<u32>>,
            include_stop_str_in_output: Option<bool>,
            skip_special_tokens: Option<bool>,
            add_special_tokens: Option<bool>,
            truncate_prompt_tokens: Option<usize>,
            $($(#[$doc])* $name: Option<$type>,)*
            #[serde(flatten)]
            rest: Rest,
        }

        impl Body for $body {
            const DIALECT: Dialect = Dialect::OpenAi;
        }

        impl $body {
            /// Takes the fields that both routes have.
            fn take_common(&mut self) -> Common {
                Common {
                    model: self.model.take().filter(|model| !model.is_empty()),
                    stream: self.stream == Some(true),
                    stream_options: self.stream_options.take().unwrap_or_default(),
                    stop: self.stop.take().unwrap_or_default().0,
                    logit_bias: self.logit_bias.take().unwrap_or_default(),
                    seed: self.seed,
                    n: self.n.unwrap_or(1),
                    adapter_id: self.adapter_id.take(),
                    adapter_source: self.adapter_source.take(),
                    merged_adapters: self.merged_adapters.take(),
                    ensemble: self.ensemble.take(),
                    api_token: self.api_token.take(),
                    cache_salt: self.cache_salt.take(),
                    ignore_eos: self.ignore_eos == Some(true),
                    ending: Ending {
                        min_tokens: self.min_tokens.unwrap_or(0),
                        stop_token_ids: self.stop_token_ids.take().unwrap_or_default(),
                        include_stop: self.include_stop_str_in_output == Some(true),
                        show_special: self.skip_special_tokens == Some(false),
                        marks: Vec::new(),
                    },
                    truncate: self.truncate_prompt_tokens,
                    named: Named { $($name: self.$name),* },
                    rest: mem::take(&mut self.rest),
                }
            }
        }
    };
}

sampling::parameters!(body {
    /// Body of `/v1/completions`.
    struct CompletionRequest {
        prompt: Prompts,
        max_tokens: Option<u32>,
        logprobs: Option<u32>,
        echo: Option<bool>,
        best_of: Option<usize>,
    }
});

sampling::parameters!(body {
    /// Body of `/v1/chat/completions`.
    struct ChatRequest {
        messages: Vec<Message>,
        max_tokens: Option<u32>,
        max_completion_tokens: Option<u32>,
        logprobs: Option<bool>,
        top_logprobs: Option<u32>,
        echo: Option<bool>,
        reasoning_effort: Option<String>,
        // Beyond OpenAI's:
        add_generation_prompt: Option<bool>,
        continue_final_message: Option<bool>,
        chat_template_kwargs: Option<BTreeMap<String, Value>>,
        documents: Option<Vec<Value>>,
        tools: Option<Vec<Value>>,
        tool_choice: Option<Value>,
        parallel_tool_calls: Option<bool>,
        include_reasoning: Option<bool>,
    }
});

/// Fields that both routes have.
struct Common {
    model: Option<String>,
    stream: bool,
    stream_options: StreamOptions,
    stop: Vec<String>,
    logit_bias: HashMap<String, f32>,
    seed: Option<i64>,
    n: usize,
    adapter_id: Option<String>,
    adapter_source: Option<String>,
    merged_adapters: Option<MergedAdapters>,
    ensemble: Option<Ensemble>,
    api_token: Option<SecretString>,
    cache_salt: Option<SecretString>,
    ignore_eos: bool,
    ending: Ending,
    truncate: Option<usize>,
    named: Named,
    rest: Rest,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
struct StreamOptions {
    include_usage: Option<bool>,
    #[serde(flatten)]
    rest: Rest,
}

/// Options of the response.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) chat: bool,
    pub(super) model: String,
    /// Names the model, and how it is computed.
    pub(super) fingerprint: String,
    /// Text in front of a chat's answer.
    pub(super) echo: String,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) logprobs: bool,
    /// Choices of each prompt.
    pub(super) choices: usize,
    /// Answers of each prompt, of which the choices are the best.
    pub(super) answers: usize,
}

/// The values of fields that only one of the routes has.
struct Asked {
    names: FieldNames,
    max_new_tokens: Option<u32>,
    num_top: u32,
    report: Report,
    /// Answers of which the best are chosen.
    best_of: Option<usize>,
}

/// Returns whether a field that is not supported has a value that asks for nothing.
fn harmless(name: &str, value: &Value) -> bool {
    match name {
        "user"
        | "metadata"
        | "store"
        | "service_tier"
        | "safety_identifier"
        | "prompt_cache_key"
        | "parallel_tool_calls" => true,
        // For tokenizers in Python, whose decoders may add spaces.
        "spaces_between_special_tokens" => value.is_boolean(),
        // A guess of the answer, and wishes for the cache, which may make it faster.
        "prediction" | "prompt_cache_options" => value.is_object(),
        // vLLM's name of a request in its log; and values that switch features of vLLM off.
        "request_id" => value.is_string(),
        "use_beam_search" | "early_stopping" | "return_tokens_as_token_ids" | "return_token_ids" => {
            value == false
        }
        "priority" => value == 0,
        "length_penalty" => value == 1.0 || value == 1,
        // Hints that no model here can follow, and a wish for what there is.
        "prompt_cache_retention" | "verbosity" => value.is_string(),
        "modalities" => *value == json!(["text"]),
        "best_of" => value == 1,
        "suffix" => value == "",
        // The request brings no tools of these kinds, so these choices ask for nothing.
        "tool_choice" | "function_call" => value == "none" || value == "auto",
        _ => false,
    }
}

impl Common {
    /// The sequences of a request, and what its response looks like.
    fn into_group(
        mut self,
        app: &App,
        caller: &Caller,
        prompts: Vec<Prompt>,
        asked: Asked,
    ) -> Result<(GroupRequest, Options), ApiError> {
        let grammar = structured::take(&mut self.rest)?;
        refuse(&self.rest, "", harmless)?;
        refuse(&self.stream_options.rest, "stream_options", |name, _| name == "include_obfuscation")?;
        let Asked { names, max_new_tokens, num_top, report, best_of } = asked;
        let answers = self.answers(best_of)?;
        if self.truncate == Some(0) {
            return Err(ApiError::invalid("truncate_prompt_tokens", "must be strictly positive"));
        }
        let params = self.sampling(num_top)?;
        drop_placeholder(app, &mut self.model);
        let adapter = self.adapter(app, caller)?;
        let sequence = |prompt| SequenceRequest {
            names,
            prompt,
            max_new_tokens,
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            ending: self.ending.clone(),
            sampling: params.clone(),
            report,
            truncate: self.truncate,
            grammar: grammar.clone(),
        };
        let group = GroupRequest {
            adapter,
            cache_salt: self.cache_salt,
            sequences: prompts.into_iter().map(sequence).collect(),
            answers,
        };
        let options = Options {
            chat: false,
            model: self.model.unwrap_or_else(|| app.base.name().to_owned()),
            fingerprint: app.base.fingerprint().to_owned(),
            echo: String::new(),
            stream: self.stream,
            include_usage: self.stream_options.include_usage == Some(true),
            logprobs: report.tokens,
            choices: self.n,
            answers: answers.count,
        };
        Ok((group, options))
    }

    /// The adapter, or those that are merged.
    fn adapter(&mut self, app: &App, caller: &Caller) -> Result<Option<AdapterRef>, ApiError> {
        let named = app.base.adapter_in(self.model.as_deref(), self.adapter_id.take());
        let credential = caller.credential.or_in_body(self.api_token.take());
        let source = self.adapter_source.as_deref();
        let several = Several { merged: self.merged_adapters.take(), ensemble: self.ensemble.take() };
        app.adapter(named, several, source, credential)
    }

    /// The answers to each prompt: as many as there are choices, or more from which these are chosen.
    fn answers(&self, best_of: Option<usize>) -> Result<Answers, ApiError> {
        let best_of = best_of.unwrap_or(self.n);
        for (field, value) in [("n", self.n), ("best_of", best_of)] {
            if !(1..=MAX_ANSWERS).contains(&value) {
                let problem = format!("must be from 1 to {MAX_ANSWERS}. Given: {value}");
                return Err(ApiError::invalid(field, problem));
            }
        }
        if best_of < self.n {
            let problem = format!("must be at least `n`. Given: {best_of} and {}", self.n);
            return Err(ApiError::invalid("best_of", problem));
        }
        if best_of > self.n && self.stream {
            // The best are known at the end.
            return Err(ApiError::invalid("best_of", "cannot be more than `n` in a stream"));
        }
        Ok(Answers { count: best_of, field: if best_of > self.n { "best_of" } else { "n" } })
    }

    /// OpenAI's requests draw unless they say otherwise.
    fn sampling(&self, num_top: u32) -> Result<SamplingParams, ApiError> {
        let bias = self.logit_bias.iter().map(|(token, bias)| {
            let id = token.parse().map_err(|_| {
                ApiError::invalid(
                    "logit_bias",
                    format!("must map token ids to numbers, and {token:?} is no token id"),
                )
            })?;
            Ok((id, *bias))
        });
        Ok(SamplingParams {
            seed: self.seed.map_or_else(rand::random, i64::cast_unsigned),
            num_top,
            logit_bias: bias.collect::<Result<_, ApiError>>()?,
            ..self.named.drawing()
        })
    }
}

impl CompletionRequest {
    pub(super) fn into_group(
        mut self,
        app: &App,
        caller: &Caller,
    ) -> Result<(GroupRequest, Options), ApiError> {
        let common = self.take_common();
        let prompts: Vec<Prompt> = match self.prompt {
            Prompts::Texts(texts) if self.add_special_tokens == Some(false) => {
                texts.into_iter().map(Prompt::Rendered).collect()
            }
            Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Prompts::Tokens(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
        };
        let most = app.config.router.max_client_batch_size;
        if prompts.is_empty() || prompts.len() > most {
            let problem = format!("must have 1 to {most} elements, and cannot be empty");
            return Err(ApiError::invalid("prompt", problem));
        }
        let (echo, tokens) = (self.echo == Some(true), self.logprobs.is_some());
        let asked = Asked {
            names: FieldNames { prompt: "prompt", max_new_tokens: "max_tokens", num_top: "logprobs" },
            max_new_tokens: Some(self.max_tokens.unwrap_or(MAX_TOKENS)),
            num_top: self.logprobs.unwrap_or(0),
            report: Report { echo, prompt: echo && tokens, tokens },
            best_of: self.best_of,
        };
        common.into_group(app, caller, prompts, asked)
    }
}

impl ChatRequest {
    pub(super) fn into_group(
        mut self,
        app: &App,
        caller: &Caller,
    ) -> Result<(GroupRequest, Options), ApiError> {
        let common = self.take_common();
        if self.top_logprobs.is_some_and(|top| top > 0) && self.logprobs != Some(true) {
            return Err(ApiError::invalid("top_logprobs", "needs `logprobs`"));
        }
        let max_tokens = match self.max_completion_tokens {
            Some(most) => ("max_completion_tokens", Some(most)),
            None => ("max_tokens", self.max_tokens),
        };
        if max_tokens.1 == Some(0) {
            return Err(ApiError::invalid(max_tokens.0, "must be strictly positive"));
        }
        let echo = match (self.echo, self.messages.last()) {
            (Some(true), Some(last)) if last.role == "assistant" => last.text(),
            _ => String::new(),
        };
        let tool_use = ToolFields {
            tools: self.tools.take(),
            tool_choice: self.tool_choice.take(),
            parallel_tool_calls: self.parallel_tool_calls,
        };
        let conversation = Conversation {
            tool_use: tool_use.read()?,
            messages: self.messages,
            documents: self.documents,
            reasoning_effort: self.reasoning_effort,
            kwargs: self.chat_template_kwargs.unwrap_or_default(),
            add_generation_prompt: self.add_generation_prompt,
            continues: self.continue_final_message == Some(true),
            add_special_tokens: self.add_special_tokens == Some(true),
            include_reasoning: self.include_reasoning != Some(false),
        };
        conversation.check()?;
        let asked = Asked {
            names: FieldNames { prompt: "messages", max_new_tokens: max_tokens.0, num_top: "top_logprobs" },
            max_new_tokens: max_tokens.1,
            num_top: self.top_logprobs.unwrap_or(0),
            report: Report { tokens: self.logprobs == Some(true), ..Report::default() },
            best_of: None,
        };
        let prompt = Prompt::Chat(Arc::new(conversation));
        let (group, options) = common.into_group(app, caller, vec![prompt], asked)?;
        Ok((group, Options { chat: true, echo, ..options }))
    }
}
