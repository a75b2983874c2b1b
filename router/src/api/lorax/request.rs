//! Bodies of requests.

use sampling::{Named, SamplingParams};
use secrecy::SecretString;
use serde::Deserialize;

use crate::{
    api::{
        error::{ApiError, Dialect},
        group::{Answers, GroupRequest},
        json::{Rest, refuse},
        merged::{self, MergedAdapters},
        request::{FieldNames, Prompt, Report, SequenceRequest},
        structured,
    },
    server::{
        App,
        accept::{Body, Caller},
    },
    text::Ending,
};

const NAMES: FieldNames =
    FieldNames { prompt: "inputs", max_new_tokens: "max_new_tokens", num_top: "return_k_alternatives" };

/// Body of a request.
#[derive(Debug, Deserialize)]
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
        { $(#[$meta:meta])* struct $struct:ident { $($field:ident: $field_type:ty,)* } }
        $($(#[$doc:meta])* $name:ident: $type:ty { $($row:tt)* })*
    ) => {
        $(#[$meta])*
        struct $struct {
            $($field: $field_type,)*
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
    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Parameters {
        adapter_id: Option<String>,
        adapter_source: Option<String>,
        merged_adapters: Option<MergedAdapters>,
        api_token: Option<SecretString>,
        cache_salt: Option<SecretString>,
        do_sample: Option<bool>,
        max_new_tokens: Option<u32>,
        ignore_eos_token: Option<bool>,
        return_full_text: Option<bool>,
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
    pub(super) prefill: bool,
    /// Text to put in front of the answer.
    pub(super) full_text: Option<String>,
    pub(super) characters: usize,
}

impl GenerateRequest {
    pub(super) fn into_group(self, app: &App, caller: &Caller) -> Result<(GroupRequest, Shape), ApiError> {
        let mut p = self.parameters.unwrap_or_default();
        let grammar = structured::take(&mut p.rest)?;
        refuse(&self.rest, "", |_, _| false)?;
        refuse(&p.rest, "", |name, value| match name {
            "best_of" => value == 1,
            "watermark" | "apply_chat_template" => value == false,
            _ => false,
        })?;
        if self.inputs.is_empty() {
            return Err(ApiError::invalid(NAMES.prompt, "cannot be empty"));
        }
        if p.max_new_tokens == Some(0) {
            return Err(ApiError::invalid(NAMES.max_new_tokens, "must be strictly positive"));
        }
        let sampling = p.sampling();
        let prefill = p.decoder_input_details == Some(true);
        let shape = Shape {
            details: p.details == Some(true) || prefill,
            prefill,
            full_text: (p.return_full_text == Some(true)).then(|| self.inputs.clone()),
            characters: self.inputs.chars().count(),
        };
        let sequence = SequenceRequest {
            names: NAMES,
            prompt: Prompt::Text(self.inputs),
            max_new_tokens: p.max_new_tokens,
            stop: p.stop.unwrap_or_default(),
            ignore_eos: p.ignore_eos_token == Some(true),
            ending: Ending::default(),
            sampling,
            report: Report { prompt: prefill, ..Report::default() },
            truncate: p.truncate,
            grammar,
        };
        let credential = caller.credential.or_in_body(p.api_token);
        let source = p.adapter_source.as_deref();
        let adapter = match p.merged_adapters {
            None => app.adapter("adapter_id", p.adapter_id, source, credential)?,
            Some(merged) => {
                merged::check_alone("adapter_id", p.adapter_id.as_deref())?;
                Some(app.merged_adapter(merged, source, credential)?)
            }
        };
        Ok((
            GroupRequest {
                adapter,
                cache_salt: p.cache_salt,
                sequences: vec![sequence],
                answers: Answers::ONE,
            },
            shape,
        ))
    }
}

impl Parameters {
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
