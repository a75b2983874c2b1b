//! A shard whose model is a hash: the token after a sequence depends on the adapter and on every token before it, and
//! so does what a row leaves in KV memory, which the rotation of its position has a part in, too. A row that reads
//! anything but its own past panics.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use scheduler::{
    Adapter, AdapterKey, Added, Limits, Request, RequestId, RopeScaling, RowsPlan, Sampled, StepPlan,
};

/// What a request's sampling parameters are to a real shard. The salt is part of the model's state here, so that a
/// block shared between two salts is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Payload {
    pub(crate) id: u64,
    pub(crate) salt: u128,
}

/// Tokens of the simulated model; 0 is the stop token.
pub(crate) const VOCAB: u64 = 11;
pub(crate) const STOP: u32 = 0;

/// The state after one more token.
fn mix(state: u64, value: u64) -> u64 {
    let mixed = (state ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 29)
}

fn start(salt: u128) -> u64 {
    mix(salt as u64, (salt >> 64) as u64)
}

fn sample(state: u64) -> u32 {
    ((state >> 7) % VOCAB) as u32
}

/// What distinguishes the rotary frequencies of a row that goes by so many tokens.
fn rotation(rope: RopeScaling, length: usize) -> u64 {
    match rope {
        RopeScaling::Switch { context } => u64::from(length > context as usize),
        RopeScaling::Dynamic { context } if length > context as usize => length as u64,
        RopeScaling::Dynamic { .. } | RopeScaling::Fixed => 0,
    }
}

/// What a row depends on beside the tokens up to it.
struct Model<'a> {
    rope: RopeScaling,
    /// Tokens that the sequence was added with.
    added: usize,
    adapters: &'a [AdapterKey],
    /// The position from which on these act.
    adapters_from: u32,
}

impl Model<'_> {
    /// The state after the token at a position.
    fn next(&self, state: u64, token: u32, position: usize) -> u64 {
        let begins = position == self.adapters_from as usize;
        let bytes = self.adapters.iter().filter(|_| begins).flat_map(|key| key.0);
        let state = bytes.fold(state, |state, byte| mix(state, u64::from(byte)));
        let state = mix(state, u64::from(token));
        match rotation(self.rope, self.added.max(position + 1)) {
            0 => state,
            rotation => mix(state, rotation),
        }
    }

    /// The state after all of these tokens.
    fn all(&self, salt: u128, tokens: &[u32]) -> u64 {
        let tokens = tokens.iter().enumerate();
        tokens.fold(start(salt), |state, (position, &token)| self.next(state, token, position))
    }
}

/// The answer that a request gets when it is alone, computed without blocks, chunks or steps.
pub(crate) fn plain(request: &Request<Payload>, rope: RopeScaling) -> Vec<u32> {
    answer(request, &[], rope)
}

/// The whole answer of a request that is added when it has generated the first tokens of it.
pub(crate) fn answer(request: &Request<Payload>, generated: &[u32], rope: RopeScaling) -> Vec<u32> {
    let adapters: Vec<_> = request.adapters.keys().collect();
    let mut tokens = [&request.prompt[..], generated].concat();
    let (added, adapters_from) = (tokens.len(), request.adapters_from);
    let mut model = Model { rope, added, adapters: &adapters, adapters_from };
    let mut state = model.all(request.payload.salt, &tokens);
    while tokens.len() < request.prompt.len() + request.max_new_tokens as usize {
        let token = sample(state);
        tokens.push(token);
        if request.stop_ids.contains(&token) {
            break;
        }
        let len = tokens.len();
        state = model.next(state, token, len - 1);
        if matches!(rope, RopeScaling::Switch { context } if len == context as usize + 1) {
            model.added = len;
            state = model.all(request.payload.salt, &tokens);
        }
    }
    tokens.split_off(request.prompt.len())
}

#[derive(Debug)]
struct Seat {
    tokens: Vec<u32>,
    /// The number of tokens that it was added with.
    added: usize,
    /// Its blocks that have not been released.
    table: Vec<Option<u32>>,
    /// The position behind its last row.
    planned: usize,
    adapters: Vec<AdapterKey>,
    adapters_from: u32,
    slots: Arc<[u32]>,
    salt: u128,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Empty,
    Loading(AdapterKey),
    Ready(AdapterKey),
    /// The load has failed on one rank, and others may have the adapter.
    Failed(AdapterKey),
}

#[derive(Debug)]
pub(crate) struct Shard {
    limits: Limits,
    last_step: u64,
    /// By block and offset: the state after the tokens up to there.
    memory: Vec<Vec<Option<u64>>>,
    seats: BTreeMap<RequestId, Seat>,
    slots: Vec<Slot>,
    /// Sequences that it will not take.
    pub(crate) refuses: BTreeSet<RequestId>,
    /// Sequences that it has not taken, until they are dropped.
    refused: BTreeSet<RequestId>,
    /// Tokens of the longest `added` so far.
    pub(crate) most_added: usize,
}

impl Shard {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            limits: limits.clone(),
            last_step: 0,
            memory: vec![vec![None; limits.block_size as usize]; limits.num_blocks as usize],
            seats: BTreeMap::new(),
            slots: vec![Slot::Empty; limits.num_slots as usize],
            refuses: BTreeSet::new(),
            refused: BTreeSet::new(),
            most_added: 0,
        }
    }

    /// Begins a new session: only adapters in slots stay. Returns them.
    pub(crate) fn attach(&mut self) -> Vec<(u32, Adapter)> {
        let mut fresh = Self::new(&self.limits);
        for (slot, state) in (0..).zip(&self.slots) {
            if let Slot::Ready(_) = state {
                fresh.slots[slot] = *state;
            }
        }
        *self = fresh;
        let ready = |(slot, state): (u32, &Slot)| match state {
            Slot::Ready(key) => Some((slot, Adapter { key: *key, bytes: 10 })),
            _ => None,
        };
        (0..).zip(&self.slots).filter_map(ready).collect()
    }

    /// Runs a step: one token for every `sample` in row order, and the sequences that are not taken.
    pub(crate) fn run(&mut self, step: &StepPlan<Payload>) -> (Vec<Sampled>, Vec<RequestId>) {
        assert_eq!(step.id, self.last_step + 1, "steps are consecutive");
        self.last_step = step.id;
        for id in &step.dropped {
            let known = self.seats.remove(id).is_some() || self.refused.remove(id);
            assert!(known, "{id:?} is dropped and was never added");
        }
        for &slot in &step.unload {
            let slot = &mut self.slots[slot as usize];
            assert!(matches!(slot, Slot::Ready(_) | Slot::Failed(_)), "unload of a slot that is {slot:?}");
            *slot = Slot::Empty;
        }
        for &(slot, key) in &step.load {
            let slot = &mut self.slots[slot as usize];
            assert_eq!(*slot, Slot::Empty, "load into an occupied slot");
            *slot = Slot::Loading(key);
        }
        let refused: Vec<_> =
            step.added.iter().filter(|added| !self.add(added)).map(|added| added.id).collect();
        let seats = self.limits.max_sequences as usize;
        let taken = self.seats.len() + self.refused.len();
        assert!(taken <= seats, "{taken} sequences and {seats} seats");
        let tokens: usize = step.added.iter().map(|added| added.prompt.len() + added.generated.len()).sum();
        assert!(step.added.len() <= 1 || tokens <= self.limits.max_added_tokens as usize, "{tokens} tokens");
        self.most_added = self.most_added.max(tokens);
        let rows = step.rows.iter().filter(|rows| !self.refused.contains(&rows.id)).collect::<Vec<_>>();
        let token = |rows: &RowsPlan| Some(Sampled { id: rows.id, token: self.run_rows(rows)? });
        (rows.into_iter().filter_map(token).collect(), refused)
    }

    /// Gives a sequence its seat. Returns whether it takes it at all.
    fn add(&mut self, added: &Added<Payload>) -> bool {
        assert_eq!(added.id.0, added.payload.id, "the payload is the request's own");
        assert!(!self.refused.contains(&added.id), "{:?} has two seats", added.id);
        if self.refuses.contains(&added.id) {
            self.refused.insert(added.id);
            return false;
        }
        let adapter = |slot: &u32| match self.slots[*slot as usize] {
            Slot::Ready(key) => key,
            slot => panic!("{:?} uses a slot that is {slot:?}", added.id),
        };
        let adapters = added.slots.iter().map(adapter).collect();
        let tokens = [&added.prompt[..], &added.generated].concat();
        let seat = Seat {
            added: tokens.len(),
            tokens,
            table: Vec::new(),
            planned: 0,
            adapters,
            adapters_from: added.adapters_from,
            slots: added.slots.clone(),
            salt: added.payload.salt,
        };
        assert!(self.seats.insert(added.id, seat).is_none(), "{:?} has two seats", added.id);
        true
    }

    fn run_rows(&mut self, rows: &RowsPlan) -> Option<u32> {
        let seat = self.seats.get_mut(&rows.id).unwrap();
        let released = rows.released_blocks as usize;
        seat.table.resize(seat.table.len().max(released), None);
        seat.table.extend(rows.new_blocks.iter().copied().map(Some));
        seat.table[..released].fill(None);
        for (&slot, &key) in seat.slots.iter().zip(&seat.adapters) {
            assert_eq!(self.slots[slot as usize], Slot::Ready(key), "slot of {:?}", rows.id);
        }
        let size = self.limits.block_size as usize;
        let window = match self.limits.kv_window {
            0 => usize::MAX,
            window => window as usize,
        };
        let first = rows.position as usize;
        let mut state = start(seat.salt);
        let Seat { added, ref adapters, adapters_from, .. } = *seat;
        let model = Model { rope: self.limits.rope, added, adapters, adapters_from };
        let step = |state, position: usize| model.next(state, seat.tokens[position], position);
        for position in 0..first {
            state = step(state, position);
            if first - position < window {
                let block = seat.table[position / size].expect("a block that is read is held");
                let stored = self.memory[block as usize][position % size];
                assert_eq!(stored, Some(state), "{:?} reads position {position}", rows.id);
            }
        }
        let range = first..first + rows.rows as usize;
        let mut written = Vec::new();
        for position in range.clone() {
            state = step(state, position);
            let block = seat.table[position / size].expect("a block that is written is held");
            self.memory[block as usize][position % size] = Some(state);
            written.push(Some(block));
        }
        let held = seat.table.iter().flatten().count();
        let most = window.saturating_add(range.len() - 1).div_ceil(size).saturating_add(1);
        assert!(held <= most, "{:?} holds {held} blocks, {most} are enough", rows.id);
        seat.planned = range.end;
        let token = rows.sample.then(|| sample(state));
        if let Some(token) = token {
            assert_eq!(range.end, seat.tokens.len(), "{:?} samples after its last token", rows.id);
            seat.tokens.push(token);
        }
        for (id, other) in self.seats.iter().filter(|(id, _)| **id != rows.id) {
            // Of blocks that it does not need any more it may be told with its next rows.
            let needed = (other.planned + 1).saturating_sub(window) / size;
            let mut needed = other.table.iter().skip(needed);
            assert!(!needed.any(|block| written.contains(block)), "{:?} writes a block of {id:?}", rows.id);
        }
        token
    }

    /// Loads that have been started and not answered.
    pub(crate) fn loading(&self) -> Vec<(u32, AdapterKey)> {
        let key = |(id, slot): (u32, &Slot)| match slot {
            Slot::Loading(key) => Some((id, *key)),
            _ => None,
        };
        (0..).zip(&self.slots).filter_map(key).collect()
    }

    /// Ends a load.
    pub(crate) fn answer(&mut self, slot: u32, key: AdapterKey, well: bool) {
        assert_eq!(self.slots[slot as usize], Slot::Loading(key));
        self.slots[slot as usize] = if well { Slot::Ready(key) } else { Slot::Failed(key) };
    }

    /// Adapters that take memory on some rank.
    pub(crate) fn resident(&self) -> Vec<AdapterKey> {
        let keys = self.slots.iter().filter_map(|slot| match slot {
            Slot::Empty => None,
            Slot::Loading(key) | Slot::Ready(key) | Slot::Failed(key) => Some(*key),
        });
        keys.collect()
    }
}
