//! Preemption: sequences give way to older ones when blocks run out, and to tenants that have no seat.

use std::collections::{BTreeMap, BTreeSet};

use super::Scheduler;
use crate::{
    flows::{FlowId, SERVICE_UNIT, TenantId},
    sequence::Arrival,
    table::Table,
};

/// The running sequences of a tenant.
#[derive(Debug, Clone, Copy)]
struct Share {
    sequences: u64,
    /// Its oldest sequence, which gives way to no other tenant.
    oldest: Arrival,
    weight: u64,
}

/// Why a tenant that runs nothing cannot be given a seat in place of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// No tenant that has had more service runs more than one sequence. The same holds for all who have had more service
    /// than this one.
    Seats,
    /// Its request needs more blocks than its tenant's share, or than the others would give.
    Blocks,
}

impl Share {
    /// Sequences relative to the weight.
    fn load(&self) -> u64 {
        self.sequences * SERVICE_UNIT / self.weight
    }
}

impl<P: Clone> Scheduler<P> {
    /// Takes seat and blocks from a running sequence. Its results in flight still count; the rest is computed again
    /// when it comes back.
    pub(super) fn preempt(&mut self, arrival: Arrival) {
        if let Some(sequence) = self.stop(arrival) {
            self.preempted.insert(arrival, sequence);
            self.preemptions += 1;
        }
    }

    /// Preempts a sequence for one that needs blocks. Returns false if none gives way.
    pub(super) fn preempt_for(&mut self, arrival: Arrival, step: u64) -> bool {
        let victim = self.victim_for(arrival, step);
        victim.into_iter().for_each(|victim| self.preempt(victim));
        victim.is_some()
    }

    /// The sequence that gives its blocks to `arrival`: the youngest of the tenant that runs most for its weight,
    /// unless it has rows in the step. A tenant that runs more gives way in any case, except for its oldest sequence;
    /// otherwise the younger gives way to the older. A tenant that runs less gives way to the oldest sequence of all,
    /// so that there is always progress.
    fn victim_for(&self, arrival: Arrival, step: u64) -> Option<Arrival> {
        let shares = self.shares();
        let share = |arrival: Arrival| shares.get(&self.tenant_of(arrival)?);
        let own = share(arrival)?.load();
        let oldest = self.running.first_key_value().is_some_and(|(&oldest, _)| oldest == arrival);
        let idle = self.running.iter().filter(|(_, sequence)| sequence.run.last_step != step);
        let victims = idle.filter_map(|(&victim, _)| {
            let share = share(victim)?;
            let (load, younger) = (share.load(), victim > arrival);
            let gives_way = younger && (load >= own || oldest) || load > own && victim != share.oldest;
            gives_way.then_some((load, victim))
        });
        victims.max().map(|(_, victim)| victim)
    }

    /// The running sequences to preempt so that the next request of a newcomer's flow can start, none if there is
    /// room. They are the youngest ones of tenants that run more than one and have had more service.
    pub(super) fn victims_for_newcomer(&self, flow: FlowId) -> Result<Vec<Arrival>, Obstacle> {
        let sequence = self.flows.peek(flow).ok_or(Obstacle::Seats)?;
        let tenant = self.flows.tenant_of(flow);
        let mut shares = self.shares();
        let weights: u64 = shares.values().map(|share| share.weight).sum();
        let weight = self.flows.weight(tenant);
        let fair_blocks = u64::from(self.limits.num_blocks) * weight / (weights + weight);
        shares.retain(|&other, _| self.flows.tenant_service(other) > self.flows.tenant_service(tenant));
        shares.retain(|_, share| share.sequences > 1);
        if shares.is_empty() {
            return Err(Obstacle::Seats);
        }
        let cached = self.find_cached(sequence);
        let needed = self.promised() + self.blocks_needed(sequence, &cached.table);
        let shared: BTreeSet<u32> = cached.table.blocks().iter().copied().collect();
        let (mut available, mut seats) = (self.blocks.available(), self.limits.seats() - self.running.len());
        let mut victims = Vec::new();
        while seats == 0 || needed > available {
            if needed > available && self.blocks_to_come(sequence, &Table::default()) as u64 > fair_blocks {
                return Err(Obstacle::Blocks);
            }
            let most = shares.iter_mut().filter(|(_, s)| s.sequences > 1).max_by_key(|(_, s)| s.load());
            let (&other, share) = most.ok_or(Obstacle::Blocks)?;
            let mut youngest = self.running.iter().rev();
            let own = |(arrival, _): &(&Arrival, _)| {
                self.tenant_of(**arrival) == Some(other) && !victims.contains(*arrival)
            };
            let (&victim, sequence) = youngest.find(own).ok_or(Obstacle::Blocks)?;
            share.sequences -= 1;
            victims.push(victim);
            let table = &sequence.run.table;
            let freed = table.blocks().iter();
            let freed =
                freed.filter(|block| self.blocks.is_exclusive(**block) && !shared.contains(block)).count();
            available += freed + self.blocks_to_come(sequence, table);
            seats += 1;
        }
        Ok(victims)
    }

    fn shares(&self) -> BTreeMap<TenantId, Share> {
        let mut shares = BTreeMap::new();
        for (&arrival, sequence) in &self.running {
            let tenant = self.flows.tenant_of(sequence.flow);
            let new = || Share { sequences: 0, oldest: arrival, weight: self.flows.weight(tenant) };
            shares.entry(tenant).or_insert_with(new).sequences += 1;
        }
        shares
    }

    fn tenant_of(&self, arrival: Arrival) -> Option<TenantId> {
        self.running.get(&arrival).map(|sequence| self.flows.tenant_of(sequence.flow))
    }
}
