//! `/tokenize` as LoRAX has it and as vLLM has it, which the field of the text tells apart, and vLLM's `/detokenize`.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    api::{
        ensemble::Several,
        error::{ApiError, Dialect},
        json::{Rest, refuse},
        openai::drop_placeholder,
    },
    server::{
        App,
        accept::{Accepted, Body, Caller},
    },
    tokenizer::{ModelTokenizer, TokenizerError},
};

/// Body of a request for tokens.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct TokenizeRequest {
    /// The text, in LoRAX's form.
    inputs: Option<String>,
    /// The text, in vLLM's form.
    prompt: Option<String>,
    add_special_tokens: Option<bool>,
    /// vLLM's wish for the vocabulary's entries beside the ids.
    return_token_strs: Option<bool>,
    /// vLLM's name of the model, or of the adapter whose tokens are wanted.
    model: Option<String>,
    #[serde(flatten)]
    rest: Rest,
}

impl Body for TokenizeRequest {
    const DIALECT: Dialect = Dialect::Native;
}

/// Body of a request for the text of tokens.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct DetokenizeRequest {
    tokens: Vec<u32>,
    model: Option<String>,
    #[serde(flatten)]
    rest: Rest,
}

impl Body for DetokenizeRequest {
    const DIALECT: Dialect = Dialect::Native;
}

/// LoRAX's answer or vLLM's.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum Tokenized {
    Native(Vec<SimpleToken>),
    Vllm(TokenList),
}

/// A token with its place in the text.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SimpleToken {
    id: u32,
    /// The vocabulary's entry.
    text: String,
    /// The character at which it begins.
    start: usize,
    /// The character behind it.
    stop: usize,
}

/// vLLM's list of tokens.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TokenList {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// The text of tokens.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Detokenized {
    prompt: String,
}

/// `POST /tokenize`
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<TokenizeRequest>,
) -> Response {
    let answer = async {
        let (text, is_native) = body.text()?;
        let max_model_len = match (is_native, app.engine.info()) {
            (true, _) => 0,
            (false, Some(info)) => app.request_limits(&info).max_total_tokens,
            (false, None) => {
                return Err(ApiError::Unavailable("the model is not available, try again".into()));
            }
        };
        let tokenizer = app.tokenizer_of(&caller, body.model).await?;
        let add_special = body.add_special_tokens.unwrap_or(true);
        let work = move || spans(&tokenizer, &text, add_special);
        let tokens = app.workers.run("tokenizing", &caller.principal, work).await??;
        Ok(if is_native {
            Tokenized::Native(tokens)
        } else {
            let texts = || tokens.iter().map(|token| token.text.clone()).collect();
            Tokenized::Vllm(TokenList {
                count: tokens.len(),
                max_model_len,
                token_strs: (body.return_token_strs == Some(true)).then(texts),
                tokens: tokens.iter().map(|token| token.id).collect(),
            })
        })
    };
    match answer.await {
        Ok(tokens) => Json(tokens).into_response(),
        Err(error) => error.respond(Dialect::Native),
    }
}

/// `POST /detokenize`
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    Accepted { caller, body }: Accepted<DetokenizeRequest>,
) -> Response {
    let answer = async {
        refuse(&body.rest, "", |_, _| false)?;
        let tokenizer = app.tokenizer_of(&caller, body.model).await?;
        let work = move || text_of(&tokenizer, &body.tokens);
        let prompt = app.workers.run("detokenizing", &caller.principal, work).await??;
        Ok::<_, ApiError>(Detokenized { prompt })
    };
    match answer.await {
        Ok(text) => Json(text).into_response(),
        Err(error) => error.respond(Dialect::Native),
    }
}

impl App {
    /// The tokenizer of the model, or of the adapter that is named in its place.
    async fn tokenizer_of(
        &self,
        caller: &Caller,
        mut model: Option<String>,
    ) -> Result<Arc<ModelTokenizer>, ApiError> {
        drop_placeholder(self, &mut model);
        let named = self.base.adapter_in(model.as_deref(), None);
        if named.1.is_none() {
            return Ok(self.text_sides.base().tokenizer.clone());
        }
        let several = Several { merged: None, ensemble: None };
        let Some(adapter) = self.adapter(named, several, None, caller.credential.clone())? else {
            return Ok(self.text_sides.base().tokenizer.clone());
        };
        let entry = self.admit(caller, Some(&adapter), 1)?;
        let (_leased, side) = self.deadline(caller).keep(self.lease(caller, &adapter)).await??;
        drop(entry);
        Ok(side.tokenizer.clone())
    }
}

impl TokenizeRequest {
    /// The text, and whether it came in LoRAX's form.
    fn text(&self) -> Result<(String, bool), ApiError> {
        refuse(&self.rest, "", |_, _| false)?;
        match (&self.inputs, &self.prompt) {
            (Some(_), Some(_)) => Err(ApiError::invalid("prompt", "cannot be given beside `inputs`")),
            (Some(_), None) if self.return_token_strs.is_some() => {
                Err(ApiError::invalid("return_token_strs", "needs `prompt`: `inputs` always has them"))
            }
            (Some(inputs), None) => Ok((inputs.clone(), true)),
            (None, Some(prompt)) => Ok((prompt.clone(), false)),
            (None, None) => Err(ApiError::Missing { field: "inputs".into() }),
        }
    }
}

/// The tokens of a text with their places in it.
fn spans(tokenizer: &ModelTokenizer, text: &str, add_special: bool) -> Result<Vec<SimpleToken>, ApiError> {
    let failed = |error| {
        let error = TokenizerError::Definition(error);
        ApiError::Refused(format!("tokenizer error {error}"))
    };
    let encoding = tokenizer.tokenizer.encode_char_offsets(text, add_special).map_err(failed)?;
    let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
    let token = |(id, (start, stop)): (&u32, &(usize, usize))| SimpleToken {
        id: *id,
        text: tokenizer.tokenizer.id_to_token(*id).unwrap_or_default(),
        start: *start,
        stop: *stop,
    };
    Ok(tokens.map(token).collect())
}

fn text_of(tokenizer: &ModelTokenizer, tokens: &[u32]) -> Result<String, ApiError> {
    let unknown = tokens.iter().position(|id| tokenizer.tokenizer.id_to_token(*id).is_none());
    match unknown {
        Some(at) => {
            let problem = format!("is {}, which is no token of this model", tokens[at]);
            Err(ApiError::invalid(format!("tokens[{at}]"), problem))
        }
        None => Ok(tokenizer.decode(tokens, false)),
    }
}
