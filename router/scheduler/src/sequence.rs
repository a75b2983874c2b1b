//! One request on its way from `submit` to its end.

use std::{mem, sync::Arc, time::Duration};

use crate::{AdapterKey, Finish, Request, RequestId, blocks::Prefix, queues::QueueId};

/// Order of submission. Older sequences keep their blocks when memory runs out.
pub(crate) type Arrival = u64;

/// A request's tokens and how far they have come.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) arrival: Arrival,
    pub(crate) queue: QueueId,
    pub(crate) adapter: Option<AdapterKey>,
    pub(crate) submitted: Duration,
    /// Prompt, then what has been generated.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    max_new_tokens: usize,
    stop_ids: Arc<[u32]>,
    pub(crate) prompt_logprobs: bool,
    /// Slot of its adapter, from its first admission on.
    pub(crate) slot: Option<u32>,
    /// What `Event::Started` will tell: set at the first admission, taken when its rows have been computed.
    pub(crate) start: Option<Start>,
    /// Whether it has been admitted before.
    pub(crate) admitted: bool,
    /// Steps in flight that have rows of it.
    pub(crate) in_flight: u32,
    /// Tokens that those steps will give.
    pub(crate) sampling: usize,
    pub(crate) run: Run,
}

/// How a sequence started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) queued: Duration,
    pub(crate) cached_tokens: u32,
}

/// What a sequence has only while it runs.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// Its block table.
    pub(crate) blocks: Vec<u32>,
    /// How many of `blocks` the shard has been told.
    pub(crate) sent: usize,
    /// How many of `blocks`, from the first, are known to the prefix cache (as these or as equal ones).
    pub(crate) published: usize,
    /// What the first unpublished block follows; `None` when nothing is to be published.
    pub(crate) prefix: Option<Prefix>,
    /// Tokens that it was added with: rows below are prefill, rows from here on are decode.
    pub(crate) added_len: usize,
    /// Positions whose rows have been planned.
    pub(crate) planned: usize,
    /// Positions whose rows have been computed.
    pub(crate) computed: usize,
    /// The last step with rows of it.
    pub(crate) last_step: u64,
}

impl Sequence {
    pub(crate) fn new(request: Request, arrival: Arrival, queue: QueueId, submitted: Duration) -> Self {
        Self {
            id: request.id,
            arrival,
            queue,
            adapter: request.adapter.map(|adapter| adapter.key),
            submitted,
            prompt_len: request.prompt.len(),
            tokens: request.prompt,
            max_new_tokens: request.max_new_tokens as usize,
            stop_ids: request.stop_ids,
            prompt_logprobs: request.prompt_logprobs,
            slot: None,
            start: None,
            admitted: false,
            in_flight: 0,
            sampling: 0,
            run: Run::default(),
        }
    }

    /// Positions that it can ever fill: the last token's is never computed.
    pub(crate) fn max_positions(&self) -> usize {
        self.prompt_len + self.max_new_tokens - 1
    }

    /// Tokens that are known or in flight.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len() + self.sampling
    }

    /// Rows that can be planned now: up to the last token in flight, and none once that is the last allowed.
    pub(crate) fn rows_to_plan(&self) -> usize {
        if self.len() > self.max_positions() { 0 } else { self.len() - self.run.planned }
    }

    /// Whether its next row is of a token it was added with.
    pub(crate) fn prefills(&self) -> bool {
        self.run.planned < self.run.added_len
    }

    /// Appends a sampled token, and says whether it is the last.
    pub(crate) fn push(&mut self, token: u32) -> Option<Finish> {
        self.tokens.push(token);
        if self.stop_ids.contains(&token) {
            Some(Finish::StopToken)
        } else if self.tokens.len() > self.max_positions() {
            Some(Finish::Length)
        } else {
            None
        }
    }

    /// Forgets what has been computed, and returns the block table.
    pub(crate) fn stop(&mut self) -> Vec<u32> {
        mem::take(&mut self.run).blocks
    }
}
