//! Who may start: adapters into slots, sequences into seats.

use std::time::Duration;

use super::{Scheduler, plan::Draft};
use crate::{
    Added,
    blocks::Prefix,
    queues::{QueueId, Residency},
    sequence::{Sequence, Start},
};

/// Who may start next.
enum Candidate {
    Preempted,
    Queued(QueueId),
}

impl Scheduler {
    /// Loads the adapters whose requests are next, for as long as there are slots; ahead of seats and blocks, so that
    /// a load passes while others run.
    pub(super) fn load_adapters(&mut self, draft: &mut Draft, now: Duration) {
        while let Some(queue) = self.queues.pick(Residency::Absent, now) {
            let Some(adapter) = self.queues.get(queue).adapter else { return };
            let queues = &self.queues;
            let Some(placement) = self.slots.place(adapter, |key| queues.waits(key)) else {
                if self.drain_slot(queue, now) {
                    continue;
                }
                return;
            };
            for (slot, key) in placement.evicted {
                draft.unload.push(slot);
                self.queues.set_residency(key, Residency::Absent);
            }
            draft.load.push((placement.slot, adapter.key));
            self.queues.set_residency(adapter.key, Residency::Held);
        }
        for key in self.slots.undrain() {
            self.queues.set_residency(key, Residency::Ready);
        }
    }

    /// Has an adapter leave its slot, when its last sequence ends, for one that has had less service or has waited for
    /// too long. True when that is at once.
    fn drain_slot(&mut self, queue: QueueId, now: Duration) -> bool {
        let queues = &self.queues;
        let drained = self.slots.drain(queues.absent(), |key| queues.yields(key, queue, now));
        let Some(drained) = drained else { return false };
        self.queues.set_residency(drained.key, Residency::Held);
        drained.free
    }

    /// Starts sequences while seats, budgets and blocks last. Whoever is next and does not fit keeps all behind it
    /// waiting: smaller requests do not overtake it for ever.
    pub(super) fn admit(&mut self, draft: &mut Draft, now: Duration) {
        let mut promised = None;
        while self.running.len() < self.limits.seats() && draft.has_room() {
            let Some(candidate) = self.candidate(now) else { return };
            let promised = promised.get_or_insert_with(|| {
                self.running.values().map(|running| self.blocks_to_come(running)).sum()
            });
            let Some(cached) = self.fit(&candidate, *promised) else { return };
            let sequence = match candidate {
                Candidate::Preempted => self.preempted.pop_first().map(|(_, sequence)| sequence),
                Candidate::Queued(queue) => self.queues.pop(queue, now),
            };
            let Some(sequence) = sequence else { return };
            *promised += self.start(sequence, cached, draft, now);
        }
    }

    /// Sequences that have been admitted before come back first, oldest first.
    fn candidate(&mut self, now: Duration) -> Option<Candidate> {
        if !self.preempted.is_empty() {
            return Some(Candidate::Preempted);
        }
        self.queues.pick(Residency::Ready, now).map(Candidate::Queued)
    }

    fn peek(&self, candidate: &Candidate) -> Option<&Sequence> {
        match *candidate {
            Candidate::Preempted => self.preempted.values().next(),
            Candidate::Queued(queue) => self.queues.peek(queue),
        }
    }

    /// The cached blocks that the candidate shares, if there are blocks for all its known tokens and one more block,
    /// beside those promised to the running sequences for theirs.
    fn fit(&self, candidate: &Candidate, promised: usize) -> Option<Vec<u32>> {
        let sequence = self.peek(candidate)?;
        if sequence.in_flight > 0 {
            return None;
        }
        // The last token is always computed: its row gives the next one.
        let reusable = &sequence.tokens[..sequence.tokens.len() - 1];
        let cached = if self.limits.prefix_caching && !sequence.prompt_logprobs {
            self.blocks.find(sequence.adapter, reusable)
        } else {
            Vec::new()
        };
        let idle = cached.iter().filter(|&&block| self.blocks.is_idle(block)).count();
        let needed = self.blocks_to_come(sequence) - cached.len() + idle;
        (promised + needed <= self.blocks.available()).then_some(cached)
    }

    /// Blocks that a sequence is expected to need soon: for its known tokens, and one to grow into.
    fn blocks_to_come(&self, sequence: &Sequence) -> usize {
        let held = sequence.run.blocks.len();
        let soon = self.limits.blocks_for(sequence.len()).max(held) + 1;
        soon.min(self.limits.blocks_for(sequence.max_positions())) - held
    }

    /// Gives a sequence its seat, its cached blocks and its first rows; returns the blocks it is promised beside.
    fn start(&mut self, mut sequence: Sequence, cached: Vec<u32>, draft: &mut Draft, now: Duration) -> usize {
        cached.iter().for_each(|&block| self.blocks.hold(block));
        let hit = cached.len() * self.limits.block_size as usize;
        if !sequence.admitted {
            self.welcome(&mut sequence, hit, now);
        }
        let run = &mut sequence.run;
        run.added_len = sequence.tokens.len();
        (run.planned, run.computed, run.published) = (hit, hit, cached.len());
        let start = Prefix::Start(sequence.adapter);
        let prefix = cached.last().map_or(Some(start), |&block| self.blocks.prefix_of(block));
        run.prefix = prefix.filter(|_| self.limits.prefix_caching);
        run.blocks = cached;
        draft.added.push(Added {
            id: sequence.id,
            tokens: sequence.tokens.clone(),
            prompt_len: sequence.prompt_len as u32,
            slot: sequence.slot,
        });
        let arrival = sequence.arrival;
        self.running.insert(arrival, sequence);
        draft.shared = self.hopeful() > 0;
        self.plan_rows(arrival, draft);
        self.running.get(&arrival).map_or(0, |sequence| self.blocks_to_come(sequence))
    }

    /// What happens once, at a sequence's first admission: it pins its slot and pays for its prompt.
    fn welcome(&mut self, sequence: &mut Sequence, hit: usize, now: Duration) {
        let cost = (sequence.prompt_len - hit) as u64;
        self.queues.charge(sequence.queue, cost);
        sequence.slot = sequence.adapter.and_then(|key| self.slots.pin(key));
        sequence.slot.into_iter().for_each(|slot| self.slots.charge(slot, cost));
        sequence.admitted = true;
        let queued = now.saturating_sub(sequence.submitted);
        sequence.start = Some(Start { queued, cached_tokens: hit as u32 });
        self.cached_tokens += hit as u64;
    }
}
