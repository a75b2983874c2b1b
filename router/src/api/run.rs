//! From a checked request to pieces of text.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{Stream, stream};
use scheduler::Finish;

use super::{
    ask::{Ask, Prompt},
    error::ApiError,
};
use crate::{
    decoder::{Detokenizer, StopStrings},
    engine::Running,
    generation::{Failure, Job, Scored, Update},
    permits::{Meter, Permit},
    server::{App, accept::Caller},
    tokenizer::ModelTokenizer,
};

/// Why a text ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FinishReason {
    Length,
    Eos,
    /// The stop string that was found.
    Stop(String),
}

/// One token and what it adds.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) token: Scored,
    /// What this token alone adds; special tokens by name.
    pub(crate) token_text: String,
    pub(crate) special: bool,
    pub(crate) top: Vec<Scored>,
    /// What is certain to belong to the answer by now, beyond what was told before.
    pub(crate) text: String,
    pub(crate) finish: Option<FinishReason>,
}

/// A sequence that is being generated. Dropping it cancels it.
pub(crate) struct Generation {
    pub(crate) prompt: Vec<u32>,
    /// The prompt as it was written, if it was text.
    written: Option<String>,
    pub(crate) seed: u64,
    pub(crate) timing: Timing,
    /// Log-probabilities of the prompt's tokens but the first, complete before the first piece.
    pub(crate) prompt_scores: Vec<Scored>,
    tokenizer: Arc<ModelTokenizer>,
    /// Gone once the text has ended: a sequence that has met a stop string does not know of it and would run on.
    running: Option<Running>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    meter: Meter,
    /// The first token, if somebody has waited for it.
    ahead: Option<Piece>,
}

/// Where the time of a request went.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    /// When the head of the request was read.
    pub(crate) received: Instant,
    /// Tokenizing, checking, preparing the adapter.
    pub(crate) validation: Duration,
    pub(crate) queued: Duration,
}

impl App {
    /// Checks a request and starts it.
    pub(crate) async fn generate(
        &self,
        caller: &Caller,
        ask: Ask,
        permit: Permit,
    ) -> Result<Generation, ApiError> {
        let begun = Instant::now();
        let info = self.engine.info();
        let info =
            info.ok_or_else(|| ApiError::Unavailable("the model is not available, try again".into()))?;
        let rules = self.rules(&info);
        ask.check(&rules)?;
        let mut prompt = self.tokenize(caller, &ask.prompt).await?;
        self.in_vocabulary(&prompt, info.vocab_size)?;
        let max_new_tokens = ask.fit(&mut prompt, &rules)?;
        let adapter = match &ask.adapter {
            Some(adapter) => Some(self.prepare(adapter).await?),
            None => None,
        };
        let stop_ids = match ask.ignore_eos {
            true => Arc::from([]),
            false => info.eos_token_ids.iter().chain(self.tokenizer.end_ids()).copied().collect(),
        };
        let seed = ask.sampling.seed;
        let job = Job {
            prompt: prompt.clone(),
            max_new_tokens,
            stop_ids,
            adapter,
            sampling: ask.sampling,
            prompt_logprobs: ask.prompt_logprobs,
        };
        let meter = self.permits.meter(&caller.principal);
        meter.charge(job.prompt.len());
        let running = self.engine.submit(job, permit).await?;
        let written = if let Prompt::Text(text) = ask.prompt { Some(text) } else { None };
        Ok(Generation {
            detokenizer: Detokenizer::new(self.tokenizer.clone(), &prompt),
            prompt,
            written,
            seed,
            timing: Timing { received: caller.received, validation: begun.elapsed(), queued: Duration::ZERO },
            prompt_scores: Vec::new(),
            tokenizer: self.tokenizer.clone(),
            running: Some(running),
            stops: StopStrings::new(ask.stop),
            meter,
            ahead: None,
        })
    }

    /// Refuses a prompt with a token that the model has no embedding for: a tokenizer may know more tokens than the
    /// model, for instance a padding token that was added for training.
    fn in_vocabulary(&self, prompt: &[u32], vocab_size: u32) -> Result<(), ApiError> {
        let Some(id) = prompt.iter().copied().find(|id| *id >= vocab_size) else { return Ok(()) };
        let text = self.tokenizer.token_bytes(id);
        let text = String::from_utf8_lossy(&text);
        Err(ApiError::invalid(format!(
            "the prompt has the token {id} ({text:?}), but the model's vocabulary has {vocab_size} entries"
        )))
    }

    /// Tokenizes on one of the threads for it.
    async fn tokenize(&self, caller: &Caller, prompt: &Prompt) -> Result<Vec<u32>, ApiError> {
        let (text, add_special) = match prompt {
            Prompt::Tokens(tokens) => return Ok(tokens.clone()),
            Prompt::Text(text) => (text.clone(), true),
            Prompt::Rendered(text) => (text.clone(), false),
        };
        let tokenizer = self.tokenizer.clone();
        let encode = move || tokenizer.encode(&text, add_special);
        let tokens = self.workers.run(&caller.principal, encode).await?;
        tokens.map_err(|error| ApiError::invalid(format!("tokenizer error {error}")))
    }
}

impl Generation {
    /// Waits for the first token. Before that a stream has no head: whoever fails or is shed until then is told so by the
    /// status of the response.
    pub(crate) async fn begin(&mut self) -> Result<(), ApiError> {
        if self.ahead.is_none() {
            self.ahead = self.next().await?;
        }
        Ok(())
    }

    /// The next token; `None` after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        if let Some(piece) = self.ahead.take() {
            return Ok(Some(piece));
        }
        loop {
            let Some(running) = &mut self.running else { return Ok(None) };
            match running.next().await {
                Some(Update::Started { queued }) => self.timing.queued = queued,
                Some(Update::Prompt(tokens)) => {
                    self.prompt_scores.extend(tokens.into_iter().map(|token| token.token));
                }
                Some(Update::Token { token, top, finish }) => {
                    return Ok(Some(self.piece(token, top, finish)));
                }
                Some(Update::Failed(failure)) => return Err(failure.into()),
                // The server stops.
                None => return Err(Failure::Unavailable.into()),
            }
        }
    }

    fn piece(&mut self, token: Scored, top: Vec<Scored>, finish: Option<Finish>) -> Piece {
        self.meter.charge(1);
        let special = self.tokenizer.is_special(token.id);
        let mut new = self.detokenizer.push(token.id);
        if finish.is_some() {
            new += &self.detokenizer.finish();
        }
        let scanned = self.stops.push(&new);
        let mut text = scanned.text;
        let finish = match (scanned.stop, finish) {
            (Some(stop), _) => Some(FinishReason::Stop(stop)),
            (None, Some(Finish::Length)) => Some(FinishReason::Length),
            (None, Some(Finish::StopToken)) => Some(FinishReason::Eos),
            (None, None) => None,
        };
        if finish.is_some() && !matches!(finish, Some(FinishReason::Stop(_))) {
            text += &self.stops.finish();
        }
        if finish.is_some() {
            self.running = None;
        }
        let token_text = if special { self.token_text(token.id) } else { new };
        Piece { token, token_text, special, top, text, finish }
    }

    /// A token's own text.
    pub(crate) fn token_text(&self, id: u32) -> String {
        self.tokenizer.token_text(id)
    }

    /// The prompt's text, without the special tokens that the tokenizer adds to text.
    pub(crate) fn prompt_text(&self) -> String {
        self.written.clone().unwrap_or_else(|| self.tokenizer.decode(&self.prompt, false))
    }

    /// As `token_text`, for when the generation itself has been given away.
    pub(crate) fn names(&self) -> impl Fn(u32) -> String + Send + use<> {
        let tokenizer = self.tokenizer.clone();
        move |id| tokenizer.token_text(id)
    }

    /// All that is to come, with the prompt's log-probabilities beside the first piece.
    pub(crate) fn pieces(self) -> impl Stream<Item = (Result<Piece, ApiError>, Vec<Scored>)> + Send {
        stream::unfold(Some(self), async |state| {
            let mut generation = state?;
            let piece = generation.next().await.transpose()?;
            let scores = std::mem::take(&mut generation.prompt_scores);
            let goes_on = piece.is_ok();
            Some(((piece, scores), goes_on.then_some(generation)))
        })
    }
}

/// A finished text.
pub(crate) struct Answer {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) text: String,
    pub(crate) finish: FinishReason,
}

impl Generation {
    /// Waits for the end.
    pub(crate) async fn answer(&mut self) -> Result<Answer, ApiError> {
        let (mut pieces, mut text) = (Vec::new(), String::new());
        loop {
            let Some(piece) = self.next().await? else {
                return Err(ApiError::Generation("the text has no end".into()));
            };
            text += &piece.text;
            let finish = piece.finish.clone();
            pieces.push(piece);
            if let Some(finish) = finish {
                return Ok(Answer { pieces, text, finish });
            }
        }
    }
}
