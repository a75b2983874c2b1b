//! The task that owns the exchange.

use std::{collections::HashMap, future::pending, sync::Arc};

use exchange::{Ask, AskId, Content, Exchange, Fault, Held, Input, Limits, Output, Staged, Version};
use scheduler::{Adapter, AdapterKey};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};

use super::{
    Asked, Inbox, News, Order, Payload, Ready,
    calls::{Answer, Calls},
    trace::Trace,
};
use crate::{metrics::AdapterMetrics, wire::stage as wire};

/// An input of the exchange, or something that leads to one.
enum Event {
    Order(Option<Order>),
    News,
    Answer(Answer),
    Timer,
}

/// Drives the exchange.
pub(super) struct Driver {
    exchange: Exchange<Payload>,
    /// Asks that have no answer yet.
    waiting: HashMap<AskId, oneshot::Sender<Result<Ready, Fault>>>,
    /// Pins, and who is told of their end.
    pins: HashMap<AskId, oneshot::Sender<Fault>>,
    calls: Calls,
    /// The present session, or the last one.
    session: u64,
    /// The tokens at which adapters in host memory begin to act, of those that do not act from the first row on.
    invocations: HashMap<Content, Arc<[u32]>>,
    metrics: Arc<AdapterMetrics>,
    trace: Option<Trace>,
    begun: Instant,
}

impl Driver {
    pub(super) fn new(
        limits: Limits,
        calls: Calls,
        metrics: Arc<AdapterMetrics>,
        trace: Option<Trace>,
        begun: Instant,
    ) -> Driver {
        Driver {
            exchange: Exchange::new(limits),
            waiting: HashMap::new(),
            pins: HashMap::new(),
            calls,
            session: 0,
            invocations: HashMap::new(),
            metrics,
            trace,
            begun,
        }
    }

    /// Runs until nobody can ask any more.
    pub(super) async fn run(mut self, mut orders: mpsc::Receiver<Order>, inbox: Arc<Inbox>) {
        for copy in self.calls.on_disk().await {
            let (content, versions) = (Content(copy.content), copy.versions.into_iter().map(Version));
            self.tell(Input::OnDisk { content, bytes: copy.bytes, versions: versions.collect() }).await;
        }
        loop {
            let due = self.exchange.next_timer();
            let due = async {
                match due {
                    Some(due) => sleep_until(self.begun + due).await,
                    None => pending().await,
                }
            };
            let event = tokio::select! {
                order = orders.recv() => Event::Order(order),
                () = inbox.added() => Event::News,
                answer = self.calls.next() => Event::Answer(answer),
                () = due => Event::Timer,
            };
            match event {
                Event::Order(None) => return,
                Event::Order(Some(Order::Ask(asked))) => {
                    if let Some(ask) = self.entered(asked) {
                        self.tell(Input::Ask(ask)).await;
                    }
                }
                Event::Order(Some(Order::AskTogether(asked))) => {
                    let asks = asked.into_iter().filter_map(|asked| self.entered(asked)).collect();
                    self.tell(Input::AskTogether(asks)).await;
                }
                Event::Order(Some(Order::Publish(done))) => {
                    self.metrics.publish(&self.exchange.stats());
                    // Whoever wanted it may have left.
                    let _ = done.send(());
                }
                Event::Order(Some(Order::Look(look))) => look(&self.exchange),
                Event::News => {
                    for news in inbox.take() {
                        self.news(news).await;
                    }
                }
                Event::Answer(answer) => self.answer(answer).await,
                Event::Timer => self.tell(Input::Tick).await,
            }
        }
    }

    /// Remembers who waits for an ask. `None`: nobody does any more, and the end of its lease may have been read before it
    /// came itself.
    fn entered(&mut self, asked: Asked) -> Option<Ask<Payload>> {
        if asked.answer.is_closed() {
            return None;
        }
        self.waiting.insert(asked.ask.id, asked.answer);
        self.pins.extend(asked.lost.map(|lost| (asked.ask.id, lost)));
        Some(asked.ask)
    }

    async fn news(&mut self, news: News) {
        let input = match news {
            News::Released(ask) => {
                self.waiting.remove(&ask);
                self.pins.remove(&ask);
                Input::Release(ask)
            }
            News::Slot(content, slot) => Input::Slot { content, slot },
            News::Attached { session, host } => {
                self.session = session;
                self.calls.attached(session);
                self.invocations.clear();
                let held = |(content, staged)| Held { content, staged: self.staged(content, staged) };
                Input::Attached { host: host.into_iter().map(held).collect() }
            }
            News::Detached => {
                self.calls.detached();
                Input::Detached
            }
            News::Reload(reference) => Input::Reload(reference),
            News::Evict(content) => Input::Evict(content),
        };
        self.tell(input).await;
    }

    async fn answer(&mut self, answer: Answer) {
        let input = match answer {
            Answer::LookedUp { call, result } => Input::LookedUp { call, result },
            Answer::Fetched { call, result } => Input::Fetched { call, result },
            Answer::Staged { call, content, result } => {
                Input::Staged { call, result: result.map(|staged| self.staged(content, staged)) }
            }
            Answer::Deleted(content) => Input::Deleted(content),
            Answer::Unstaged { content, session } if session == self.session => {
                self.invocations.remove(&content);
                Input::Unstaged(content)
            }
            // What was in host memory has been forgotten with the session.
            Answer::Unstaged { .. } => return,
        };
        self.tell(input).await;
    }

    /// Remembers of an adapter in host memory what the exchange need not know. Returns its sizes.
    fn staged(&mut self, content: Content, staged: wire::Staged) -> Staged {
        let wire::Staged { host_bytes, slot_bytes, invocation, .. } = staged;
        if !invocation.is_empty() {
            self.invocations.insert(content, invocation.into());
        }
        Staged { host_bytes, slot_bytes }
    }

    /// Tells the exchange, and does what it decides.
    async fn tell(&mut self, input: Input<Payload>) {
        let now = self.begun.elapsed();
        if let Some(trace) = &self.trace {
            trace.record(exchange::trace::input(&input, now)).await;
        }
        for output in self.exchange.handle(input, now) {
            if let Some(trace) = &self.trace {
                trace.record(exchange::trace::output(&output)).await;
            }
            self.follow(output);
        }
    }

    fn follow(&mut self, output: Output<Payload>) {
        match output {
            Output::Ready { ask, content, slot_bytes, .. } => {
                let adapter = Adapter { key: AdapterKey(content.0), bytes: slot_bytes };
                if let Some(answer) = self.waiting.remove(&ask) {
                    // If nobody waits any more, the end of the lease is on its way.
                    let invocation = self.invocations.get(&content).cloned();
                    let _ = answer.send(Ok(Ready { adapter, invocation, session: self.session }));
                }
            }
            // A lease that has ended with its session is no longer waited for: the engine fails its requests.
            Output::Failed { ask, fault } => {
                if let Some(lost) = self.pins.remove(&ask) {
                    // Whoever had it may have dropped it.
                    let _ = lost.send(fault.clone());
                }
                if let Some(answer) = self.waiting.remove(&ask) {
                    let _ = answer.send(Err(fault));
                }
            }
            call => self.calls.begin(call),
        }
    }
}
