//! The invariants.

use super::{MAX_IN_FLIGHT, Scheduler};
use crate::sequence::Sequence;

impl<P> Scheduler<P> {
    /// Asserts every invariant: blocks, slots, flows and results in flight are each accounted for exactly once.
    /// Takes time in proportion to all there is; meant for tests and for idle moments.
    ///
    /// # Panics
    /// If one is broken.
    pub fn check(&self) {
        self.blocks.check(self.running.values().map(|sequence| sequence.run.table.blocks()));
        let pins = |sequence| Sequence::slots(sequence).iter().copied().zip(sequence.adapters.keys());
        self.slots.check(self.admitted().flat_map(pins));
        self.flows.check(self.admitted().map(|sequence| sequence.flow), |key| self.slots.residency(key));
        let member = |sequence: &Sequence<P>| sequence.group.map(|group| (group, sequence.arrival));
        self.groups.check(&self.sequences().filter_map(member).collect::<Vec<_>>());
        self.check_sequences();
        self.check_flights();
    }

    fn check_sequences(&self) {
        assert!(self.running.len() <= self.limits.seats(), "{} sequences run", self.running.len());
        let parked = self.groups.waiting();
        assert_eq!(self.sequences().count() + parked, self.tickets.len(), "requests that have not ended");
        for sequence in self.sequences() {
            let ticket = self.tickets.get(&sequence.id).map(|ticket| (ticket.arrival, ticket.flow));
            assert_eq!(ticket, Some((sequence.arrival, Some(sequence.flow))), "ticket of {:?}", sequence.id);
        }
        for sequence in self.admitted() {
            let (slots, adapters) = (sequence.slots().len(), sequence.adapters.list().len());
            assert_eq!(slots, adapters, "slots of {:?}", sequence.id);
            assert!(sequence.len() <= sequence.max_positions() + 1, "{:?} has too many tokens", sequence.id);
            assert!(sequence.generates() || sequence.sampling == 0, "{:?} is only scored", sequence.id);
        }
        for sequence in self.running.values() {
            let run = &sequence.run;
            let room = run.table.end() * self.limits.block_size as usize;
            assert!(run.computed <= run.planned && run.planned <= room, "rows of {:?}", sequence.id);
            assert!(run.published <= run.table.end(), "published blocks of {:?}", sequence.id);
            let needed = self.limits.first_block(run.planned);
            assert!(run.table.released() <= needed, "{:?} has released what it needs", sequence.id);
            let last = self.limits.rope.last_position(run.added_len);
            assert!(last.is_none_or(|last| run.planned <= last), "{:?} outgrows its rotation", sequence.id);
            assert!(run.planned <= sequence.max_positions(), "{:?} is planned too far", sequence.id);
        }
    }

    fn check_flights(&self) {
        assert!(self.flights.len() <= MAX_IN_FLIGHT, "{} steps in flight", self.flights.len());
        let ids: Vec<_> = self.flights.iter().map(|flight| flight.step).collect();
        let expected: Vec<_> = (self.steps + 1 - ids.len() as u64..=self.steps).collect();
        assert_eq!(ids, expected, "steps in flight are the last ones planned");
        for sequence in self.admitted() {
            let flights = self.flights.iter().flat_map(|flight| &flight.rows);
            let own: Vec<_> = flights.filter(|rows| rows.arrival == sequence.arrival).collect();
            assert_eq!(own.len(), sequence.in_flight as usize, "steps in flight of {:?}", sequence.id);
            let samples = own.iter().filter(|rows| rows.sample).count();
            assert_eq!(samples, sequence.sampling, "tokens in flight of {:?}", sequence.id);
            let rows: u32 = own.iter().map(|rows| rows.rows).sum();
            let run = &sequence.run;
            let runs = self.running.contains_key(&sequence.arrival);
            assert!(
                !runs || run.planned - run.computed == rows as usize,
                "rows in flight of {:?}",
                sequence.id
            );
        }
    }
}
