//! Runs what is computed of texts in place of new tokens: vectors, and scores of classes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::http::HeaderMap;
use futures::{StreamExt, TryStreamExt, stream};
use sampling::SamplingParams;
use scheduler::{Adapters, CacheSalt, Tenant};
use tokenizers::Encoding;

use super::{
    error::ApiError,
    headers::{compute_type, insert},
    request::{FieldNames, Prompt},
};
use crate::{
    adapter::{AdapterRef, LeasedAll, acting},
    adapters::Leases,
    embedding::Embedding,
    generation::{Failure, Job, Pooling, Update},
    server::{App, accept::Caller},
    text_side::TextSide,
    tokenizer::{ModelTokenizer, TokenizerError},
    wire::{Info, Task},
};

/// The inputs of one HTTP request, for all of which the same is computed with the same adapter.
#[derive(Debug)]
pub(crate) struct PooledRequest {
    pub(crate) adapter: Option<AdapterRef>,
    /// The field that has the inputs.
    pub(crate) field: &'static str,
    pub(crate) inputs: Vec<Prompt>,
    pub(crate) wants: Wants,
    /// Whether inputs that are too long are truncated; `None` for what the model's files say.
    pub(crate) truncate: Option<bool>,
}

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wants {
    Vectors,
    Classes,
}

/// An input, and what was computed of it.
pub(crate) struct Output {
    /// One vector, or the scores of one token after the other.
    pub(crate) values: Vec<f32>,
    pub(crate) tokens: usize,
    /// The tokens and their places in the text, if it was a text that is classified.
    pub(crate) encoding: Option<Encoding>,
    /// Time from its submission until its first rows were planned.
    queued: Duration,
}

/// The outputs of a request, in the order of the inputs.
pub(crate) struct Pooled {
    /// The tokenizer of the inputs.
    pub(crate) tokenizer: Arc<ModelTokenizer>,
    pub(crate) outputs: Vec<Output>,
    /// Tokenizing, checking, waiting for the adapter.
    validation: Duration,
    received: Instant,
    submitted: Instant,
}

impl Pooled {
    /// Tokens of all inputs.
    pub(crate) fn tokens(&self) -> usize {
        self.outputs.iter().map(|output| output.tokens).sum()
    }

    /// Who has answered, and where the time went, in milliseconds.
    pub(crate) fn headers(&self, app: &App) -> HeaderMap {
        let queued = self.outputs.iter().map(|output| output.queued).max().unwrap_or_default();
        let inference = self.submitted.elapsed().saturating_sub(queued);
        let mut headers = HeaderMap::new();
        for (name, time) in [
            ("x-compute-time", self.received.elapsed()),
            ("x-validation-time", self.validation),
            ("x-queue-time", queued),
            ("x-inference-time", inference),
        ] {
            insert(&mut headers, name, time.as_millis());
        }
        compute_type(app).into_iter().for_each(|device| insert(&mut headers, "x-compute-type", device));
        headers
    }
}

/// An input that is tokenized and fits.
struct Input {
    ids: Arc<[u32]>,
    encoding: Option<Encoding>,
}

/// The values that all inputs of a request share.
struct Shared {
    tenant: Tenant,
    adapters: Adapters,
    weights: Arc<[f32]>,
    /// The tokens at which the adapters begin to act.
    invocation: Option<Arc<[u32]>>,
    /// Keep the adapters in host memory until all inputs are admitted.
    leases: Option<Arc<Leases>>,
    pooling: Pooling,
}

/// How inputs are tokenized, and how long they may be.
struct Rules {
    tokenizer: Arc<ModelTokenizer>,
    embedding: Embedding,
    field: &'static str,
    most: usize,
    truncates: bool,
    vocab_size: u32,
    /// Whether places in texts are wanted.
    keeps_places: bool,
}

impl App {
    /// Refuses requests for text if the model generates none.
    pub(crate) fn expect_generation(&self) -> Result<(), ApiError> {
        let Some(info) = self.engine.info() else { return Ok(()) };
        let (kind, does) = match info.task {
            Task::Generate => return Ok(()),
            Task::Embed => ("Embedding", "embeds texts, at /embed and /v1/embeddings"),
            Task::ClassifyTokens(_) => ("Classify", "classifies tokens, at /classify and /classify_batch"),
            Task::ClassifyTexts(_) => ("Classify", "classifies texts, at /classify and /classify_batch"),
        };
        let name = self.base.name();
        Err(ApiError::Refused(format!("{kind} models don't support text generation: {name} {does}")))
    }

    /// What is computed for a request.
    fn pooling(&self, info: &Info, wants: Wants) -> Result<Pooling, ApiError> {
        let does = match (&info.task, wants) {
            (Task::Embed, Wants::Vectors) => return Ok(self.embedding.pooling),
            (Task::ClassifyTokens(_), Wants::Classes) => return Ok(Pooling::ClassesOfTokens),
            (Task::ClassifyTexts(_), Wants::Classes) => return Ok(Pooling::ClassesOfText),
            (Task::Generate, _) => "generates text",
            (Task::Embed, _) => "embeds texts",
            (Task::ClassifyTokens(_) | Task::ClassifyTexts(_), _) => "classifies texts",
        };
        let cannot = match wants {
            Wants::Vectors => "embeddings",
            Wants::Classes => "classification",
        };
        Err(ApiError::Refused(format!("{} {does}, and does not support {cannot}", self.base.name())))
    }

    /// Checks a request and runs it.
    pub(crate) async fn pool(&self, caller: &Caller, request: PooledRequest) -> Result<Pooled, ApiError> {
        self.deadline(caller).keep(self.pool_all(caller, request)).await?
    }

    async fn pool_all(&self, caller: &Caller, request: PooledRequest) -> Result<Pooled, ApiError> {
        let begun = Instant::now();
        let PooledRequest { adapter, field, inputs, wants, truncate } = request;
        let unavailable = || ApiError::Unavailable("the model is not available, try again".into());
        let info = self.engine.info().ok_or_else(unavailable)?;
        let pooling = self.pooling(&info, wants)?;
        let in_use = self.begin_use(caller, adapter.as_ref());
        let at_once = if inputs.len() > 1 { inputs.len().min(self.most_at_once(caller)) } else { 1 };
        let entry = self.admit(caller, adapter.as_ref(), at_once)?;
        let (leased, side) = match &adapter {
            Some(adapter) => self.lease(caller, adapter).await?,
            None => (LeasedAll::default(), self.text_sides.base().clone()),
        };
        let rules = self.rules(&info, &side, (field, wants, truncate));
        let tokenize =
            move || inputs.into_iter().map(|input| rules.tokenize(input)).collect::<Result<Vec<_>, _>>();
        let inputs = self.workers.run("tokenizing", &caller.principal, tokenize).await??;
        let permits = self.admit_prepared(caller, adapter.as_ref(), entry)?;
        let shared = Shared {
            tenant: caller.principal.tenant.scheduled(),
            adapters: leased.adapters,
            weights: leased.weights.into(),
            invocation: leased.invocation,
            leases: adapter.is_some().then(|| Arc::new(leased.leases)),
            pooling,
        };
        let (validation, submitted) = (begun.elapsed(), Instant::now());
        self.metrics.validated(validation);
        let tokens = inputs.iter().map(|input| input.ids.len()).sum();
        self.permits.meter(&caller.principal).charge(tokens);
        let outputs = stream::iter(inputs).map(|input| self.run_pooled(input, &shared)).buffered(at_once);
        let outputs: Vec<Output> = outputs.try_collect().await?;
        outputs.iter().for_each(|output| in_use.started(output.tokens, output.queued));
        drop((permits, in_use));
        let tokenizer = side.tokenizer.clone();
        Ok(Pooled { tokenizer, outputs, validation, received: caller.received, submitted })
    }

    fn rules(
        &self,
        info: &Info,
        side: &TextSide,
        (field, wants, truncate): (&'static str, Wants, Option<bool>),
    ) -> Rules {
        let (most, router) = (self.request_limits(info).max_total_tokens, &self.config.router);
        let most = router.max_input_length.map_or(most, |asked| asked.min(most));
        Rules {
            tokenizer: side.tokenizer.clone(),
            most: self.embedding.max_tokens.map_or(most, |own| own.min(most)),
            truncates: truncate.unwrap_or(self.embedding.truncates),
            embedding: self.embedding.clone(),
            field,
            vocab_size: info.vocab_size,
            keeps_places: wants == Wants::Classes,
        }
    }

    /// Runs one input. The request holds a permit for it.
    async fn run_pooled(&self, input: Input, shared: &Shared) -> Result<Output, ApiError> {
        let Input { ids, encoding } = input;
        let tokens = ids.len();
        let (adapters, adapters_from) = acting(&shared.adapters, shared.invocation.as_deref(), &ids);
        let job = Job {
            tenant: shared.tenant,
            salt: CacheSalt::default(),
            prompt: ids,
            max_new_tokens: 0,
            stop_ids: Arc::from([]),
            adapters,
            adapters_from,
            weights: shared.weights.clone(),
            sampling: SamplingParams::default(),
            prompt_logprobs: false,
            pooling: Some(shared.pooling),
            group: None,
            grammar: None,
        };
        let mut running = self.engine.submit(job, None, shared.leases.clone()).await?;
        let mut output = Output { values: Vec::new(), tokens, encoding, queued: Duration::ZERO };
        loop {
            match running.next().await {
                Some(Update::Started { queued, .. }) => output.queued = queued,
                Some(Update::Pooled(values)) => output.values = values,
                Some(Update::Scored) if output.values.is_empty() => {
                    return Err(ApiError::Generation("the model has given no result".into()));
                }
                Some(Update::Scored) => return Ok(output),
                Some(Update::Failed(failure)) => return Err(failure.into()),
                // Nothing is sampled.
                Some(Update::Prompt(_) | Update::Token { .. }) => {}
                // The server stops.
                None => return Err(Failure::Unavailable.into()),
            }
        }
    }
}

impl Rules {
    /// Tokenizes an input, and fits it into the limit.
    fn tokenize(&self, input: Prompt) -> Result<Input, ApiError> {
        let failed = |error: TokenizerError| ApiError::Refused(format!("tokenizer error {error}"));
        let (mut ids, encoding) = match input {
            Prompt::Tokens(ids) => (ids, None),
            Prompt::Chat(_) => return Err(ApiError::Refused("chats are not pooled".into())),
            Prompt::Text(text) | Prompt::Rendered(text) => {
                let text = self.embedding.prepare(&text);
                let most = self.truncates.then_some(self.most);
                let encoding = self.tokenizer.encode_whole(&text, most).map_err(failed)?;
                (encoding.get_ids().to_vec(), Some(encoding).filter(|_| self.keeps_places))
            }
        };
        if ids.is_empty() {
            return Err(ApiError::invalid(self.field, "cannot be empty"));
        }
        if let Some(id) = ids.iter().find(|id| **id >= self.vocab_size) {
            let problem = format!("has the token {id}, but token ids must be less than {}", self.vocab_size);
            return Err(ApiError::invalid(self.field, problem));
        }
        if ids.len() > self.most && !self.truncates {
            let names =
                FieldNames { prompt: self.field, max_new_tokens: "max_tokens", num_top: "top_logprobs" };
            let (prompt, most) = (ids.len(), self.most);
            return Err(ApiError::ContextLength { names, prompt, new: 0, max_prompt: most, max_total: most });
        }
        ids.truncate(self.most);
        Ok(Input { ids: ids.into(), encoding })
    }
}
