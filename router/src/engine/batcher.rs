//! One session: the jobs that run in it, the steps that are sent, and the updates that clients get.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use config::RouterConfig;
use scheduler::{FailReason, Finish, Request, RequestId, Sampled, Scheduler, Stats};
use tokio::{task::yield_now, time::MissedTickBehavior};

use super::{
    Cancel, Submit,
    in_flight::{InFlight, Steps},
    masks::Masks,
    serve::{Inbox, Session},
};
use crate::{
    generation::{Failure, Job, PromptToken, Update},
    grammar::mask_workers::MaskWorkers,
    metrics::{Capacity, End, EngineMetrics, StepTokens},
    ranks::{Group, RankError},
    wire::{self, Event, PromptPart, StepResult},
};

/// Time between two checks of the deadlines.
const TICK: Duration = Duration::from_millis(250);

/// Events that are handed out before the tasks of the connections to the ranks get a turn, which share this thread: the
/// next step is written meanwhile. Each event wakes a thread of the HTTP side, which takes a few microseconds.
const BETWEEN_YIELDS: usize = 8;

/// An input that the engine waits for.
enum Input {
    Submit(Option<Submit>),
    Cancel,
    Event(Event),
    Masks,
    Tick,
}

/// The scheduler and the jobs of one session.
pub(super) struct Batcher {
    scheduler: Scheduler<Arc<Job>>,
    in_flight: HashMap<RequestId, InFlight>,
    group: Group,
    steps: Steps,
    masks: Masks,
    /// Slots to empty with the next step, whose content is not of this session's scheduler.
    stale: Vec<u32>,
    session: Session,
    metrics: Arc<EngineMetrics>,
    /// The statistics that were published last.
    published: Stats,
    begun: Instant,
}

impl Batcher {
    pub(super) fn new(
        group: Group,
        config: &RouterConfig,
        session: Session,
        mask_workers: Arc<MaskWorkers>,
        metrics: Arc<EngineMetrics>,
    ) -> Batcher {
        Batcher {
            scheduler: Scheduler::new(group.info.limits(config), &group.resident.slots),
            in_flight: HashMap::new(),
            stale: group.resident.stale.clone(),
            group,
            steps: Steps::new(),
            masks: Masks::new(mask_workers),
            session,
            metrics,
            published: Stats::default(),
            begun: Instant::now(),
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Runs until nobody can send a job any more, or until the session fails.
    pub(super) async fn run(&mut self, inbox: &mut Inbox) -> Result<(), RankError> {
        let mut tick = tokio::time::interval(TICK.min(self.session.deadlines.step / 4));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.handle_cancels(inbox);
            self.send_steps()?;
            self.send_masks()?;
            let input = tokio::select! {
                submit = inbox.submits.recv() => Input::Submit(submit),
                () = inbox.cancels.added.notified() => Input::Cancel,
                event = self.group.next() => Input::Event(event?),
                () = self.masks.computed() => Input::Masks,
                _ = tick.tick() => Input::Tick,
            };
            match input {
                Input::Submit(None) => return Ok(()),
                Input::Submit(Some(submit)) => {
                    self.handle_submit(submit);
                    // All that have come by now go into the same step.
                    while let Ok(submit) = inbox.submits.try_recv() {
                        self.handle_submit(submit);
                    }
                }
                Input::Cancel => {}
                Input::Event(event) => {
                    // Before the next step is planned: whoever has left gets no rows of it.
                    self.handle_cancels(inbox);
                    self.handle_event(event).await?;
                }
                Input::Masks => self.collect_masks(),
                Input::Tick => {
                    self.publish();
                    self.steps.check(self.session.deadlines.step)?;
                    self.group.check_loads(self.session.deadlines.load)?;
                }
            }
        }
    }

    fn publish(&mut self) {
        let stats = self.scheduler.stats();
        let info = &self.group.info;
        let capacity = Capacity { num_blocks: info.num_blocks, num_slots: info.num_slots };
        self.metrics.publish(self.now(), &stats, &self.published, capacity);
        self.metrics.oldest_step.set(self.steps.age());
        self.published = stats;
    }

    /// Fails whatever has not ended: the session is over.
    pub(super) fn fail_all(mut self) {
        self.publish();
        self.metrics.clear();
        self.in_flight.into_values().for_each(|in_flight| in_flight.fail(Failure::Unavailable));
    }

    fn send_steps(&mut self) -> Result<(), RankError> {
        while let Some(mut plan) = self.scheduler.next_step(self.now()) {
            plan.unload.append(&mut self.stale);
            let id = plan.id;
            self.session.device.planned(&plan.unload, &plan.load);
            self.metrics.step_rows.record(plan.rows.iter().map(|rows| rows.rows).sum::<u32>());
            let sampled = plan.rows.iter().filter(|rows| rows.sample);
            sampled.for_each(|rows| self.masks.planned(id, rows.id));
            self.group.send(wire::step(plan, |id| self.masks.constrain(id)))?;
            self.steps.sent(id);
        }
        Ok(())
    }

    /// Sends the masks of the steps that wait for no more of them.
    fn send_masks(&mut self) -> Result<(), RankError> {
        for complete in self.masks.complete() {
            self.group.send_masks(wire::masks(complete.step, complete.masks))?;
            if let Some(since) = complete.since {
                self.metrics.mask_duration.record(since.elapsed());
            }
        }
        Ok(())
    }

    /// Takes the masks that have been computed, and ends the jobs whose grammars cannot go on.
    fn collect_masks(&mut self) {
        for (id, error) in self.masks.collect() {
            self.end(id, Failure::Generation(error.to_string()));
        }
    }

    fn handle_cancels(&mut self, inbox: &Inbox) {
        for Cancel { id, stopped } in inbox.cancels.take() {
            let Some(in_flight) = self.forget(id) else { continue };
            self.scheduler.cancel(id);
            if stopped && let Some(times) = in_flight.times() {
                self.metrics.generated(times, in_flight.generated);
            }
        }
    }

    fn handle_submit(&mut self, submit: Submit) {
        // Its cancellation may have been taken before it came itself.
        if submit.updates.is_closed() {
            return;
        }
        let Submit { id, job, updates, outcome, hold, leases } = submit;
        let prompt = job.prompt.len();
        self.metrics.max_new_tokens.record(job.max_new_tokens);
        let request = Request {
            id,
            tenant: job.tenant,
            adapters: job.adapters.clone(),
            adapters_from: job.adapters_from,
            salt: job.salt,
            prompt: job.prompt.clone(),
            max_new_tokens: job.max_new_tokens,
            stop_ids: job.stop_ids.clone(),
            prompt_logprobs: job.prompt_logprobs,
            group: job.group,
            hidden_states: job.pooling.is_some(),
            payload: job,
        };
        let in_flight = InFlight {
            updates,
            outcome,
            prompt,
            prompt_reported: 1,
            generated: 0,
            planned: Instant::now(),
            first_token: None,
            last_token: None,
            _hold: hold,
            leases,
        };
        // Its adapters may not be there any more.
        if in_flight.leases.as_ref().is_some_and(|leases| !leases.hold_in(self.session.number)) {
            return in_flight.fail(Failure::Unavailable);
        }
        let grammar = request.payload.grammar.clone();
        match self.scheduler.submit(request, self.now()) {
            Ok(()) => {
                grammar.into_iter().for_each(|begin| self.masks.begin(id, begin));
                self.in_flight.insert(id, in_flight);
            }
            Err(error) => in_flight.fail(Failure::Refused(error)),
        }
    }

    async fn handle_event(&mut self, event: Event) -> Result<(), RankError> {
        match event {
            Event::Step(result) => self.complete(result).await?,
            Event::Slot { slot, key, error: None } => {
                self.metrics.slots_filled.increment(1);
                let took = self.session.device.filled(slot, key);
                took.into_iter().for_each(|took| self.metrics.load_time.record(took));
                self.scheduler.slot_ready(slot, key);
            }
            Event::Slot { slot, key, error: Some(error) } => {
                tracing::warn!(slot, adapter = ?key, "an adapter could not be loaded: {error}");
                self.metrics.slots_failed.increment(1);
                self.session.device.emptied(slot);
                for event in self.scheduler.slot_failed(slot, key) {
                    self.handle_scheduled(event);
                }
            }
        }
        Ok(())
    }

    /// Plans the next step with the results of one, and hands these out while it is on its way.
    async fn complete(&mut self, result: StepResult) -> Result<(), RankError> {
        let now = Instant::now();
        self.steps.answered(result.id, now)?;
        self.metrics.step_duration.record(result.duration);
        let refused: Vec<_> = result.refused.iter().map(|(sequence, _)| RequestId(*sequence)).collect();
        let sampled = result.tokens.iter();
        let sampled = sampled.map(|s| Sampled { id: RequestId(s.sequence), token: s.token.id });
        let sampled: Vec<_> = sampled.collect();
        let events = self.scheduler.complete(result.id, &sampled, &refused);
        self.want_masks(&events);
        self.send_steps()?;
        self.send_masks()?;
        for (sequence, reason) in result.refused {
            if let Some(in_flight) = self.forget(RequestId(sequence)) {
                in_flight.fail(Failure::Rejected(reason));
            }
        }
        for part in result.prompt {
            self.report_prompt(part);
        }
        for (sequence, values) in result.pooled {
            self.report_pooled(RequestId(sequence), values);
        }
        let mut tokens: Vec<_> = result.tokens.into_iter().map(|s| Some((s.token, s.top))).collect();
        let metrics = self.metrics.clone();
        let mut counted = metrics.tokens(now);
        for (handed_out, event) in events.into_iter().enumerate() {
            if handed_out % BETWEEN_YIELDS == 0 {
                yield_now().await;
            }
            match event {
                scheduler::Event::Token { id, index, finish, .. } => {
                    if let Some((token, top)) = tokens.get_mut(index).and_then(Option::take) {
                        self.handle_token(id, Update::Token { token, top, finish }, &mut counted);
                    }
                }
                event => self.handle_scheduled(event),
            }
        }
        Ok(())
    }

    /// Has the masks computed that the step in flight needs. Those of sequences that have ended are not needed any more.
    fn want_masks(&mut self, events: &[scheduler::Event]) {
        for event in events {
            match *event {
                scheduler::Event::Token { id, token, finish: None, .. } => self.masks.sampled(id, token),
                scheduler::Event::Token { id, .. }
                | scheduler::Event::Scored { id }
                | scheduler::Event::Failed { id, .. } => self.masks.end(id),
                scheduler::Event::Started { .. } => {}
            }
        }
    }

    fn report_pooled(&mut self, id: RequestId, values: Vec<f32>) {
        if values.iter().all(|x| x.is_finite()) {
            self.send(id, Update::Pooled(values));
        } else {
            self.end(id, Failure::Generation("the hidden states are not numbers".into()));
        }
    }

    fn report_prompt(&mut self, part: PromptPart) {
        let id = RequestId(part.sequence);
        let Some(in_flight) = self.in_flight.get_mut(&id) else { return };
        let known = in_flight.prompt_reported.saturating_sub(part.position) as usize;
        let new: Vec<PromptToken> = part.tokens.into_iter().skip(known).collect();
        in_flight.prompt_reported += new.len() as u32;
        if !new.is_empty() {
            self.send(id, Update::Prompt(new));
        }
    }

    fn handle_token(&mut self, id: RequestId, update: Update, counted: &mut StepTokens<'_>) {
        let Update::Token { token, finish, .. } = &update else { return };
        let (nan, finish) = (token.logprob.is_nan(), *finish);
        let Some(in_flight) = self.in_flight.get_mut(&id) else { return };
        counted.add(in_flight.last_token);
        if in_flight.first_token.is_none() {
            in_flight.first_token = Some(counted.now());
            self.metrics.first_token.record(in_flight.outcome.age(counted.now()));
        }
        in_flight.last_token = Some(counted.now());
        in_flight.generated += 1;
        if nan {
            // An adapter's finite weights can still be too large to compute with.
            return self.end(id, Failure::Generation("the logits are not numbers".into()));
        }
        self.send(id, update);
        if let Some(finish) = finish
            && let Some(in_flight) = self.forget(id)
        {
            in_flight
                .times()
                .into_iter()
                .for_each(|times| self.metrics.generated(times, in_flight.generated));
            in_flight.outcome.end(match finish {
                Finish::Length => End::Length,
                Finish::StopToken => End::EosToken,
            });
        }
    }

    /// Handles whatever is not a token.
    fn handle_scheduled(&mut self, event: scheduler::Event) {
        match event {
            scheduler::Event::Started { id, queued, cached_tokens } => {
                if let Some(in_flight) = self.in_flight.get_mut(&id) {
                    // The slots are pinned from here on.
                    in_flight.leases = None;
                    in_flight.planned += queued;
                    self.metrics.queue_duration.record(queued);
                    self.metrics.input_length.record(in_flight.prompt as f64);
                    self.metrics.prompt_tokens.increment(in_flight.prompt as u64);
                    self.metrics.cached_tokens.increment(u64::from(cached_tokens));
                }
                self.send(id, Update::Started { queued, cached_tokens });
            }
            scheduler::Event::Token { .. } => {}
            scheduler::Event::Scored { id } => {
                self.send(id, Update::Scored);
                if let Some(in_flight) = self.forget(id) {
                    in_flight.outcome.end(End::Length);
                }
            }
            scheduler::Event::Failed { id, reason } => {
                let failure = match reason {
                    FailReason::AdapterLoad(_) => Failure::Adapter(reason.to_string()),
                    FailReason::Refused { .. } => Failure::Rejected(reason.to_string()),
                    FailReason::NoResult { .. } => Failure::Generation(reason.to_string()),
                };
                if let Some(in_flight) = self.forget(id) {
                    in_flight.fail(failure);
                }
            }
        }
    }

    /// Passes an update on. A client that has gone is forgotten, and one that does not keep up is told so.
    fn send(&mut self, id: RequestId, update: Update) {
        let Some(in_flight) = self.in_flight.get(&id) else { return };
        if in_flight.updates.is_closed() {
            self.forget(id);
            self.scheduler.cancel(id);
        } else if in_flight.updates.capacity() <= 1 || in_flight.updates.try_send(update).is_err() {
            self.end(id, Failure::Generation("the client did not keep up".into()));
        }
    }

    /// Ends a job before its time. Rows of it that are in flight are computed for nothing.
    fn end(&mut self, id: RequestId, failure: Failure) {
        if let Some(in_flight) = self.forget(id) {
            in_flight.fail(failure);
        }
        self.scheduler.cancel(id);
    }

    /// Takes a job out of those in flight.
    fn forget(&mut self, id: RequestId) -> Option<InFlight> {
        self.masks.end(id);
        self.in_flight.remove(&id)
    }
}
