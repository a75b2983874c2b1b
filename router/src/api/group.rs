//! Starts the sequences of a checked request, and turns their updates into text events.

use std::{
    collections::VecDeque,
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    error::ApiError,
    request::{Prompt, RequestLimits, SequenceRequest},
};
use crate::{
    adapter::AdapterRef,
    adapters::{InUse, Lease},
    engine::Running,
    generation::{Failure, Job, Scored, Update},
    permits::{Meter, Permit},
    server::{App, accept::Caller},
    text::{EndReason, Piece, PromptText, TextEvent, TextStream},
    tokenizer::{ModelTokenizer, TokenizerError},
};
use futures::future::try_join_all;
use scheduler::{Adapter, CacheSalt, Finish, Tenant};
use secrecy::{ExposeSecret, SecretString};

/// The sequences of one HTTP request, which use the same adapter.
#[derive(Debug)]
pub(crate) struct GroupRequest {
    pub(crate) adapter: Option<AdapterRef>,
    /// Narrows the sharing of the prefix cache to requests with the same salt. A secret: whoever knows it can find
    /// out by the time of an answer whether a prompt was asked before.
    pub(crate) cache_salt: Option<SecretString>,
    pub(crate) sequences: Vec<SequenceRequest>,
}

/// Times of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    /// Time at which the head of the request was read.
    pub(crate) received: Instant,
    /// Tokenizing, checking, waiting for the adapter.
    pub(crate) validation: Duration,
    /// Time at which the sequence was handed to the engine.
    pub(crate) submitted: Instant,
    /// Time from `submitted` until its first rows were planned.
    pub(crate) queued: Duration,
}

/// The tokens of a sequence, counted as it runs.
#[derive(Debug, Default)]
pub(crate) struct TokenCounts {
    pub(crate) prompt: usize,
    /// Tokens of the prompt that were in the prefix cache.
    pub(crate) cached: AtomicUsize,
    /// Tokens that have been generated so far, whether or not they are text.
    pub(crate) generated: AtomicUsize,
}

/// A sequence that is being generated. Dropping it cancels it.
pub(crate) struct Generation {
    pub(crate) tokens: Arc<TokenCounts>,
    /// The seed, if tokens are drawn.
    pub(crate) seed: Option<u64>,
    pub(crate) timing: Timing,
    /// Gone once the text has ended: a sequence that has met a stop string does not know of it and would run on.
    running: Option<Running>,
    /// The prompt, until all of it that was asked for is known.
    prompt: Option<PromptText>,
    text: TextStream,
    meter: Meter,
    /// Shows that the adapter is used, and counts its tokens.
    in_use: Option<Arc<InUse>>,
    /// Whether a token has come.
    begun: bool,
    /// Events that have not been taken.
    ready: VecDeque<TextEvent>,
}

/// A sequence whose prompt is tokenized and fits.
struct Tokenized {
    request: SequenceRequest,
    prompt: Vec<u32>,
    max_new_tokens: u32,
    /// The prompt's text, if it is wanted.
    text: Option<PromptText>,
}

/// The values that all sequences of a group share.
struct Shared {
    tenant: Tenant,
    salt: CacheSalt,
    adapter: Option<Adapter>,
    /// Keeps the adapter in host memory until all sequences are admitted.
    lease: Option<Arc<Lease>>,
    in_use: Option<Arc<InUse>>,
    end_ids: Arc<[u32]>,
    received: Instant,
    validation: Duration,
    meter: Meter,
}

impl App {
    /// Checks a group and starts it. No sequence runs before all can: one that waits for another's prompt would
    /// meanwhile generate what nobody reads.
    pub(crate) async fn start_group(
        &self,
        caller: &Caller,
        request: GroupRequest,
    ) -> Result<Vec<Generation>, ApiError> {
        let begun = Instant::now();
        let GroupRequest { adapter, cache_salt, sequences } = request;
        let cache_salt = cache_salt.as_ref().map(ExposeSecret::expose_secret);
        if cache_salt.is_some_and(str::is_empty) {
            return Err(ApiError::invalid("cache_salt", "cannot be empty"));
        }
        let unavailable = || ApiError::Unavailable("the model is not available, try again".into());
        let info = self.engine.info().ok_or_else(unavailable)?;
        let limits = self.request_limits(&info);
        sequences.iter().try_for_each(|sequence| sequence.check(&limits))?;
        if let Some(first) = sequences.first() {
            self.check_sequences(caller, first.names.prompt, sequences.len())?;
        }
        let in_use = adapter.as_ref().map(|adapter| self.adapters.book().begin(adapter.references()));
        // Each sequence is as much work as a request of its own.
        let entry = self.admit(caller, adapter.as_ref(), sequences.len())?;
        let tokenized = sequences.into_iter().map(|sequence| self.tokenize(caller, sequence, limits));
        let tokenized = try_join_all(tokenized).await?;
        // Once, however many sequences there are.
        let leased = match &adapter {
            Some(adapter) => Some(self.lease(caller, adapter).await?),
            None => None,
        };
        let permits = self.admit_prepared(caller, adapter.as_ref(), entry)?;
        let shared = Shared {
            tenant: caller.principal.tenant.scheduled(),
            salt: self.cache_salt(caller, adapter.as_ref(), cache_salt),
            adapter: leased.as_ref().map(|leased| leased.adapter),
            lease: leased.map(|leased| Arc::new(leased.lease)),
            in_use,
            end_ids: info.eos_token_ids.iter().chain(self.tokenizer.end_ids()).copied().collect(),
            received: caller.received,
            validation: begun.elapsed(),
            meter: self.permits.meter(&caller.principal),
        };
        let started = tokenized.into_iter().zip(permits);
        try_join_all(started.map(|(sequence, permit)| self.start_sequence(sequence, &shared, permit))).await
    }

    /// Tokenizes a prompt on one of the threads for it, and fits it into the limits. Token ids are no work.
    async fn tokenize(
        &self,
        caller: &Caller,
        request: SequenceRequest,
        limits: RequestLimits,
    ) -> Result<Tokenized, ApiError> {
        let tokenizer = self.tokenizer.clone();
        let told = request.report.echo || request.report.prompt;
        if matches!(request.prompt, Prompt::Tokens(_)) && !told {
            return tokenize(tokenizer, request, &limits);
        }
        let work = move || tokenize(tokenizer, request, &limits);
        self.workers.run("tokenizing", &caller.principal, work).await?
    }

    async fn start_sequence(
        &self,
        tokenized: Tokenized,
        shared: &Shared,
        permit: Permit,
    ) -> Result<Generation, ApiError> {
        let Tokenized { request, prompt, max_new_tokens, text } = tokenized;
        let report = request.report;
        let mut generation = Generation {
            tokens: Arc::new(TokenCounts { prompt: prompt.len(), ..TokenCounts::default() }),
            seed: request.sampling.draws().then_some(request.sampling.seed),
            timing: Timing {
                received: shared.received,
                validation: shared.validation,
                submitted: Instant::now(),
                queued: Duration::ZERO,
            },
            running: None,
            prompt: text,
            text: TextStream::new(self.tokenizer.clone(), &prompt, request.stop, report.tokens),
            meter: shared.meter.clone(),
            in_use: shared.in_use.clone(),
            begun: false,
            ready: VecDeque::new(),
        };
        generation.meter.charge(prompt.len());
        if !report.prompt {
            generation.tell_prompt(false);
        }
        // Nothing predicts the first token, so that a prompt of one has no scores.
        let has_scores = report.prompt && prompt.len() > 1;
        if max_new_tokens == 0 && !has_scores {
            generation.end_without_token();
            return Ok(generation);
        }
        let job = Job {
            tenant: shared.tenant,
            salt: shared.salt,
            prompt: prompt.into(),
            max_new_tokens,
            stop_ids: if request.ignore_eos { Arc::from([]) } else { shared.end_ids.clone() },
            adapter: shared.adapter,
            sampling: request.sampling,
            prompt_logprobs: report.prompt,
        };
        generation.running = Some(self.engine.submit(job, permit, shared.lease.clone()).await?);
        Ok(generation)
    }
}

fn tokenize(
    tokenizer: Arc<ModelTokenizer>,
    mut request: SequenceRequest,
    limits: &RequestLimits,
) -> Result<Tokenized, ApiError> {
    let failed = |error: TokenizerError| ApiError::Refused(format!("tokenizer error {error}"));
    let (mut prompt, written) = match mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new())) {
        Prompt::Tokens(ids) => (ids, None),
        Prompt::Text(text) => (tokenizer.encode(&text, true).map_err(failed)?, Some(text)),
        Prompt::Rendered(text) => (tokenizer.encode(&text, false).map_err(failed)?, Some(text)),
    };
    if let Some(id) = prompt.iter().find(|id| **id >= limits.vocab_size) {
        let (text, entries) = (tokenizer.token_bytes(*id), limits.vocab_size);
        let problem = format!(
            "has the token {id} ({:?}), but token ids must be less than {entries}: the model's vocabulary has {entries} \
             entries",
            String::from_utf8_lossy(&text)
        );
        return Err(ApiError::invalid(request.names.prompt, problem));
    }
    let added =
        if request.truncate.is_some() { tokenizer.encode("", true).map_err(failed)? } else { Vec::new() };
    let bos = prompt.iter().zip(&added).take_while(|(token, added)| token == added).count();
    let max_new_tokens = request.fit(&mut prompt, bos, limits)?;
    let wanted = request.report.echo || request.report.prompt;
    let text = wanted.then(|| PromptText::new(tokenizer, &prompt, written.as_deref()));
    Ok(Tokenized { request, prompt, max_new_tokens, text })
}

impl Generation {
    /// Waits for the first token, or for the end if there is none. Before that a stream has no head: a request that
    /// fails or is shed until then is told so by the status of its response.
    pub(crate) async fn begin(&mut self) -> Result<(), ApiError> {
        while !self.begun && self.running.is_some() {
            self.advance().await?;
        }
        Ok(())
    }

    /// The next event; `None` after the last. Nothing follows an error.
    pub(crate) async fn next(&mut self) -> Option<Result<TextEvent, ApiError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                if let TextEvent::Piece(Piece { token: Some(_), .. }) = &event {
                    self.tokens.generated.fetch_add(1, Ordering::Relaxed);
                }
                return Some(Ok(event));
            }
            self.running.as_ref()?;
            if let Err(error) = self.advance().await {
                return Some(Err(error));
            }
        }
    }

    /// Takes an update of the running sequence.
    async fn advance(&mut self) -> Result<(), ApiError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        match running.next().await {
            Some(Update::Started { queued, cached_tokens }) => {
                self.timing.queued = queued;
                self.tokens.cached.store(cached_tokens as usize, Ordering::Relaxed);
            }
            Some(Update::Prompt(scores)) => {
                if let Some(prompt) = &mut self.prompt {
                    prompt.score(scores);
                }
            }
            Some(Update::Token { token, top, finish }) => self.token(token, top, finish),
            Some(Update::Scored) => self.end_without_token(),
            Some(Update::Failed(failure)) => return self.fail(failure),
            // The server stops.
            None => return self.fail(Failure::Unavailable),
        }
        Ok(())
    }

    fn fail(&mut self, failure: Failure) -> Result<(), ApiError> {
        self.running = None;
        Err(failure.into())
    }

    fn token(&mut self, token: Scored, top: Vec<Scored>, finish: Option<Finish>) {
        self.begun = true;
        self.meter.charge(1);
        self.in_use.iter().for_each(|in_use| in_use.token());
        self.tell_prompt(true);
        let pieces = self.text.push(token, top, finish);
        if let Some(end) = pieces.last().and_then(|piece| piece.end.as_ref())
            && let Some(running) = self.running.take()
            && matches!(end, EndReason::StopString { .. })
        {
            running.stop();
        }
        self.ready.extend(pieces.into_iter().map(TextEvent::Piece));
    }

    fn tell_prompt(&mut self, with_tokens: bool) {
        if let Some(prompt) = self.prompt.take() {
            self.ready.push_back(TextEvent::Prompt(prompt.into_echo(with_tokens)));
        }
    }

    /// Ends an answer of no tokens.
    fn end_without_token(&mut self) {
        self.tell_prompt(true);
        self.running = None;
        self.ready.push_back(TextEvent::Piece(Piece { end: Some(EndReason::Length), ..Piece::default() }));
    }
}
