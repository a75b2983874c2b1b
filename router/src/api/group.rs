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
    deadline::Deadline,
    error::ApiError,
    request::{Prompt, RequestLimits, SequenceRequest},
};
use crate::{
    adapter::{AdapterRef, LeasedAll, acting},
    adapters::{InUse, Leases},
    chat_events::AnswerSpec,
    engine::Running,
    generation::{Failure, Job, Scored, Update},
    grammar::{CompiledGrammar, Words, mask_workers::Begin},
    permits::{Meter, Permit},
    server::{App, accept::Caller},
    text::{EndReason, Ending, Piece, PromptText, TextEvent, TextStream},
    text_side::TextSide,
    tokenizer::{ModelTokenizer, TokenizerError},
};
use futures::future::try_join_all;
use sampling::Ban;
use scheduler::{Adapters, CacheSalt, Finish, GroupId, Tenant};
use secrecy::{ExposeSecret, SecretString};

/// Most rows that an adapter has for tokens beyond those of the model.
const ADDED_ROWS: u32 = 256;

/// The sequences of one HTTP request, which use the same adapter.
#[derive(Debug)]
pub(crate) struct GroupRequest {
    pub(crate) adapter: Option<AdapterRef>,
    /// Narrows the sharing of the prefix cache to requests with the same salt. A secret: whoever knows it can find
    /// out by the time of an answer whether a prompt was asked before.
    pub(crate) cache_salt: Option<SecretString>,
    pub(crate) sequences: Vec<SequenceRequest>,
    /// Answers to generate for each of them; at least 1. They differ in their seeds.
    pub(crate) answers: Answers,
}

/// The number of answers to one prompt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answers {
    pub(crate) count: usize,
    /// The field that asks for them.
    pub(crate) field: &'static str,
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
    /// Time from `submitted` until its first token was here.
    pub(crate) first_token: Option<Duration>,
}

impl Timing {
    /// Those of a sequence that is handed to the engine now.
    fn new(received: Instant, validation: Duration) -> Timing {
        Timing { received, validation, submitted: Instant::now(), queued: Duration::ZERO, first_token: None }
    }
}

/// The tokens of a sequence, counted as it runs.
#[derive(Debug, Default)]
pub(crate) struct TokenCounts {
    pub(crate) prompt: usize,
    /// Whether another sequence of the request has the same prompt, and counts it.
    pub(crate) shares_prompt: bool,
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
    /// The form of its answer, if it is a chat's.
    answer: Option<AnswerSpec>,
    deadline: Deadline,
    /// Gone once the text has ended: a sequence that has met a stop string does not know of it and would run on.
    running: Option<Running>,
    /// The prompt, until all of it that was asked for is known.
    prompt: Option<PromptText>,
    text: TextStream,
    meter: Meter,
    /// Shows that the adapter is used, and counts tokens for it and for the tenant.
    in_use: Arc<InUse>,
    /// Whether a token has come.
    begun: bool,
    /// The sum of the generated tokens' log-probabilities.
    logprob: f64,
    /// Events that have not been taken.
    ready: VecDeque<TextEvent>,
}

/// A sequence whose prompt is tokenized and fits.
#[derive(Clone)]
struct Tokenized {
    request: SequenceRequest,
    prompt: Arc<[u32]>,
    max_new_tokens: u32,
    /// The prompt's text, if it is wanted.
    text: Option<PromptText>,
    /// The group of the sequences with this prompt, and the place of this one in it, if there are several.
    group: Option<(GroupId, u64)>,
    grammar: Option<Arc<CompiledGrammar>>,
    answer: Option<AnswerSpec>,
}

/// The values that all sequences of a group share.
struct Shared {
    tenant: Tenant,
    salt: CacheSalt,
    adapters: Adapters,
    weights: Arc<[f32]>,
    /// The tokens at which the adapters begin to act.
    invocation: Option<Arc<[u32]>>,
    /// Keep the adapters in host memory until all sequences are admitted.
    leases: Option<Arc<Leases>>,
    in_use: Arc<InUse>,
    end_ids: Arc<[u32]>,
    tokenizer: Arc<ModelTokenizer>,
    vocab_size: u32,
    received: Instant,
    deadline: Deadline,
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
        let deadline = self.deadline(caller);
        deadline.keep(self.begin_group(caller, request, deadline)).await?
    }

    async fn begin_group(
        &self,
        caller: &Caller,
        request: GroupRequest,
        deadline: Deadline,
    ) -> Result<Vec<Generation>, ApiError> {
        let begun = Instant::now();
        let GroupRequest { adapter, cache_salt, sequences, answers } = request;
        let cache_salt = cache_salt.as_ref().map(ExposeSecret::expose_secret);
        if cache_salt.is_some_and(str::is_empty) {
            return Err(ApiError::invalid("cache_salt", "cannot be empty"));
        }
        let unavailable = || ApiError::Unavailable("the model is not available, try again".into());
        let info = self.engine.info().ok_or_else(unavailable)?;
        self.expect_generation()?;
        let limits = self.request_limits(&info);
        sequences.iter().try_for_each(|sequence| sequence.check(&limits))?;
        let all = sequences.len() * answers.count;
        if let Some(first) = sequences.first() {
            let field = if answers.count > 1 { answers.field } else { first.names.prompt };
            self.check_sequences(caller, field, all)?;
        }
        let in_use = self.begin_use(caller, adapter.as_ref());
        // Each sequence is as much work as a request of its own.
        let entry = self.admit(caller, adapter.as_ref(), all)?;
        // Once, however many sequences there are.
        let (leased, side) = match &adapter {
            Some(adapter) => self.lease(caller, adapter).await?,
            None => (LeasedAll::default(), self.text_sides.base().clone()),
        };
        let words = Words::new(&side.words, info.vocab_size, self.end_ids(&info, &side));
        // The shard knows which of them an adapter with tokens of its own has rows for.
        let rows = limits.vocab_size + if side.new_tokens > 0 { ADDED_ROWS } else { 0 };
        let limits = RequestLimits { vocab_size: rows, ..limits };
        let prepared = sequences.into_iter().map(async |sequence| {
            let (mut sequence, answer) = self.render(caller, sequence, &side).await?;
            let grammar = self.compile(caller, &mut sequence, &words).await?;
            let tokenized = self.tokenize(caller, sequence, limits, &side).await?;
            Ok::<_, ApiError>(Tokenized { grammar, answer, ..tokenized })
        });
        let tokenized = try_join_all(prepared).await?;
        let permits = self.admit_prepared(caller, adapter.as_ref(), entry)?;
        let validation = begun.elapsed();
        self.metrics.validated(validation);
        let shared = Shared {
            tenant: caller.principal.tenant.scheduled(),
            salt: self.cache_salt(caller, adapter.as_ref(), cache_salt),
            adapters: leased.adapters,
            weights: leased.weights.into(),
            invocation: leased.invocation,
            leases: adapter.is_some().then(|| Arc::new(leased.leases)),
            in_use,
            end_ids: words.into_end_ids(),
            tokenizer: side.tokenizer.clone(),
            vocab_size: info.vocab_size,
            received: caller.received,
            deadline,
            validation,
            meter: self.permits.meter(&caller.principal),
        };
        let sequences = tokenized.into_iter().flat_map(|tokenized| self.copies(tokenized, answers.count));
        let started = sequences.zip(permits);
        try_join_all(started.map(|(sequence, permit)| self.start_sequence(sequence, &shared, permit))).await
    }

    /// The sequences that answer a prompt, the first of which has the request's own seed.
    fn copies(&self, tokenized: Tokenized, count: usize) -> Vec<Tokenized> {
        let group = (count > 1).then(|| self.engine.new_group());
        let copy = |place: u64| {
            let mut copy = tokenized.clone();
            copy.request.sampling.seed = sibling_seed(copy.request.sampling.seed, place);
            Tokenized { group: group.map(|group| (group, place)), ..copy }
        };
        (0..count as u64).map(copy).collect()
    }

    /// Renders the chat of a sequence, if it is one, on one of the threads for such work.
    async fn render(
        &self,
        caller: &Caller,
        mut request: SequenceRequest,
        side: &Arc<TextSide>,
    ) -> Result<(SequenceRequest, Option<AnswerSpec>), ApiError> {
        if !matches!(request.prompt, Prompt::Chat(_)) {
            return Ok((request, None));
        }
        let side = side.clone();
        let work = move || request.render(&side).map(|answer| (request, answer));
        self.workers.run("rendering of a chat", &caller.principal, work).await?
    }

    /// Compiles the grammar of a sequence, if it has one.
    async fn compile(
        &self,
        caller: &Caller,
        request: &mut SequenceRequest,
        words: &Words,
    ) -> Result<Option<Arc<CompiledGrammar>>, ApiError> {
        let Some(grammar) = request.grammar.take() else { return Ok(None) };
        let compiled = self.grammars.compiled(&caller.principal, &grammar, words).await;
        compiled.map(Some).map_err(|error| ApiError::of_grammar(grammar.field, error))
    }

    /// Tokenizes a prompt on one of the threads for it, and fits it into the limits. Token ids are no work.
    async fn tokenize(
        &self,
        caller: &Caller,
        request: SequenceRequest,
        limits: RequestLimits,
        side: &TextSide,
    ) -> Result<Tokenized, ApiError> {
        let tokenizer = side.tokenizer.clone();
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
        let Tokenized { request, prompt, max_new_tokens, text, group, grammar, answer } = tokenized;
        let report = request.report;
        let (stop_ids, bans) = shared.ends(&request, grammar.is_some());
        let mut sampling = request.sampling;
        sampling.bans.extend(bans);
        let (early, bans) = (request.ending.min_tokens, sampling.bans.as_slice());
        let min_tokens = if request.ignore_eos { u32::MAX } else { early };
        let grammar = grammar.map(|grammar| Begin { grammar, min_tokens, bans: bans.into() });
        let shares_prompt = group.is_some_and(|(_, place)| place > 0);
        let mut generation = Generation {
            tokens: Arc::new(TokenCounts { prompt: prompt.len(), shares_prompt, ..TokenCounts::default() }),
            seed: sampling.draws().then_some(sampling.seed),
            timing: Timing::new(shared.received, shared.validation),
            deadline: shared.deadline,
            running: None,
            prompt: text,
            answer,
            text: TextStream::new(
                shared.tokenizer.clone(),
                &prompt,
                request.stop,
                &request.ending,
                report.tokens,
            ),
            meter: shared.meter.clone(),
            in_use: shared.in_use.clone(),
            begun: false,
            logprob: 0.0,
            ready: VecDeque::new(),
        };
        generation.meter.charge(if shares_prompt { 0 } else { prompt.len() });
        if !report.prompt {
            generation.tell_prompt(false);
        }
        // Nothing predicts the first token, so that a prompt of one has no scores.
        let has_scores = report.prompt && prompt.len() > 1;
        if max_new_tokens == 0 && !has_scores {
            generation.end_without_token();
            return Ok(generation);
        }
        let (adapters, adapters_from) = acting(&shared.adapters, shared.invocation.as_deref(), &prompt);
        let job = Job {
            tenant: shared.tenant,
            salt: shared.salt,
            prompt,
            max_new_tokens,
            stop_ids,
            adapters,
            adapters_from,
            weights: shared.weights.clone(),
            sampling,
            prompt_logprobs: report.prompt,
            group: group.map(|(group, _)| group),
            grammar,
            pooling: None,
        };
        generation.running = Some(self.engine.submit(job, Some(permit), shared.leases.clone()).await?);
        Ok(generation)
    }
}

/// The seed of another answer to the same prompt. Neighbouring seeds have no seeds in common.
fn sibling_seed(seed: u64, place: u64) -> u64 {
    // The finalizer of SplitMix64 (Steele et al., 2014) over the golden ratio's multiples; 0 leads to 0.
    let mut mixed = place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ mixed ^ mixed >> 31
}

impl Shared {
    /// The tokens that end a sequence, and the bans that keep tokens from ending it too early. Behind the end of a grammar
    /// no others are left than those that end the model's texts, so that the masks see to these.
    fn ends(&self, request: &SequenceRequest, constrained: bool) -> (Arc<[u32]>, Vec<Ban>) {
        let Ending { min_tokens, stop_token_ids, .. } = &request.ending;
        let models = if request.ignore_eos && !constrained { &[][..] } else { &self.end_ids };
        let stop_ids = models.iter().chain(stop_token_ids).copied().collect();
        // Also those of the model that would not end it, as vLLM has it.
        let models = if constrained { &[][..] } else { &self.end_ids };
        let ends = models.iter().chain(stop_token_ids).filter(|id| **id < self.vocab_size);
        let until = *min_tokens;
        let bans = ends.filter(|_| until > 0).map(|&token| Ban { token, until }).collect();
        (stop_ids, bans)
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
        Prompt::Chat(_) => return Err(ApiError::Refused("the chat was not rendered".into())),
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
    Ok(Tokenized {
        request,
        prompt: prompt.into(),
        max_new_tokens,
        text,
        group: None,
        grammar: None,
        answer: None,
    })
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

    /// The form of a chat's answer, which is told once.
    pub(crate) fn take_answer(&mut self) -> Result<AnswerSpec, ApiError> {
        self.answer.take().ok_or_else(|| ApiError::Refused("no chat was rendered".into()))
    }

    /// The mean log-probability of the tokens that have been generated so far.
    pub(crate) fn mean_logprob(&self) -> f64 {
        self.logprob / self.tokens.generated.load(Ordering::Relaxed).max(1) as f64
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
        let update = match self.deadline.keep(running.next()).await {
            Ok(update) => update,
            Err(error) => {
                self.running = None;
                return Err(error);
            }
        };
        match update {
            Some(Update::Started { queued, cached_tokens }) => {
                self.timing.queued = queued;
                self.in_use.started(self.tokens.prompt, queued);
                self.tokens.cached.store(cached_tokens as usize, Ordering::Relaxed);
            }
            Some(Update::Prompt(scores)) => {
                if let Some(prompt) = &mut self.prompt {
                    prompt.score(scores);
                }
            }
            // A sequence that generates is not pooled.
            Some(Update::Pooled(_)) => {}
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
        self.timing.first_token.get_or_insert_with(|| self.timing.submitted.elapsed());
        self.logprob += f64::from(token.logprob);
        self.meter.charge(1);
        self.in_use.token();
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
