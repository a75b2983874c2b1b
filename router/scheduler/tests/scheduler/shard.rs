//! A shard whose model is a hash: the token after a sequence depends on the adapter and on every token before it, and
//! so does what a row leaves in KV memory. A row that reads anything but its own past panics.

use std::collections::BTreeMap;

use scheduler::{AdapterKey, Added, Limits, RequestId, RowsPlan, StepPlan};

/// Tokens of the simulated model; 0 is the stop token.
pub(crate) const VOCAB: u64 = 11;
pub(crate) const STOP: u32 = 0;

/// The state after one more token.
fn mix(state: u64, value: u64) -> u64 {
    let mixed = (state ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 29)
}

fn start(adapter: Option<AdapterKey>) -> u64 {
    adapter.map_or(1, |key| key.0.iter().fold(2, |state, &byte| mix(state, u64::from(byte))))
}

fn sample(state: u64) -> u32 {
    ((state >> 7) % VOCAB) as u32
}

/// What a request gets when it is alone, computed without blocks, chunks or steps.
pub(crate) fn plain(adapter: Option<AdapterKey>, prompt: &[u32], max_new: u32, stop: bool) -> Vec<u32> {
    let mut state = prompt.iter().fold(start(adapter), |state, &token| mix(state, u64::from(token)));
    let mut tokens = Vec::new();
    while tokens.len() < max_new as usize {
        let token = sample(state);
        tokens.push(token);
        if stop && token == STOP {
            break;
        }
        state = mix(state, u64::from(token));
    }
    tokens
}

#[derive(Debug)]
struct Seat {
    tokens: Vec<u32>,
    table: Vec<u32>,
    adapter: Option<AdapterKey>,
    slot: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Empty,
    Loading(AdapterKey),
    Ready(AdapterKey),
}

#[derive(Debug)]
pub(crate) struct Shard {
    limits: Limits,
    last_step: u64,
    /// By block and offset: the state after the tokens up to there.
    memory: Vec<Vec<Option<u64>>>,
    seats: BTreeMap<RequestId, Seat>,
    slots: Vec<Slot>,
}

impl Shard {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            limits: limits.clone(),
            last_step: 0,
            memory: vec![vec![None; limits.block_size as usize]; limits.num_blocks as usize],
            seats: BTreeMap::new(),
            slots: vec![Slot::Empty; limits.num_slots as usize],
        }
    }

    /// Runs a step: one token for every `sample`, in row order.
    pub(crate) fn run(&mut self, step: &StepPlan) -> Vec<(RequestId, u32)> {
        assert_eq!(step.id, self.last_step + 1, "steps are consecutive");
        self.last_step = step.id;
        for id in &step.dropped {
            assert!(self.seats.remove(id).is_some(), "{id:?} is dropped and has no seat");
        }
        for &slot in &step.unload {
            let slot = &mut self.slots[slot as usize];
            assert!(matches!(slot, Slot::Ready(_)), "unload of a slot that is {slot:?}");
            *slot = Slot::Empty;
        }
        for &(slot, key) in &step.load {
            let slot = &mut self.slots[slot as usize];
            assert_eq!(*slot, Slot::Empty, "load into an occupied slot");
            *slot = Slot::Loading(key);
        }
        step.added.iter().for_each(|added| self.add(added));
        let seats = self.limits.max_sequences as usize;
        assert!(self.seats.len() <= seats, "{} sequences and {seats} seats", self.seats.len());
        step.rows.iter().filter_map(|rows| self.run_rows(rows).map(|token| (rows.id, token))).collect()
    }

    fn add(&mut self, added: &Added) {
        let adapter = added.slot.map(|slot| match self.slots[slot as usize] {
            Slot::Ready(key) => key,
            slot => panic!("{:?} uses a slot that is {slot:?}", added.id),
        });
        let seat = Seat { tokens: added.tokens.clone(), table: Vec::new(), adapter, slot: added.slot };
        assert!(self.seats.insert(added.id, seat).is_none(), "{:?} has two seats", added.id);
    }

    fn run_rows(&mut self, rows: &RowsPlan) -> Option<u32> {
        let seat = self.seats.get_mut(&rows.id).unwrap();
        seat.table.extend(&rows.new_blocks);
        if let Some(slot) = seat.slot {
            assert_eq!(
                Some(self.slots[slot as usize]),
                seat.adapter.map(Slot::Ready),
                "slot of {:?}",
                rows.id
            );
        }
        let size = self.limits.block_size as usize;
        let mut state = start(seat.adapter);
        for position in 0..rows.position as usize {
            state = mix(state, u64::from(seat.tokens[position]));
            let stored = self.memory[seat.table[position / size] as usize][position % size];
            assert_eq!(stored, Some(state), "{:?} reads position {position}", rows.id);
        }
        let first = rows.position as usize;
        let range = first..first + rows.rows as usize;
        let mut written = Vec::new();
        for position in range.clone() {
            state = mix(state, u64::from(seat.tokens[position]));
            let block = seat.table[position / size];
            self.memory[block as usize][position % size] = Some(state);
            written.push(block);
        }
        let token = rows.sample.then(|| sample(state));
        if let Some(token) = token {
            assert_eq!(range.end, seat.tokens.len(), "{:?} samples after its last token", rows.id);
            seat.tokens.push(token);
        }
        for (id, other) in self.seats.iter().filter(|(id, _)| **id != rows.id) {
            assert!(
                !written.iter().any(|b| other.table.contains(b)),
                "{:?} writes a block of {id:?}",
                rows.id
            );
        }
        token
    }

    /// Loads that have been started and not answered.
    pub(crate) fn loading(&self) -> Vec<(u32, AdapterKey)> {
        let loading = (0..).zip(&self.slots);
        loading
            .filter_map(|(id, slot)| if let Slot::Loading(key) = slot { Some((id, *key)) } else { None })
            .collect()
    }

    /// Ends a load.
    pub(crate) fn answer(&mut self, slot: u32, key: AdapterKey, well: bool) {
        assert_eq!(self.slots[slot as usize], Slot::Loading(key));
        self.slots[slot as usize] = if well { Slot::Ready(key) } else { Slot::Empty };
    }

    /// Adapters in slots, ready or loading.
    pub(crate) fn resident(&self) -> Vec<AdapterKey> {
        let keys = self.slots.iter().filter_map(|slot| match slot {
            Slot::Empty => None,
            Slot::Loading(key) | Slot::Ready(key) => Some(*key),
        });
        keys.collect()
    }
}
