//! What a shard remembers between steps: who runs, where they sit, which slot holds what.

use std::{collections::HashMap, mem, sync::Arc};

use kernels::{Backend, Batch};
use model::{Config, Model, adapter::ContentHash};
use tokio::sync::oneshot::error::TryRecvError;

use super::idle::Idle;
use crate::{
    adapters::{Adapters, Fetch},
    step::{Event, NewSequence, Step},
};

/// How much room there is.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Adapters on the device.
    pub num_slots: usize,
    /// Rows of a step.
    pub max_rows: usize,
    /// Running sequences.
    pub max_sequences: usize,
    /// Rows of a step with logits.
    pub max_logit_rows: usize,
}

/// Why a step was refused. The router has broken the protocol; the shard is unharmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A sequence that does not run.
    #[error("sequence {0} does not run")]
    UnknownSequence(u64),
    /// A sequence that runs already.
    #[error("sequence {0} runs already")]
    DuplicateSequence(u64),
    /// An index or a size above its limit.
    #[error("{what} {value} is out of range, limit {limit}")]
    OutOfRange {
        /// What it is.
        what: &'static str,
        /// Its value.
        value: usize,
        /// The first value that is too large.
        limit: usize,
    },
    /// Rows without a block to store them in.
    #[error("sequence {sequence} has {blocks} blocks, position {position} needs more")]
    NoBlock {
        /// The sequence.
        sequence: u64,
        /// Its last position in the step.
        position: usize,
        /// Its blocks.
        blocks: usize,
    },
    /// A row uses a slot before it was reported ready.
    #[error("slot {0} is not ready")]
    SlotNotReady(u32),
    /// An adapter that is named by something else than its SHA-256.
    #[error("a content hash of {0} bytes")]
    ContentHash(usize),
    /// Parameters or tokens that the model cannot take.
    #[error("sequence {sequence}: {message}")]
    Sequence {
        /// The sequence.
        sequence: u64,
        /// The cause.
        message: String,
    },
}

/// A running sequence.
pub(super) struct Sequence {
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_len: usize,
    pub(super) seat: u32,
    pub(super) slot: Option<u32>,
    pub(super) blocks: Vec<u32>,
    pub(super) prompt_logprobs: bool,
    pub(super) num_top: u32,
}

/// What a slot holds.
enum Slot<B: Backend> {
    Empty,
    /// Its adapter is on its way into host memory.
    Fetching(ContentHash, Fetch<B>),
    Loading(ContentHash),
    Ready,
}

/// See the module.
pub(super) struct State<B: Backend> {
    pub(super) ops: Arc<B>,
    pub(super) model: Arc<Model<B>>,
    adapters: Arc<Adapters<B>>,
    pub(super) limits: Limits,
    pub(super) sequences: HashMap<u64, Sequence>,
    free_seats: Vec<u32>,
    slot_states: Vec<Slot<B>>,
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
        let Config { vocab, max_positions, .. } = *model.config();
        // Sequences may share blocks, but each has a table of its own.
        let tables = limits.max_sequences * max_positions.div_ceil(kernels::BLOCK_SIZE);
        Ok(State {
            slots: ops.lora_slots(&model.sites(), limits.num_slots)?,
            sampler: ops.sampler(limits.max_sequences, vocab)?,
            num_blocks: 0,
            kv: model.kv_cache(&ops, 0)?,
            scratch: model.scratch(&ops, limits.max_rows, limits.max_logit_rows)?,
            batch: ops.batch(limits.max_rows, tables)?,
            host: Batch::default(),
            idle: Idle::new(),
            sequences: HashMap::new(),
            free_seats: (0..limits.max_sequences as u32).rev().collect(),
            slot_states: (0..limits.num_slots).map(|_| Slot::Empty).collect(),
            ops,
            model,
            adapters,
            limits,
        })
    }

    /// Replaces the memory for keys and values.
    pub(super) fn set_blocks(&mut self, num_blocks: usize) -> kernels::Result<()> {
        self.kv = self.model.kv_cache(&self.ops, 0)?;
        self.kv = self.model.kv_cache(&self.ops, num_blocks)?;
        self.num_blocks = num_blocks;
        Ok(())
    }

    /// Forgets all sequences and empties all slots.
    pub(super) fn reset(&mut self) -> kernels::Result<()> {
        self.idle.interrupt();
        self.sequences.clear();
        self.free_seats = (0..self.limits.max_sequences as u32).rev().collect();
        for slot in 0..self.limits.num_slots {
            let held = mem::replace(&mut self.slot_states[slot], Slot::Empty);
            if matches!(held, Slot::Loading(_) | Slot::Ready) {
                self.ops.unload(&mut self.slots, slot as u32)?;
            }
        }
        Ok(())
    }

    /// Loads that have ended since the last call.
    pub(super) fn slot_events(&mut self) -> kernels::Result<Vec<Event>> {
        let mut events = self.load_fetched()?;
        for slot in self.ops.loaded(&mut self.slots)? {
            let state = &mut self.slot_states[slot as usize];
            if let Slot::Loading(content) = state {
                events.push(Event::Slot { slot, content: *content, error: None });
                *state = Slot::Ready;
            }
        }
        Ok(events)
    }

    /// Begins to copy what has arrived in host memory; returns what could not be had.
    fn load_fetched(&mut self) -> kernels::Result<Vec<Event>> {
        let mut failed = Vec::new();
        for (slot, state) in (0..).zip(&mut self.slot_states) {
            let Slot::Fetching(content, fetch) = state else { continue };
            let content = *content;
            let error = match fetch.try_recv() {
                Err(TryRecvError::Empty) => continue,
                Ok(Ok(adapter)) => {
                    *state = Slot::Loading(content);
                    self.ops.load(&mut self.slots, slot, &adapter)?;
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(TryRecvError::Closed) => "reading it was interrupted".into(),
            };
            *state = Slot::Empty;
            failed.push(Event::Slot { slot, content, error: Some(error) });
        }
        Ok(failed)
    }

    /// What must happen before the rows of a step, in the order of its fields.
    pub(super) fn prepare(&mut self, step: &Step) -> kernels::Result<Result<(), StepError>> {
        for sequence in &step.dropped {
            match self.sequences.remove(sequence) {
                Some(dropped) => self.free_seats.push(dropped.seat),
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
            match self.adapters.get(content) {
                Some(adapter) => {
                    self.slot_states[slot as usize] = Slot::Loading(content);
                    self.ops.load(&mut self.slots, slot, &adapter)?;
                }
                // Memory pressure has taken it since it was prepared.
                None => {
                    self.slot_states[slot as usize] = Slot::Fetching(content, self.adapters.fetch(content))
                }
            }
        }
        for new in &step.added {
            if let Err(error) = self.add(new) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    pub(super) fn in_range(&self, what: &'static str, value: usize, limit: usize) -> Result<(), StepError> {
        if value < limit { Ok(()) } else { Err(StepError::OutOfRange { what, value, limit }) }
    }

    fn add(&mut self, new: &NewSequence) -> Result<(), StepError> {
        let id = new.sequence;
        if self.sequences.contains_key(&id) {
            return Err(StepError::DuplicateSequence(id));
        }
        self.in_range("prompt length", new.prompt_len, new.tokens.len() + 1)?;
        let running = self.sequences.len();
        self.in_range("running sequence", running, self.limits.max_sequences)?;
        if let Some(slot) = new.slot {
            self.in_range("slot", slot as usize, self.limits.num_slots)?;
        }
        let Some(seat) = self.free_seats.pop() else {
            return Err(StepError::OutOfRange {
                what: "seat",
                value: running,
                limit: self.limits.max_sequences,
            });
        };
        let (prompt, output) = new.tokens.split_at(new.prompt_len);
        if let Err(error) = self.ops.seat(&mut self.sampler, seat, &new.sampling, prompt, output) {
            self.free_seats.push(seat);
            return Err(StepError::Sequence { sequence: id, message: error.to_string() });
        }
        self.sequences.insert(
            id,
            Sequence {
                tokens: new.tokens.clone(),
                prompt_len: new.prompt_len,
                seat,
                slot: new.slot,
                blocks: Vec::new(),
                prompt_logprobs: new.prompt_logprobs,
                num_top: new.sampling.num_top,
            },
        );
        Ok(())
    }

    /// Whether an adapter is on its way into a slot.
    pub(super) fn is_loading(&self) -> bool {
        self.slot_states.iter().any(|state| matches!(state, Slot::Fetching(..) | Slot::Loading(_)))
    }

    pub(super) fn is_slot_ready(&self, slot: u32) -> bool {
        matches!(self.slot_states.get(slot as usize), Some(Slot::Ready))
    }
}
