//! Bodies of requests.

use std::{collections::BTreeMap, sync::Arc};

use minijinja::value::Serde;
use sampling::{Named, SamplingParams};
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::Deserialize;

use crate::{
    adapter::AdapterRef,
    api::{
        ensemble::{Ensemble, Several},
        error::{ApiError, Dialect},
        group::{Answers, GroupRequest},
        json::{Rest, refuse},
        merged::MergedAdapters,
        request::{Chat, FieldNames, Prompt, RenderedChat, Report, SequenceRequest},
        structured,
    },
    chat::TemplateInput,
    server::{
        App,
        accept::{Body, Caller},
    },
    text::Ending,
    text_side::TextSide,
};

const NAMES: FieldNames =
    FieldNames { prompt: "inputs", max_new_tokens: "max_new_tokens", num_top: "return_k_alternatives" };

/// Body of a request.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct GenerateRequest {
    inputs: String,
    parameters: Option<Parameters>,
    pub(super) stream: Option<bool>,
    #[serde(flatten)]
    rest: Rest,
}

impl Body for GenerateRequest {
    const DIALECT: Dialect = Dialect::Native;
}

/// Declares the struct of parameters with those of sampling among its fields.
macro_rules! parameters {
    (
        { $(#[$meta:meta])* struct $struct:ident { $($(#[$about:meta])* $field:ident: $field_type:ty,)* } }
        $($(#[$doc:meta])* $name:ident: $type:ty { $($row:tt)* })*
    ) => {
        $(#[$meta])*
        struct $struct {
            $($(#[$about])* $field: $field_type,)*
            $($(#[$doc])* $name: Option<$type>,)*
            #[serde(flatten)]
            rest: Rest,
        }

        impl $struct {
            fn named(&self) -> Named {
                Named { $($name: self.$name),* }
            }
        }
    };
}

sampling::parameters!(parameters {
    /// The parameters that LoRAX documents. A null is the same as no value.
    #[derive(Debug, Default, Deserialize, JsonSchema)]
    #[serde(default)]
    #[schemars(rename = "GenerateParameters")]
    struct Parameters {
        adapter_id: Option<String>,
        adapter_source: Option<String>,
        merged_adapters: Option<MergedAdapters>,
        ensemble: Option<Ensemble>,
        #[schemars(with = "Option<String>")]
        api_token: Option<SecretString>,
        #[schemars(with = "Option<String>")]
        cache_salt: Option<SecretString>,
        best_of: Option<usize>,
        do_sample: Option<bool>,
        max_new_tokens: Option<u32>,
        ignore_eos_token: Option<bool>,
        return_full_text: Option<bool>,
        apply_chat_template: Option<bool>,
        stop: Option<Vec<String>>,
        truncate: Option<usize>,
        details: Option<bool>,
        decoder_input_details: Option<bool>,
        return_k_alternatives: Option<u32>,
        seed: Option<u64>,
    }
});

/// The parts that the response has.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) details: bool,
    /// Text to put in front of the answer.
    pub(super) full_text: Option<String>,
    pub(super) characters: usize,
}

impl GenerateRequest {
    /// What is to be generated, and what the response looks like.
    pub(super) fn into_group(
        self,
        app: &App,
        caller: &Caller,
        streams: bool,
    ) -> Result<(GroupRequest, Shape), ApiError> {
        let mut p = self.parameters.unwrap_or_default();
        let grammar = structured::take(&mut p.rest)?;
        refuse(&self.rest, "", |_, _| false)?;
        refuse(&p.rest, "", |name, value| name == "watermark" && value == false)?;
        if self.inputs.is_empty() {
            return Err(ApiError::invalid(NAMES.prompt, "cannot be empty"));
        }
        if p.max_new_tokens == Some(0) {
            return Err(ApiError::invalid(NAMES.max_new_tokens, "must be strictly positive"));
        }
        let sampling = p.sampling();
        let answers = p.answers(app.config.router.max_best_of, sampling.draws(), streams)?;
        let prefill = p.decoder_input_details == Some(true);
        if streams && prefill {
            return Err(ApiError::invalid(
                "decoder_input_details",
                "== true is not supported when streaming tokens",
            ));
        }
        let shape = Shape {
            details: p.details == Some(true) || prefill,
            full_text: (p.return_full_text == Some(true)).then(|| self.inputs.clone()),
            characters: self.inputs.chars().count(),
        };
        let prompt = match p.apply_chat_template {
            Some(true) => Prompt::Chat(Arc::new(Said(self.inputs))),
            _ => Prompt::Text(self.inputs),
        };
        let adapter = p.adapter(app, caller)?;
        let sequence = SequenceRequest {
            names: NAMES,
            prompt,
            max_new_tokens: p.max_new_tokens,
            stop: p.stop.unwrap_or_default(),
            ignore_eos: p.ignore_eos_token == Some(true),
            ending: Ending::default(),
            sampling,
            report: Report { prompt: prefill, ..Report::default() },
            truncate: p.truncate,
            grammar,
        };
        Ok((GroupRequest { adapter, cache_salt: p.cache_salt, sequences: vec![sequence], answers }, shape))
    }
}

/// A chat in which the user says this.
#[derive(Debug)]
struct Said(String);

impl Chat for Said {
    fn render(&self, side: &TextSide) -> Result<RenderedChat, ApiError> {
        let message = BTreeMap::from([("role", "user"), ("content", &*self.0)]);
        let messages = vec![Serde(message).into()];
        let chat = TemplateInput { messages, add_generation_prompt: true, ..TemplateInput::default() };
        let prompt = side.chat.render(&chat).map_err(|error| ApiError::Template(error.to_string()))?;
        Ok(RenderedChat { prompt: Prompt::Rendered(prompt), grammar: None, marks: Vec::new(), answer: None })
    }
}

impl Parameters {
    /// The adapter, or those that are merged or run together.
    fn adapter(&mut self, app: &App, caller: &Caller) -> Result<Option<AdapterRef>, ApiError> {
        let credential = caller.credential.or_in_body(self.api_token.take());
        let source = self.adapter_source.as_deref();
        let several = Several { merged: self.merged_adapters.take(), ensemble: self.ensemble.take() };
        app.adapter(("adapter_id", self.adapter_id.take()), several, source, credential)
    }

    /// The answers of which the best is told.
    fn answers(&self, most: usize, draws: bool, streams: bool) -> Result<Answers, ApiError> {
        let count = self.best_of.unwrap_or(1);
        let problem = if !(1..=most).contains(&count) {
            format!("`best_of` must be > 0 and <= {most}. Given: {count}")
        } else if count > 1 && streams {
            "`best_of` != 1 is not supported when streaming tokens".into()
        } else if count > 1 && !draws {
            "you must use sampling when `best_of` is > 1".into()
        } else if count > 1 && self.seed.is_some() {
            "`seed` must not be set when `best_of` > 1".into()
        } else {
            return Ok(Answers { count, field: "best_of" });
        };
        Err(ApiError::Refused(problem))
    }

    /// Naming one of the parameters that only matter to draws asks for a draw, too.
    fn sampling(&self) -> SamplingParams {
        let named = self.named();
        let draws = self.do_sample == Some(true) || named.ask_for_a_draw();
        SamplingParams {
            seed: self.seed.unwrap_or_else(rand::random),
            num_top: self.return_k_alternatives.unwrap_or(0),
            ..if draws { named.drawing() } else { named.choosing() }
        }
    }
}
