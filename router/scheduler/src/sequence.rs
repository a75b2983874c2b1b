//! One request on its way from `submit` to its end.

use std::{borrow::Cow, mem, ops::Range, sync::Arc, time::Duration};

use crate::{
    Adapters, CacheSalt, Finish, GroupId, Limits, Request, RequestId,
    blocks::{Content, Prefix},
    flows::{FlowId, GENERATED},
    table::Table,
};

/// Order of submission. Older sequences keep their blocks when memory runs out.
pub(crate) type Arrival = u64;

/// A request's tokens and how far they have come.
#[derive(Debug)]
pub(crate) struct Sequence<P> {
    pub(crate) id: RequestId,
    pub(crate) arrival: Arrival,
    pub(crate) flow: FlowId,
    pub(crate) adapters: Adapters,
    pub(crate) adapters_from: u32,
    salt: CacheSalt,
    pub(crate) submitted: Duration,
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) generated: Vec<u32>,
    max_new_tokens: usize,
    stop_ids: Arc<[u32]>,
    /// Whether something is reported of every row of the prompt.
    pub(crate) prompt_logprobs: bool,
    /// Set only if there is something to share.
    pub(crate) group: Option<GroupId>,
    /// Whether the row of the prompt's last token is computed though nothing is generated.
    hidden_states: bool,
    pub(crate) payload: P,
    /// Set at the first admission.
    pub(crate) admission: Option<Admission>,
    /// Whether `Event::Started` has been reported.
    pub(crate) started: bool,
    /// Steps in flight that have rows of it.
    pub(crate) in_flight: u32,
    /// Tokens that those steps will give.
    pub(crate) sampling: usize,
    pub(crate) run: Run,
}

/// The circumstances of a sequence's first admission.
#[derive(Debug)]
pub(crate) struct Admission {
    /// Slots of its adapters, which it pins until its end.
    pub(crate) slots: Arc<[u32]>,
    pub(crate) queued: Duration,
    pub(crate) cached_tokens: u32,
    /// Whether it was admitted for its age, out of turn.
    pub(crate) aged: bool,
}

/// State that a sequence has only while it runs.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pub(crate) table: Table,
    /// Whether the sequence has been added on the shards.
    pub(crate) added: bool,
    /// Places of the table that the shards know.
    pub(crate) sent: usize,
    /// Places of the table that have been published in the prefix cache (as these blocks or as equal ones).
    pub(crate) published: usize,
    /// What the first unpublished block follows; `None` when nothing is published.
    pub(crate) prefix: Option<Prefix>,
    /// Tokens that are known when it gets its seat: rows below are prefill, rows from here on are decode.
    pub(crate) added_len: usize,
    /// Positions whose rows have been planned.
    pub(crate) planned: usize,
    /// Positions whose rows have been computed.
    pub(crate) computed: usize,
    /// The last step with rows of it.
    pub(crate) last_step: u64,
}

impl<P> Sequence<P> {
    pub(crate) fn new(request: Request<P>, arrival: Arrival, flow: FlowId, submitted: Duration) -> Self {
        Self {
            id: request.id,
            arrival,
            flow,
            adapters: request.adapters,
            adapters_from: request.adapters_from,
            salt: request.salt,
            submitted,
            prompt: request.prompt,
            generated: Vec::new(),
            max_new_tokens: request.max_new_tokens as usize,
            stop_ids: request.stop_ids,
            group: request.group,
            prompt_logprobs: request.prompt_logprobs || request.hidden_states,
            hidden_states: request.hidden_states,
            payload: request.payload,
            admission: None,
            started: false,
            in_flight: 0,
            sampling: 0,
            run: Run::default(),
        }
    }

    /// The slots of its adapters, once it has been admitted.
    pub(crate) fn slots(&self) -> &[u32] {
        self.admission.as_ref().map_or(&[], |admission| &admission.slots)
    }

    /// Returns whether it generates tokens; if not, it ends when its prompt has been computed.
    pub(crate) fn generates(&self) -> bool {
        self.max_new_tokens > 0
    }

    /// Positions that it can ever fill. The last token's is never computed: it would only serve the token after it.
    /// The exception is a prompt of one token that is scored, which has one row so that it need not be a special case.
    pub(crate) fn max_positions(&self) -> usize {
        if self.hidden_states {
            return self.prompt.len();
        }
        max_positions(self.prompt.len() as u64, self.max_new_tokens as u64) as usize
    }

    /// Tokens that are known.
    pub(crate) fn known(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    /// Tokens that are known or in flight.
    pub(crate) fn len(&self) -> usize {
        self.known() + self.sampling
    }

    /// The known tokens at some positions.
    pub(crate) fn tokens(&self, range: Range<usize>) -> Cow<'_, [u32]> {
        let prompt = self.prompt.len();
        if range.end <= prompt {
            Cow::Borrowed(&self.prompt[range])
        } else if range.start >= prompt {
            Cow::Borrowed(&self.generated[range.start - prompt..range.end - prompt])
        } else {
            Cow::Owned([&self.prompt[range.start..], &self.generated[..range.end - prompt]].concat())
        }
    }

    /// Rows that can be planned now: up to the last token in flight, and none for the last token that is allowed.
    pub(crate) fn rows_to_plan(&self) -> usize {
        self.len().min(self.max_positions()) - self.run.planned
    }

    /// Returns whether its next row is of a token that was known when it got its seat.
    pub(crate) fn prefills(&self) -> bool {
        self.run.planned < self.run.added_len
    }

    /// Virtual tokens of the tokens that it may still generate and that no step in flight will give.
    pub(crate) fn cost_to_come(&self) -> u64 {
        let generated = self.len() - self.prompt.len();
        GENERATED * self.max_new_tokens.saturating_sub(generated) as u64
    }

    /// Appends a sampled token. Returns why it is the last one, if it is.
    pub(crate) fn push(&mut self, token: u32) -> Option<Finish> {
        self.generated.push(token);
        if self.stop_ids.contains(&token) {
            Some(Finish::StopToken)
        } else if self.generated.len() >= self.max_new_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }

    /// The prefix of its first block if it is added with the tokens that are known.
    pub(crate) fn start(&self, limits: &Limits) -> Prefix {
        // Without a cache for all, blocks are known to the sequence's group alone.
        let group = self.group.filter(|_| !limits.prefix_caching);
        Prefix::Start { salt: self.salt, regime: limits.rope.regime(self.known()), group }
    }

    /// What one of its blocks holds, if all of its tokens are known.
    pub(crate) fn content(&self, block: usize, limits: &Limits) -> Content<'_> {
        let size = limits.block_size as usize;
        let positions = block * size..(block + 1) * size;
        let variant = self.adapters.variant().filter(|_| positions.end > self.adapters_from as usize);
        Content {
            acting: variant.map(|variant| (variant, self.adapters_from)),
            tokens: self.tokens(positions),
        }
    }

    /// Returns whether its blocks are shared with others.
    pub(crate) fn shares(&self, limits: &Limits) -> bool {
        limits.prefix_caching || self.group.is_some()
    }

    /// Forgets what has been computed, and returns the block table.
    pub(crate) fn stop(&mut self) -> Table {
        mem::take(&mut self.run).table
    }
}

/// Positions that a request fills, given the lengths of its prompt and of its longest answer.
pub(crate) fn max_positions(prompt: u64, max_new_tokens: u64) -> u64 {
    (prompt + max_new_tokens - 1).max(1)
}
