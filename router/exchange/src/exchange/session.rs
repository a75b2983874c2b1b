//! Sessions with the ranks, the device tier, and copies that are there from the start.

use std::time::Duration;

use super::{AskState, Exchange, SlotState, Stand};
use crate::{
    AskId, Content, Fault, Held, Output, Slot, Tier, Version,
    flights::{Kind, Target},
};

impl<P: Clone> Exchange<P> {
    /// A session begins, with these copies in host memory. Asks that wait for one of them have it.
    pub(super) fn attach(&mut self, held: &[Held], now: Duration) {
        if self.attached {
            self.detach(now);
        }
        self.attached = true;
        for &Held { content, staged } in held {
            self.host_sizes.insert(content, staged.host_bytes);
            if !self.host.adopt(content, staged.host_bytes, staged.slot_bytes) {
                self.host.refuse(content);
                self.outputs.push(Output::Unstage(content));
            }
        }
        let waiting: Vec<_> =
            self.asks.iter().filter_map(|(&id, state)| self.found_on_host(id, state)).collect();
        for (id, target) in waiting {
            self.leave(id, target);
            self.restart(id, now);
        }
    }

    /// An ask that waits for a fetch or a stage of a content which is in host memory.
    fn found_on_host(&self, id: AskId, state: &AskState<P>) -> Option<(AskId, Target)> {
        let Stand::Waiting(target @ (Target::Fetch(_) | Target::Stage(_))) = state.stand else { return None };
        let content = state.content?;
        (state.ask.tier == Tier::Host && self.host.has(content)).then_some((id, target))
    }

    /// The session has ended, and what is in host memory is not known. Leases of requests end with it; pins, and asks
    /// that wait for a stage, wait for the next session.
    pub(super) fn detach(&mut self, now: Duration) {
        self.attached = false;
        self.device.clear();
        let stages = self.calls.running.iter().filter(|(_, call)| call.target.kind() == Kind::Stage);
        let stages: Vec<_> = stages.map(|(&id, _)| id).collect();
        for id in stages {
            let Some(call) = self.end_call(id) else { continue };
            if !call.aborted {
                self.requeue(call.target);
            }
        }
        let leased = self.asks.iter().filter(|(_, state)| state.ask.tier == Tier::Host);
        let leased: Vec<_> = leased
            .filter_map(|(&id, state)| match state.stand {
                Stand::Leased(content) => Some((id, content, state.ask.tenant.id, state.ask.pin)),
                Stand::Waiting(_) | Stand::Together => None,
            })
            .collect();
        for &(_, content, tenant, _) in &leased {
            let bytes = self.host.sizes(content).map_or(0, |(bytes, _)| bytes);
            self.host_bytes.subtract(tenant, bytes);
        }
        self.host.clear();
        for (id, content, _, pin) in leased {
            if pin {
                let state = self.asks.get_mut(&id);
                state.into_iter().for_each(|state| state.stand = Stand::Waiting(Target::Stage(content)));
                self.restart(id, now);
            } else {
                if let Some(group) = self.asks.remove(&id).and_then(|state| state.group) {
                    self.leave_group(id, group);
                }
                self.outputs.push(Output::Failed { ask: id, fault: Fault::SessionLost });
            }
        }
    }

    pub(super) fn slot(&mut self, content: Content, slot: Slot) {
        let before = self.device.get(&content).copied();
        if before.is_some_and(|before| before.leased) && slot != Slot::Loading {
            self.host.release(content, false);
        }
        match (slot, before) {
            (Slot::Loading, None) => {
                // The load reads the host copy, which a request has leased so far.
                let leased = self.host.has(content);
                if leased {
                    self.host.lease(content, false);
                }
                self.device.insert(content, SlotState { ready: false, leased });
            }
            (Slot::Loading, Some(_)) => {}
            (Slot::Ready, before) => {
                self.device_stats.loads += u64::from(before.is_some_and(|before| !before.ready));
                self.device.insert(content, SlotState { ready: true, leased: false });
            }
            (Slot::Empty, before) => {
                self.device.remove(&content);
                if before.is_some_and(|before| before.ready) {
                    self.device_stats.evictions += 1;
                    self.device_stats.needed_evictions += u64::from(self.host.requests(content) > 0);
                }
            }
        }
    }

    /// Somebody says that an adapter is not needed any more.
    pub(super) fn evict(&mut self, content: Content) {
        if self.host.is_idle(content) {
            self.host.evict(content, false);
            self.outputs.push(Output::Unstage(content));
        }
        if self.disk.is_idle(content) {
            self.disk.evict(content, false);
            self.outputs.push(Output::Delete(content));
        }
    }

    pub(super) fn on_disk(&mut self, content: Content, bytes: u64, versions: &[Version]) {
        versions.iter().for_each(|&version| self.versions.insert(version, content));
        if !self.disk.adopt(content, bytes, 0) && !self.disk.has(content) {
            self.disk.refuse(content);
            self.outputs.push(Output::Delete(content));
        }
    }
}
