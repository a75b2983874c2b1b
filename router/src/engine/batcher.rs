//! One session: what runs in it, and what is told to whom.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use config::RouterConfig;
use lifecycle::Pulse;
use scheduler::{CacheSalt, FailReason, Request, RequestId, Sampled, Scheduler, Tenant};
use tokio::{sync::mpsc, time::MissedTickBehavior};

use super::{
    PermitHold, Submit,
    serve::{Deadlines, Inbox},
};
use crate::{
    generation::{Failure, Job, PromptToken, Scored, Update},
    ranks::{Group, RankError},
    wire::{self, Event, PromptPart, StepResult},
};

/// Between two looks at the deadlines.
const TICK: Duration = Duration::from_millis(250);

/// A job that has been submitted and has not ended.
struct InFlight {
    updates: mpsc::Sender<Update>,
    /// Prompt positions that have been reported; they are computed again after a preemption.
    prompt_reported: u32,
    _hold: PermitHold,
}

impl InFlight {
    /// Tells the client that nothing follows. There is a place for it, unless the client has gone.
    fn fail(self, failure: Failure) {
        let _ = self.updates.try_send(Update::Failed(failure));
    }
}

/// Steps that have been sent and not answered.
struct Steps {
    sent: u64,
    answered: u64,
    /// When the oldest one became the oldest: a step waits for the one before it.
    since: Instant,
}

impl Steps {
    fn sent(&mut self, id: u64) {
        if self.sent == self.answered {
            self.since = Instant::now();
        }
        self.sent = id;
    }

    /// Takes the answer of the oldest step, and no other.
    fn answered(&mut self, id: u64) -> Result<(), RankError> {
        let expected = self.answered + 1;
        if id != expected || id > self.sent {
            return Err(RankError::UnexpectedStep { actual: id, expected });
        }
        self.answered = id;
        self.since = Instant::now();
        Ok(())
    }

    fn check(&self, limit: Duration) -> Result<(), RankError> {
        if self.sent > self.answered && self.since.elapsed() > limit {
            return Err(RankError::LateStep { step: self.answered + 1, limit });
        }
        Ok(())
    }
}

/// What the engine waits for.
enum Input {
    Submit(Option<Submit>),
    Cancel,
    Event(Event),
    Tick,
}

/// The scheduler and the jobs of one session.
pub(super) struct Batcher {
    scheduler: Scheduler<Arc<Job>>,
    in_flight: HashMap<RequestId, InFlight>,
    group: Group,
    steps: Steps,
    /// Slots to empty with the next step, whose content is not of this session's scheduler.
    stale: Vec<u32>,
    deadlines: Deadlines,
    begun: Instant,
}

impl Batcher {
    pub(super) fn new(group: Group, config: &RouterConfig, deadlines: Deadlines) -> Batcher {
        let begun = Instant::now();
        Batcher {
            scheduler: Scheduler::new(group.info.limits(config), &group.resident.slots),
            in_flight: HashMap::new(),
            stale: group.resident.stale.clone(),
            group,
            steps: Steps { sent: 0, answered: 0, since: begun },
            deadlines,
            begun,
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Runs until nobody can send a job any more, or until the session fails. Work between two waits is `pulse`'s.
    pub(super) async fn run(&mut self, inbox: &mut Inbox, pulse: &Pulse) -> Result<(), RankError> {
        let mut tick = tokio::time::interval(TICK.min(self.deadlines.step / 4));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            pulse.busy();
            self.handle_cancels(inbox);
            self.send_steps()?;
            pulse.idle();
            let input = tokio::select! {
                submit = inbox.submits.recv() => Input::Submit(submit),
                () = inbox.cancels.added.notified() => Input::Cancel,
                event = self.group.next() => Input::Event(event?),
                _ = tick.tick() => Input::Tick,
            };
            pulse.busy();
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
                Input::Event(event) => self.handle_event(event)?,
                Input::Tick => {
                    self.steps.check(self.deadlines.step)?;
                    self.group.check_loads(self.deadlines.load)?;
                }
            }
        }
    }

    /// Fails whatever has not ended: the session is over.
    pub(super) fn fail_all(self) {
        self.in_flight.into_values().for_each(|in_flight| in_flight.fail(Failure::Unavailable));
    }

    fn send_steps(&mut self) -> Result<(), RankError> {
        while let Some(mut plan) = self.scheduler.next_step(self.now()) {
            plan.unload.append(&mut self.stale);
            let id = plan.id;
            self.group.send(wire::step(plan))?;
            self.steps.sent(id);
        }
        Ok(())
    }

    fn handle_cancels(&mut self, inbox: &Inbox) {
        for id in inbox.cancels.take() {
            if self.in_flight.remove(&id).is_some() {
                self.scheduler.cancel(id);
            }
        }
    }

    fn handle_submit(&mut self, submit: Submit) {
        let Submit { id, job, updates, hold } = submit;
        // Its cancellation may have been taken before it came itself.
        if updates.is_closed() {
            return;
        }
        let request = Request {
            id,
            tenant: Tenant { id: 0, weight: 1 },
            adapter: job.adapter,
            salt: CacheSalt::default(),
            prompt: job.prompt.as_slice().into(),
            max_new_tokens: job.max_new_tokens,
            stop_ids: job.stop_ids.clone(),
            prompt_logprobs: job.prompt_logprobs,
            payload: Arc::from(job),
        };
        match self.scheduler.submit(request, self.now()) {
            Ok(()) => {
                self.in_flight.insert(id, InFlight { updates, prompt_reported: 1, _hold: hold });
            }
            Err(error) => {
                let _ = updates.try_send(Update::Failed(Failure::Refused(error)));
            }
        }
    }

    fn handle_event(&mut self, event: Event) -> Result<(), RankError> {
        match event {
            Event::Step(result) => self.complete(result)?,
            Event::Slot { slot, key, error: None } => self.scheduler.slot_ready(slot, key),
            Event::Slot { slot, key, error: Some(error) } => {
                tracing::warn!(slot, adapter = ?key, "an adapter could not be loaded: {error}");
                for event in self.scheduler.slot_failed(slot, key) {
                    self.handle_scheduled(event, &mut []);
                }
            }
        }
        Ok(())
    }

    fn complete(&mut self, result: StepResult) -> Result<(), RankError> {
        self.steps.answered(result.id)?;
        tracing::trace!(step = result.id, duration = ?result.duration, "ran");
        let refused: Vec<_> = result.refused.iter().map(|(sequence, _)| RequestId(*sequence)).collect();
        for (sequence, reason) in result.refused {
            if let Some(in_flight) = self.in_flight.remove(&RequestId(sequence)) {
                in_flight.fail(Failure::Rejected(reason));
            }
        }
        for part in result.prompt {
            self.report_prompt(part);
        }
        let sampled = result.tokens.iter();
        let sampled = sampled.map(|s| Sampled { id: RequestId(s.sequence), token: s.token.id });
        let sampled: Vec<_> = sampled.collect();
        let mut tokens: Vec<_> = result.tokens.into_iter().map(|s| Some((s.token, s.top))).collect();
        for event in self.scheduler.complete(result.id, &sampled, &refused) {
            self.handle_scheduled(event, &mut tokens);
        }
        Ok(())
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

    fn handle_scheduled(&mut self, event: scheduler::Event, tokens: &mut [Option<(Scored, Vec<Scored>)>]) {
        match event {
            scheduler::Event::Started { id, queued, .. } => {
                self.send(id, Update::Started { queued });
            }
            scheduler::Event::Token { id, index, finish, .. } => {
                let Some((token, top)) = tokens.get_mut(index).and_then(Option::take) else { return };
                if token.logprob.is_nan() {
                    // An adapter's finite weights can still be too large to compute with.
                    return self.end(id, Failure::Generation("the logits are not numbers".into()));
                }
                self.send(id, Update::Token { token, top, finish });
                if finish.is_some() {
                    self.in_flight.remove(&id);
                }
            }
            scheduler::Event::Scored { id } => {
                self.send(id, Update::Scored);
                self.in_flight.remove(&id);
            }
            scheduler::Event::Failed { id, reason } => {
                let failure = match reason {
                    FailReason::AdapterLoad(_) => Failure::Adapter(reason.to_string()),
                    FailReason::Refused { .. } => Failure::Rejected(reason.to_string()),
                    FailReason::NoResult { .. } => Failure::Generation(reason.to_string()),
                };
                if let Some(in_flight) = self.in_flight.remove(&id) {
                    in_flight.fail(failure);
                }
            }
        }
    }

    /// Passes an update on. A client that has gone or does not keep up is cancelled.
    fn send(&mut self, id: RequestId, update: Update) {
        let Some(in_flight) = self.in_flight.get(&id) else { return };
        if in_flight.updates.capacity() > 1 && in_flight.updates.try_send(update).is_ok() {
            return;
        }
        self.end(id, Failure::Generation("the client did not keep up".into()));
    }

    /// Ends a job before its time. Rows of it that are in flight are computed for nothing.
    fn end(&mut self, id: RequestId, failure: Failure) {
        if let Some(in_flight) = self.in_flight.remove(&id) {
            in_flight.fail(failure);
        }
        self.scheduler.cancel(id);
    }
}
