//! The way of an ask: from its reference to a version, to a content, to a lease.

use std::time::Duration;

use super::{AskState, Exchange, Stand, together::GroupId};
use crate::{Ask, AskId, Content, Fault, Found, Output, Tier, flights::Target, timers::Timer};

impl<P: Clone> Exchange<P> {
    /// Takes an ask, alone or as one of a group.
    pub(super) fn ask(&mut self, ask: Ask<P>, group: Option<GroupId>, now: Duration) {
        let (id, deadline) = (ask.id, ask.deadline);
        if self.asks.contains_key(&id) {
            self.outputs.push(Output::Failed { ask: id, fault: Fault::Duplicate });
            return;
        }
        if deadline <= now {
            self.outputs.push(Output::Failed { ask: id, fault: Fault::Slow });
            return;
        }
        let access = (ask.reference, ask.credential);
        let stand = Stand::Waiting(Target::Lookup(access));
        let arrival = self.arrivals;
        self.arrivals += 1;
        let (found, content, disk_lease, expected) = (None, None, None, None);
        let state = AskState { ask, arrival, stand, group, found, content, disk_lease, expected, retries: 0 };
        self.asks.insert(id, state);
        self.enter_group(id);
        self.timers.add(deadline, Timer::Ask(id));
        let grant = self.grants.get(access).copied();
        match grant.filter(|grant| now < grant.expires) {
            Some(grant) => self.granted(id, grant.found, now),
            None => {
                let content = grant.and_then(|grant| self.versions.peek(grant.found.version).copied());
                self.look_up(id, content, now);
            }
        }
    }

    /// Asks the source. `expected` is the content to which the reference led last time.
    pub(super) fn look_up(&mut self, id: AskId, expected: Option<Content>, now: Duration) {
        let Some(state) = self.asks.get_mut(&id) else { return };
        state.expected = expected;
        let access = state.access();
        if let Some(content) = expected {
            *self.wanted.entry(content).or_default() += 1;
        }
        self.join(id, Target::Lookup(access), 0, now);
    }

    /// The credential may read the version. Counts where the adapter was found.
    pub(super) fn granted(&mut self, id: AskId, found: Found, now: Duration) {
        self.unwant(id);
        let Some(state) = self.asks.get_mut(&id) else { return };
        state.found = Some(found);
        let tier = state.ask.tier;
        let content = self.versions.get(found.version).copied();
        state.content = content;
        let on_host = content.is_some_and(|content| self.host.has(content));
        if tier == Tier::Host {
            let on_device =
                content.and_then(|content| self.device.get(&content)).is_some_and(|slot| slot.ready);
            *if on_device { &mut self.device_stats.hits } else { &mut self.device_stats.misses } += 1;
            *if on_host { &mut self.host.hits } else { &mut self.host.misses } += 1;
        }
        if tier == Tier::Disk || !on_host {
            let on_disk = found.in_place || content.is_some_and(|content| self.disk.has(content));
            *if on_disk { &mut self.disk.hits } else { &mut self.disk.misses } += 1;
        }
        self.advance(id, now);
    }

    /// Gives a granted ask its lease, or makes it wait for the next call.
    pub(super) fn advance(&mut self, id: AskId, now: Duration) {
        let Some(state) = self.asks.get(&id) else { return };
        let (Some(found), tier, group) = (state.found, state.ask.tier, state.group) else { return };
        if self.lacks_promise(group) {
            self.asks.get_mut(&id).into_iter().for_each(|state| state.stand = Stand::Together);
            return;
        }
        let Some(state) = self.asks.get(&id) else { return };
        let Some(content) = state.content else { return self.fetch(id, found, now) };
        if tier == Tier::Host && self.host.has(content) {
            return self.lease(id, content);
        }
        let on_disk = self.disk.has(content);
        match tier {
            _ if !found.in_place && !on_disk => self.fetch(id, found, now),
            Tier::Disk => self.lease(id, content),
            Tier::Host => {
                if !found.in_place {
                    self.disk.lease(content, false);
                    self.asks.get_mut(&id).into_iter().for_each(|state| state.disk_lease = Some(content));
                }
                let bytes = self.host_sizes.get(content).copied().unwrap_or(found.bytes);
                self.stage(id, content, bytes, now);
            }
        }
    }

    /// Lets a granted ask that waits for nothing find its way again.
    pub(super) fn restart(&mut self, id: AskId, now: Duration) {
        let Some(state) = self.asks.get_mut(&id) else { return };
        if let Some(content) = state.disk_lease.take() {
            self.disk.release(content, false);
        }
        self.advance(id, now);
    }

    fn fetch(&mut self, id: AskId, found: Found, now: Duration) {
        let bytes = if found.in_place { 0 } else { found.bytes };
        let limit = self.disk.unpinned();
        if bytes > limit {
            return self.fail(id, Fault::TooLarge { bytes, limit });
        }
        self.join(id, Target::Fetch(found.version), bytes, now);
    }

    fn stage(&mut self, id: AskId, content: Content, bytes: u64, now: Duration) {
        let limit = self.host.unpinned();
        if bytes > limit {
            return self.fail(id, Fault::TooLarge { bytes, limit });
        }
        self.join(id, Target::Stage(content), bytes, now);
    }

    /// Gives an ask its lease on a copy that is on its tier.
    pub(super) fn lease(&mut self, id: AskId, content: Content) {
        let Some(state) = self.asks.get_mut(&id) else { return };
        let (tier, pin, tenant) = (state.ask.tier, state.ask.pin, state.ask.tenant.id);
        let in_place = tier == Tier::Disk && state.found.is_some_and(|found| found.in_place);
        let copies = if tier == Tier::Disk { &mut self.disk } else { &mut self.host };
        if pin && !in_place && !copies.can_pin(content) {
            return self.fail(id, Fault::PinsFull(tier));
        }
        state.stand = Stand::Leased(content);
        let deadline = state.ask.deadline;
        let (disk_lease, access) = (state.disk_lease.take(), state.access());
        let mut slot_bytes = 0;
        // What is read in place has no copy to keep.
        if !in_place {
            copies.lease(content, pin);
            state.disk_lease = (tier == Tier::Disk).then_some(content);
        }
        if tier == Tier::Host {
            let (bytes, in_slot) = self.host.sizes(content).unwrap_or_default();
            slot_bytes = in_slot;
            self.host_bytes.add(tenant, bytes);
            self.disk.touch(content);
        }
        if let Some(content) = disk_lease {
            self.disk.release(content, false);
        }
        self.access_failures.clear(access);
        self.timers.remove(deadline, Timer::Ask(id));
        self.outputs.push(Output::Ready { ask: id, content, tier, slot_bytes });
    }

    pub(super) fn fail(&mut self, id: AskId, fault: Fault) {
        if self.remove(id) {
            self.outputs.push(Output::Failed { ask: id, fault });
        }
    }

    pub(super) fn release(&mut self, id: AskId) {
        self.remove(id);
    }

    /// Forgets an ask, and gives back what it holds.
    fn remove(&mut self, id: AskId) -> bool {
        self.unwant(id);
        let Some(state) = self.asks.remove(&id) else { return false };
        let pin = state.ask.pin;
        self.timers.remove(state.ask.deadline, Timer::Ask(id));
        if let Some(group) = state.group {
            self.leave_group(id, group);
        }
        match state.stand {
            Stand::Together => {}
            Stand::Waiting(target) => {
                if let Some(content) = state.disk_lease {
                    self.disk.release(content, false);
                }
                self.leave(id, target);
            }
            Stand::Leased(content) if state.ask.tier == Tier::Host => {
                let bytes = self.host.sizes(content).map_or(0, |(bytes, _)| bytes);
                self.host_bytes.subtract(state.ask.tenant.id, bytes);
                self.host.release(content, pin);
            }
            Stand::Leased(_) => {
                if let Some(content) = state.disk_lease {
                    self.disk.release(content, pin);
                }
            }
        }
        true
    }

    /// An ask is no longer looked up.
    fn unwant(&mut self, id: AskId) {
        let Some(content) = self.asks.get_mut(&id).and_then(|state| state.expected.take()) else { return };
        if let Some(wanted) = self.wanted.get_mut(&content) {
            *wanted -= 1;
            if *wanted == 0 {
                self.wanted.remove(&content);
            }
        }
    }
}
