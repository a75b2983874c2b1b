//! The state that a shard keeps between steps: its sequences, their seats, and its adapter slots.

use std::{collections::HashMap, mem, sync::Arc};

use kernels::{Backend, Batch, Group, MAX_MEMBER_RANKS, MAX_MEMBERS, RANK_STEP, SamplingParams};
use model::{
    ADDED_TOKENS, Decoder, Model,
    adapter::ContentHash,
    decoder::{Classes, Task},
};

use super::{Held, idle::Idle, sequence::Sequence};
use crate::{
    adapters::{Adapters, HostCopy, Properties},
    step::{Event, Member, NewSequence, Pooling, PoolingKind, Refusal, Step},
};

/// The bounds of a shard's memory and steps.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Adapter slots.
    pub num_slots: usize,
    /// Rows of one step.
    pub max_rows: usize,
    /// Sequences that run at the same time.
    pub max_sequences: usize,
    /// Rows of one step whose logits are computed.
    pub max_logit_rows: usize,
}

/// Why a stream of steps was ended. The router has violated the protocol; the shard itself can go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A stream was opened before any session.
    #[error("no session has begun")]
    NoSession,
    /// A second stream was opened in the same session.
    #[error("session {0} has had its stream")]
    SecondStream(u64),
    /// A step or its masks belong to a session that is not the present one.
    #[error("a step of session {got} in session {current}")]
    OtherSession {
        /// The step's session.
        got: u64,
        /// The session that has begun.
        current: u64,
    },
    /// A step is missing, or was sent twice.
    #[error("step {got} where step {expected} follows")]
    NotConsecutive {
        /// The step's id.
        got: u64,
        /// The id after the last one.
        expected: u64,
    },
    /// A step names a sequence that does not run.
    #[error("sequence {0} does not run")]
    UnknownSequence(u64),
    /// A step adds a sequence that runs already.
    #[error("sequence {0} runs already")]
    DuplicateSequence(u64),
    /// An index or a size is above its limit.
    #[error("{what} {value} is out of range, limit {limit}")]
    OutOfRange {
        /// The kind of the value.
        what: &'static str,
        /// Its value.
        value: usize,
        /// The first value that is too large.
        limit: usize,
    },
    /// A sequence has no block for some of its rows.
    #[error("sequence {sequence} has {blocks} blocks, position {position} needs more")]
    NoBlock {
        /// The sequence.
        sequence: u64,
        /// Its last position in the step.
        position: usize,
        /// Its blocks.
        blocks: usize,
    },
    /// Rows are to be stored in a block that their sequence has released.
    #[error("sequence {sequence} has released {released} blocks, position {position} is in one of them")]
    ReleasedBlock {
        /// The sequence.
        sequence: u64,
        /// Its first position in the step.
        position: usize,
        /// The number of blocks at its beginning that it has released.
        released: usize,
    },
    /// A token is given for a position within the prompt, whose tokens are known.
    #[error("sequence {sequence} is given a token at position {position} of its prompt")]
    GivenPrompt {
        /// The sequence.
        sequence: u64,
        /// The position.
        position: usize,
    },
    /// A token is to be sampled after a position whose token was neither sampled nor given.
    #[error("sequence {sequence} has no token at or before position {position}")]
    UnknownToken {
        /// The sequence.
        sequence: u64,
        /// The row to sample from.
        position: usize,
    },
    /// A part of a sequence whose rows attend to each other, so that all must be in one step.
    #[error("{rows} rows of sequence {sequence}, whose {tokens} tokens must be in one step")]
    Partial {
        /// The sequence.
        sequence: u64,
        /// Its rows in the step.
        rows: usize,
        /// Its tokens.
        tokens: usize,
    },
    /// The size of a mask does not fit the vocabulary.
    #[error("a mask of {got} bytes, the vocabulary needs {expected}")]
    Mask {
        /// Bytes of the mask.
        got: usize,
        /// Bytes of a mask with a bit for every token.
        expected: usize,
    },
    /// A row uses a slot that has not been reported ready.
    #[error("slot {0} is not ready")]
    SlotNotReady(u32),
    /// An adapter's content hash does not have 32 bytes.
    #[error("a content hash of {0} bytes")]
    ContentHash(usize),
    /// A message is too large, or no step. The stream ends with it.
    #[error("a step that cannot be read: {0}")]
    Unreadable(String),
    /// The rows of a step contradict each other.
    #[error("the rows of a step: {0}")]
    Rows(String),
}

/// The state of a sequence that the router has added and not dropped.
pub(super) enum Place {
    Seated(Box<Sequence>),
    /// It was refused, and the router was told why. Its rows are skipped until the router drops it.
    Refused,
}

/// The state of an adapter slot. A slot keeps the properties of its adapter, because the copy in host memory may be gone
/// before the slot is emptied.
enum Slot {
    Empty,
    /// Its adapter is being copied to the device.
    Loading(Arc<Properties>),
    Ready(Arc<Properties>),
}

/// All that the step loop keeps between steps.
pub(super) struct State<B: Backend> {
    pub(super) ops: Arc<B>,
    pub(super) model: Arc<Model<B>>,
    adapters: Arc<Adapters<B>>,
    pub(super) limits: Limits,
    pub(super) sequences: HashMap<u64, Place>,
    free_seats: Vec<u32>,
    slot_states: Vec<Slot>,
    /// Events of loads that have ended, which have not been sent yet.
    ended_loads: Vec<Event>,
    pub(super) slots: B::LoraSlots,
    pub(super) sampler: B::Sampler,
    pub(super) num_blocks: usize,
    pub(super) kv: model::KvCache<B>,
    pub(super) scratch: model::Scratch<B>,
    pub(super) host: Batch,
    pub(super) batch: B::Batch,
    pub(super) idle: Idle<B>,
}

impl<B: Backend> State<B> {
    pub(super) fn new(
        ops: Arc<B>,
        model: Arc<Model<B>>,
        adapters: Arc<Adapters<B>>,
        limits: Limits,
    ) -> kernels::Result<State<B>> {
        let Decoder { max_positions, .. } = *model.decoder();
        // Sequences may share blocks, but each has a table of its own.
        let tables = limits.max_sequences * max_positions.div_ceil(kernels::BLOCK_SIZE);
        Ok(State {
            slots: ops.lora_slots(model.sites(), limits.num_slots)?,
            sampler: ops.sampler(limits.max_sequences, model.decoder().vocab + ADDED_TOKENS)?,
            num_blocks: 0,
            kv: model.kv_cache(&ops, 0)?,
            scratch: model.scratch(&ops, limits.max_rows, limits.max_logit_rows)?,
            batch: ops.batch(limits.max_rows, tables, &model.spans())?,
            host: Batch::default(),
            idle: Idle::new(),
            sequences: HashMap::new(),
            free_seats: (0..limits.max_sequences as u32).rev().collect(),
            ended_loads: Vec::new(),
            slot_states: (0..limits.num_slots).map(|_| Slot::Empty).collect(),
            ops,
            model,
            adapters,
            limits,
        })
    }

    /// Replaces the KV cache by one of `num_blocks` blocks.
    pub(super) fn set_blocks(&mut self, num_blocks: usize) -> kernels::Result<()> {
        self.kv = self.model.kv_cache(&self.ops, 0)?;
        self.kv = self.model.kv_cache(&self.ops, num_blocks)?;
        self.num_blocks = num_blocks;
        Ok(())
    }

    /// The ranks of the model.
    pub(super) fn group(&self) -> &Group {
        self.ops.group()
    }

    /// Drops all sequences, abandons the loads that are under way, and returns the adapters that stay.
    pub(super) fn begin_session(&mut self, session: u64) -> kernels::Result<Held> {
        self.idle.interrupt();
        self.ops.group().forget_failures();
        self.sequences.clear();
        self.free_seats = (0..self.limits.max_sequences as u32).rev().collect();
        let mut held = Held { slots: Vec::new(), host: self.adapters.begin_session(session) };
        for (slot, state) in (0..).zip(&mut self.slot_states) {
            match state {
                Slot::Empty => {}
                Slot::Ready(adapter) => held.slots.push((slot, adapter.content, adapter.slot_bytes)),
                Slot::Loading(_) => {
                    self.ops.unload(&mut self.slots, slot)?;
                    *state = Slot::Empty;
                }
            }
        }
        Ok(held)
    }

    /// The events of loads that have ended since the last call.
    pub(super) fn slot_events(&mut self) -> kernels::Result<Vec<Event>> {
        for slot in self.ops.loaded(&mut self.slots)? {
            let state = &mut self.slot_states[slot as usize];
            if let Slot::Loading(adapter) = state {
                self.ended_loads.push(Event::Slot { slot, content: adapter.content, error: None });
                *state = Slot::Ready(adapter.clone());
            }
        }
        Ok(mem::take(&mut self.ended_loads))
    }

    /// Begins to copy an adapter into a slot. If the device has no memory for it, the slot stays empty and the router
    /// is told, which can then evict another adapter.
    fn load(&mut self, slot: u32, copy: &HostCopy<B::HostAdapter>) -> kernels::Result<()> {
        match self.ops.load(&mut self.slots, slot, &copy.adapter, &self.model.site_weights()) {
            Ok(()) => {
                self.slot_states[slot as usize] = Slot::Loading(copy.properties.clone());
                Ok(())
            }
            Err(error @ kernels::Error::OutOfMemory { .. }) => {
                tracing::warn!(slot, "an adapter does not fit on the device: {error}");
                self.fail_load(slot, copy.properties.content, error.to_string())
            }
            Err(error) => Err(error),
        }
    }

    /// Reports that a slot, which is empty, could not be filled.
    fn fail_load(&mut self, slot: u32, content: ContentHash, error: String) -> kernels::Result<()> {
        self.slot_states[slot as usize] = Slot::Empty;
        // Other ranks may wait for this one's part of a norm.
        self.ops.group().post(slot.into(), content.number(), &[])?;
        self.ended_loads.push(Event::Slot { slot, content, error: Some(error) });
        Ok(())
    }

    /// Does what a step asks for before its rows, in the order of its fields. Returns the sequences that were refused.
    pub(super) fn prepare(&mut self, step: &Step) -> kernels::Result<Result<Vec<Refusal>, StepError>> {
        for sequence in &step.dropped {
            match self.sequences.remove(sequence) {
                Some(Place::Seated(dropped)) => self.free_seats.push(dropped.seat),
                Some(Place::Refused) => {}
                None => return Ok(Err(StepError::UnknownSequence(*sequence))),
            }
        }
        for &slot in &step.unload {
            if let Err(error) = self.in_range("slot", slot as usize, self.limits.num_slots) {
                return Ok(Err(error));
            }
            self.slot_states[slot as usize] = Slot::Empty;
            self.ops.unload(&mut self.slots, slot)?;
        }
        for &(slot, content) in &step.load {
            if let Err(error) = self.in_range("slot", slot as usize, self.limits.num_slots) {
                return Ok(Err(error));
            }
            self.ops.group().begin(slot.into(), step.id);
            match self.adapters.staged(content) {
                Some(copy) => self.load(slot, &copy)?,
                None => {
                    self.ops.unload(&mut self.slots, slot)?;
                    self.fail_load(slot, content, "it was never staged here".into())?;
                }
            }
        }
        let mut refused = Vec::new();
        for new in &step.added {
            match self.add(new, step.id)? {
                Ok(refusal) => refused.extend(refusal),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(refused))
    }

    /// Refuses a value that is not below its limit.
    pub(super) fn in_range(&self, what: &'static str, value: usize, limit: usize) -> Result<(), StepError> {
        if value < limit { Ok(()) } else { Err(StepError::OutOfRange { what, value, limit }) }
    }

    /// Gives a sequence a seat, or refuses it if the model or the device cannot compute it.
    fn add(&mut self, new: &NewSequence, step: u64) -> kernels::Result<Result<Option<Refusal>, StepError>> {
        if let Err(error) = self.expect_new(new) {
            return Ok(Err(error));
        }
        let id = new.sequence;
        if let Err(reason) = self.expect_task(new.pooling) {
            return Ok(Ok(Some(self.refuse(id, reason))));
        }
        if let Err(reason) = self
            .expect_tokens(new)
            .and_then(|()| self.expect_sums(&new.members, new.members_from))
            .and_then(|()| expect_sampling(&new.sampling))
        {
            return Ok(Ok(Some(self.refuse(id, reason))));
        }
        let Some(&seat) = self.free_seats.last() else {
            let limit = self.limits.max_sequences;
            return Ok(Err(StepError::OutOfRange { what: "running sequence", value: limit, limit }));
        };
        let (prompt, output) = new.tokens.split_at(new.prompt_len);
        // Nothing is sampled from a sequence that is pooled.
        let seated = match new.pooling {
            Some(_) => Ok(()),
            None => self.ops.seat(&mut self.sampler, seat, &new.sampling, prompt, output),
        };
        match seated {
            Ok(()) => {}
            Err(error) if error.is_argument() => {
                return Ok(Ok(Some(self.refuse(id, error.to_string()))));
            }
            Err(error) => return Err(error),
        }
        self.free_seats.pop();
        let seated = Sequence::new(new, seat, step);
        self.sequences.insert(id, Place::Seated(Box::new(seated)));
        Ok(Ok(None))
    }

    /// Checks what a router that keeps to the protocol never violates.
    fn expect_new(&self, new: &NewSequence) -> Result<(), StepError> {
        if self.sequences.contains_key(&new.sequence) {
            return Err(StepError::DuplicateSequence(new.sequence));
        }
        self.in_range("adapter of a sequence", new.members.len(), MAX_MEMBERS + 1)?;
        self.in_range("first row of adapters", new.members_from, new.prompt_len.max(1))?;
        let mut slots = new.members.iter().map(|member| member.slot as usize);
        slots.try_for_each(|slot| self.in_range("slot", slot, self.limits.num_slots))
    }

    /// Checks that the model computes what is asked for.
    fn expect_task(&self, pooling: Option<Pooling>) -> Result<(), String> {
        let task = &self.model.decoder().task;
        let classes = task.classifier().map(|classifier| classifier.classes);
        match pooling {
            None if *task != Task::Generate => Err("the model generates no tokens".into()),
            Some(Pooling { classes: true, kind, .. }) => match (kind, classes) {
                (PoolingKind::None, Some(Classes::OfTokens))
                | (PoolingKind::First, Some(Classes::OfSequences)) => Ok(()),
                _ => Err(format!("the model has no classes for {kind:?}")),
            },
            _ => Ok(()),
        }
    }

    /// Checks the number of a sequence's tokens, and that each token has a row.
    fn expect_tokens(&self, new: &NewSequence) -> Result<(), String> {
        let (tokens, limit) = (new.tokens.len(), self.model.decoder().max_positions);
        if new.prompt_len == 0 || new.prompt_len > tokens {
            return Err(format!("a prompt of {} tokens of {tokens}", new.prompt_len));
        }
        if tokens > limit {
            return Err(format!("{tokens} tokens, the model has {limit} positions"));
        }
        let biased = new.sampling.logit_bias.iter().map(|(token, _)| *token);
        let banned = new.sampling.bans.iter().map(|ban| ban.token);
        self.expect_tokens_of(new.tokens.iter().copied().chain(biased).chain(banned), &new.members)
    }

    /// Checks that a sequence's adapters can be added to each other, and can begin to act within it if they do.
    fn expect_sums(&self, members: &[Member], from: usize) -> Result<(), String> {
        if let ([] | [Member { weight: 1.0, .. }], 0) = (members, from) {
            return Ok(());
        }
        let adapters = || members.iter().filter_map(|member| self.adapter(member.slot));
        if let Some(other) = adapters().find_map(|adapter| adapter.beside_sums) {
            return Err(format!(
                "an adapter of an ensemble, or one that begins within a prompt, has {other}; it may have low-rank deltas \
                 and biases alone"
            ));
        }
        let ranks: usize = adapters().map(|adapter| adapter.max_lora_rank.next_multiple_of(RANK_STEP)).sum();
        if ranks > MAX_MEMBER_RANKS {
            return Err(format!(
                "the adapters of an ensemble have a rank of {ranks} in all, which must be at most {MAX_MEMBER_RANKS}"
            ));
        }
        Ok(())
    }

    /// Checks that the model, or the adapter of a sequence, has a row for each of these tokens.
    pub(super) fn expect_tokens_of(
        &self,
        tokens: impl Iterator<Item = u32>,
        members: &[Member],
    ) -> Result<(), String> {
        let vocab = self.model.decoder().vocab;
        let Some(largest) = tokens.max().filter(|token| *token as usize >= vocab) else {
            return Ok(());
        };
        let adapters = members.iter().filter_map(|member| self.adapter(member.slot));
        let limit = adapters.map(|adapter| adapter.vocab).fold(vocab, usize::max);
        if largest as usize >= limit {
            return Err(format!("token {largest} is out of range, limit {limit}"));
        }
        Ok(())
    }

    /// The adapter in a slot.
    fn adapter(&self, slot: u32) -> Option<&Properties> {
        match self.slot_states.get(slot as usize)? {
            Slot::Loading(adapter) | Slot::Ready(adapter) => Some(adapter),
            Slot::Empty => None,
        }
    }

    /// The vector that a sequence's adapter adds to hidden states. Members of ensembles have none.
    pub(super) fn hidden_shift(&self, members: &[Member]) -> Option<Arc<[f32]>> {
        self.adapter(members.first()?.slot)?.hidden_shift.clone()
    }

    /// Refuses a sequence: its seat is freed, and none of its rows is computed any more.
    pub(super) fn refuse(&mut self, sequence: u64, reason: String) -> Refusal {
        if let Some(Place::Seated(seated)) = self.sequences.insert(sequence, Place::Refused) {
            self.free_seats.push(seated.seat);
        }
        Refusal { sequence, reason }
    }

    /// Whether any slot is being filled.
    pub(super) fn is_loading(&self) -> bool {
        self.slot_states.iter().any(|state| matches!(state, Slot::Loading(_)))
    }

    /// Whether rows may use a slot.
    pub(super) fn is_slot_ready(&self, slot: u32) -> bool {
        matches!(self.slot_states.get(slot as usize), Some(Slot::Ready(_)))
    }
}

/// Checks the values of sampling parameters. The sampler checks the token ids in them.
fn expect_sampling(sampling: &SamplingParams) -> Result<(), String> {
    sampling.check().map_err(|error| format!("{} {}", error.name, error.problem()))?;
    match sampling.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
        Some((token, bias)) => Err(format!("the logit bias of token {token} is {bias}")),
        None => Ok(()),
    }
}
