//! An exchange, simulated sources and ranks, and the rules that hold between them at every moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    time::Duration,
};

use exchange::{
    Ask, AskId, CallId, Content, CredentialId, Exchange, Fault, Fetched, Found, Held, Input, Limits, Output,
    Place, ReferenceId, Slot, SourceId, StageFault, Staged, Tenant, Tier, Version, trace,
};

/// What calls are made with: who asks for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) tenant: u64,
    pub(crate) source: u64,
    pub(crate) reference: u128,
    pub(crate) credential: u128,
}

pub(crate) const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

pub(crate) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Limits that are small enough for everything to run out.
pub(crate) fn limits() -> Limits {
    let budget = exchange::Budget { source: 4, tenant: 2, deadline: secs(30) };
    Limits {
        disk_bytes: 1000,
        host_bytes: 500,
        adapter_bytes: 400,
        lookups: budget,
        fetches: budget,
        stages: budget,
        tenant_calls: 12,
        slow_after: secs(5),
        first_backoff: secs(1),
        longest_backoff: secs(8),
        remembered: 1000,
    }
}

/// An adapter at its source.
#[derive(Debug, Clone)]
pub(crate) struct Original {
    pub(crate) revision: u8,
    pub(crate) bytes: u64,
    pub(crate) in_place: bool,
    pub(crate) fresh_for: Duration,
    /// Credentials that may not read it.
    pub(crate) denied: BTreeSet<u128>,
    /// Adapters of the same family have the same bytes.
    pub(crate) family: u128,
}

impl Original {
    pub(crate) fn new(reference: u128, bytes: u64) -> Self {
        Self {
            revision: 0,
            bytes,
            in_place: false,
            fresh_for: secs(60),
            denied: BTreeSet::new(),
            family: reference,
        }
    }

    pub(crate) fn content(&self) -> Content {
        let mut content = [0; 32];
        content[..16].copy_from_slice(&self.family.to_le_bytes());
        content[16] = self.revision;
        Content(content)
    }

    fn version(&self, reference: u128) -> Version {
        let mut version = [0; 32];
        version[..16].copy_from_slice(&reference.to_le_bytes());
        version[16] = self.revision;
        Version(version)
    }
}

/// A call that has not been answered.
#[derive(Debug, Clone)]
pub(crate) struct Pending {
    pub(crate) output: Output<Asked>,
    pub(crate) asked: Asked,
    pub(crate) begun: Duration,
    pub(crate) aborted: bool,
    /// A fetch whose files are in the cache already.
    published: Option<Fetched>,
}

#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) ask: Ask<Asked>,
    /// Whether its credential was shown to the source not longer ago than the answer may be used.
    authorised: bool,
    pub(crate) ready: Option<Content>,
}

pub(crate) struct World {
    pub(crate) exchange: Exchange<Asked>,
    pub(crate) now: Duration,
    pub(crate) limits: Limits,
    pub(crate) originals: BTreeMap<u128, Original>,
    pub(crate) open: BTreeMap<AskId, Open>,
    pub(crate) ready: BTreeMap<AskId, Content>,
    pub(crate) failed: BTreeMap<AskId, Fault>,
    pub(crate) calls: BTreeMap<CallId, Pending>,
    pub(crate) deletes: Vec<Content>,
    pub(crate) unstages: Vec<Content>,
    /// Files in the cache.
    pub(crate) disk: BTreeMap<Content, u64>,
    /// Copies in host memory.
    pub(crate) host: BTreeMap<Content, Staged>,
    pub(crate) attached: bool,
    /// The trace of all inputs, while one is taken.
    pub(crate) trace: Option<String>,
    /// Bytes that an adapter takes in host memory beyond those of its files.
    pub(crate) padding: u64,
    /// Asks that need their leases at the same time.
    groups: Vec<BTreeSet<AskId>>,
    grants: BTreeMap<(u128, u128), Duration>,
    asks: u64,
}

impl World {
    /// A world with a session, whose sources have no adapters.
    pub(crate) fn new(limits: Limits) -> Self {
        let mut world = Self::detached(limits);
        world.attach();
        world
    }

    /// A world that takes a trace of all that happens.
    pub(crate) fn traced(limits: Limits) -> Self {
        let mut world = Self::detached(limits);
        world.trace = Some(format!("{}\n", trace::limits(&limits)));
        world.attach();
        world
    }

    fn detached(limits: Limits) -> Self {
        Self {
            exchange: Exchange::new(limits),
            now: Duration::ZERO,
            limits,
            originals: BTreeMap::new(),
            open: BTreeMap::new(),
            ready: BTreeMap::new(),
            failed: BTreeMap::new(),
            calls: BTreeMap::new(),
            deletes: Vec::new(),
            unstages: Vec::new(),
            disk: BTreeMap::new(),
            host: BTreeMap::new(),
            attached: false,
            padding: 0,
            trace: None,
            groups: Vec::new(),
            grants: BTreeMap::new(),
            asks: 0,
        }
    }

    /// A world whose sources have adapters of so many bytes, with the references 0, 1 and so on.
    pub(crate) fn with(limits: Limits, bytes: &[u64]) -> Self {
        let mut world = Self::new(limits);
        let originals = (0..).zip(bytes);
        world.originals = originals.map(|(id, &bytes)| (id, Original::new(id, bytes))).collect();
        world
    }

    pub(crate) fn original(&mut self, reference: u128) -> &mut Original {
        self.originals.get_mut(&reference).unwrap()
    }

    /// Gives the exchange an input, and does what follows from it.
    pub(crate) fn give(&mut self, input: Input<Asked>) -> Vec<Output<Asked>> {
        let outputs = match &mut self.trace {
            None => self.exchange.handle(input, self.now),
            Some(text) => {
                let told = trace::input(&input, self.now);
                let outputs = self.exchange.handle(input, self.now);
                let lines = iter::once(told).chain(outputs.iter().map(trace::output));
                lines.for_each(|line| text.extend([&line, "\n"]));
                outputs
            }
        };
        self.exchange.check();
        outputs.iter().for_each(|output| self.take(output));
        self.check();
        outputs
    }

    fn take(&mut self, output: &Output<Asked>) {
        match output.clone() {
            Output::Lookup { call, payload }
            | Output::Fetch { call, payload, .. }
            | Output::Stage { call, payload, .. } => {
                let same = self.calls.values().find(|pending| is_same(pending, output));
                assert!(same.is_none(), "{output:?} is made twice");
                if let Output::Stage { content, place: Place::Cache, .. } = output {
                    assert!(!self.deletes.contains(content), "{content:?} is staged while it is deleted");
                }
                let (output, begun) = (output.clone(), self.now);
                let pending = Pending { output, asked: payload, begun, aborted: false, published: None };
                self.calls.insert(call, pending);
            }
            Output::Abort(call) => self.calls.get_mut(&call).unwrap().aborted = true,
            Output::Delete(content) => {
                let reads = |pending: &Pending| match pending.output {
                    Output::Stage { content: staged, place, .. } => {
                        staged == content && place == Place::Cache
                    }
                    _ => false,
                };
                let reader = self.calls.values().find(|pending| reads(pending));
                assert!(reader.is_none(), "{content:?} is deleted while it is staged: {reader:?}");
                self.deletes.push(content);
            }
            Output::Unstage(content) => self.unstages.push(content),
            Output::Ready { ask, content, tier, .. } => {
                let open = self.open.get_mut(&ask).unwrap();
                assert!(open.authorised && open.ready.is_none(), "{ask:?}");
                assert_eq!(tier, open.ask.tier);
                let asked = self.originals[&open.ask.reference.0].family.to_le_bytes();
                assert_eq!(content.0[..16], asked, "what it asked for");
                assert!(tier == Tier::Disk || self.host.contains_key(&content), "{content:?} is there");
                open.ready = Some(content);
                self.ready.insert(ask, content);
            }
            Output::Failed { ask, fault } => {
                self.open.remove(&ask).unwrap();
                self.failed.insert(ask, fault);
            }
        }
    }

    /// The bounds, as the sources, the disk and the ranks see them.
    fn check(&self) {
        let mut disk: u64 = self.disk.values().sum();
        let mut host: u64 = self.host.values().map(|staged| staged.host_bytes).sum();
        for pending in self.calls.values() {
            match pending.output {
                Output::Fetch { max_bytes, .. } if pending.published.is_none() => disk += max_bytes,
                Output::Stage { max_bytes, .. } => host += max_bytes,
                _ => {}
            }
        }
        assert!(disk <= self.limits.disk_bytes, "{disk} bytes on the disk");
        assert!(host <= self.limits.host_bytes, "{host} bytes in host memory");
        for open in self.open.values() {
            let Some(content) = open.ready else { continue };
            if open.ask.tier == Tier::Disk {
                let in_place = self.originals[&open.ask.reference.0].in_place;
                assert!(in_place || !self.deletes.contains(&content), "{content:?} is deleted under a lease");
            } else {
                assert!(!self.unstages.contains(&content), "{content:?} is unstaged under a lease");
            }
        }
        let sources: BTreeSet<_> = self.calls.values().map(|pending| pending.asked.source).collect();
        for source in sources {
            let of_source = self.calls.values().filter(|pending| pending.asked.source == source);
            let lookups = of_source.filter(|pending| matches!(pending.output, Output::Lookup { .. }));
            let tenants: Vec<_> = lookups.map(|pending| pending.asked.tenant).collect();
            let own = tenants.iter().collect::<BTreeSet<_>>().len();
            let most = self.limits.lookups.source as usize + own;
            assert!(tenants.len() <= 2 * most, "lookups at {source}");
        }
    }

    /// An ask of tenant 1 for a lease in host memory, without a credential, with a minute's time.
    pub(crate) fn new_ask(&mut self, reference: u128) -> Ask<Asked> {
        self.asks += 1;
        Ask {
            id: AskId(self.asks),
            tenant: Tenant { id: 1, weight: 1 },
            source: SourceId(0),
            reference: ReferenceId(reference),
            credential: CredentialId(0),
            tier: Tier::Host,
            pin: false,
            deadline: self.now + secs(60),
            payload: Asked { tenant: 1, source: 0, reference, credential: 0 },
        }
    }

    pub(crate) fn submit(&mut self, ask: Ask<Asked>) -> AskId {
        let id = ask.id;
        let ask = self.open(ask);
        self.give(Input::Ask(ask));
        id
    }

    /// Submits asks that need their leases at the same time.
    pub(crate) fn submit_together(&mut self, asks: Vec<Ask<Asked>>) -> Vec<AskId> {
        let asks: Vec<_> = asks.into_iter().map(|ask| self.open(ask)).collect();
        let ids: Vec<_> = asks.iter().map(|ask| ask.id).collect();
        self.groups.push(ids.iter().copied().collect());
        self.give(Input::AskTogether(asks));
        ids
    }

    /// Submits asks for leases of these adapters on the disk at the same time, in the name of a tenant.
    pub(crate) fn ask_together(&mut self, tenant: u64, references: &[u128]) -> Vec<AskId> {
        self.ask_together_on(Tier::Disk, tenant, references)
    }

    /// As [`Self::ask_together`], on any tier.
    pub(crate) fn ask_together_on(&mut self, tier: Tier, tenant: u64, references: &[u128]) -> Vec<AskId> {
        let ask = |&reference: &u128| Ask {
            tier,
            tenant: Tenant { id: tenant, weight: 1 },
            ..self.new_ask(reference)
        };
        let asks = references.iter().map(ask).collect();
        self.submit_together(asks)
    }

    /// Notes an ask, and completes its payload.
    fn open(&mut self, ask: Ask<Asked>) -> Ask<Asked> {
        let id = ask.id;
        let (reference, credential) = (ask.reference.0, ask.credential.0);
        let payload = Asked { tenant: ask.tenant.id, source: ask.source.0, reference, credential };
        let ask = Ask { payload, ..ask };
        let expires = self.grants.get(&(reference, credential));
        let authorised = expires.is_some_and(|expires| self.now < *expires);
        self.open.insert(id, Open { ask: ask.clone(), authorised, ready: None });
        ask
    }

    /// Submits such an ask.
    pub(crate) fn ask(&mut self, reference: u128) -> AskId {
        let ask = self.new_ask(reference);
        self.submit(ask)
    }

    pub(crate) fn ask_as(&mut self, tenant: u64, credential: u128, reference: u128) -> AskId {
        let ask = self.new_ask(reference);
        let (tenant, credential) = (Tenant { id: tenant, weight: 1 }, CredentialId(credential));
        self.submit(Ask { tenant, credential, ..ask })
    }

    pub(crate) fn ask_at(&mut self, source: u64, tenant: u64, reference: u128) -> AskId {
        let ask = self.new_ask(reference);
        self.submit(Ask { source: SourceId(source), tenant: Tenant { id: tenant, weight: 1 }, ..ask })
    }

    pub(crate) fn release(&mut self, id: AskId) {
        self.open.remove(&id);
        self.give(Input::Release(id));
    }

    pub(crate) fn wait(&mut self, time: Duration) {
        self.now += time;
        self.give(Input::Tick);
    }

    /// Puts the files of a fetch into the cache before its answer is on its way.
    pub(crate) fn publish(&mut self, call: CallId) {
        let Some(pending) = self.calls.get(&call) else { return };
        let (Output::Fetch { version, max_bytes, .. }, None) = (&pending.output, pending.published) else {
            return;
        };
        let original = &self.originals[&pending.asked.reference];
        let (content, bytes) = (original.content(), original.bytes);
        let current = original.version(pending.asked.reference) == *version;
        if original.in_place || !current || bytes > *max_bytes {
            return;
        }
        self.calls.get_mut(&call).unwrap().published = Some(Fetched { content, bytes });
        self.disk.insert(content, bytes);
        self.check();
    }

    /// Answers a call as the sources, the disk and the ranks are.
    pub(crate) fn answer(&mut self, call: CallId) -> Vec<Output<Asked>> {
        self.publish(call);
        let pending = self.calls.remove(&call).unwrap();
        let Asked { reference, credential, .. } = pending.asked;
        let original = self.originals.get(&reference).cloned();
        let access = (!pending.aborted).then_some((reference, credential));
        let input = match (pending.output, original) {
            (Output::Lookup { .. }, original) => {
                let result = self.look_up((reference, credential), original);
                // The answer to an aborted lookup counts for nothing.
                access.into_iter().for_each(|access| self.note_lookup(access, &result));
                Input::LookedUp { call, result }
            }
            (Output::Fetch { version, max_bytes, .. }, Some(original)) => {
                let (bytes, content) = (original.bytes, original.content());
                let result = match pending.published {
                    Some(fetched) => Ok(fetched),
                    None if original.version(reference) != version => Err(Fault::Changed),
                    None if original.denied.contains(&credential) => Err(Fault::Denied("no".into())),
                    None if original.in_place => Ok(Fetched { content, bytes }),
                    None => Err(Fault::TooLarge { bytes, limit: max_bytes }),
                };
                Input::Fetched { call, result }
            }
            (Output::Stage { content, place, max_bytes, .. }, Some(original)) => {
                let there = match place {
                    Place::Cache => self.disk.contains_key(&content),
                    Place::InPlace(version) => original.version(reference) == version,
                };
                let bytes = self.disk.get(&content).copied().unwrap_or(original.bytes);
                let host_bytes = bytes + self.padding;
                let staged = Staged { host_bytes, slot_bytes: bytes };
                if !there && place == Place::Cache {
                    // Pins on the disk wait until it has been fetched again.
                    let pins =
                        self.open.values_mut().filter(|open| open.ask.tier == Tier::Disk && open.ask.pin);
                    pins.filter(|open| open.ready == Some(content)).for_each(|open| open.ready = None);
                }
                let result = match there {
                    false => Err(StageFault::Gone),
                    true if host_bytes > max_bytes => Err(StageFault::NeedsRoom { bytes: host_bytes }),
                    true => {
                        self.host.insert(content, staged);
                        Ok(staged)
                    }
                };
                Input::Staged { call, result }
            }
            (output, _) => panic!("{output:?} of nothing"),
        };
        self.give(input)
    }

    fn look_up(
        &self,
        (reference, credential): (u128, u128),
        original: Option<Original>,
    ) -> Result<Found, Fault> {
        match original {
            None => Err(Fault::NotFound("no such adapter".into())),
            Some(original) if original.denied.contains(&credential) => Err(Fault::Denied("no".into())),
            Some(original) => {
                let Original { bytes, in_place, fresh_for, .. } = original;
                Ok(Found { version: original.version(reference), bytes, in_place, fresh_for })
            }
        }
    }

    fn note_lookup(&mut self, access: (u128, u128), result: &Result<Found, Fault>) {
        match result {
            Ok(found) => {
                self.grants.insert(access, self.now + found.fresh_for);
                let asks = self.open.values_mut();
                let asks = asks.filter(|open| (open.ask.reference.0, open.ask.credential.0) == access);
                asks.for_each(|open| open.authorised = true);
            }
            Err(Fault::NotFound(_) | Fault::Denied(_)) => _ = self.grants.remove(&access),
            Err(_) => {}
        }
    }

    /// Fails a call, whatever the sources, the disk and the ranks are.
    pub(crate) fn fail(&mut self, call: CallId, fault: Fault) -> Vec<Output<Asked>> {
        if self.calls[&call].published.is_some() {
            return self.answer(call);
        }
        let pending = self.calls.remove(&call).unwrap();
        let Asked { reference, credential, .. } = pending.asked;
        let input = match pending.output {
            Output::Lookup { .. } => {
                self.note_lookup((reference, credential), &Err(fault.clone()));
                Input::LookedUp { call, result: Err(fault) }
            }
            Output::Fetch { .. } => Input::Fetched { call, result: Err(fault) },
            _ => Input::Staged { call, result: Err(StageFault::Failed(fault)) },
        };
        self.give(input)
    }

    /// The oldest call that waits for an answer.
    pub(crate) fn first(&self) -> CallId {
        *self.calls.first_key_value().expect("a call is running").0
    }

    /// Removes the copies that the exchange has given up.
    pub(crate) fn remove_copies(&mut self) {
        while !self.deletes.is_empty() {
            self.delete(0);
        }
        while !self.unstages.is_empty() {
            self.unstage(0);
        }
    }

    pub(crate) fn delete(&mut self, nth: usize) {
        let content = self.deletes.remove(nth);
        self.disk.remove(&content);
        self.give(Input::Deleted(content));
    }

    pub(crate) fn unstage(&mut self, nth: usize) {
        let content = self.unstages.remove(nth);
        self.host.remove(&content);
        self.give(Input::Unstaged(content));
    }

    /// Answers all calls and removes what is given up, until there is nothing left to do. No time passes.
    pub(crate) fn settle(&mut self) {
        for _ in 0..10_000 {
            self.remove_copies();
            let Some((&call, _)) = self.calls.first_key_value() else { return };
            self.answer(call);
        }
        panic!("the exchange makes calls for ever: {:?}", self.calls);
    }

    /// The asks that have not got their leases.
    pub(crate) fn waiting(&self) -> Vec<AskId> {
        self.open.iter().filter(|(_, open)| open.ready.is_none()).map(|(&id, _)| id).collect()
    }

    pub(crate) fn slot(&mut self, content: Content, slot: Slot) {
        self.give(Input::Slot { content, slot });
    }

    /// Ends the session, or begins one.
    pub(crate) fn toggle_session(&mut self) {
        if self.attached { self.detach() } else { self.attach() }
    }

    pub(crate) fn detach(&mut self) {
        self.attached = false;
        self.calls.retain(|_, pending| !matches!(pending.output, Output::Stage { .. }));
        self.unstages.clear();
        // Copies of host memory that nobody has leased any more may still be there, or be lost.
        self.open.values_mut().filter(|open| open.ask.tier == Tier::Host).for_each(|open| open.ready = None);
        self.give(Input::Detached);
    }

    pub(crate) fn attach(&mut self) {
        self.attached = true;
        let held = self.host.iter().map(|(&content, &staged)| Held { content, staged });
        let held = held.collect();
        self.give(Input::Attached { host: held });
    }

    /// Ends everything: no ask is left waiting although all calls are answered and all leases released, and what is on
    /// the disk and in host memory is known.
    pub(crate) fn run_to_end(&mut self) {
        if !self.attached {
            self.attach();
        }
        loop {
            self.settle();
            let ready: Vec<_> = self.open.iter().filter(|(_, open)| open.ready.is_some()).collect();
            let waits = |id: &AskId| self.open.get(id).is_some_and(|open| open.ready.is_none());
            // Whoever needs several keeps what it has until it has all of them.
            let kept =
                |id: &AskId| self.groups.iter().any(|group| group.contains(id) && group.iter().any(waits));
            let ready: Vec<_> = ready.into_iter().map(|(&id, _)| id).filter(|id| !kept(id)).collect();
            if ready.is_empty() {
                break;
            }
            ready.into_iter().for_each(|id| self.release(id));
        }
        assert_eq!(self.waiting(), [], "asks wait for nothing");
        let stats = self.exchange.stats();
        assert_eq!((stats.waiting, stats.leased, stats.running, stats.queued), (0, 0, [0; 3], [0; 3]));
        for (tier, copies) in
            [(Tier::Disk, self.disk.keys().collect::<Vec<_>>()), (Tier::Host, self.host.keys().collect())]
        {
            let residents = self.exchange.residents(tier);
            let known: BTreeSet<_> = residents.iter().map(|resident| resident.content).collect();
            let unknown = copies.iter().find(|content| !known.contains(content));
            assert_eq!(unknown, None, "{tier:?}");
        }
    }
}

/// Whether a call has been made that is not answered and would give the same answer.
fn is_same(pending: &Pending, output: &Output<Asked>) -> bool {
    match (&pending.output, output) {
        (Output::Lookup { .. }, Output::Lookup { payload, .. }) => {
            let access = |asked: &Asked| (asked.reference, asked.credential);
            access(&pending.asked) == access(payload)
        }
        (Output::Fetch { version: a, .. }, Output::Fetch { version: b, .. }) => a == b,
        (Output::Stage { content: a, .. }, Output::Stage { content: b, .. }) => a == b,
        _ => false,
    }
}
